"""What a pass is given besides the program."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphopt.backend import Profile
from graphopt.budget import Budget
from graphopt.calibration import Batches, Histogram, collect
from graphopt.errors import GraphoptError
from graphopt.ir.program import Program
from graphopt.pipeline.journal import Journal
from graphopt.progress import Progress, Silent
from graphopt.target import Target


@dataclass
class Context:
    """Everything a pass may use.

    Attributes:
        target: the profile to place Q/DQ for.
        calibration: batches of inputs, or None.
        evaluate: the user's metric, `metric(module) -> float`, or None.
        loss: `loss(module, batch) -> scalar`, or None.
        measure: times programs of the same inputs against each other on the target; None where nothing can be timed.
        journal: remembers measurements that decide something, over interruptions too.
        budget: what must hold of the result.
        original: the captured program, to which the ratios of the budget refer; None where there is no run.
        seed: of every random choice.
        progress: shows long work.
        strict: raise when an exact pass changes the function, instead of dropping its changes (for tests).
    """

    target: Target
    calibration: Batches | None = None
    evaluate: Callable[[Any], float] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    measure: Callable[[Mapping[str, Program]], dict[str, Profile]] | None = None
    journal: Journal = field(default_factory=Journal)
    budget: Budget = field(default_factory=Budget)
    original: Program | None = None
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    strict: bool = False
    _seen: tuple[Any, tuple[Any, ...], dict[str, Histogram]] = field(default=((), (), {}), repr=False)

    def needed_calibration(self, who: str) -> Batches:
        """Return the calibration batches; GraphoptError says that `who` needs them."""
        if self.calibration is None:
            raise GraphoptError(f"{who} needs calibration data; pass calibration=, an iterable of inputs")
        return self.calibration

    def timed(self, programs: Mapping[str, Program]) -> dict[str, Profile]:
        """Return what `measure` finds, or found before for the same programs: a run that goes on decides alike."""
        assert self.measure is not None
        key = hashlib.sha256("\0".join(f"{name}\0{program}" for name, program in programs.items()).encode()).hexdigest()

        def measured() -> dict[str, Any]:
            assert self.measure is not None
            return {name: dataclasses.asdict(profile) for name, profile in self.measure(programs).items()}

        return {name: Profile(**each) for name, each in self.journal.recorded(f"times {key}", measured).items()}

    def histograms(self, program: Program, nodes: Collection[fx.Node], who: str) -> dict[str, Histogram]:
        """Return a histogram for each node, by name, over the calibration data.

        What was collected of a program stays until another one is asked about, or `forget` is called: passes that try
        several ways to quantize the same program read the data once. Raises GraphoptError where `who` needs data and
        there is none.
        """
        nodes_now = tuple((node.name, node.target, repr(node.args), repr(node.kwargs)) for node in program.graph.nodes)
        weights = tuple(program.weights.values())
        known_nodes, known_weights, seen = self._seen
        if known_nodes != nodes_now or any(a is not b for a, b in zip(known_weights, weights, strict=True)):
            seen = {}
            self._seen = nodes_now, weights, seen
        if missing := [node for node in nodes if node.name not in seen]:
            found = collect(program, missing, self.needed_calibration(who), self.progress)
            seen |= {node.name: histogram for node, histogram in found.items()}
        return seen

    def forget(self) -> None:
        """Drop what `histograms` remembers, and its hold on the weights."""
        self._seen = (), (), {}
