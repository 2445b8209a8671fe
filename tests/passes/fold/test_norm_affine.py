"""fold_norm_affine: gains and biases of norms into whatever reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Example, Function, apply, before, four_tests, operators
from torch import Tensor, nn
from torch.nn import functional

from graphopt.ir import arguments, operator
from graphopt.passes import FoldNormAffine

PASS = FoldNormAffine()


class Two(nn.Module):
    """A norm with two readers; one writes a residual."""

    def __init__(self, norm: nn.Module, returned: bool = False) -> None:
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Linear(8, 6), nn.Linear(8, 6, bias=False)
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        z = self.a(y).tanh() * self.b(y[:, 1:2])
        return (z, y) if self.returned else z


class Tied(nn.Module):
    """Embedding, a block, a norm and the same table as the head."""

    def __init__(self, gelu: bool = False) -> None:
        super().__init__()
        self.table, self.up, self.norm = nn.Embedding(11, 8), nn.Linear(8, 8), nn.RMSNorm(8)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        y = self.table(x)
        y = y + self.up(y)
        if self.gelu:
            y = functional.gelu(y)
        return functional.linear(self.norm(y), self.table.weight)


class Experts(nn.Module):
    """A stack of matrices, of which an index picks some."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(8), nn.Parameter(torch.randn(3, 8, 5))
        self.register_buffer("order", torch.tensor([2, 0]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.bmm(y.expand(2, -1, -1), self.weight[self.order])


class Shared(nn.Module):
    """One norm module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.norm(x + self.a(self.norm(x))))
        return y


class Sum(nn.Module):
    """Two norms, read as their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.RMSNorm(8), nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.one(x) + self.two(x * x))
        return y


class Padded(nn.Module):
    """A convolution that pads a norm's output with zeros: a gain passes, a bias does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(8), nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.norm(x).mT)
        return y


def _tokens() -> tuple[Tensor, ...]:
    return (torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1)),)


def _zeroed(module: Any) -> None:
    module.norm.weight[2] = 0


def _negative(module: Any) -> None:
    module.norm.weight[1:4] *= -1


EXAMPLES = [
    Example("layer_norm_two_readers", lambda: Two(nn.LayerNorm(8)), (2, 3, 8), fires=1),
    Example(
        "rms_norm",
        lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 6)),
        (2, 8),
        fires=1,
        golden="""
        rms_norm_1 = rms_norm(input_1, [8])
        linear = linear(rms_norm_1, @1.weight, @1.bias)
        return linear
        """,
    ),
    Example("negative_gain", lambda: Two(nn.LayerNorm(8)), (2, 3, 8), fires=1, prepare=_negative),
    Example("zero_gain", lambda: Two(nn.LayerNorm(8)), (2, 3, 8), fires=1, prepare=_zeroed),
    Example("tied_head", Tied, _tokens, fires=2, batch=False),
    Example("experts", Experts, (1, 3, 8), fires=1, batch=False),
    Example("experts_zero_gain", Experts, (1, 3, 8), declines="is 0", batch=False, prepare=_zeroed),
    Example("shared_norm", Shared, (2, 8), fires=2),
    Example("padded", Padded, (2, 7, 8), fires=1),
    Example("through_relu", lambda: nn.Sequential(nn.RMSNorm(8), nn.ReLU(), nn.Linear(8, 6)), (2, 8), fires=1),
    Example("returned", lambda: Two(nn.LayerNorm(8), returned=True), (2, 3, 8), declines="where the model returns it"),
    Example("two_norms_summed", Sum, (2, 8), declines="also reads rms_norm_1, which has a gain of its own"),
    Example(
        "negative_gain_before_relu",
        lambda: nn.Sequential(nn.RMSNorm(8), nn.ReLU(), nn.Linear(8, 6)),
        (2, 8),
        declines="relu",
        prepare=lambda module: module[0].weight.neg_(),
    ),
    Example("gelu", lambda: nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6)), (2, 8), declines="gelu"),
    Example(
        "several_axes", lambda: nn.Sequential(nn.LayerNorm([3, 8]), nn.Linear(8, 6)), (2, 3, 8), declines="several axes"
    ),
    Example(
        "computed_gain",
        lambda: Function(lambda x, w, v: functional.rms_norm(x, (8,), x[0]) @ v, w=torch.ones(8), v=torch.randn(8, 3)),
        (2, 8),
        declines="not a weight",
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(PASS, EXAMPLES)


def _example(name: str) -> Example:
    return next(example for example in EXAMPLES if example.name == name)


def test_norms_are_bare_and_biases_are_where_all_readers_take_them() -> None:
    after, _ = apply(PASS, before(_example("layer_norm_two_readers"), PASS))
    norms = [node for node in after.nodes if operator(node) == "layer_norm"]
    assert [arguments(node).get("weight") for node in norms] == [None]
    assert "add" not in operators(after)
    assert sorted(after.weights) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    after, _ = apply(PASS, before(_example("experts"), PASS))
    assert "add" in operators(after)


def test_a_tied_table_is_copied_once_and_what_that_costs_is_said() -> None:
    _, changes = apply(PASS, before(_example("tied_head"), PASS))
    assert changes.facts["untied_bytes"] == {"table.weight": 11 * 8 * 4}
    after, changes = apply(FoldNormAffine(untie=False), before(_example("tied_head"), PASS))
    assert not changes.changed
    assert len(after.weights) == 4


def test_a_table_is_not_copied_for_nothing() -> None:
    """Where the norm could not be rotated nor centered afterwards, the copy would only cost."""
    example = Example("gelu_before", lambda: Tied(gelu=True), _tokens, batch=False)
    _, changes = apply(PASS, before(example, PASS))
    assert "untied_bytes" not in changes.facts
    assert [site.node for site in changes.skipped] == ["rms_norm"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 2)).to(dtype)

    def large(module: Any) -> None:
        module[0].weight.fill_(3e4)
        module[1].weight.fill_(9.0)

    example = Example("half", build, lambda: (torch.randn(2, 4).to(dtype),), batch=False, prepare=large)
    after, changes = apply(PASS, before(example, PASS))
    if dtype is torch.float16:
        assert "would overflow torch.float16" in changes.skipped[0].reason
    assert all(bool(weight.isfinite().all()) for weight in after.weights.values())
