# torch leaves streams and events untyped.
# mypy: disable-error-code="no-untyped-call"
"""Times of eager calls on a GPU; those of CUDA graphs are `graphopt.backends.cuda.timing`'s."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def eager(calls: Sequence[Callable[[], object]], times: int = 60) -> float:
    """Return median seconds from one call to the next, as Python makes them."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    found: list[float] = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(times):
            calls[i % len(calls)]()
        end.record()
        end.synchronize()
        found.append(float(start.elapsed_time(end)) * 1e-3 / times)
    return statistics.median(found)
