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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Reading:
    """What a site reads of a batch.

    Attributes:
        site: the call. batch: the number of the batch.
        x, exact: its input in either lane; `exact` is None where there is one lane.
        beside, beside_exact: the same of the value that it will be added to, where the stream was asked for that.
    """

    site: fx.Node
    batch: int
    x: Tensor
    exact: Tensor | None = None
    beside: Tensor | None = None
    beside_exact: Tensor | None = None


Change = Tensor | Mapping[str, Tensor]  # a new weight, or new arguments by name
Show = Callable[[Reading], None]
Settle = Callable[[list[fx.Node]], Mapping[fx.Node, Change]]  # the sites of a level -> what changes of them
Lane = dict[str, Any]


class Staged:
    """A program that is run over the calibration data stage by stage; of each batch is kept what later stages read.

    Args:
        program: left as it is.
        stages: of each call; what is not among them is never run. Placeholders are there from the start.
        sites: calls whose weights may change, `changed` has what is new by call.
        batches: the calibration data, read once.
        exact: whether there is a second lane, in which nothing is changed.
        spill: whether to keep values between stages in files.
    """

    def __init__(
        self,
        program: Program,
        stages: Mapping[fx.Node, int],
        sites: Collection[fx.Node],
        batches: Batches,
        exact: bool,
        spill: bool,
    ) -> None:
        self.program, self.stages, self.batches, self.exact = program, stages, batches, exact
        self.changed: dict[fx.Node, Change] = {}
        self.apart = _fed_by(program, set(sites)) if exact else set()
        self.store = empty_store(spill)
        self._needed: dict[int, set[str]] = {}
        self._plans: dict[int, tuple[list[fx.Node], dict[fx.Node, list[str]]]] = {}

    def lanes(self, stage: int) -> Iterator[tuple[int, tuple[Lane, Lane]]]:
        """Yield every batch's values: of the data at first, then what the stage before kept."""
        if stage > 0:
            for index in range(len(self.store)):
                yield index, self.store.take(index)
            return
        count = 0
        names = [node.name for node in self.program.placeholders]
        for flat in self.batches:
            yield count, (dict(zip(names, flat, strict=True)), {})
            count += 1
        if count == 0:
            raise GraphoptError(EMPTY)

    def keep(self, index: int, stage: int, lane: Lane, other: Lane) -> None:
        """Keep what stages after `stage` read of a batch."""
        kept = self.needed_after(stage)
        self.store.put(index, _only(lane, kept), _only(other, kept))

    @torch.no_grad()
    def advance(self, index: int, stage: int, lane: Lane, other: Lane, shown: Collection[str] = ()) -> None:
        """Run what stage `stage` runs, dropping each value after its last reader there, except those `shown`.

        A stage shows the same values every time.
        """
        if stage not in self._plans:
            self._plans[stage] = self._plan(stage, shown)
        steps, dropped = self._plans[stage]
        with running(index):
            for node in steps:
                lane[node.name] = self.call(node, lane, {}, self.changed)
                if node in self.apart:
                    other[node.name] = self.call(node, other, lane)
                for name in dropped.get(node, ()):
                    lane.pop(name, None)
                    other.pop(name, None)

    def call(self, node: fx.Node, lane: Lane, shared: Lane, changed: Mapping[fx.Node, Change] | None = None) -> Any:
        """Return what `node` gives for the values of a lane and, where it has none, of `shared`.

        `changed` has other weights, or other arguments, for some sites; without it, dequantize(quantize(x)) is x.
        """

        def value(source: fx.Node) -> Any:
            if source.op == "get_attr":
                return self.program.weight(source)
            return lane[source.name] if source.name in lane else shared[source.name]

        if changed is None and (plain := unquantized(node)) is not None:
            return value(plain)
        new = _by_source(node, changed[node]) if changed and node in changed else {}

        def given(source: fx.Node) -> Any:
            return new[source] if source in new else value(source)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def steps(self, stage: int) -> list[fx.Node]:
        return [node for node in self.program.graph.nodes if self.stages.get(node) == stage]

    def _plan(self, stage: int, shown: Collection[str]) -> tuple[list[fx.Node], dict[fx.Node, list[str]]]:
        steps, needed = self.steps(stage), self.needed_after(stage)
        place = {node: index for index, node in enumerate(steps)}
        readers_of: dict[fx.Node, list[int]] = {}
        for node in steps:
            for source in self._read(node):
                readers_of.setdefault(source, []).append(place[node])
        dropped: dict[fx.Node, list[str]] = {}
        for source in self.program.graph.nodes:
            readers = readers_of.get(source, [])
            if readers and source.op != "get_attr" and source.name not in needed and source.name not in shown:
                dropped.setdefault(steps[max(readers)], []).append(source.name)
        return steps, dropped

    def needed_after(self, stage: int) -> set[str]:
        """Return the names of the values that stages after `stage` read."""
        if stage not in self._needed:
            later = [node for node in self.program.graph.nodes if self.read_in(node) > stage]
            read = [source for node in later for source in self._read(node)]
            self._needed[stage] = {source.name for source in read if source.op != "get_attr"}
        return self._needed[stage]

    def read_in(self, node: fx.Node) -> int:
        """Return the stage in which a node reads its inputs; -1 where it never does."""
        return self.stages.get(node, -1)

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """Return what a node reads in either lane."""
        plain = unquantized(node) if self.exact else None
        return node.all_input_nodes if plain is None else [*node.all_input_nodes, plain]


class Stream(Staged):
    """Runs `program` over `batches` for the sites given.

    Args:
        program: left as it is.
        sites: calls with an `input` and a `weight`.
        batches: the calibration data, read once.
        progress: shows a step for each batch of each stage.
        exact: whether to run the exact lane too.
        spill: whether to keep values between stages in files.
        beside: for some sites a value to be shown with what they read; no site feeds it that does not feed them, too.
    """

    def __init__(
        self,
        program: Program,
        sites: Collection[fx.Node],
        batches: Batches,
        progress: Progress,
        exact: bool = False,
        spill: bool = False,
        beside: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        self._progress, self._sites = progress, set(sites)
        self._beside = dict(beside or {})
        self._ordered = [node for node in program.graph.nodes if node in self._sites]
        self._level = levels(program, self._sites)
        self._last = max((self._level[site] for site in self._sites), default=-1)
        # A site waits for its change.
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        stages = {node: self._level[node] + (node in self._sites) for node in calls}
        reached = {node: stage for node, stage in stages.items() if stage <= self._last}
        super().__init__(program, reached, sites, batches, exact, spill)

    def run(self, show: Show, settle: Settle) -> None:
        """Show the inputs of the sites and change them, level by level.

        Raises GraphoptError where there is no batch, or a batch does not run.
        """
        try:
            for level in range(self._last + 1):
                ready = [site for site in self._ordered if self._level[site] == level]
                seen = [each for site in ready for each in (arguments(site)["input"], self._beside.get(site))]
                shown = {each.name for each in seen if each is not None}
                with self._progress.stage(f"stage {level + 1} of {self._last + 1}", len(self.batches)) as stage:
                    for index, (lane, other) in self.lanes(level):
                        self.advance(index, level, lane, other, shown)
                        for site in ready:
                            show(self._reading(site, index, lane, other))
                        self.keep(index, level, lane, other)
                        stage.advance()
                release_freed()
                self.changed.update(settle(ready))
        finally:
            self.store.clear()

    def _reading(self, site: fx.Node, index: int, lane: Lane, other: Lane) -> Reading:
        def both(node: fx.Node | None) -> tuple[Any, Any]:
            value = None if node is None else lane[node.name]
            return value, other.get(node.name, value) if node is not None and self.exact else None

        return Reading(site, index, *both(arguments(site)["input"]), *both(self._beside.get(site)))

    def _read(self, node: fx.Node) -> list[fx.Node]:
        return [*super()._read(node), *([self._beside[node]] if node in self._beside else [])]

    def read_in(self, node: fx.Node) -> int:
        return self._level[node] if node in self._sites and node not in self.stages else super().read_in(node)


def levels(program: Program, sites: Collection[fx.Node]) -> dict[fx.Node, int]:
    """Return for each node how many of `sites`, one after the other, stand before it."""
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


def _by_source(node: fx.Node, change: Change) -> dict[fx.Node, Tensor]:
    """Return what is new of a call by the node that it stands for."""
    named = arguments(node)
    return {named[key]: value for key, value in ({"weight": change} if isinstance(change, Tensor) else change).items()}


def _only(lane: Lane, names: set[str]) -> Lane:
    return {name: value for name, value in lane.items() if name in names}


def empty_store(spill: bool) -> _Memory:
    """Return what keeps values by batch: memory, or files."""
    return _Files() if spill else _Memory()


class _Memory:
    """Values between two stages, in memory."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Lane, Lane]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, index: int, lane: Lane, other: Lane) -> None:
        self._kept[index] = lane, other

    def take(self, index: int) -> tuple[Lane, Lane]:
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

    def put(self, index: int, lane: Lane, other: Lane) -> None:
        own = pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (lane, other))
        try:
            torch.save(own, self._path(index))
        except (OSError, RuntimeError) as error:
            raise GraphoptError(
                f"cannot keep activations in {tempfile.gettempdir()} ({described(error)}); point TMPDIR to a folder "
                "with room, or leave spill out"
            ) from error
        self._count = max(self._count, index + 1)

    def take(self, index: int) -> tuple[Lane, Lane]:
        lane, other = torch.load(self._path(index), weights_only=True)
        return lane, other

    def clear(self) -> None:
        self._folder.cleanup()

    def _path(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.pt"
