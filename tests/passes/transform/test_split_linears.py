"""split_linears: one linear for each part of a fused output."""

from __future__ import annotations

import pytest
import torch
from harness import Example, apply, before, check_means_the_same, four_tests, operators
from torch import Tensor, nn
from torch.nn import functional

from graphopt.passes import MergeLinears, SplitLinears

PASS = SplitLinears(always=True)


class Fused(nn.Module):
    """Queries, keys and values of 2 heads of 3 out of one linear, taken apart in one of many ways.

    x: [batch, length, 4]; `how`: split, chunk, slice, unbind ([3, heads, dim]) or select ([heads, 3, dim]).
    """

    def __init__(self, how: str, bias: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.how = nn.Linear(4, 18, bias), nn.Linear(6, 4), how

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        batch, length, _ = y.shape
        match self.how:
            case "split":
                flat = y.split([6, 6, 6], -1)
            case "chunk":
                flat = y.chunk(3, -1)
            case "slice":
                flat = y[..., :6], y[..., 6:12], y[..., 12:]
            case "unbind":
                return y.view(batch, length, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
            case _:
                heads = y.view(batch, length, 2, 3, 3)
                return tuple(heads[..., i, :].transpose(1, 2) for i in range(3))
        return tuple(each.view(batch, length, 2, 3).transpose(1, 2) for each in flat)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        y = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Gated(nn.Module):
    """Gate and up in one linear. `glu`: by torch's operator."""

    def __init__(self, glu: bool = False) -> None:
        super().__init__()
        self.both, self.down, self.glu = nn.Linear(4, 10), nn.Linear(5, 4), glu

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        if self.glu:
            return self.down(functional.glu(y, -1))  # type: ignore[no-any-return]
        gate, up = y.chunk(2, -1)
        return self.down(functional.silu(gate) * up)  # type: ignore[no-any-return]


class Odd(nn.Module):
    """A linear whose output goes other ways too."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(4, 6), way

    def forward(self, x: Tensor) -> object:
        y = self.layer(x)
        match self.way:
            case "whole":
                return y[..., :3] * 2, y.relu()
            case "returned":
                return y, y[..., :3] * 2
            case "twice":
                return y[..., :4] * 2, y[..., 2:] * 3
            case "again":
                return torch.cat((-y[..., 3:], y[..., :3]), -1) * 2
            case _:  # tied
                z = functional.linear(x[..., :4] * 2, self.layer.weight)
                return y[..., :3] * 2, y[..., 3:] * 3, z.relu()


SHAPE = (2, 5, 4)
WAYS = ("split", "chunk", "slice", "unbind", "select")
EXAMPLES = [
    *(Example(how, lambda how=how: Fused(how), SHAPE, fires=1) for how in WAYS),
    Example("no_bias", lambda: Fused("split", bias=False), SHAPE, fires=1),
    Example("gated", Gated, SHAPE, fires=1),
    Example("glu", lambda: Gated(glu=True), SHAPE, fires=1),
    Example("whole", lambda: Odd("whole"), SHAPE, declines="also read as a whole by relu"),
    Example("returned", lambda: Odd("returned"), SHAPE, declines="the caller gets its memory layout"),
    Example("twice", lambda: Odd("twice"), SHAPE, declines="both read row 2"),
    Example("again", lambda: Odd("again"), SHAPE, declines="meet again in cat"),
    Example("tied", lambda: Odd("tied"), SHAPE, declines="is also read by linear_1"),
]  # fmt: skip
test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(PASS, EXAMPLES)


def test_rows_are_those_of_the_parts() -> None:
    """Dealt out by turns, [heads, 3, dim]: head 0 has rows 0-8, of which the first three are its query."""
    program = before(next(e for e in EXAMPLES if e.name == "select"), PASS)
    after, _ = apply(PASS, program)
    weight = program.weights["qkv.weight"].unflatten(0, (2, 3, 3))
    for part in range(3):
        assert torch.equal(after.weights[f"qkv.part{part}.weight"], weight[:, part].flatten(0, 1))
    assert "qkv.weight" not in after.weights


def test_a_split_that_frees_nothing_is_not_made() -> None:
    plain = SplitLinears()
    _, changes = apply(plain, before(EXAMPLES[0], plain))
    assert not changes.changed
    assert [site.reason for site in changes.skipped] == [
        "its parts are as free as they are: the analysis tells them apart"
    ]
    assert apply(plain, before(next(e for e in EXAMPLES if e.name == "select"), plain))[1].changed


@pytest.mark.parametrize("example", EXAMPLES[:8], ids=str)
def test_merging_is_the_way_back(example: Example) -> None:
    once, _ = apply(PASS, before(example, PASS))
    count = operators(before(example, PASS)).count("linear")
    assert operators(once).count("linear") > count
    merged, _ = apply(MergeLinears(), once)
    assert operators(merged).count("linear") == count
    program = before(example, PASS)
    x = program.flat_example[0]
    torch.testing.assert_close(merged(x), program(x), rtol=0, atol=1e-5)


def test_what_was_merged_is_split_again() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).sum() + self.b(x).tanh().sum() + self.c(x).relu().sum()  # type: ignore[no-any-return]

    merged, _ = apply(MergeLinears(), before(Example("three", Three, (2, 4)), PASS))
    again, changes = apply(PASS, merged)
    assert operators(merged).count("linear") == 1
    assert operators(again).count("linear") == 3
    assert len(changes.touched) == 1
    check_means_the_same(MergeLinears(), Example("three", Three, (2, 4)))
