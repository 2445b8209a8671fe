"""Latency of ONNX files in ONNX Runtime's CPU provider, measured so that ratios between them can be trusted.

All sessions stay loaded and take turns (A B A B ...), so that drift of the machine's clock, temperature and
load falls on all of them alike; idle sessions' worker threads do not spin into another one's turn; medians
are taken over single runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from graphopt.backends.onnx.compare import load_session, select_feeds, session_options
from graphopt.errors import GraphoptError, first_line


@dataclass(frozen=True)
class Latency:
    """Times of one file; `samples_ms` holds every single timed run in the order measured."""

    median_ms: float
    minimum_ms: float
    samples_ms: tuple[float, ...]

    @property
    def samples(self) -> int:
        """Number of timed runs."""
        return len(self.samples_ms)


def measure_latency(
    models: Mapping[str, str | Path],
    feeds: Mapping[str, npt.NDArray[Any]],
    threads: int = 1,
    min_seconds: float = 1.0,
    rounds: int = 8,
    max_seconds: float = 30.0,
) -> dict[str, Latency]:
    """Measure the files in `models` (label -> path) in turns on the same `feeds` (input name -> array).

    Each file is run for at least `min_seconds` in `rounds` turns, unless that would take more than
    `max_seconds` for all files together: then turns get shorter and fewer, but never fewer than three of one
    run each.
    Raises GraphoptError when a file does not load, an input is missing, or an argument is not positive.
    """
    if threads < 1 or rounds < 1 or min_seconds <= 0 or max_seconds <= 0:
        raise GraphoptError("threads, rounds, min_seconds and max_seconds must be positive")
    runners = {label: onnxruntime_runner(path, feeds, threads) for label, path in models.items()}
    return interleaved(runners, min_seconds, rounds, max_seconds)


def interleaved(
    runners: Mapping[str, Callable[[], object]], min_seconds: float, rounds: int, max_seconds: float
) -> dict[str, Latency]:
    """Time functions in turns, each of which runs a loaded file once; see `measure_latency`."""
    slowest = {label: _warm_up(run) for label, run in runners.items()}
    turn_seconds = min(min_seconds, max_seconds / max(len(runners), 1)) / rounds
    round_seconds = sum(max(turn_seconds, once) for once in slowest.values())
    turns = max(min(rounds, 3), min(rounds, int(max_seconds / round_seconds))) if round_seconds else rounds
    samples: dict[str, list[float]] = {label: [] for label in runners}
    for _ in range(turns):
        for label, run in runners.items():
            run()  # untimed: brings this model's weights back into the caches that the others took
            until = time.perf_counter() + turn_seconds
            while True:
                samples[label].append(_timed(run))
                if time.perf_counter() >= until:
                    break
    return {
        label: Latency(statistics.median(each), min(each), tuple(each)) for label, each in samples.items()
    }


def onnxruntime_runner(
    path: str | Path, feeds: Mapping[str, npt.NDArray[Any]], threads: int
) -> Callable[[], object]:
    """Load a file and return a function that runs it once; GraphoptError where it does not load or run."""
    session = load_session(path, session_options(threads))
    selected = select_feeds(session, feeds)
    names = [each.name for each in session.get_outputs()]

    def run() -> object:
        try:
            return session.run(names, selected)
        except Exception as error:  # onnxruntime's exception classes are not public
            raise GraphoptError(f"ONNX Runtime cannot run the model: {first_line(error)}; check the inputs") from None

    return run


def _timed(run: Callable[[], object]) -> float:
    """Run once; return milliseconds."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _warm_up(run: Callable[[], object]) -> float:
    """Run until memory is allocated and caches are warm; return the seconds of one warm run."""
    start = time.perf_counter()
    run()
    once = _timed(run)
    while time.perf_counter() - start < 0.05:
        once = min(once, _timed(run))
    return once / 1e3
