"""How long a program takes whose spaces have other widths: a table measured on this machine.

The program is timed at a few widths of all spaces together, with whatever coordinates, for that needs no data. Each
operator then has a few points (what it computes, how long it takes); between them its time is a straight line. Times
are of the target's own runtime, in turns with the original, and remembered like all measurements of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from graphopt.analysis.cost import node_macs
from graphopt.analysis.spaces import Space, analyze
from graphopt.errors import GraphoptError
from graphopt.ir import Program, Rewriter
from graphopt.passes.prune.candidates import Costs
from graphopt.passes.prune.deletion import Deletion
from graphopt.pipeline import Context

_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # places on the way from all of a space to the least of it


def latency_of(context: Context, program: Program, who: str) -> Callable[[Program], float]:
    """Return a function that times a program against the original: the ratio of their latencies.

    Raises GraphoptError where nothing can be timed.
    """
    if context.measure is None:
        raise GraphoptError(
            f"{who} cannot hold budget.latency_ratio: nothing can be timed here for {context.target.name}; "
            "give macs_ratio instead"
        )
    original = context.original or program

    def ratio(made: Program) -> float:
        times = context.timed({"original": original, "made": made})
        return times["made"].latency_ms / times["original"].latency_ms

    return ratio


class LatencyTable:
    """Latency by widths, relative to the original.

    Args:
        widths: of each space those that it may have, descending.
    """

    def __init__(
        self, program: Program, costs: Costs, widths: Mapping[Space, Sequence[int]], context: Context, who: str
    ) -> None:
        self._costs, self._ratio = costs, latency_of(context, program, who)
        self._program, self._widths = program, widths
        levels = [{space: each[round(level * (len(each) - 1))] for space, each in widths.items()} for level in _LEVELS]
        made = {f"{level:g}": self.made(at) for level, at in zip(_LEVELS, levels, strict=True)}
        times = context.timed({"original": context.original or program, **made})
        self._whole = times["original"].latency_ms
        self._points: dict[fx.Node, tuple[list[float], list[float]]] = {}
        rest = [times[name].latency_ms for name in made]
        for node in program.graph.nodes:
            spent = [times[name].nodes.get(node.name, 0.0) for name in made]
            if any(spent):
                work = [self._work(node, at) for at in levels]
                order = sorted(range(len(work)), key=lambda index: work[index])
                # A wider one is not faster: where it seems so that is noise.
                rising = np.maximum.accumulate([spent[index] for index in order])
                self._points[node] = [work[index] for index in order], rising.tolist()
                rest = [left - each for left, each in zip(rest, spent, strict=True)]
        self._rest = float(np.median(rest))  # of what belongs to no operator

    def __call__(self, widths: Mapping[Space, int]) -> float:
        """Return the latency that the table tells, relative to the original."""
        spent = sum(np.interp(self._work(node, widths), *points) for node, points in self._points.items())
        return float(spent + self._rest) / self._whole

    def measured(self, widths: Mapping[Space, int]) -> float:
        """Return the latency of the program with these widths, relative to the original."""
        return self._ratio(self.made(widths))

    def made(self, widths: Mapping[Space, int]) -> Program:
        """Return a program with these widths, with the first coordinates of each space."""
        twin = self._program.clone()
        analysis, rewriter = analyze(twin), Rewriter(twin, "prune")
        by_name = {space.name: width for space, width in widths.items() if width < space.size}
        kept: dict[Space, Tensor] = {
            space: torch.arange(by_name[space.name])
            for space in analysis.under("permutation") if space.name in by_name
        }
        Deletion(analysis, kept).apply(rewriter)
        rewriter.finish()
        return twin

    def _work(self, node: fx.Node, widths: Mapping[Space, int]) -> float:
        shape = self._costs.shape(widths)
        return float(node_macs(node, shape) or np.prod(shape(node)))
