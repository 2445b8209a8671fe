"""A check that has never failed on purpose is no check: passes that deserve to fail each of the four."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from harness import Example, check_declines, check_fires, check_idempotent, check_means_the_same
from torch import fx, nn

from graphopt.ir import Changes, Match, Program, Rewriter, Rule, arguments, operator, rule
from graphopt.passes import FoldBatchNorm
from graphopt.pipeline import Context, Pass

FOLLOWS = Example(
    "conv_bn",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)),
    (2, 3, 8, 8),
    fires=1,
    golden="""
    conv2d = conv2d(input_1, @0.weight, @0.bias, padding=[1, 1])
    return conv2d
    """,
)
PADDED = Example(
    "bn_conv_padded",
    lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
    (2, 3, 8, 8),
    declines="pads with zeros",
)


def _batch_norm(node: fx.Node) -> Match | None:
    return Match(node, {"x": arguments(node)["input"]}) if operator(node) == "batch_norm" else None


@rule(match=_batch_norm)
def forget_the_shift(match: Match, rewriter: Rewriter) -> None:
    """Fold the scale, wherever the batch norm stands, and drop the shift."""
    named = arguments(match.root)
    scale = rewriter.value(named["weight"]) / (rewriter.value(named["running_var"]) + named["eps"]).sqrt()
    conv = next(node for node in rewriter.graph.nodes if operator(node) == "conv2d")
    weight = arguments(conv)["weight"]
    sides = (-1, 1, 1, 1) if conv is match["x"] else (1, -1, 1, 1)
    rewriter.rewire(conv, weight=rewriter.edit(weight, "scale", lambda value: value * scale.reshape(sides)))
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, "folded")


@dataclass(frozen=True)
class FoldWrongly(Pass):
    """Has the algebra wrong and checks nothing."""

    rules: ClassVar[tuple[Rule, ...]] = (forget_the_shift,)


@dataclass(frozen=True)
class DoNothing(Pass):
    """Never fires and never says why."""


@dataclass(frozen=True)
class NegateTwice(Pass):
    """Means the same and does not come to an end."""

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        end = program.graph.output_node()
        result = program.outputs[0]
        for _ in range(2):
            result = rewriter.insert(torch.ops.aten.neg.default, result, before=end)
        rewriter.redirect(end, program.outputs[0], result)
        rewriter.touch(result, "negated twice")
        return rewriter.finish()


@pytest.mark.parametrize("check", [check_fires, check_means_the_same, check_idempotent])
def test_a_right_pass_passes(check: object) -> None:
    check(FoldBatchNorm(), FOLLOWS)  # type: ignore[operator]
    check_declines(FoldBatchNorm(), PADDED)


def test_a_wrong_rewrite_changes_the_meaning() -> None:
    with pytest.raises(AssertionError, match="relative error"):
        check_means_the_same(FoldWrongly(), FOLLOWS)


def test_a_rewrite_without_conditions_does_not_decline() -> None:
    with pytest.raises(AssertionError, match="recorded"):
        check_declines(FoldWrongly(), PADDED)
    with pytest.raises(AssertionError, match="relative error"):
        check_means_the_same(FoldWrongly(), PADDED)


def test_a_rewrite_that_is_missing_does_not_fire() -> None:
    with pytest.raises(AssertionError, match="rewrote"):
        check_fires(DoNothing(), FOLLOWS)


def test_another_rewrite_does_not_match_the_golden_text() -> None:
    with pytest.raises(AssertionError, match=r"neg|batch_norm"):
        check_fires(NegateTwice(), FOLLOWS)


def test_a_rewrite_that_fires_again_is_not_idempotent() -> None:
    with pytest.raises(AssertionError, match="second run"):
        check_idempotent(NegateTwice(), FOLLOWS)
