"""permute: orders of coordinates, by range and for N:M sparsity."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import Example, apply, before, check_means_the_same, four_tests
from small_decoder import Decoder, example_ids
from torch import Tensor, nn

from graphopt.errors import GraphoptError
from graphopt.passes import Permute

PASS = Permute(group_size=4)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 3))


def _mixed(module: nn.Sequential) -> None:
    """Large and small columns side by side."""
    module[2].weight.mul_(torch.tensor([1.0, 8, 1, 8, 1, 8, 1, 8, 1, 8, 1, 8]))


def _sorted(module: nn.Sequential) -> None:
    module[2].weight.copy_(torch.linspace(3, 1, 12).expand(3, 12))


MLP = Example("mlp", _mlp, (2, 5), fires=1, prepare=_mixed)
EXAMPLES = [
    MLP,
    Example("decoder", Decoder, example_ids),
    Example("conv", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)), (2, 3, 8, 8), fires=1),
    Example(
        "grouped", lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)), (2, 4, 6, 6)
    ),
    Example("in_order", _mlp, (2, 5), declines="is in a good order", prepare=_sorted),
    Example("input", lambda: nn.Sequential(nn.Linear(12, 3)), (2, 12), declines="has a fixed order"),
    Example("nothing", lambda: nn.Sequential(nn.ReLU()), (2, 5), fires=0),
]
test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(PASS, EXAMPLES)


def _best_sum_of_ranges(ranges: Tensor, size: int) -> float:
    """Try every way to cut the coordinates into groups."""
    best = float("inf")
    for order in itertools.permutations(range(len(ranges))):
        best = min(best, sum(float(ranges[list(order[i : i + size])].max()) * size for i in range(0, len(order), size)))
    return best


def test_the_order_by_range_is_the_best_there_is() -> None:
    example = Example("small", lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), (2, 5))
    pass_ = Permute(group_size=2)
    program = before(example, pass_)
    after, _ = apply(pass_, program)
    best = _best_sum_of_ranges(program.weights["2.weight"].detach().abs().amax(0), 2)
    found = sum(float(group.max()) * 2 for group in after.weights["2.weight"].abs().amax(0).split(2))
    assert found == pytest.approx(best, rel=1e-6)


def _kept(weight: Tensor) -> float:
    return float(weight.abs().unflatten(1, (-1, 4)).topk(2, -1).values.sum())


def test_sparsity_keeps_more_and_never_less() -> None:
    """Columns in fours of a kind: the worst order for 2:4, and one that a search easily betters."""

    def clumped(module: nn.Sequential) -> None:
        _mixed(module)
        module[2].weight.copy_(module[2].weight[:, torch.arange(12).reshape(-1, 2).T.flatten()])

    pass_ = Permute(by="nm")
    example = Example("clumped", _mlp, (2, 5), prepare=clumped)
    program = before(example, pass_)
    after, changes = apply(pass_, program)
    old, new = (_kept(each.weights["2.weight"]) for each in (program, after))
    assert new > old * 1.05
    was, now = changes.facts["figures"]["0.out"]
    total = float(program.weights["2.weight"].abs().sum())
    assert (was, now) == pytest.approx((old / total, new / total), rel=1e-5)
    check_means_the_same(pass_, example)
    again, _ = apply(pass_, after)
    assert _kept(again.weights["2.weight"]) >= new * (1 - 1e-6)


def test_sparsity_of_a_few_channels_finds_the_best_order() -> None:
    example = Example("eight", lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (2, 3))
    pass_ = Permute(by="nm")
    program = before(example, pass_)
    after, _ = apply(pass_, program)
    weight = program.weights["2.weight"]
    ways = (c for c in itertools.combinations(range(8), 4) if 0 in c)
    best = max(_kept(weight[:, [*first, *(i for i in range(8) if i not in first)]]) for first in ways)
    assert _kept(after.weights["2.weight"]) == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("pass_", [Permute(by="nm"), Permute(by="nm", n=1, m=3), Permute(group_size=1)], ids=str)
def test_every_option_means_the_same(pass_: Permute) -> None:
    check_means_the_same(pass_, Example("decoder", Decoder, example_ids))


def test_heads_are_ordered_each_by_itself() -> None:
    """The values of each key head have an order of their own."""
    _, changes = apply(PASS, before(Example("decoder", Decoder, example_ids), PASS))
    assert any("v.out[1]" in site.reason for site in [*changes.touched, *changes.skipped])


def test_n_of_m_must_leave_something_out() -> None:
    with pytest.raises(GraphoptError, match=r"permute\.n=4 of m=4 keeps everything"):
        apply(Permute(by="nm", n=4), before(MLP, PASS))
