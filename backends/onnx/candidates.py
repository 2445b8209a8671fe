"""Time programs against each other: each is lowered, runs in turns with the others, and is profiled node by node."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from graphopt.backend import Profile
from graphopt.backends.onnx.latency import measure_latency
from graphopt.backends.onnx.profile import NodeTime, profile_by_node
from graphopt.ir import Program

_SECONDS = 0.4  # each program runs for so long
_MOST_SECONDS = 20.0  # all of them together
_PROFILED = 8  # runs of each under the profiler
# What the runtime puts behind a node's name when it rewrites it.
_BEHIND = re.compile(r"(/.*|_token_\d+|_nchwc|_NhwcTransformer.*)$")


def time_programs(
    programs: Mapping[str, Program], files: Mapping[str, Path], feeds: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Profile]:
    """Return the profile of each program, written to the file under the same label, on `feeds`."""
    times = measure_latency(files, feeds, min_seconds=_SECONDS, max_seconds=_MOST_SECONDS)
    return {
        label: Profile(
            times[label].median_ms,
            by_operator(
                profile_by_node(files[label], feeds, runs=_PROFILED),
                {node.name for node in program.graph.nodes if node.op == "call_function"},
            ),
        )
        for label, program in programs.items()
    }


def by_operator(times: Iterable[NodeTime], names: Collection[str]) -> dict[str, float]:
    """Return the milliseconds of each operator out of those of the executed nodes, which carry its name in front."""
    found: dict[str, float] = defaultdict(float)
    for each in times:
        found[_owner(each.name, names)] += each.milliseconds
    return dict(found)


def _owner(name: str, names: Collection[str]) -> str:
    while name not in names:
        shorter = _BEHIND.sub("", name)
        if shorter == name:
            return ""
        name = shorter
    return name
