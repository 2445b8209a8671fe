# torch leaves streams and events untyped.
# mypy: disable-error-code="no-untyped-call"
"""Times on a GPU: medians of replayed CUDA graphs, and of eager calls."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_LAUNCHES = 20  # of a graph
_REPLAYS = 50
_CACHE_BYTES = 180e6  # three times the second cache of the largest GPU so far


def copies_of(weight_bytes: float) -> int:
    """Return how many copies of a weight take turns, so that none is still in the cache when its turn comes."""
    return min(int(_CACHE_BYTES / max(weight_bytes, 1)) + 2, 64)


def replayed(calls: Sequence[Callable[[], object]], replays: int = _REPLAYS) -> float:
    """Return median seconds of a call, the calls taking turns in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    count = max(_LAUNCHES, len(calls))
    with torch.cuda.graph(graph, stream=side):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e-3 / count)
    return statistics.median(times)


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
