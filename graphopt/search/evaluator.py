"""True evaluations of candidates: cached, journaled, in parallel.

A loss is the mean over pieces of the calibration data of how far a candidate's outputs are from the original's; each
piece is evaluated once for each candidate. A piece's loss is never negative, so that a candidate whose losses so far
exceed what it is allowed altogether is rejected without the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graphopt.pipeline.journal import Journal
from graphopt.progress import Progress, Silent
from graphopt.search.pool import Lost, Pool, Work
from graphopt.search.problem import Assignment, Problem


@dataclass(frozen=True)
class LossTask:
    """Asks for the losses of a candidate on some pieces; one may stop as soon as they add up to more than `bound`."""

    assignment: Assignment
    pieces: tuple[int, ...]
    bound: float = math.inf


@dataclass(frozen=True)
class MetricTask:
    """Asks for the user's metric of a candidate; `again` counts further calls for the same one."""

    assignment: Assignment
    again: int = 0


@dataclass(frozen=True)
class EffectsTask:
    """Asks how the effects of candidates on a piece add up: their inner products, [candidates][candidates].

    The effect of a candidate is a vector whose square is near its loss (`graphopt.calibration.judge.effect`).
    """

    assignments: tuple[Assignment, ...]
    piece: int


class Candidates(Work, Protocol):
    """Makes candidates and judges them.

    `load()` returns a function of LossTask, which gives a list, of MetricTask, a number, and EffectsTask, a matrix.

    Attributes:
        pieces: how many pieces of data there are to judge by.
    """

    @property
    def pieces(self) -> int: ...


@dataclass
class Evaluator:
    """Evaluates assignments.

    Attributes:
        problem: whose assignments they are. candidates: what makes and judges them. pool: where.
        journal: remembers what was evaluated, over interruptions too.
        evaluated: pieces that were evaluated for candidates. metrics: calls of the user's metric.
        seconds: spent waiting for evaluations. busy: spent in them, all processes together.
        lost: sentences about candidates that could not be evaluated, which count as infinitely bad.
    """

    problem: Problem
    candidates: Candidates
    pool: Pool = field(default_factory=Pool)
    journal: Journal = field(default_factory=Journal)
    progress: Progress = field(default_factory=Silent)
    evaluated: int = 0
    metrics: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    lost: list[str] = field(default_factory=list)
    _losses: dict[Assignment, dict[int, float]] = field(default_factory=dict, repr=False)
    _metrics: dict[Assignment, float] = field(default_factory=dict, repr=False)

    @property
    def pieces(self) -> int:
        return self.candidates.pieces

    @functools.cached_property
    def _work(self) -> _Timed:
        return _Timed(self.candidates)

    def losses(
        self, assignments: Iterable[Assignment], pieces: Sequence[int] | None = None, bound: float = math.inf
    ) -> list[float]:
        """Return the loss of each assignment, the mean over `pieces` (all); infinity where it exceeds `bound`."""
        wanted, asked = list(assignments), tuple(range(self.pieces) if pieces is None else pieces)
        tasks = []
        for each in dict.fromkeys(wanted):
            known = self._losses.setdefault(each, {})
            missing = tuple(piece for piece in asked if piece not in known)
            allowed = bound * len(asked) - math.fsum(known[piece] for piece in asked if piece in known)
            if missing and allowed >= 0:
                tasks.append(LossTask(each, missing, allowed))
        self._run(tasks, self._took_losses)
        return [self._mean(each, asked, bound) for each in wanted]

    def _mean(self, assignment: Assignment, asked: Sequence[int], bound: float) -> float:
        known = self._losses[assignment]
        if any(piece not in known for piece in asked):
            return math.inf
        mean = math.fsum(known[piece] for piece in asked) / max(len(asked), 1)
        return mean if mean <= bound else math.inf

    def _took_losses(self, task: LossTask, result: Any) -> None:
        found = [math.inf] * len(task.pieces) if isinstance(result, Lost) else result
        found = [math.inf if math.isnan(each) else max(each, 0.0) for each in found]
        self._losses[task.assignment] |= dict(zip(task.pieces, found, strict=False))
        self.evaluated += len(found)

    def metric(self, assignments: Iterable[Assignment]) -> list[float]:
        """Return the user's metric of each assignment; minus infinity where there is none.

        Raises GraphoptError where the metric fails or returns what is no number.
        """
        wanted = list(assignments)
        self._run([MetricTask(each) for each in dict.fromkeys(wanted) if each not in self._metrics], self._took_metric)
        return [self._metrics[each] for each in wanted]

    def metric_again(self, assignment: Assignment, times: int) -> list[float]:
        """Return what further calls of the metric give, which need not be the same; they are journaled, too."""
        found: list[float] = []
        tasks = [MetricTask(assignment, again) for again in range(1, times + 1)]
        self._run(tasks, lambda task, result: found.append(math.nan if isinstance(result, Lost) else result))
        return found

    def _took_metric(self, task: MetricTask, result: Any) -> None:
        self._metrics[task.assignment] = -math.inf if isinstance(result, Lost) or math.isnan(result) else result
        self.metrics += 1

    def effects(self, assignments: Sequence[Assignment], pieces: Sequence[int]) -> NDArray[np.float64]:
        """Return the inner products of the effects of assignments, the mean over pieces, [n, n]."""
        total = np.zeros((len(assignments), len(assignments)))

        def took(task: EffectsTask, result: Any) -> None:
            nonlocal total
            if not isinstance(result, Lost):
                total = total + np.array(result)

        self._run([EffectsTask(tuple(assignments), piece) for piece in pieces], took)
        return total / max(len(pieces), 1)

    def _run(self, tasks: Sequence[Any], took: Callable[[Any, Any], None]) -> None:
        """Do what is in no journal; what is done is in there before anything else happens."""
        keys = [self._key(task) for task in tasks]
        left = []
        for at, (key, task) in enumerate(zip(keys, tasks, strict=True)):
            if key in self.journal:
                took(task, self.journal.recorded(key, lambda: None))
            else:
                left.append(at)
        if not left:
            return
        started = time.perf_counter()
        try:
            with self.progress.stage("evaluate", len(left)) as stage:
                for index, result in self.pool.run(self._work, [tasks[at] for at in left]):
                    key, task = keys[left[index]], tasks[left[index]]
                    if isinstance(result, Lost):
                        self.lost.append(f"a candidate could not be evaluated: {result.reason}")
                        took(task, result)
                    else:
                        self.busy += result[1]
                        took(task, self.journal.recorded(key, functools.partial(operator.itemgetter(0), result)))
                    stage.advance()
        finally:
            self.seconds += time.perf_counter() - started

    def _key(self, task: LossTask | MetricTask | EffectsTask) -> str:
        text = json.dumps([self.candidates.key, type(task).__name__, dataclasses.asdict(task)])
        return f"evaluated {hashlib.sha256(text.encode()).hexdigest()[:40]}"


class _Timed:
    """Work that says how long each task took; loaded once in this process, too."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._loaded: Callable[[Any], tuple[Any, float]] | None = None

    @property
    def key(self) -> str:
        return self.work.key

    def __getstate__(self) -> dict[str, Any]:
        return {"work": self.work, "_loaded": None}

    def load(self) -> Callable[[Any], tuple[Any, float]]:
        if self._loaded is None:
            call = self.work.load()

            def timed(task: Any) -> tuple[Any, float]:
                started = time.perf_counter()
                result = call(task)
                return result, time.perf_counter() - started

            self._loaded = timed
        return self._loaded
