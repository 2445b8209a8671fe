"""The meaning of deletion, run coordinate by coordinate: what is deleted contributes nothing to any sum.

`removed(program, analysis, kept, flat)` runs the original in float64 and puts zero at every deleted coordinate of every
value, so that sums run over what stays while their divisors stay what they were. Only group norms are computed anew
over what is left of each group. It shares with the code under test where coordinates lie, and nothing of the rewriting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphopt.analysis.spaces import Analysis, Selection, Space
from graphopt.ir import Changes, Program, Rewriter
from graphopt.ir.arguments import arguments, operator
from graphopt.ir.precision import retype
from graphopt.passes.prune.deletion import Deletion
from graphopt.pipeline.validation import run_seeded


def keep(space: Space, share: float, random: torch.Generator) -> Tensor:
    """Draw what stays of a space, another set for every index of its siblings."""
    count = max(1, min(space.size - 1, math.ceil(share * space.size)))
    return torch.rand(space.shape, generator=random).argsort(-1)[..., :count].sort(-1).values


def keep_all(spaces: Sequence[Space], share: float, random: torch.Generator) -> dict[Space, Tensor]:
    """Draw what stays of several spaces; along one that another differs along, it is the same everywhere."""
    kept: dict[Space, Tensor] = {}
    along: set[object] = set()
    for space in spaces:
        kept[space] = keep(space, share, random)
        if space.atom in along:
            kept[space] = kept[space].flatten(0, -2)[0] if space.siblings else kept[space]
        else:
            along.update(space.sibling_atoms)
    return kept


def delete(program: Program, analysis: Analysis, kept: Mapping[Space, Tensor]) -> Changes:
    """Delete what is not kept."""
    rewriter = Rewriter(program, "test")
    Deletion(analysis, kept).apply(rewriter)
    return rewriter.finish()


class _Removed(fx.Interpreter):
    def __init__(self, program: Program, analysis: Analysis, selection: Selection) -> None:
        twin = retype(program, torch.float64)
        super().__init__(twin.graph_module)
        self.selection = selection
        # Nodes of both graphs in their order: the twin is a copy.
        pairs = zip(twin.graph.nodes, analysis.program.graph.nodes, strict=True)
        self.axes = {copy.name: analysis.axes(node) for copy, node in pairs}

    def run_node(self, n: fx.Node) -> Any:
        axes = self.axes[n.name]
        if operator(n) == "group_norm" and self.selection.touches(self._channels(n)):
            args, _ = self.fetch_args_kwargs_from_env(n)
            return self._over_what_is_left(n, args)
        value = super().run_node(n)
        if not isinstance(value, Tensor) or not isinstance(axes, list):
            return value
        return self._masked(value, axes)

    def _channels(self, node: fx.Node) -> Any:
        found = self.axes[node.all_input_nodes[0].name]
        assert isinstance(found, list)
        return found[1]

    def _masked(self, value: Tensor, axes: list[Any]) -> Tensor:
        if not any(self.selection.touches(axis) for axis in axes):
            return value
        mask = torch.zeros(value.numel(), dtype=torch.bool)
        mask[self.selection.take(axes, torch.arange(value.numel()).view(value.shape)).flatten()] = True
        return torch.where(mask.view(value.shape), value, torch.zeros((), dtype=value.dtype))

    def _over_what_is_left(self, node: fx.Node, args: Any) -> Tensor:
        named = arguments(node)
        x, groups, weight, bias = (*args, None, None)[:4]
        left = self.selection.take([self._channels(node)], torch.arange(x.shape[1]))
        each = x.shape[1] // groups
        out = torch.zeros_like(x)
        for group in range(groups):
            mine = left[(left >= group * each) & (left < (group + 1) * each)]
            if not len(mine):
                continue
            scale, shift = (None if v is None else v[mine] for v in (weight, bias))
            out[:, mine] = functional.group_norm(x[:, mine], 1, scale, shift, named["eps"])
        return out


def removed(program: Program, analysis: Analysis, kept: Mapping[Space, Tensor], flat: list[Any]) -> list[Any]:
    """Return what the original gives, in float64, when deleted coordinates contribute nothing."""
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in flat]
    with torch.no_grad():
        return list(_Removed(program, analysis, Selection(kept)).run(*doubled))


def run_unrounded(program: Program, changes: Changes, flat: list[Any]) -> list[Any]:
    """Run in float64, on weights as they were computed."""
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in flat]
    return run_seeded(retype(program, torch.float64, changes.unrounded), doubled)
