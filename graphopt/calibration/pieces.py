"""Run a program over the calibration data piece by piece, and learn the weights of each from what the exact one gives.

A piece is what lies between two cuts of the graph (`graphopt.analysis.blocks`): a layer of a decoder, a residual block
of a convolutional network; of a graph without cuts, all of it. Its inputs are what the changed pieces before it give,
its target what it would give if nothing had changed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.analysis.blocks import find_blocks
from graphopt.calibration.batches import Batches, running
from graphopt.calibration.stream import Change, Lane, Staged, empty_store, levels, unquantized
from graphopt.ir.program import Program, is_floating
from graphopt.memory import release_freed
from graphopt.progress import Progress


@dataclass(frozen=True, eq=False)
class Piece:
    """Some calls that are run together.

    Attributes:
        sites: calls in it whose weights may change, in graph order.
        exits: the values that others read of it and that the weights touch.
        count: batches.
    """

    sites: Sequence[fx.Node]
    exits: Sequence[fx.Node]
    count: int
    _owner: Pieces
    _steps: Sequence[fx.Node]

    def batches(self, order: Sequence[int] | None = None) -> Iterator[tuple[Lane, dict[fx.Node, Tensor]]]:
        """Yield what the piece reads, and its targets by exit, for every batch or for those of `order`."""
        for index in range(self.count) if order is None else order:
            lane, _ = self._owner.store.take(index)
            _, targets = self._owner.targets.take(index)
            yield lane, {node: targets[node.name] for node in self.exits}

    def outputs(self, lane: Lane, changed: Mapping[fx.Node, Change]) -> dict[fx.Node, Tensor]:
        """Return the exits for other weights, by site; gradients reach these."""
        values = dict(lane)
        for node in self._steps:
            value = self._owner.call(node, values, {}, changed)
            if (plain := unquantized(node)) is not None:  # straight through
                value = values[plain.name] + (value - values[plain.name]).detach()
            values[node.name] = value
        return {node: values[node.name] for node in self.exits}


Learn = Callable[[Piece], Mapping[fx.Node, Change]]  # a piece -> new weights of its sites


class Pieces(Staged):
    """Runs `program` over `batches` piece by piece.

    Args:
        program: left as it is.
        sites: calls with a `weight` that may change.
        batches: the calibration data, read once.
        progress: shows a step for each piece.
        whole: whether there is one piece, which is everything.
        spill: whether to keep values between pieces in files.
    """

    def __init__(
        self,
        program: Program,
        sites: Collection[fx.Node],
        batches: Batches,
        progress: Progress,
        whole: bool = False,
        spill: bool = False,
    ) -> None:
        self._progress, self._sites = progress, set(sites)
        level = levels(program, set() if whole else _ends(program))
        stages = {node: level[node] for node in program.graph.nodes if node.op == "call_function"}
        super().__init__(program, stages, sites, batches, exact=True, spill=spill)
        self.targets = empty_store(spill)

    def run(self, learn: Learn) -> None:
        """Let `learn` change the weights of every piece that has sites, in the order of the data.

        Raises GraphoptError where there is no batch, or a batch does not run.
        """
        last = max((self.stages[site] for site in self._sites), default=-1)
        returned = {node for node in self.program.outputs if isinstance(node, fx.Node)}
        try:
            if last >= 0:
                for index, (lane, other) in self.lanes(0):
                    self.store.put(index, lane, other)
            with self._progress.stage("pieces", last + 1) as shown:
                for stage in range(last + 1):
                    steps, needed = self.steps(stage), self.needed_after(stage)
                    exits = [
                        node
                        for node in steps
                        if node in self.apart and is_floating(node) and (node.name in needed or node in returned)
                    ]
                    sites = [node for node in steps if node in self._sites]
                    if sites and exits:
                        self._aim(steps, exits)
                        self.changed |= learn(Piece(sites, exits, len(self.store), self, steps))
                    self._go_on(stage)
                    release_freed()
                    shown.advance()
        finally:
            self.store.clear()
            self.targets.clear()

    @torch.no_grad()
    def _aim(self, steps: Sequence[fx.Node], exits: Sequence[fx.Node]) -> None:
        """Note what every batch would give where nothing is changed."""
        for index in range(len(self.store)):
            lane, other = (dict(each) for each in self.store.take(index))
            with running(index):
                for node in steps:
                    here = other if node in self.apart else lane
                    here[node.name] = self.call(node, other, lane)
            self.targets.put(index, {}, {node.name: other[node.name] for node in exits})

    def _go_on(self, stage: int) -> None:
        for index in range(len(self.store)):
            lane, other = (dict(each) for each in self.store.take(index))
            self.advance(index, stage, lane, other)
            self.keep(index, stage, lane, other)


def _ends(program: Program) -> set[fx.Node]:
    """Return where pieces end: layers, where all of the data goes through their ends; else every cut."""
    blocks = find_blocks(program)
    cuts = set(blocks.cuts)
    layers = {node for layer in blocks.layers for node in layer.outputs[:1] if node in cuts}
    return layers or cuts
