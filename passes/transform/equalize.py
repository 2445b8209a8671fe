"""Balance the channel ranges of weights that share a space.

    writers(W1)_i  ->  s_i W1_i         readers(W2)_i  ->  W2_i / s_i          s_i = sqrt(r2_i / r1_i)

r1_i and r2_i are the largest magnitudes that the weights on either side hold at coordinate i; afterwards both are
sqrt(r1_i r2_i). What stands between passes a positive scale: nothing, relu, max-pooling, a depthwise convolution or the
gain of a norm, which are writers and readers themselves. These are the spaces that the analysis finds free under the
symmetry `diagonal`. As weights lie in several spaces, all are balanced in turn until none changes any more.

Exact. Runs after `fold_batch_norm`, as a batch norm pins what it reads, and before anything that quantizes: weights
quantized with one scale for the tensor are what it is for. A bound that binds (ReLU6) passes no scale, as the skip
says.
Source: "Data-Free Quantization Through Weight Equalization and Bias Correction".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, fx

from graphopt.analysis.spaces import Member, Space, Symmetry, analyze
from graphopt.ir import Changes, Program, Rewriter
from graphopt.passes.transform.reparameterize import Reparameterization
from graphopt.pipeline import Context, Pass

_NO_RANGE = {"bias", "mean", "variance"}  # what follows the scale of a weight and is not stored in its type


@dataclass(frozen=True)
class Equalize(Pass):
    """Equalize channel ranges across layers.

    Attributes:
        iterations: how often all spaces are balanced at most.
        convergence: of a scale, relative, below which nothing is changed any more.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "fold_batch_norm")

    iterations: PositiveInt = 50
    convergence: Annotated[float, Field(gt=0, lt=1)] = 0.02

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        pairs = []
        for space in analyze(program).under(Symmetry.DIAGONAL):
            sides = _sides(space)
            if not all(sides):
                continue
            if space.free:
                pairs.append(space)
            else:
                rewriter.decline(space.members[0].weight, f"{space.name} passes no scale: {space.pins[0]}")
        balance = _Balance(pairs, rewriter)
        before = {space.name: balance.imbalance(space) for space in pairs}
        total = {space.name: torch.ones(space.shape, dtype=torch.float64) for space in pairs}
        unsettled = set(total)
        with context.progress.stage("equalize", self.iterations) as stage:
            for _ in range(self.iterations):
                for space in pairs:
                    if space.name not in unsettled:
                        continue
                    unsettled.discard(space.name)
                    scale = balance.scale(space)
                    if bool(((scale - 1).abs() > self.convergence).any()):
                        total[space.name] *= scale
                        balance.apply(space, scale)
                        unsettled |= balance.beside(space)
                stage.advance()
                if not unsettled:
                    break
        edits = Reparameterization(rewriter)
        for space in pairs:
            change = total[space.name]
            if bool((change == 1).all()):
                rewriter.decline(space.members[0].weight, f"{space.name} is balanced")
                continue
            edits.apply(space, change)
            after = balance.imbalance(space)
            ranges = f"largest over smallest range {before[space.name]:.3g} -> {after:.3g}"
            rewriter.touch(space.members[0].weight, f"equalized {space.name} ({space.size}), {ranges}")
        rewriter.note(
            imbalance={name: [float(f"{was:.4g}"), float(f"{balance.imbalance(space):.4g}")]
                       for space in pairs for name, was in ((space.name, before[space.name]),)}
        )  # fmt: skip
        edits.commit()
        return rewriter.finish()


def _sides(space: Space) -> tuple[list[Member], list[Member]]:
    """Return the members that a change multiplies and those that it divides; biases and statistics aside."""
    held = [member for member in space.members if not _NO_RANGE & set(member.role.split(", "))]
    return [member for member in held if not member.dual], [member for member in held if member.dual]


class _Balance:
    """The magnitudes of the weights while they are balanced: a copy, changed in place; only ranges are read of it."""

    def __init__(self, spaces: list[Space], rewriter: Rewriter) -> None:
        nodes = {member.node for space in spaces for member in space.members}
        magnitudes = {node: _magnitude(rewriter.value(node)) for node in nodes}
        self._views = {
            (space.name, member): list(space.views(member, magnitudes[member.node]))
            for space in spaces
            for member in space.members
        }
        self._of_node: dict[fx.Node, set[str]] = {}
        for space in spaces:
            for member in space.members:
                self._of_node.setdefault(member.node, set()).add(space.name)

    def beside(self, space: Space) -> set[str]:
        """Return the names of the other spaces that hold weights of a space."""
        return {name for member in space.members for name in self._of_node[member.node]} - {space.name}

    def ranges(self, space: Space, members: list[Member]) -> Tensor:
        """Return the largest magnitude at each coordinate [*fibres, n] over some members, float64."""
        found = []
        for member in members:
            for view in self._views[space.name, member]:
                rest = tuple(range(view.dim() - len(space.shape)))
                found.append(view.amax(rest) if rest else view)
        return torch.stack(found).amax(0).to(torch.float64)

    def scale(self, space: Space) -> Tensor:
        """Return s [*fibres, n]; 1 where a side holds nothing but zeros."""
        multiplied, divided = (self.ranges(space, members) for members in _sides(space))
        scale = (divided / multiplied).sqrt()
        return torch.where((multiplied > 0) & (divided > 0) & torch.isfinite(scale), scale, 1.0)

    def apply(self, space: Space, scale: Tensor) -> None:
        for member in space.members:
            for view in self._views[space.name, member]:
                view.mul_((1 / scale if member.dual else scale).to(view.dtype))

    def imbalance(self, space: Space) -> float:
        """Return the largest over the smallest range that is not zero, of the weights that a change multiplies."""
        ranges = self.ranges(space, _sides(space)[0]).flatten()
        live = ranges[ranges > 0]
        return float(live.max() / live.min()) if len(live) else 1.0


def _magnitude(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32)).abs().contiguous()
