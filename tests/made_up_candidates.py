"""Candidates whose losses are a known function: a quadratic form in the errors of the chosen levels."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.search import Level, LossTask, Problem, Unit

BITS = (8, 6, 4, 3, 2)


def allocation(units: int, bits: float, seed: int = 0) -> Problem:
    """Weights of different sizes, and `bits` on average to spend."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1, 2, 4], units)
    made = tuple(
        Unit(f"u{at}", tuple(Level(f"int{b}", {"size": float(size * b)}) for b in BITS))
        for at, size in enumerate(sizes)
    )
    return Problem(made, {"size": float(bits * sizes.sum())})


@dataclass(frozen=True)
class Quadratic:
    """Losses e' H_piece e, e_u = importance_u 2^-bits_u; H is close to one matrix for all pieces.

    Attributes:
        units: how many. pieces: of data. trouble: a file beside which things go wrong, once or always:
            `die:A`, `die always:A`, `hang:A`, `lack:A`, `raise:A` for the candidate whose assignment is written as A.
    """

    units: int
    pieces: int = 8
    seed: int = 0
    trouble: str = ""
    marker: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> str:
        return f"quadratic {self.units} {self.pieces} {self.seed}"

    def load(self) -> Callable[[Any], Any]:
        return self

    def errors(self, assignment: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        importance = rng.lognormal(0, 1, self.units)
        return importance * 2.0 ** -np.array([BITS[level] for level in assignment])

    def forms(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed + 1)
        mixed = rng.normal(size=(self.pieces, self.units, self.units)) / self.units**0.5
        common = np.eye(self.units) + 0.5 * rng.normal(size=(self.units, self.units)) / self.units**0.5
        return np.array([(common + 0.2 * each).T @ (common + 0.2 * each) for each in mixed])

    def loss(self, assignment: tuple[int, ...], pieces: Any = None) -> float:
        found = self.losses(assignment, range(self.pieces) if pieces is None else pieces)
        return float(np.mean(found))

    def losses(self, assignment: tuple[int, ...], pieces: Any) -> list[float]:
        error = self.errors(assignment)
        return [float(error @ self.forms()[piece] @ error) for piece in pieces]

    def __call__(self, task: Any) -> Any:
        kind, _, which = self.trouble.partition(":")
        if kind and which == "".join(map(str, task.assignment)):
            first = not Path(self.marker).exists()
            Path(self.marker).touch()
            if kind == "die always" or (kind == "die" and first):
                os._exit(1)
            if kind == "hang":
                time.sleep(60)
            if kind == "lack":
                raise ModuleNotFoundError("No module named 'made_up'", name="made_up")
            if kind == "raise":
                raise ValueError("no such thing")
        time.sleep(self.seconds)
        if not isinstance(task, LossTask):
            return -self.loss(task.assignment)
        found: list[float] = []
        for loss in self.losses(task.assignment, task.pieces):
            found.append(loss)
            if sum(found) > task.bound:
                break
        return found
