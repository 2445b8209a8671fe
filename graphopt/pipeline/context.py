"""What a pass is given besides the program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graphopt.calibration.batches import Batches
from graphopt.errors import GraphoptError
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
        seed: of every random choice.
        progress: shows long work.
        strict: raise when an exact pass changes the function, instead of dropping its changes (for tests).
    """

    target: Target
    calibration: Batches | None = None
    evaluate: Callable[[Any], float] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    strict: bool = False

    def needed_calibration(self, who: str) -> Batches:
        """Return the calibration batches; GraphoptError says that `who` needs them."""
        if self.calibration is None:
            raise GraphoptError(f"{who} needs calibration data; pass calibration=, an iterable of inputs")
        return self.calibration
