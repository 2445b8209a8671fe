"""Pictures of a search: what they show, and that nothing a trace holds can break them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from graphopt.pipeline import PassRecord
from graphopt.report.allocation import Pictures, pictures
from graphopt.report.svg import alone

FACTS: dict[str, Any] = {
    "levels": {"a.weight": "int4", "b<script>.weight": "float"},
    "losses": {"a.weight": {"float": 0.0, "int8": 1e-7, "int4": 1e-5}, "b<script>.weight": {"int4": 1e-3}},
    "bits": {"a.weight": 4.5, "b<script>.weight": 32.0},
    "front": [{"cost": 10.0, "loss": 1e-4, "origin": "seed & co"}, {"cost": 20.0, "loss": 1e-5, "origin": "evolution"}],
    "loss": 1e-5,
    "resource": "bits",
    "correlations": {"fisher": {"rank": 0.9123, "logarithm": float("nan")}},
}


def drawn(**facts: Any) -> Pictures | None:
    record = PassRecord(3, "allocate", "allocate", "", "")
    record.facts = FACTS | facts
    return pictures(record)


def test_what_was_chosen_is_filled() -> None:
    found = drawn()
    assert found is not None and found.left_out == 0
    for picture in (found.front, found.losses, found.bits):
        assert picture is not None
        ElementTree.fromstring(alone(picture))  # well formed
        assert "<script>" not in picture
    assert found.front is not None and found.losses is not None and found.bits is not None
    assert found.front.count('class="mark"') == 1 and "seed &amp; co: loss 0.0001 at 10" in found.front
    # A loss of 0 has no place on the axis.
    assert found.losses.count('class="mark"') == 1 and found.losses.count('class="open"') == 2
    assert "a.weight at int4 alone loses 1e-05" in found.losses
    assert "4.50" in found.bits
    assert found.trust == {"fisher": ("0.912", "unknown")}


@pytest.mark.parametrize(
    "facts",
    [
        {"front": None, "losses": None, "bits": None},
        {"front": "x", "losses": [1], "bits": "y"},
        {"front": [1, {"cost": "a", "loss": 1}, {"cost": float("nan"), "loss": float("inf")}]},
        {"losses": {"a.weight": {"int4": float("nan"), "int8": -1.0, "x": True}}, "bits": {"a.weight": None}},
        {"front": [{"cost": 1.0, "loss": 1e-5}] * 3, "loss": None, "resource": {"x": 1}},
        {"losses": {"a.weight": {"int4": 1e-5}}},
        {"correlations": [1]},
        {"correlations": {"fisher": 0.5, "<b>": {"rank": "x"}}},
    ],
)
def test_odd_facts_are_left_out(facts: dict[str, Any]) -> None:
    found = drawn(**facts)
    assert found is not None
    for picture in (found.front, found.losses, found.bits):
        if picture is not None:
            ElementTree.fromstring(alone(picture))


def test_other_passes_have_none_and_many_units_are_told() -> None:
    assert drawn(levels=None) is None and drawn(levels={}) is None
    many = {f"layer{at}.weight": "int4" for at in range(300)}
    found = drawn(levels=many, losses={name: {"int4": 1e-3} for name in many}, bits={})
    assert found is not None and found.left_out == 100 and found.bits is None
    assert found.losses is not None and "layer199.weight" in found.losses and "layer200.weight" not in found.losses
