"""Choose a level for every unit that other passes offer, under a budget.

    program  ->  the candidate of least divergence from the original whose costs hold the budget

The passes named in `choices` say what can be chosen (grids of weights, blocks that stay or go) and compute every level
once. Each unit is tried alone at each level; how the effects of two units add up is seen from the same outputs
(`graphopt.search.surrogate`). A solver proposes candidates, which are put together from the levels and judged on
calibration data:

    integer     the integer program over the losses of single units, with terms for the strongest pairs
    evolution   the same, then offspring of the best that hold the budget ("EvoPress: Accurate Dynamic Model Compression
                via Evolutionary Search")
    bisection   units in the order of loss for what they save, as far as the metric allows or the budget asks
    greedy      the same order, until the budget holds; nothing is judged on the way
    random      to compare with

Where the budget bounds the metric alone, as much is saved as the metric allows, by bisection. What is chosen is then
done by the passes themselves, on all the data: they may do better than the candidate, which is put together from levels
that were computed one by one.

Lossy. Runs where the passes in `choices` would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from graphopt.analysis import resources
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Site
from graphopt.passes.allocate.latency import RESOURCE as LATENCY
from graphopt.passes.allocate.latency import with_latencies
from graphopt.pipeline import Branch, Composite, Context, Pass, Recipe, parse_pass
from graphopt.pipeline.unfinished import run_key
from graphopt.search import (
    Assignment,
    Choices,
    Estimate,
    Evaluator,
    Front,
    Infeasible,
    Point,
    Pool,
    Problem,
    Search,
    Solver,
    Store,
    StoredCandidates,
    Surrogate,
    curvature,
    gathered,
    singles_of,
)

_BOUNDS = {"average_bits": "bits", "size_ratio": "size_bytes", "macs_ratio": "macs", "params_ratio": "parameters"}
_CALLS = 3  # of a metric that does not return the same twice, to tell by how much it varies
_TRIES = 3  # until the latency that was asked for is measured
_NEARER = 0.98  # of it
_SHOWN = 200  # points of the front in the trace


@dataclass(frozen=True)
class Allocate(Composite):
    """Choose what other passes do to each place, under the budget.

    Attributes:
        choices: passes that offer levels, each as `str(pass)` writes it.
        solver: see above.
        estimate: of what a unit loses at a level. divergence: measured, each alone. interaction: the same, and pairs.
            hessian, fisher, sqnr: see `graphopt.search.curvature`; for levels that change nothing but weights.
        evaluations: candidates that the solver may judge on all the data, or as many pieces of it altogether.
        samples: calibration batches to judge by. alone: of these, those on which units are tried alone.
        pairs: share of the pairs of units that the integer program knows of.
        sweep: other bounds at which a candidate is judged, for the front that the report shows.
        compare: other estimates to report the correlation of with the true losses.
        workers: processes. cluster: ray spreads them over a Ray cluster.
        timeout: seconds that one evaluation may take; a candidate that takes longer is left out.
        skip: globs of places that stay in floating point.
    """

    exact: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "retype_floats")

    choices: tuple[str, ...] = ("quantize_weights(levels=['int8', 'int6', 'int4', 'int3', 'int2'])",)
    solver: Solver = "evolution"
    estimate: Estimate = "interaction"
    evaluations: PositiveInt = 50
    samples: PositiveInt = 32
    alone: PositiveInt = 8
    pairs: Annotated[float, Field(ge=0, le=1)] = 0.05
    sweep: Annotated[int, Field(ge=0)] = 6
    compare: tuple[Estimate, ...] = ("fisher", "sqnr")
    workers: PositiveInt = 1
    cluster: Literal["", "ray"] = ""
    timeout: Annotated[float, Field(gt=0)] | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.choices:
            what = "choices=['quantize_weights(levels=...)']"
            raise GraphoptError(f"{self.name} needs passes to choose for; give {what}")
        for text in self.choices:
            parse_pass(text)

    def compose(
        self, program: Program, branch: Callable[[Sequence[Pass], Context], Branch], context: Context
    ) -> tuple[Branch | None, Changes]:
        started, making = time.perf_counter(), 0.0
        limits = _limits(context, program)
        if not limits and context.budget.latency_ratio is None and context.budget.metric_drop is None:
            names = ", ".join([*_BOUNDS, "latency_ratio", "metric_drop"])
            raise GraphoptError(f"{self.name} needs to know what must hold: give a budget with one of {names}")
        batches = context.needed_calibration(self.name).first(self.samples)
        with _folder(context) as folder:
            work = _Work.prepared(self, program, context, limits, batches, folder)
            for attempt in range(_TRIES):
                try:
                    chosen = work.chosen()
                except Infeasible:
                    if not attempt:
                        raise
                    break  # the bound was lowered too far; what was made before stays
                passes, begun = work.choices.chosen(chosen.assignment), time.perf_counter()
                made = branch(passes, context) if passes else None
                making += time.perf_counter() - begun
                if not (missed := work.slower(made.program if made is not None else program)):
                    break
                work.facts["note"] = missed
            changes = work.changes(chosen)
        spent = {
            "all": time.perf_counter() - started, "levels": work.level_seconds,
            "evaluations": work.evaluator.seconds, "estimates": work.search.estimate_seconds, "making": making,
        }  # fmt: skip
        changes.facts["seconds"] = {name: round(each, 3) for name, each in spent.items()}
        return made, changes


@contextlib.contextmanager
def _folder(context: Context) -> Iterator[Path]:
    """Yield where levels are kept: beside the journal of a run, so that one that goes on finds them."""
    journal = context.journal.path
    if journal is None:
        with tempfile.TemporaryDirectory(prefix="graphopt-levels-") as name:
            yield Path(name)
        return
    folder = journal.parent / "levels"
    folder.mkdir(exist_ok=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # an interruption leaves it


def _limits(context: Context, program: Program) -> dict[str, float]:
    """Return the most that may be spent of each resource that the budget bounds."""
    whole = resources(context.original or program)
    bounds = context.budget.bounds()
    found = {_BOUNDS[name]: bound * whole[_BOUNDS[name]] for name, bound in bounds.items() if name in _BOUNDS}
    if "average_bits" in bounds:
        found["bits"] = bounds["average_bits"] * whole["parameters"]
    return found


@dataclass
class _Work:
    """One search."""

    options: Allocate
    context: Context
    program: Program
    choices: Choices
    evaluator: Evaluator
    store: Store
    batches: list[list[Any]]
    level_seconds: float

    @functools.cached_property
    def search(self) -> Search:
        options = self.options
        return Search(
            self.evaluator, options.solver, options.estimate, self._by_weights, options.evaluations, options.alone,
            options.pairs, options.compare, self.context.seed,
        )  # fmt: skip

    @property
    def facts(self) -> dict[str, Any]:
        return self.search.facts

    @staticmethod
    def prepared(
        options: Allocate, program: Program, context: Context, limits: dict[str, float], batches: list[list[Any]],
        folder: Path,
    ) -> _Work:  # fmt: skip
        """Compute the levels, unless an interrupted run has, and write what candidates are made of."""
        data = context.needed_calibration(options.name)
        decides = (options.choices, options.skip, context.seed, options.samples, sorted(limits.items()))
        key = run_key(program, data, *decides)
        known, started = folder / "choices.json", time.perf_counter()
        pool = Pool(options.workers, options.cluster, options.timeout)
        pool.warm()
        if (folder / "key").exists() and (folder / "key").read_text() == key and known.exists():
            choices = Choices.from_json(known.read_text())
        else:
            (folder / "key").unlink(missing_ok=True)  # half of these levels are no use to another search
            passes = Recipe("", tuple(map(parse_pass, options.choices))).keeping_float(options.skip).passes
            with context.progress.stage("compute levels"):
                choices = gathered(passes, program, context, Store(folder), resources(program))
        level_seconds = time.perf_counter() - started
        original = context.original or program
        kept = StoredCandidates.keep(
            folder, key, program, original, choices, batches, context.seed, context.evaluate
        )
        (folder / "key").write_text(key)
        if (ratio := context.budget.latency_ratio) is not None:
            choices = with_latencies(choices, program, context, options.name)
            limits = limits | {LATENCY: ratio * choices.problem.costs(choices.problem.start)[LATENCY]}
        problem = dataclasses.replace(choices.problem, limits=limits)
        evaluator = Evaluator(problem, kept, pool, context.journal, context.progress)
        return _Work(options, context, program, choices, evaluator, Store(folder), batches, level_seconds)

    @property
    def problem(self) -> Problem:
        return self.evaluator.problem

    def slower(self, made: Program) -> str:
        """Return by how much a program misses the bound on the latency, or an empty string; the bound is then lowered.

        What a level takes depends on what stands around it: the sum of times only comes near.
        """
        asked = self.context.budget.latency_ratio
        if asked is None:
            return ""
        profiles = self.context.timed({"as it is": self.program, "chosen": made})
        found = profiles["chosen"].latency_ms / max(profiles["as it is"].latency_ms, 1e-9)
        self.facts["latency_ratio"] = round(found, 4)
        if found <= asked:
            return ""
        limits = {**self.problem.limits, LATENCY: self.problem.limits[LATENCY] * _NEARER * asked / found}
        self.evaluator.problem = dataclasses.replace(self.problem, limits=limits)
        return f"budget.latency_ratio ≤ {asked:g} does not hold: {found:.3g} was measured"

    # Choosing -----------------------------------------------------------------------------------------------------

    def chosen(self) -> Point:
        """Return the candidate to go on with."""
        if not self.problem.units:
            offered = ", ".join(self.options.choices)
            raise GraphoptError(f"{self.options.name} found nothing to choose: {offered} offer no unit")
        self.problem.check(self._described)
        if self.problem.limits and self.problem.feasible(self.problem.start):
            self.facts["note"] = "the budget holds as it is"
            if self.context.budget.metric_drop is None:
                return self.search.point(self.problem.start, 0.0, "as it is")
        surrogate = self.search.estimated()
        if not self.problem.limits:
            return self._within_metric(surrogate)
        front = self.search.solved(surrogate)
        with self.context.progress.stage("look at other bounds"):
            around = self.search.swept(surrogate, self.options.sweep)
        around.update(front)
        self.facts["front"] = self._told(around)
        if not len(front):
            raise GraphoptError(f"{self.options.name}: no candidate within the budget gives finite outputs")
        ordered = sorted(front, key=lambda each: each.loss)
        self.search.correlate(surrogate, front)
        return self._best_by_metric(ordered)

    def _described(self, resource: str, value: float) -> str:
        whole = resources(self.context.original or self.program)
        if resource == LATENCY:
            return f"budget.latency_ratio {value / self.problem.costs(self.problem.start)[LATENCY]:.3g}"
        for name, of in _BOUNDS.items():
            if of == resource and (name == "average_bits") == (resource == "bits"):
                return f"budget.{name} {value / whole['parameters' if resource == 'bits' else resource]:.4g}"
        return f"{resource} {value:.6g}"

    def _by_weights(self, estimate: str) -> dict[tuple[int, int], float]:
        """Return an estimate for the levels that change nothing but weights."""
        if estimate not in ("hessian", "fisher", "sqnr"):
            return {}
        changes = {}
        for unit, level in singles_of(self.problem):
            if found := self.choices.weights_of(unit, level, self.store):
                changes[unit, level] = found
        if not changes:
            return {}
        with self.context.progress.stage(f"estimate by {estimate}"):
            if estimate == "sqnr":
                return curvature.sqnr(self.program, changes)
            few = self.batches[: self.options.alone]
            by = curvature.hessian if estimate == "hessian" else curvature.fisher
            return by(self.program, changes, few, self.context.loss, self.context.seed)

    # The metric ---------------------------------------------------------------------------------------------------

    def _wanted(self) -> float | None:
        """Return the least metric that the budget allows; None where it bounds none."""
        drop, evaluate = self.context.budget.metric_drop, self.context.evaluate
        if drop is None:
            return None
        if evaluate is None:
            raise GraphoptError("budget.metric_drop needs a metric; pass evaluate=")
        (before,) = self.evaluator.metric([self.problem.start])
        if not math.isfinite(before):
            raise GraphoptError("evaluate returned NaN on the original model; return a finite number, higher is better")
        again = self.evaluator.metric_again(self.problem.start, _CALLS - 1)
        if spread := max([before, *again]) - min([before, *again]):
            self.facts["metric_spread"] = spread
            self.facts["note"] = (
                f"the metric is noisy: it varied by {spread:.3g} over {_CALLS} calls on the same model, "
                f"where budget.metric_drop is {drop:g}"
            )
        return before - drop

    def _best_by_metric(self, ordered: Sequence[Point]) -> Point:
        """Return the candidate of least loss among those whose metric the budget allows."""
        wanted = self._wanted()
        if wanted is None:
            return ordered[0]
        best: Point | None = None
        for point in ordered[: max(3, self.options.evaluations // 10)]:
            (metric,) = self.evaluator.metric([point.assignment])
            judged = dataclasses.replace(point, metric=metric)
            if metric >= wanted:
                return judged
            best = judged if best is None or metric > (best.metric or -math.inf) else best
        assert best is not None
        self.facts["note"] = f"the metric falls to {best.metric:.4g}, below the {wanted:.4g} that the budget allows"
        return best

    def _within_metric(self, surrogate: Surrogate) -> Point:
        """Return what saves most while the metric holds, by bisection over the steps."""
        wanted = self._wanted()
        assert wanted is not None
        def holds(assignment: Assignment) -> bool:
            (metric,) = self.evaluator.metric([assignment])
            return metric >= wanted

        point = self.search.by_bisection(surrogate, holds, "size_bytes")
        (metric,) = self.evaluator.metric([point.assignment])
        return dataclasses.replace(point, metric=metric)

    # What is told -------------------------------------------------------------------------------------------------

    def _told(self, front: Front) -> list[dict[str, Any]]:
        resource = next(iter(self.problem.limits))
        points = front.pareto(resource)[:_SHOWN]
        return [{"cost": each.costs[resource], "loss": each.loss, "origin": each.origin} for each in points]

    def changes(self, chosen: Point) -> Changes:
        """Return the record: every unit with its level and what it alone loses."""
        changes = Changes(facts=self.facts)
        names = self.problem.names(chosen.assignment)
        spent = {u.name: u.levels[at].costs for u, at in zip(self.problem.units, chosen.assignment, strict=True)}
        for unit, level in names.items():
            if level == next(each for each in self.problem.units if each.name == unit).levels[0].name:
                changes.skipped.append(Site(unit, f"{level} is best: it stays as it is"))
            else:
                alone = self.facts.get("losses", {}).get(unit, {}).get(level)
                changes.touched.append(Site(unit, level + ("" if alone is None else f", alone it loses {alone:.3g}")))
        self.search.facts |= {
            "levels": names, "loss": chosen.loss, "origin": chosen.origin, "costs": chosen.costs,
            "resource": next(iter(self.problem.limits), "size_bytes"),
            "bits": {
                name: each["bits"] / each["parameters"]
                for name, each in spent.items()
                if "bits" in each and each.get("parameters")
            },
            "evaluated": self.evaluator.evaluated / max(self.evaluator.pieces, 1), "metrics": self.evaluator.metrics,
        }  # fmt: skip
        if chosen.metric is not None:
            self.facts["metric"] = chosen.metric
        if self.evaluator.lost:
            self.facts["lost"] = list(dict.fromkeys(self.evaluator.lost))
        return changes

