# torch leaves streams and events untyped.
# mypy: disable-error-code="no-untyped-call"
"""How long programs take on a GPU: replays of CUDA graphs in turns, and the kernels that the time goes into."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.backend import Timing
from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.backends.cuda.compiled import Compiled

_RUNS = 50
_PROFILED = 5
_LAUNCHES = 20  # of a graph
_CACHE_BYTES = 180e6  # three times the second cache of the largest GPU so far


def copies_of(weight_bytes: float) -> int:
    """Return how many copies of a weight take turns, so that none is still in the cache when its turn comes."""
    return min(int(_CACHE_BYTES / max(weight_bytes, 1)) + 2, 64)


def replayed(calls: Sequence[Callable[[], object]], replays: int = _RUNS) -> float:
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


def measure(compiled: Mapping[str, Compiled]) -> dict[str, Timing]:
    """Time compiled programs that take the same inputs in turns, on the example inputs of each.

    A run is the replay of a CUDA graph, inputs in place. Raises GraphoptError where inputs differ.
    """
    inputs = {label: [_shown(value) for value in each.program.flat_example] for label, each in compiled.items()}
    first = next(iter(inputs.values()))
    for label, shown in inputs.items():
        if shown != first:
            raise GraphoptError(f"{label} takes {', '.join(shown)}, not {', '.join(first)}; only like can be compared")
    graphs = {label: each.captured(_on(each, each.program.flat_example)) for label, each in compiled.items()}
    times: dict[str, list[float]] = {label: [] for label in graphs}
    for _ in range(_RUNS):
        for label, replay in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[label].append(float(start.elapsed_time(end)))
    return {
        label: Timing(statistics.median(times[label]), min(times[label]), _RUNS, _kernels(graphs[label]), first)
        for label in graphs
    }


def _kernels(replay: Any) -> list[tuple[str, str, float]]:
    """Return (kernel, who made it, milliseconds a run), slowest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED):
            replay()
        torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        spent[event.key] += float(event.self_device_time_total) * 1e-3 / _PROFILED
    named = [(name, "graphopt" if name.startswith("go_") else "torch", time) for name, time in spent.items() if time]
    return sorted(named, key=lambda each: -each[2])


def _on(compiled: Compiled, flat: list[Any]) -> list[Any]:
    return [value.to(compiled.device) if isinstance(value, Tensor) else value for value in flat]


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    # Of floats the program decides in which type they come.
    kind = "float" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return f"{kind}{list(value.shape)}"
