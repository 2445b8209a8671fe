"""Time programs against each other: each runs in turns with the others, and is profiled node by node.

The profiler's times are scaled to add up to the latency: profiling itself costs time, and the profiles are not taken in
turns.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from graphopt.backend import Profile
from graphopt.backends.onnx.latency import measure_latency
from graphopt.backends.onnx.naming import output_names
from graphopt.backends.onnx.profile import NodeTime, profile_by_node
from graphopt.ir import Program, is_tensor

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
        label: Profile(times[label].median_ms, node_times(program, files[label], feeds, times[label].median_ms))
        for label, program in programs.items()
    }


def node_times(
    program: Program,
    file: Path,
    feeds: Mapping[str, npt.NDArray[Any]],
    latency_ms: float,
    known: Collection[str] = (),
) -> dict[str, float]:
    """Return the milliseconds of each operator of the program that a file was written from, adding up to a latency.

    With `known` names, an operator of none of them counts with the first known one that it follows from: a batch norm
    with its convolution.
    """
    nodes = by_operator(profile_by_node(file, feeds, runs=_PROFILED), _names(program))
    if known:
        nodes = _attributed(nodes, program, known)
    factor = latency_ms / (sum(nodes.values()) or 1.0)
    return {name: spent * factor for name, spent in nodes.items()}


def _attributed(times: Mapping[str, float], program: Program, known: Collection[str]) -> dict[str, float]:
    """Return the times by the names of `known` operators, or of the first of them that an operator follows from."""
    owners: dict[str, str] = {}
    for node in program.graph.nodes:
        above = [owners[source.name] for source in node.all_input_nodes if source.name in owners]
        if node.op == "call_function" and node.name in known:
            owners[node.name] = node.name
        elif node.op == "call_function" and above:
            owners[node.name] = above[0]
    found: dict[str, float] = defaultdict(float)
    for name, spent in times.items():
        found[owners.get(name, name)] += spent
    return dict(found)


def _names(program: Program) -> dict[str, str]:
    """Return the operators by the names of their nodes in the file: their own, or that of the output they compute."""
    found = {node.name: node.name for node in program.graph.nodes if node.op == "call_function"}
    values = [value for value in program.outputs if is_tensor(value)]
    return {name: value.name for name, value in zip(output_names(program), values, strict=True)} | found


def by_operator(times: Iterable[NodeTime], names: Mapping[str, str]) -> dict[str, float]:
    """Return the milliseconds of each operator; executed nodes carry a name of `names` in front."""
    found: dict[str, float] = defaultdict(float)
    for each in times:
        found[_owner(each.name, names)] += each.milliseconds
    return dict(found)


def _owner(name: str, names: Mapping[str, str]) -> str:
    name = name.removeprefix("fused ")
    while name not in names:
        shorter = _BEHIND.sub("", name)
        if shorter == name:
            return ""
        name = shorter
    return names[name]
