"""Neurons of every MLP, then whole attentions: 2SSP.

    attentions removed   N = round(B s^(|mlp| / (alpha |attention|)))        of B blocks, s: share of parameters to go
    neurons removed      what is left to reach s, the same share of every MLP

Neurons go by the mean square of what they give, attentions one after the other by how far the outputs move ("2SSP: A
Two-Stage Framework for Structured Pruning of LLMs"; there by the mean of norms, and by perplexity). The two stages are
`prune` and `drop_blocks`, recorded as such; `resolve` fits what stays, which the paper does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import fx

from graphopt.analysis import parameters
from graphopt.analysis.blocks import Branch, find_blocks
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Site, operator
from graphopt.passes.prune.drop_blocks import DropBlocks
from graphopt.passes.prune.prune import Prune
from graphopt.pipeline import Branch as Tried
from graphopt.pipeline import Composite, Context, Pass

_ATTENTION = ("scaled_dot_product_attention", "softmax", "_softmax", "_safe_softmax")


@dataclass(frozen=True)
class TwoStage(Composite):
    """Prune MLPs in width and attentions in depth.

    Attributes:
        sparsity: share of the blocks' parameters that goes; None: what the budget's params_ratio asks for.
        alpha: the larger, the fewer attentions go.
        samples: batches of the calibration data that judge attentions.
        resolve: whether what stays is fitted to the original.
    """

    exact: ClassVar[bool] = False

    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    alpha: Annotated[float, Field(gt=0)] = 1.5
    samples: Annotated[int, Field(ge=1)] = 8
    resolve: bool = False

    def compose(
        self, program: Program, branch: Callable[[Sequence[Pass], Context], Tried], context: Context
    ) -> tuple[Tried | None, Changes]:
        attentions, mlps = _branches(program)
        if not attentions or not mlps:
            reason = "it has no layers of attentions and MLPs"
            return None, Changes(skipped=[Site("program", reason)])
        attention, mlp = (sum(map(_parameters, each)) / len(each) for each in (attentions, mlps))
        whole = attention * len(attentions) + mlp * len(mlps)
        share = self._share(program, whole, context)
        count = round(len(attentions) * share ** (mlp / attention / self.alpha))
        count = min(count, int(share * whole / attention))  # of small MLPs the formula takes more than is to go
        ratio = (share * whole - count * attention) / (mlp * len(mlps))
        if not ratio < 1:
            raise GraphoptError(
                f"two_stage cannot remove {share:.0%} of the blocks: beside {count} of {len(attentions)} attentions "
                f"{ratio:.0%} of the MLPs would have to go; give another alpha, or remove less"
            )
        # The width that all MLPs lose sets what is read by their last linears.
        neurons = tuple(end.name for each in mlps for end in each.ends)
        names = tuple(node.name for each in attentions for node in each.body if operator(node) in _ATTENTION)
        stages: list[Pass] = [
            Prune(
                ratio=ratio, criterion="activation", turn=False, streams=False, resolve=self.resolve, multiple=1,
                floor=1e-3, only=neurons,
            )
        ]
        if count:
            stages.append(
                DropBlocks(
                    unit="branches", count=count, criterion="greedy", exchange=False, samples=self.samples,
                    resolve=self.resolve, only=names,
                )
            )  # fmt: skip
        facts = {"attentions": count, "neurons": ratio, "sparsity": share}
        return branch(stages, context), Changes(facts=facts)

    def _share(self, program: Program, whole: float, context: Context) -> float:
        if self.sparsity is not None:
            return self.sparsity
        if context.budget.params_ratio is None:
            raise GraphoptError(
                "two_stage needs to know how much goes: give a budget with params_ratio, or two_stage(sparsity=...)"
            )
        goes = parameters(program) - context.budget.params_ratio * parameters(context.original or program)
        if not 0 < goes < whole:
            raise GraphoptError(
                f"two_stage cannot meet budget.params_ratio ≤ {context.budget.params_ratio:g}: the blocks hold "
                f"{whole / parameters(program):.0%} of the parameters"
            )
        return goes / whole


def _branches(program: Program) -> tuple[list[Branch], list[Branch]]:
    """Return the branches of all layers that have an attention, and the others."""
    found = [branch for layer in find_blocks(program).layers for branch in layer.branches]
    having = [branch for branch in found if any(operator(node) in _ATTENTION for node in branch.body)]
    return having, [branch for branch in found if branch not in having]


def _parameters(branch: Branch) -> int:
    weights: dict[fx.Node, None] = {}
    for node in branch.body:
        weights.update(dict.fromkeys(each for each in node.all_input_nodes if each.op == "get_attr"))
    return sum(each.meta["val"].numel() for each in weights)
