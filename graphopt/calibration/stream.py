"""Run a program over the calibration data stage by stage, with some operators changed on the way.

A site is an operator that is about to change: a linear whose weight will be quantized. Level 0 are the sites that no
other site feeds, level n+1 those that level n is the last to feed. Stage n runs every batch as far as it goes without
running a site of level n, shows what these sites read, and lets the caller change them; stage n+1 goes on with the
changed ones. So later layers see what the changed layers before them give ("sequential calibration"), in any graph:
branches advance together, and nothing is run twice.

Of each batch only the values that later stages read are kept: for a stack of blocks, what one block hands to the next.
With `spill` they lie in files between the stages, and memory holds one batch at a time.

The exact lane is the same run with nothing changed. It shares all values that no site feeds, and reads
dequantize(quantize(x)) as x.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.calibration.batches import EMPTY, Batches, running
from graphopt.errors import GraphoptError, described
from graphopt.ir.arguments import arguments, operator
from graphopt.ir.program import Program
from graphopt.memory import release_freed
from graphopt.progress import Progress

Show = Callable[[fx.Node, Tensor, Tensor | None, int], None]  # site, input, input in the exact lane, batch
Settle = Callable[[list[fx.Node]], Mapping[fx.Node, Tensor]]  # the sites of a level -> their new weights
_Lane = dict[str, Any]


class Stream:
    """Runs `program` over `batches` for the sites given.

    Args:
        program: left as it is.
        sites: calls with an `input` and a `weight`.
        batches: the calibration data, read once.
        progress: shows a step for each batch of each stage.
        exact: whether to run the exact lane too.
        spill: whether to keep values between stages in files.
    """

    def __init__(
        self,
        program: Program,
        sites: Collection[fx.Node],
        batches: Batches,
        progress: Progress,
        exact: bool = False,
        spill: bool = False,
    ) -> None:
        self._program, self._batches, self._progress = program, batches, progress
        self._sites = set(sites)
        self._ordered = [node for node in program.graph.nodes if node in self._sites]
        self._level = _levels(program, self._sites)
        self._last = max((self._level[site] for site in self._sites), default=-1)
        self._changed: dict[fx.Node, Tensor] = {}
        self._exact = exact
        self._apart = _fed_by(program, self._sites) if exact else set()
        self._store = _Files() if spill else _Memory()

    def run(self, show: Show, settle: Settle) -> None:
        """Show the inputs of the sites and change them, level by level.

        Raises GraphoptError where there is no batch, or a batch does not run.
        """
        if not self._sites:
            return
        try:
            for level in range(self._last + 1):
                ready = [site for site in self._ordered if self._level[site] == level]
                with self._progress.stage(f"stage {level + 1} of {self._last + 1}", len(self._batches)) as stage:
                    for index, (lane, other) in self._lanes(level):
                        self._advance(index, level, lane, other)
                        for site in ready:
                            name = arguments(site)["input"].name
                            show(site, lane[name], other.get(name, lane[name]) if self._exact else None, index)
                        kept = self._needed_after(level)
                        self._store.put(index, _only(lane, kept), _only(other, kept))
                        stage.advance()
                release_freed()
                self._changed.update(settle(ready))
        finally:
            self._store.clear()

    def _lanes(self, level: int) -> Iterator[tuple[int, tuple[_Lane, _Lane]]]:
        """Yield every batch's values: of the data at first, then what the stage before kept."""
        if level > 0:
            for index in range(len(self._store)):
                yield index, self._store.take(index)
            return
        count = 0
        names = [node.name for node in self._program.placeholders]
        for flat in self._batches:
            yield count, (dict(zip(names, flat, strict=True)), {})
            count += 1
        if count == 0:
            raise GraphoptError(EMPTY)

    @torch.no_grad()
    def _advance(self, index: int, level: int, lane: _Lane, other: _Lane) -> None:
        """Run what stage `level` runs, dropping each value after its last reader there."""
        steps, dropped = self._plan(level)
        with running(index):
            for node in steps:
                lane[node.name] = self._call(node, lane, {}, changed=True)
                if node in self._apart:
                    other[node.name] = self._call(node, other, lane, changed=False)
                for name in dropped.get(node, ()):
                    lane.pop(name, None)
                    other.pop(name, None)

    def _call(self, node: fx.Node, lane: _Lane, shared: _Lane, changed: bool) -> Any:
        def value(source: fx.Node) -> Any:
            if source.op == "get_attr":
                return self._program.weight(source)
            return lane[source.name] if source.name in lane else shared[source.name]

        if not changed and (plain := unquantized(node)) is not None:
            return value(plain)
        weight = arguments(node)["weight"] if changed and node in self._changed else None

        def given(source: fx.Node) -> Any:
            return self._changed[node] if source is weight else value(source)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _plan(self, level: int) -> tuple[list[fx.Node], dict[fx.Node, list[str]]]:
        steps = [node for node in self._program.graph.nodes if self._stage(node) == level]
        needed, place = self._needed_after(level), {node: index for index, node in enumerate(steps)}
        ready = {arguments(site)["input"].name for site in self._sites if self._level[site] == level}
        readers_of: dict[fx.Node, list[int]] = {}
        for node in steps:
            for source in self._read(node):
                readers_of.setdefault(source, []).append(place[node])
        dropped: dict[fx.Node, list[str]] = {}
        for source in self._program.graph.nodes:
            readers = readers_of.get(source, [])
            if readers and source.op != "get_attr" and source.name not in needed and source.name not in ready:
                dropped.setdefault(steps[max(readers)], []).append(source.name)
        return steps, dropped

    def _stage(self, node: fx.Node) -> int:
        """Return the stage that runs a node: a site waits for its change; -1 for what is not run at all."""
        if node.op != "call_function":
            return -1
        stage = self._level[node] + (node in self._sites)
        return stage if stage <= self._last else -1

    def _needed_after(self, level: int) -> set[str]:
        needed = set()
        for node in self._program.graph.nodes:
            if self._stage(node) > level or (node in self._sites and self._level[node] > level):
                needed |= {source.name for source in self._read(node) if source.op != "get_attr"}
        return needed

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """Return what a node reads in either lane."""
        plain = unquantized(node) if self._exact else None
        return node.all_input_nodes if plain is None else [*node.all_input_nodes, plain]


def _levels(program: Program, sites: Collection[fx.Node]) -> dict[fx.Node, int]:
    """Return for each node how many sites, one after the other, stand before it."""
    level: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        level[node] = max((level[each] + (each in sites) for each in node.all_input_nodes), default=0)
    return level


def _fed_by(program: Program, sites: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes that a site, or a quantized activation, feeds, and these."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and (
            node in sites or unquantized(node) is not None or any(each in found for each in node.all_input_nodes)
        ):
            found.add(node)
    return found


def unquantized(node: fx.Node) -> fx.Node | None:
    """Return x for a node that is dequantize(quantize(x)), else None."""
    if operator(node) != "graphopt.dequantize":
        return None
    codes = arguments(node)["codes"]
    return arguments(codes)["x"] if operator(codes) == "graphopt.quantize" else None


def _only(lane: _Lane, names: set[str]) -> _Lane:
    return {name: value for name, value in lane.items() if name in names}


class _Memory:
    """Values between two stages, in memory."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[_Lane, _Lane]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, index: int, lane: _Lane, other: _Lane) -> None:
        self._kept[index] = lane, other

    def take(self, index: int) -> tuple[_Lane, _Lane]:
        return self._kept[index]

    def clear(self) -> None:
        self._kept.clear()


class _Files(_Memory):
    """Values between two stages, a file a batch."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-stream-")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, index: int, lane: _Lane, other: _Lane) -> None:
        own = pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (lane, other))
        try:
            torch.save(own, self._path(index))
        except (OSError, RuntimeError) as error:
            raise GraphoptError(
                f"cannot keep activations in {tempfile.gettempdir()} ({described(error)}); point TMPDIR to a folder "
                "with room, or leave spill out"
            ) from error
        self._count = max(self._count, index + 1)

    def take(self, index: int) -> tuple[_Lane, _Lane]:
        lane, other = torch.load(self._path(index), weights_only=True)
        return lane, other

    def clear(self) -> None:
        self._folder.cleanup()

    def _path(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.pt"
