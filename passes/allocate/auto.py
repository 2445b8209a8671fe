"""Try one way after the other to meet the budget, each measured, from the one that changes least.

    int8      activations and weights of each site as is fast and accurate here (`choose_schemes`)
    bits      weights alone, each with the bits that it needs (`allocate`), where files are still too large
    prune     channels, neurons and heads go, as far as the budget asks, then int8 once more; where it is allowed

A way that cannot meet the budget by what is known of int8, or that would take longer than the minutes that are left,
is not tried. After each the size of the file, the latency beside that of the float model, and the metric are measured.
The first that holds the whole budget is taken; one that does and is slower than the float model, where latency is not
bounded, only when no later one holds it. Where none does, the one that misses it least is taken, and how far each went
is said, so that one knows which bound to give up. With a run directory the best so far lies beside the journal as
`best.pt2`.

Lossy. Runs after the exact passes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from graphopt.analysis import file_bytes, macs, parameter_bytes, parameters, weight_bits
from graphopt.budget import Budget
from graphopt.errors import GraphoptError, NotExpressible
from graphopt.ir import Changes, Program, Site
from graphopt.metric import rated
from graphopt.pipeline import Branch, Composite, Context, Pass, Recipe, parse_pass
from graphopt.quantization.grids import grid

_TRANSFORMED = "best_of(alternatives=[['equalize'], ['smooth'], ['smooth', 'rotate']])"
_INT8 = (_TRANSFORMED, "quantize_embedding", "choose_schemes", "quantize_static", "quantize_dynamic")
_GRID = "quantize_weights(grid='int4', objective='plain', rounding='nearest')"
_SMOOTHED = f"best_of(judge={_GRID!r}, alternatives=[['smooth'], ['smooth', 'rotate']])"
_WIDTHS = (0.25, 0.4, 0.55)  # of every space that go, where the budget does not say how much
_NEARER = 0.98  # of the size that is asked for: quantized graphs have more nodes
_LARGE = 5e6  # weights, from which rounding does less for each and fewer data judge candidates
_FEW = "samples=8, alone=2"
_TIMES = 4  # as long as int8 takes what comes after it, before anything is known
_SMALLER = ("size_ratio", "average_bits")
_SHRINKING = ("size_ratio", "latency_ratio")
_LIGHTER = ("macs_ratio", "params_ratio")


@dataclass(frozen=True)
class Attempt:
    """A way to meet the budget.

    Attributes:
        name: as it is told. passes: it consists of, as `str(pass)` writes them. budget: for these passes.
        least: what it cannot go below, by field of the budget.
    """

    name: str
    passes: tuple[str, ...]
    budget: Budget
    least: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    """An attempt, what was measured of it by field of the budget, which bounds it missed, by how much, and its time."""

    attempt: Attempt
    branch: Branch
    measured: dict[str, float]
    missed: list[str]
    excess: float
    seconds: float


@dataclass(frozen=True)
class Auto(Composite):
    """Find a way to meet the budget.

    Attributes:
        prune: whether widths may go. bits: whether weights may have fewer than eight bits.
        levels: of weights, where these may have fewer.
        minutes: no way is begun that would take longer, by the time that those before it took; zero: no limit.
        workers: processes that judge candidates.
        evaluations: see `allocate`.
        skip: globs of places that stay in floating point.
    """

    exact: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "retype_floats")

    prune: bool = True
    bits: bool = True
    levels: tuple[str, ...] = ("int8", "int4", "int3", "int2")
    minutes: Annotated[float, Field(ge=0)] = 10
    workers: PositiveInt = 1
    evaluations: PositiveInt = 20
    skip: tuple[str, ...] = ()

    def compose(
        self, program: Program, branch: Callable[[Sequence[Pass], Context], Branch], context: Context
    ) -> tuple[Branch | None, Changes]:
        work = _Work(self, program, branch, context)
        best = work.found()
        changes = Changes(facts={"path": work.path, "measured": best.measured, "chosen": best.attempt.name})
        changes.touched.append(Site("program", f"{best.attempt.name} was taken: {_shown(best.measured)}"))
        return best.branch, changes


@dataclass
class _Work:
    options: Auto
    program: Program
    branch: Callable[[Sequence[Pass], Context], Branch]
    context: Context
    path: list[str] = field(default_factory=list)
    _contexts: dict[Budget, Context] = field(default_factory=dict)
    _before: float | None = None
    _float_bytes: int = 0

    def found(self) -> Tried:
        """Return the first attempt that holds the budget, or that which misses it least."""
        tried: list[Tried] = []
        begun = time.perf_counter()
        if self.context.evaluate is not None:  # what is wrong with the metric is known before any work is done
            self._before = self._metric(self.context.original or self.program, "the original model")
        for attempt in self._attempts(tried):
            if reason := self._not_worth_it(attempt, tried, begun):
                self.path.append(f"{attempt.name} was not tried: {reason}")
                continue
            so_far = _best(tried) if tried else None
            beside = f", best so far {so_far.attempt.name} ({_shown(so_far.measured)})" if so_far else ""
            with self.context.progress.stage(f"try {attempt.name}{beside}"):
                try:
                    made = self._tried(attempt)
                except GraphoptError as error:
                    self.path.append(f"{attempt.name}: {error}")
                    continue
            tried.append(made)
            outcome = "; ".join(made.missed) or "the budget holds"
            self.path.append(f"{attempt.name}: {_shown(made.measured)} after {made.seconds:.0f} s: {outcome}")
            if made is _best(tried):
                self._save(made.branch.program)
            if not made.missed:
                if not self._slower(made):
                    return made
                self.path.append(f"{attempt.name} is slower than the float model; others are tried")
        if not tried:
            raise GraphoptError(f"auto found no way: {'; '.join(self.path)}")
        best = _best(tried)
        if not best.missed:
            self.path.append(f"{best.attempt.name} was taken: nothing faster holds the budget")
            return best
        reached = ", ".join(
            f"{name} {min(each.measured[name] for each in tried if name in each.measured):.3g}"
            for name in self.context.budget.bounds()
            if any(name in each.measured for each in tried)
        )
        self.path.append(f"out of reach, the least of each alone was {reached}: {best.attempt.name} was taken")
        return best

    def _not_worth_it(self, attempt: Attempt, tried: Sequence[Tried], begun: float) -> str:
        """Return why an attempt is left out, or an empty string."""
        bounds = self.context.budget.bounds()
        for name, least in attempt.least.items():
            if name in bounds and least > bounds[name]:
                return f"{name} could not fall below {least:.3g}"
        if not self.options.minutes or not tried:
            return ""
        longest = max(each.seconds for each in tried)
        needed = longest * (_TIMES if [each.attempt.name for each in tried] == ["int8"] else 1)
        spent = time.perf_counter() - begun
        # What was decided once is decided so when the run goes on.
        late = self.context.journal.recorded(
            f"auto: no time for {attempt.name}", lambda: spent + needed > 60 * self.options.minutes
        )
        return f"the {self.options.minutes:g} minutes would not do, raise auto.minutes" if late else ""

    def _slower(self, made: Tried) -> bool:
        return "latency_ratio" not in self.context.budget.bounds() and made.measured.get("latency_ratio", 0.0) > 1

    def _attempts(self, tried: list[Tried]) -> Iterator[Attempt]:
        """Yield ways, by what those before it have missed."""
        budget, options = self.context.budget, self.options
        bounds = budget.bounds()
        whole = Budget(metric_drop=budget.metric_drop)
        lighter = {name: bounds[name] for name in _LIGHTER if name in bounds}
        if not lighter:
            yield Attempt("int8", _INT8, whole)
        if options.bits and not lighter and self._misses(tried, _SMALLER):
            yield self._by_bits("bits", (), {name: bounds[name] for name in _SMALLER if name in bounds})
        if not options.prune:
            return
        if lighter:
            both = Budget(**lighter, metric_drop=budget.metric_drop)
            yield Attempt("prune", ("prune",), both)
            yield Attempt("prune, then int8", ("prune", *_INT8), both)
        elif bounds.keys() - {"metric_drop"}:
            for ratio in _WIDTHS:
                # Weights that lose inputs and outputs lose most; what is measured shrinks by no more.
                known = tried[0].measured if tried else {}
                least = {name: known[name] * (1 - ratio) ** 2 for name in _SHRINKING if name in known}
                least |= {name: known[name] for name in ("average_bits",) if name in known}
                yield Attempt(f"prune {ratio:.0%}, then int8", (f"prune(ratio={ratio})", *_INT8), whole, least)
                if tried and tried[-1].measured.get("metric_drop", 0.0) > bounds.get("metric_drop", math.inf):
                    return  # more harms more

    def _by_bits(self, name: str, first: tuple[str, ...], bounds: dict[str, float]) -> Attempt:
        options = self.options
        large = parameters(self.program) > _LARGE
        how = "objective='gram', sweeps=0" if large else "objective='fisher'"
        levels = f"quantize_weights(levels={list(options.levels)!r}, {how})"
        much = f", {_FEW}, compare=[]" if large else ""
        allocate = (
            f"allocate(choices=[{levels!r}], evaluations={options.evaluations}, workers={options.workers}{much})"
        )
        least = self._least()
        if "size_ratio" in bounds:
            bounds = bounds | {"size_ratio": max(self._of_weights(bounds["size_ratio"]), 0.0)}
        drop = self.context.budget.metric_drop
        return Attempt(name, (*first, _SMOOTHED, allocate), Budget(**bounds, metric_drop=drop), least)

    def _least(self) -> dict[str, float]:
        """Return what is left where every weight has the fewest bits."""
        bits = min((grid(each).bits for each in self.options.levels if each != "float"), default=32.0)
        stored = min((each for each in self.context.target.code_bits if each >= bits), default=bits)
        weights = parameter_bytes(self.context.original or self.program)
        whole = max(self._float_bytes, weights)
        return {"average_bits": bits, "size_ratio": (whole - weights + weights * stored / 32) / max(whole, 1)}

    def _of_weights(self, ratio: float) -> float:
        """Return what the weights may take where the whole file may take `ratio`: the graph is as large as before."""
        weights = parameter_bytes(self.context.original or self.program)
        whole = max(self._float_bytes, weights)
        return _NEARER * (ratio * whole - (whole - weights)) / max(weights, 1)

    def _misses(self, tried: list[Tried], names: Sequence[str]) -> bool:
        bounds = self.context.budget.bounds()
        return any(
            name in bounds and all(not each.measured.get(name, math.inf) <= bounds[name] for each in tried)
            for name in names
        )

    def _tried(self, attempt: Attempt) -> Tried:
        # Ways that begin alike, under the same budget, go on from where the first one was: the context is the same.
        context = self._contexts.setdefault(attempt.budget, dataclasses.replace(self.context, budget=attempt.budget))
        passes = Recipe("", tuple(map(parse_pass, attempt.passes))).keeping_float(self.options.skip).passes
        started = time.perf_counter()
        made = self.branch(passes, context)
        measured = self._measured(made.program)
        bounds = self.context.budget.bounds()
        over = {name: measured[name] for name in bounds.keys() & measured.keys() if not measured[name] <= bounds[name]}
        missed = [f"{name} {value:.3g} is more than {bounds[name]:g}" for name, value in over.items()]
        excess = sum(math.inf if math.isnan(v) else (v - bounds[n]) / max(bounds[n], 0.1) for n, v in over.items())
        return Tried(attempt, made, measured, missed, excess, time.perf_counter() - started)

    def _measured(self, program: Program) -> dict[str, float]:
        """Return what is known of a program, by field of the budget."""
        context = self.context
        original = context.original or self.program
        found = {
            "macs_ratio": macs(program) / max(macs(original), 1),
            "params_ratio": parameters(program) / max(parameters(original), 1),
            "average_bits": weight_bits(program) / max(parameters(program), 1),
            "size_ratio": file_bytes(program, context.target.code_bits) / max(parameter_bytes(original), 1),
        }
        if context.measure is not None:
            try:
                with context.progress.stage("measure"):
                    profiles = context.timed({"float": self.program, "tried": program})
            except NotExpressible as error:
                self.path.append(f"not measured: {error}")
            else:
                found["latency_ratio"] = profiles["tried"].latency_ms / max(profiles["float"].latency_ms, 1e-9)
                if profiles["float"].size_bytes:
                    self._float_bytes = profiles["float"].size_bytes
                    found["size_ratio"] = profiles["tried"].size_bytes / profiles["float"].size_bytes
        if self._before is not None:
            found["metric_drop"] = self._before - self._metric(program, "a candidate")
        return found

    def _metric(self, program: Program, what: str) -> float:
        evaluate = self.context.evaluate
        assert evaluate is not None
        with self.context.progress.stage("evaluate"):
            return rated(evaluate, program, what, self.context.seed)

    def _save(self, program: Program) -> None:
        """Keep the best so far; a full disk costs that, not the run."""
        if (journal := self.context.journal.path) is not None:
            try:
                program.save(journal.parent / "best.pt2")
            except GraphoptError as error:
                self.path.append(f"the best so far could not be kept: {error}")


def _best(tried: Sequence[Tried]) -> Tried:
    """Return the one that misses the budget least, of several the fastest."""
    return min(tried, key=lambda each: (each.excess, each.measured.get("latency_ratio", 0.0)))


def _shown(measured: dict[str, float]) -> str:
    names = {"size_ratio": "size", "latency_ratio": "latency", "metric_drop": "metric drop"}
    return ", ".join(f"{shown} {measured[name]:.3g}" for name, shown in names.items() if name in measured)
