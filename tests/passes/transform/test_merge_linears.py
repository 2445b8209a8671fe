"""merge_linears: linears that read the same value become one."""

from __future__ import annotations

import torch
from harness import Example, apply, before, four_tests
from torch import Tensor, nn
from torch.nn import functional

from graphopt.passes import MergeLinears

PASS = MergeLinears()


class Several(nn.Module):
    """Linears of one input: two with a bias, two without, one of another input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(4, 2, bias=False)
        self.d, self.e = nn.Linear(4, 2, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).sum(-1) + self.b(x).tanh().sum(-1) + (self.c(x) * self.d(x).relu()).sum(-1)
        return y * self.e(x + 1).sum(-1)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two linears share a weight; `computed`: one weight is computed."""

    def __init__(self, computed: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.computed = nn.Linear(4, 3), nn.Linear(4, 3), computed

    def forward(self, x: Tensor) -> Tensor:
        if self.computed:
            return functional.linear(x, self.a.weight * x.mean()).tanh() + self.b(x)
        return self.a(x).tanh() * functional.linear(x * 2, self.a.weight) + self.b(x).relu()


EXAMPLES = [
    Example("several", Several, (2, 4), fires=4),
    Example("tied", Tied, (2, 4), declines="a.weight is also read by linear"),
    Example("computed", lambda: Tied(computed=True), (2, 4), declines="is computed by mul, not a weight"),
    Example("returned", lambda: Both(), (2, 4), declines="memory layout"),
    Example("alone", lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), (2, 4), fires=0),
    Example(
        "golden",
        lambda: Summed(),
        (2, 4),
        fires=2,
        golden="""
        linear_2 = linear(x, @a.merged.weight, @a.merged.bias)
        split_with_sizes = split_with_sizes(linear_2, [3, 3], dim=-1)
        getitem = getitem(split_with_sizes, 0)
        getitem_1 = getitem(split_with_sizes, 1)
        relu = relu(getitem_1)
        mul = mul(getitem, relu)
        return mul
        """,
    ),
]


class Both(nn.Module):
    """Returns what its linears write."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x).relu()  # type: ignore[no-any-return]


test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(PASS, EXAMPLES)


def test_rows_lie_one_after_the_other() -> None:
    program = before(EXAMPLES[0], PASS)
    after, _ = apply(PASS, program)
    merged = after.weights["a.merged.weight"]
    assert torch.equal(merged, torch.cat([program.weights["a.weight"], program.weights["b.weight"]]))
    assert set(after.weights) == {"a.merged.weight", "a.merged.bias", "c.merged.weight", "e.weight", "e.bias"}
