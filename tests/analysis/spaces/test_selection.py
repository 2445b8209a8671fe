"""What is left of axes: counted by hand on axes that are products and sums, and refused where it makes no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.analysis.spaces import Analysis, Selection, Space, analyze


class Heads(nn.Module):
    """Two heads of three, fused values and gate: the axis of `both` is [2 x 3] + 4."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(5, 10), nn.Linear(6, 5)
        self.rest = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        heads, rest = self.both(x).split([6, 4], -1)
        heads = heads.unflatten(-1, (2, 3)).transpose(0, 1).flatten(2).unflatten(-1, (3,)).transpose(0, 1)
        out: Tensor = self.out(heads.flatten(-2)) + self.rest(functional.silu(rest))
        return out


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze(graphopt.capture(Heads().eval(), (torch.randn(4, 5),)))


def _named(analysis: Analysis, size: int) -> Space:
    return next(space for space in analysis.under("permutation") if space.size == size and space.free)


def _axes(analysis: Analysis, weight: str) -> Any:
    return analysis.axes(next(node for node in analysis.program.graph.nodes if node.target == weight))


def test_another_set_in_every_fibre(analysis: Analysis) -> None:
    space = _named(analysis, 3)
    assert space.fibres == (2,)
    selection = Selection({space: torch.tensor([[0, 2], [1, 2]])})
    weight, bias = torch.arange(50.0).view(10, 5), torch.arange(10.0)
    axes = _axes(analysis, "both.weight")
    assert selection.touches(axes[0]) and not selection.touches(axes[1])
    assert selection.size(axes[0]) == (8, ())
    left = [0, 2, 4, 5, 6, 7, 8, 9]
    assert selection.take(_axes(analysis, "both.bias"), bias).tolist() == left
    assert torch.equal(selection.take(axes, weight), weight[left])
    out = torch.arange(30.0).view(5, 6)
    assert torch.equal(selection.take(_axes(analysis, "out.weight"), out), out[:, [0, 2, 4, 5]])


def test_fibres_and_what_stands_in_them_at_once(analysis: Analysis) -> None:
    kept = {_named(analysis, 3): torch.tensor([[0, 2], [1, 2]]), _named(analysis, 2): torch.tensor([1])}
    assert Selection(kept).take(_axes(analysis, "both.bias"), torch.arange(10)).tolist() == [4, 5, 6, 7, 8, 9]


def test_one_set_for_all_fibres_in_any_order(analysis: Analysis) -> None:
    selection = Selection({_named(analysis, 3): torch.tensor([2, 0])})
    assert selection.take(_axes(analysis, "both.bias"), torch.arange(10)).tolist() == [0, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "nothing would be left"),
        ([0, 0], "different indices from 0 to 2"),
        ([0, 3], "different indices from 0 to 2"),
        ([-1, 0], "different indices from 0 to 2"),
        ([[0, 1]], "has fibres"),
    ],
)
def test_refuses_what_is_no_choice(analysis: Analysis, indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection({_named(analysis, 3): torch.tensor(indices)})


def test_refuses_spaces_that_cannot_lose_anything(analysis: Analysis) -> None:
    pinned = next(space for space in analysis.under("permutation") if space.pins)
    with pytest.raises(ValueError, match="nothing can be deleted of"):
        Selection({pinned: torch.tensor([0])})
    scaled = next(space for space in analysis.under("diagonal") if space.free)
    with pytest.raises(ValueError, match="space of diagonal"):
        Selection({scaled: torch.tensor([0])})


def test_a_softmax_counts(analysis: Analysis) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 4)).eval()
    found = analyze(graphopt.capture(model, (torch.randn(3, 4),)))
    space = next(space for space in found.under("permutation") if space.size == 6)
    assert space.free and "takes the softmax over it" in str(space.counted[0])
    with pytest.raises(ValueError, match="takes the softmax"):
        Selection({space: torch.arange(3)})
