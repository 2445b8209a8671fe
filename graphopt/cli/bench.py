"""`graphopt bench`: latencies of one file or two, measured in turns, and where the time goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.backend import Timing
from graphopt.cli.console import WIDTH
from graphopt.errors import GraphoptError
from graphopt.pipeline import backend as backend_by_name
from graphopt.report.text import plain
from graphopt.rundir import check_run_directory

_MOST = 10  # operator types and nodes shown


def bench_text(
    model: Path, against: Path | None, backend: str, threads: int, runtimes: Sequence[str] = ()
) -> str:
    """Return the measurements as plain text; GraphoptError where a file is missing or does not run."""
    runner = backend_by_name(backend)
    paths = {"model": model_file(model, runner.file)}
    if against is not None:
        paths["against"] = model_file(against, runner.file)
    others = _other_runtimes(runner, runtimes)
    timings = runner.measure(paths, threads)
    head = Text(f"inputs {', '.join(timings['model'].inputs)}; {threads} thread{'s' * (threads > 1)}; runs in turns\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "median ms", "least ms", "runs", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    reference = timings.get("against", timings["model"]).latency_ms
    for label, path in paths.items():
        each = timings[label]
        ratio = f"{each.latency_ms / reference:.2f}×" if len(paths) > 1 and reference else ""
        table.add_row(Text(str(path)), f"{each.latency_ms:.3f}", f"{each.minimum_ms:.3f}", str(each.runs), ratio)
    beside = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("other runtime", "median ms", "beside", "ratio", "largest difference", "at", "SQNR dB"):
        beside.add_column(heading, justify="left" if heading in ("other runtime", "at") else "right")
    for runtime in others:
        found = runner.compare(paths["model"], threads, runtime)
        cells = [f"{runtime} {found.version}", f"{found.latency_ms:.3f}", f"{found.onnxruntime_ms:.3f}"]
        cells += [f"{found.latency_ms / found.onnxruntime_ms:.2f}×", f"{found.max_steps:.2f} steps", found.output]
        beside.add_row(*(Text(cell) for cell in [*cells, f"{found.sqnr_db:.1f}"]))
    shown: list[RenderableType] = [Text(), beside] if others else []
    parts: list[RenderableType] = [head, table, *shown, Text(f"\nwhere the time goes in {paths['model']}\n")]
    return plain(Group(*parts, types(timings), Text(), nodes(timings["model"])), WIDTH)


def _other_runtimes(runner: Any, named: Sequence[str]) -> list[str]:
    """Return the runtimes to compare with, known to be there before anything is timed."""
    if not named:
        return []
    if not hasattr(runner, "other_runtimes"):
        raise GraphoptError(f"the backend {runner.name!r} has one runtime only; leave out --runtime")
    found: list[str] = runner.other_runtimes(named)
    return found


def model_file(path: Path, name: str = "model.onnx") -> Path:
    """Return the model that a path means: the file itself, or the one of this name in a run directory."""
    if not path.exists():
        raise GraphoptError(f"there is no file {path}")
    if not path.is_dir():
        return path
    check_run_directory(path)
    if not (path / name).is_file():
        raise GraphoptError(f"{path} holds no {name}; its report says why (graphopt inspect {path})")
    return path / name


def types(timings: dict[str, Timing]) -> Table:
    """Return milliseconds by operator type, the slowest of the model first, of both files side by side."""
    sums = {label: _by_type(each) for label, each in timings.items()}
    total = sum(time for time, _ in sums["model"].values()) or 1.0
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("operator")
    for heading in ("ms", "share", "nodes", *(("ms against", "nodes against") if "against" in sums else ())):
        table.add_column(heading, justify="right")
    slowest = sorted(sums["model"].items(), key=lambda each: -each[1][0])
    for name, (time, count) in slowest[:_MOST]:
        row = [name, f"{time:.3f}", f"{time / total:.0%}", str(count)]
        if "against" in sums:
            other, number = sums["against"].get(name, (0.0, 0))
            row += [f"{other:.3f}", str(number)]
        table.add_row(*(Text(cell) for cell in row))
    return table


def nodes(timing: Timing) -> Table:
    """Return the slowest nodes."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("node", overflow="fold")
    table.add_column("operator")
    table.add_column("ms", justify="right")
    for name, operator, time in timing.nodes[:_MOST]:
        table.add_row(Text(name), Text(operator), f"{time:.3f}")
    return table


def _by_type(timing: Timing) -> dict[str, tuple[float, int]]:
    times: dict[str, list[float]] = defaultdict(list)
    for _, operator, time in timing.nodes:
        times[operator].append(time)
    return {operator: (sum(each), len(each)) for operator, each in times.items()}
