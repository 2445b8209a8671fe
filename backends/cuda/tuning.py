"""Measuring schedules on a GPU: a product's candidates in turns of enough copies of its weights, remembered by GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.cuda import launch
from graphopt.backends.cuda.operands import sizes
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, is_vector, plan_text
from graphopt.backends.cuda.schedule import bucket, gpu_of, tune
from graphopt.backends.cuda.timing import copies_of, replayed
from graphopt.errors import GraphoptError, described
from graphopt.progress import Progress

Calls = list[Callable[[], object]]
_REPLAYS = 7  # of a candidate


class Trial:
    """A product of random operands on a GPU, in as many copies of the weights as do not fit its cache.

    Attributes:
        plan: what is computed. tokens: how many. bytes: that a launch moves, weights, scales, x and y counted once.
        failure: why the last schedule that did not run did not.
    """

    def __init__(self, plan: LinearPlan | Int8Plan, tokens: int, device: torch.device) -> None:
        self.plan, self.tokens, self.device, self.failure = plan, tokens, device, ""
        half = torch.float16 if plan.dtype == "float16" else torch.bfloat16
        counts = sizes(plan)
        self.bytes = 4 * (counts["weights"] + counts["scales"]) + tokens * (plan.k + 2 * plan.outputs)
        self.weights = [_words(counts["weights"], device) for _ in range(copies_of(4 * counts["weights"]))]
        # 2^-7 in halves and about that in float32: no sum overflows.
        given: dict[str, Any] = {
            "scales": torch.full((counts["scales"],), 0x20002000, dtype=torch.int32, device=device)
        }
        if isinstance(plan, LinearPlan):
            self.bytes += tokens * plan.k
            given["x"] = torch.randn(tokens, plan.k, dtype=half, device=device)
            if plan.zero_points:
                given["zeros"] = torch.full((counts["zeros"],), 0x0101, dtype=torch.int16, device=device)
        else:
            given["x"] = torch.randint(-128, 128, (tokens, plan.k), dtype=torch.int8, device=device)
            count = tokens if plan.by_token else 1
            given["x_scale"] = torch.rand(count, device=device).to(half)
            if plan.zero_points:
                given["x_zero_point"] = torch.zeros(count, dtype=torch.int8, device=device)
                given["row_sums"] = torch.zeros(counts["row_sums"], dtype=torch.int32, device=device)
        for name in plan.inputs:
            shape = (plan.outputs,) if is_vector(name) else (tokens, plan.outputs)
            given[name] = torch.randn(shape, dtype=half, device=device)
        self.given = {**given, "y": torch.empty(tokens, plan.outputs, dtype=half, device=device), "tokens": tokens}

    def calls(self, schedule: LinearPlan | Int8Plan) -> Calls:
        """Return launches of a schedule, one for each copy of the weights."""
        given = {**self.given, **launch._with_workspace(schedule, self.tokens, self.device)}
        grid = schedule.grid(self.tokens)
        return [partial(launch.launch, schedule, grid, {**given, "weights": w}, self.device) for w in self.weights]

    def seconds(self, schedule: LinearPlan | Int8Plan) -> float:
        """Return the time of a launch; infinity where the GPU does not take the schedule."""
        try:
            return replayed(self.calls(schedule), _REPLAYS)
        except Exception as error:  # of the driver, in whatever type cuda.core gives it: another schedule will do
            self.failure = described(error)
            return math.inf


def _words(count: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, device=device)


def tuned(
    plan: Any, tokens: int, device: torch.device, most: int = 8, library: float | None = None
) -> tuple[Any, Trial]:
    """Measure the best candidates by the model and remember them; return the fastest, and the trial that it ran in.

    Raises GraphoptError where none of them runs.
    """
    trial = Trial(plan, tokens, device)
    index = launch._index(device)
    best, seconds = tune(plan, tokens, gpu_of(index), launch._architecture(index), trial.seconds, most, library)
    if seconds == math.inf:
        raise GraphoptError(f"no schedule of a {plan.kind} product runs on this GPU: {trial.failure}")
    return best, trial


def tune_products(
    products: Iterable[tuple[LinearPlan | Int8Plan, int]], device: torch.device, progress: Progress
) -> int:
    """Tune each (plan, tokens) once; return how many there were."""
    once = {(plan_text(plan), bucket(tokens)): plan for plan, tokens in products}
    with progress.stage("measuring schedules", len(once)) as stage:
        for (_, tokens), plan in once.items():
            tuned(plan, tokens, device)
            stage.advance()
    return len(once)
