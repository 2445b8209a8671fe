"""Where the time of an ONNX file goes, node by node, from ONNX Runtime's own profile."""

from __future__ import annotations

import bisect
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from graphopt.backends.onnx.compare import load_session, select_feeds, session_options
from graphopt.errors import GraphoptError

_WARM_UP = 3
_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """One node of the executed graph and its time per run; `name` is what ONNX Runtime calls it."""

    name: str
    op_type: str
    milliseconds: float


def profile_by_node(
    path: str | Path, feeds: Mapping[str, npt.NDArray[Any]], threads: int = 1, runs: int = 20
) -> list[NodeTime]:
    """Time per run of every executed node (median over `runs` runs after a warm-up), slowest first.

    A node that runs several times in one run (in a loop) counts with the sum. Profiling itself costs a few
    microseconds a node, so sums exceed the latency of small models.
    Raises GraphoptError when the file does not load, an input is missing or `runs` is not positive.
    """
    if runs < 1:
        raise GraphoptError(f"runs is {runs}; profile at least one run")
    events = _profile(path, feeds, threads, runs)
    starts = sorted(
        event["ts"] for event in events if event.get("cat") == "Session" and event["name"] == "model_run"
    )
    if len(starts) != runs + _WARM_UP:
        raise GraphoptError(
            f"ONNX Runtime's profile holds {len(starts)} runs where {runs + _WARM_UP} were made"
        )
    microseconds: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * runs)
    for event in events:
        run = bisect.bisect_right(starts, event["ts"]) - 1 - _WARM_UP
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL) and run >= 0:
            microseconds[event["name"].removesuffix(_KERNEL), event["args"]["op_name"]][run] += event["dur"]
    times = [NodeTime(*key, statistics.median(each) / 1e3) for key, each in microseconds.items()]
    return sorted(times, key=lambda each: (-each.milliseconds, each.name))


def _profile(
    path: str | Path, feeds: Mapping[str, npt.NDArray[Any]], threads: int, runs: int
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = load_session(path, options)
        selected = select_feeds(session, feeds)
        for _ in range(_WARM_UP + runs):
            session.run(None, selected)
        try:
            found: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
        except (OSError, ValueError):  # ONNX Runtime says nothing where the disk is full
            raise GraphoptError(
                f"ONNX Runtime's profile in {tempfile.gettempdir()} is incomplete; make room there, or set TMPDIR"
            ) from None
    return found


@dataclass(frozen=True)
class TypeTime:
    """Time per run of all nodes of one operator type."""

    op_type: str
    nodes: int
    milliseconds: float


def by_type(times: Sequence[NodeTime]) -> list[TypeTime]:
    """Aggregate node times by operator type, slowest first."""
    groups: dict[str, list[float]] = defaultdict(list)
    for each in times:
        groups[each.op_type].append(each.milliseconds)
    found = [TypeTime(op_type, len(values), sum(values)) for op_type, values in groups.items()]
    return sorted(found, key=lambda each: (-each.milliseconds, each.op_type))


def explain_slowdown(
    baseline_path: str | Path,
    path: str | Path,
    feeds: Mapping[str, npt.NDArray[Any]],
    threads: int = 1,
    runs: int = 20,
    top: int = 5,
) -> list[str]:
    """Say in lines of text where the file at `path` spends its time against the one at `baseline_path`.

    First the totals, then the conversions between float and integer, then the operator types and nodes that
    take most.
    """
    return compare_profiles(
        profile_by_node(baseline_path, feeds, threads, runs), profile_by_node(path, feeds, threads, runs), top
    )


def compare_profiles(baseline: Sequence[NodeTime], times: Sequence[NodeTime], top: int = 5) -> list[str]:
    """The lines of `explain_slowdown` from two profiles."""
    total, before = sum(each.milliseconds for each in times), sum(each.milliseconds for each in baseline)
    ratio = f", {total / before:.2f}x" if before > 0 else ""
    lines = [f"all nodes: {total:.3f} ms against {before:.3f} ms{ratio}"]
    old = {each.op_type: each for each in by_type(baseline)}
    types = by_type(times)
    conversions = [each for each in types if each.op_type in _CONVERSIONS]
    if conversions and total > 0:
        spent = sum(each.milliseconds for each in conversions)
        count = sum(each.nodes for each in conversions)
        lines.append(
            f"conversion between float and integer: {spent:.3f} ms ({spent / total:.0%}) in {count} nodes"
        )
    for each in types[:top]:
        known = old.get(each.op_type)
        against = (
            "none in the baseline" if known is None else f"{known.milliseconds:.3f} ms in {known.nodes} there"
        )
        lines.append(f"{each.op_type}: {each.milliseconds:.3f} ms in {each.nodes} nodes; {against}")
    for node in sorted(times, key=lambda each: -each.milliseconds)[:top]:
        share = f" ({node.milliseconds / total:.0%})" if total > 0 else ""
        lines.append(f"node '{node.name}' ({node.op_type}): {node.milliseconds:.3f} ms{share}")
    return lines


_CONVERSIONS = frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"))
