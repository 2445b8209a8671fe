"""Collecting statistics: right values at right nodes, constant memory, data that does not run."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from graphopt.calibration import Batches, collect
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.progress import Silent


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Net().eval(), (torch.randn(4, 3),))


def calls(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes if node.op in ("call_function", "placeholder")]


def test_every_value_is_seen_once(program: Program) -> None:
    data = [torch.randn(4, 3) for _ in range(6)]
    found = collect(program, calls(program), Batches(data, program), Silent())
    x, linear, relu = (found[node] for node in calls(program))
    every = torch.cat(data)
    assert (x.low, x.high) == (every.min().item(), every.max().item())
    out = program.flat_example[0].new_zeros(4, 5)
    assert x.counts.sum() == every.numel() == 72 and linear.counts.sum() == relu.counts.sum() == 6 * out.numel()
    assert relu.low == 0.0 and relu.high == linear.high > 0 > linear.low


def test_memory_does_not_grow_with_batches(program: Program) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def generate(count: int) -> Iterator[Tensor]:
        nonlocal most
        for _ in range(count):
            x = torch.randn(4, 3)
            alive.append(weakref.ref(x))
            yield x
            del x
            most = max(most, sum(ref() is not None for ref in alive))

    def peak(count: int) -> int:
        tracemalloc.start()
        collect(program, calls(program), Batches(generate(count), program), Silent())
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)
    short, long = peak(3), peak(15)
    assert most <= 2
    assert long < short + 50_000  # the twelve batches more would have made as many histograms of 16 kB


def test_data_that_does_not_run_is_the_users_mistake() -> None:
    embedding = capture(nn.Embedding(5, 2).eval(), (torch.tensor([1, 2]),))
    with pytest.raises(
        GraphoptError, match=r"the model does not run on calibration batch 1 \(IndexError: index out"
    ) as caught:
        collect(embedding, calls(embedding), Batches([torch.tensor([0, 4]), torch.tensor([0, 5])], embedding), Silent())
    assert "\n" not in str(caught.value)


def test_nothing_to_collect_from(program: Program) -> None:
    with pytest.raises(GraphoptError, match="the calibration data is empty"):
        collect(program, calls(program), Batches([], program), Silent())


def test_overflow_inside_the_model_is_named() -> None:
    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.exp(x))

    exp = capture(Overflow().eval(), (torch.zeros(2),))
    with pytest.raises(GraphoptError, match="calibration met NaN or infinity at exp"):
        collect(exp, calls(exp), Batches([torch.full((2,), 1000.0)], exp), Silent())


def test_integers_and_tuples_pass_by(program: Program) -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            values, places = torch.sort(x)
            return values, places

    sorts = capture(Sorts().eval(), (torch.randn(9),))
    found = collect(sorts, calls(sorts), Batches([torch.arange(9.0)], sorts), Silent())
    assert [(found[node].low, found[node].high) for node in calls(sorts) if not found[node].empty] == [(0.0, 8.0)] * 3
    assert all(np.isfinite(each.counts).all() for each in found.values())
