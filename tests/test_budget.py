"""Budgets: what is accepted, and the sentences about what does not hold."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from graphopt import Budget, GraphoptError


def test_bounds_are_what_was_given() -> None:
    assert Budget().bounds() == {}
    assert Budget(metric_drop=0.5, average_bits=4).bounds() == {"metric_drop": 0.5, "average_bits": 4.0}
    assert Budget(size_ratio=np.float32(0.5)).bounds() == {"size_ratio": 0.5}  # type: ignore[arg-type]
    assert Budget(size_ratio=Fraction(1, 4)) == Budget(size_ratio=0.25)  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", [-1, float("nan"), float("inf"), True, "0.5", [1], 1j])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Budget)])
def test_what_is_no_bound(name: str, bound: Any) -> None:
    with pytest.raises(GraphoptError, match=f"budget.{name} must be a number, finite and not negative, not "):
        Budget(**{name: bound})


def test_one_more_bound() -> None:
    budget = Budget(size_ratio=0.5).with_bound("latency_ratio", 1)
    assert budget == Budget(size_ratio=0.5, latency_ratio=1.0)
    with pytest.raises(GraphoptError, match="a budget has no field 'size_ration', did you mean 'size_ratio'"):
        budget.with_bound("size_ration", 1)


@pytest.mark.parametrize(
    ("measured", "sentences"),
    [
        ({"size_ratio": 0.5}, []),
        ({"size_ratio": 0.25}, []),
        ({"size_ratio": 0.50004}, ["budget.size_ratio ≤ 0.5 does not hold: it is 0.5"]),
        ({"size_ratio": 0.75}, ["budget.size_ratio ≤ 0.5 does not hold: it is 0.75"]),
        ({"size_ratio": float("nan")}, ["budget.size_ratio ≤ 0.5 does not hold: it is nan"]),
        ({"size_ratio": None}, ["budget.size_ratio ≤ 0.5 was not measured"]),
        ({}, ["budget.size_ratio ≤ 0.5 was not measured"]),
    ],
)
def test_what_is_exceeded(measured: dict[str, float | None], sentences: list[str]) -> None:
    assert Budget(size_ratio=0.5).exceeded(measured) == sentences


def test_bounds_that_were_not_given_are_free() -> None:
    assert Budget().exceeded({"size_ratio": 100.0}) == []
    assert len(Budget(0.1, 0.1, 0.1, 0.1, 0.1, 0.1).exceeded({"macs_ratio": 0.05})) == 5
