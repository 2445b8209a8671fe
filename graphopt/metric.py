"""The user's metric: called alike wherever a model is judged, and what is wrong with it in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from graphopt.errors import GraphoptError, described
from graphopt.ir.program import Program


def rated(
    evaluate: Callable[[Any], float], program: Program, what: str, seed: int, finite: bool = False
) -> float:
    """Return the user's metric of a program, `what` in messages.

    Raises GraphoptError where it fails, returns no number, changes the weights or, with `finite`, is not finite.
    """
    held = _identities(program)
    try:
        # Seeded alike for both models: a metric that draws numbers compares them on the same ones.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            value = float(evaluate(program.module()))
    except GraphoptError:
        raise
    except Exception as error:
        raise GraphoptError(f"evaluate failed on {what}: {described(error)}") from error
    if _identities(program) != held:
        raise GraphoptError(
            f"evaluate changed the weights of {what}; let it train or convert copy.deepcopy(model) instead"
        )
    if finite and not math.isfinite(value):
        kind = "NaN" if math.isnan(value) else "infinity"
        raise GraphoptError(f"evaluate returned {kind} on {what}; return a finite number, higher is better")
    return value


def _identities(program: Program) -> dict[str, tuple[Any, ...]]:
    """What changes when somebody writes to a weight, or moves it to another type or device."""
    return {
        name: (weight.data_ptr(), weight.dtype, weight.device, None if weight.is_inference() else weight._version)
        for name, weight in program.weights.items()
    }
