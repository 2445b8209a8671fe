"""Backend: the protocol by which the core lowers, runs and measures a Program without importing any backend."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from graphopt.ir.program import Program
from graphopt.target import Target


@dataclass
class ExportReport:
    """What was written and what a real runtime made of it.

    Attributes:
        path: the file. size_bytes: of the file and its external data. opset: of the default ONNX domain.
        fused: integer operators in the runtime's optimized graph, `type -> count`.
        unfused: `(node, reason)` for operators with Q/DQ that run a float kernel, and for Q/DQ left over.
        sqnr_db: signal to quantization noise of the outputs against the float model, the worst output.
        max_steps: largest difference to the torch emulation, in quantization steps of that output (of 1/255 of its
            range where the output is not quantized).
        latency_ms, baseline_latency_ms: medians of this file and of the float export, interleaved, one thread;
            None where not measured.
        baseline_size_bytes: of the float export.
        node_ms, baseline_node_ms: milliseconds a run of each operator, by its name in the program, of this file and of
            the float export, by the runtime's profiler; empty where not measured.
        slow_nodes: where the time went, filled in when the file is slower than its baseline.
        notes: sentences about what was decided on the way.
    """

    path: Path
    size_bytes: int
    opset: int
    fused: dict[str, int] = field(default_factory=dict)
    unfused: list[tuple[str, str]] = field(default_factory=list)
    sqnr_db: float | None = None
    max_steps: float | None = None
    latency_ms: float | None = None
    baseline_latency_ms: float | None = None
    baseline_size_bytes: int | None = None
    node_ms: dict[str, float] = field(default_factory=dict)
    baseline_node_ms: dict[str, float] = field(default_factory=dict)
    slow_nodes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def latency_ratio(self) -> float | None:
        """Latency of this file over that of the float export."""
        if self.latency_ms is None or not self.baseline_latency_ms:
            return None
        return self.latency_ms / self.baseline_latency_ms


@dataclass
class Timing:
    """How long a file takes in its runtime.

    Attributes:
        latency_ms, minimum_ms: median and least of `runs` timed runs.
        nodes: `(name, operator, milliseconds a run)` of the executed graph, slowest first, by the runtime's profiler.
        inputs: names, types and shapes of what it was run on.
    """

    latency_ms: float
    minimum_ms: float
    runs: int
    nodes: list[tuple[str, str, float]] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)


@dataclass
class Profile:
    """How long a program takes on the target of a backend.

    Attributes:
        latency_ms: median of runs in turns with the other programs, one thread.
        nodes: milliseconds a run of each of the program's operators, by name; what belongs to none is under "".
        size_bytes: of the file.
    """

    latency_ms: float
    nodes: dict[str, float] = field(default_factory=dict)
    size_bytes: int = 0


Rounds = Callable[[Any], Any]  # rounds a tensor as the runtime rounds what it shows
See = Callable[[str, str, Any, Rounds | None], None]  # a site, the node at which it shows, the value, how it is rounded


class Observer(Protocol):
    """Shows what the sites of a program give where something else than torch computes it.

    A site is the name of an operator. It may show at an operator behind it, which the runtime computes together with
    it, and rounded, where it gives nothing else: then it is to be compared with other values rounded alike. Sites that
    cannot be seen are left out. `exact` holds the values of a reference, by the names of its nodes.
    """

    def local(self, flat: list[Any], exact: Mapping[str, Any], sites: Collection[str], see: See) -> None:
        """Show what each site gives where everything before it is exact."""

    def propagated(self, flat: list[Any], exact: Mapping[str, Any], sites: Collection[str], see: See) -> None:
        """Show what each site gives on the inputs."""


@runtime_checkable
class Backend(Protocol):
    """What a backend offers that writes files for a runtime.

    One that compiles programs to be called in the place of the model offers `compile` instead of `lower`, `run`,
    `export`, `observer` and `profile`, and need not have targets (`result.compile`).

    Attributes:
        name: as users call it. targets: runtimes that it lowers for. file: which file of a run directory it measures.
    """

    name: str
    targets: Sequence[Target]
    file: str

    def lower(self, program: Program, path: Path) -> int:
        """Write `program` to `path` atomically and return the opset (or format version)."""

    def run(self, path: Path, flat_inputs: Sequence[Any]) -> list[Any]:
        """Run the file on flat inputs and return flat outputs as numpy arrays."""

    def export(self, program: Program, path: Path, baseline: Program | None, measure: bool) -> ExportReport:
        """Lower, check, run, compare with `program` and `baseline`, and measure."""

    def observer(self, path: Path, program: Program) -> Observer:
        """Look into the runtime while it computes the file that a program was lowered to.

        Raises GraphoptError where the file does not load.
        """

    def measure(self, paths: Mapping[str, Path], threads: int) -> dict[str, Timing]:
        """Time files that take the same inputs in turns, on inputs made up from what the first one declares.

        Raises GraphoptError where a file does not load, or takes other inputs than the first.
        """

    def profile(self, programs: Mapping[str, Program]) -> dict[str, Profile]:
        """Lower programs of the same inputs and time them in turns on their example inputs.

        Raises NotExpressible where the target has no form for one of them.
        """
