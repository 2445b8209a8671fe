#!/usr/bin/env python3
"""Make Markdown tables of the benchmark's JSON lines: the last run of each task, and whether its limits hold.

tools/bench/table.py runs/bench/results.jsonl [--task NAME] [--all] [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import records
from limits import BASELINE, check
from tasks import TASKS

Row = Mapping[str, Any]


def _number(figures: Row, name: str, form: str, divide_by: float = 1) -> str:
    value = figures.get(name)
    return "" if value is None else format(value / divide_by if divide_by != 1 else value, form)


def _kernels(figures: Row) -> str:
    return f"{figures['integer_kernels']} / {figures['float_kernels']}" if "float_kernels" in figures else ""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "latency ms": lambda f: _number(f, "latency_ms", ".2f"),
    "÷ fp32": lambda f: _number(f, "latency_ratio", ".3f"),
    "size MB": lambda f: _number(f, "size_bytes", ".2f", 1e6),
    "÷ fp32 ": lambda f: _number(f, "size_ratio", ".3f"),
    "SQNR dB": lambda f: _number(f, "sqnr_db", ".1f"),
    "KL": lambda f: _number(f, "kl", ".2e"),
    "cosine": lambda f: _number(f, "cosine", ".5f"),
    "metric": lambda f: _number(f, "metric", ".2f"),
    "drop": lambda f: _number(f, "metric_drop", "+.2f"),
    "integer / float kernels": _kernels,
    "left Q/DQ": lambda f: _number(f, "leftover_qdq", "d"),
    "seconds": lambda f: _number(f, "total_seconds", ".1f"),
    "peak MB": lambda f: _number(f, "peak_bytes", ".0f", 1e6),
}


def render(group: Mapping[str, records.Record]) -> str:
    """The table of one run of one task: a heading, what it was measured on, a row per method."""
    first = next(iter(group.values()))
    order = sorted(group, key=lambda name: name != BASELINE)
    rows = {name: {title: cell(group[name]["figures"]) for title, cell in COLUMNS.items()} for name in order}
    titles = [title for title in COLUMNS if any(row[title] for row in rows.values())]
    machine = first["machine"]
    vnni = {True: "VNNI", False: "no VNNI", None: "VNNI unknown"}[machine["vnni"]]
    task = TASKS.get(first["task"])
    unit = f" {task.metric_unit}" if task and task.metric_unit else ""
    heads = [title.strip() + unit * (title in ("metric", "drop")) for title in titles]
    lines = [
        f"### {first['task']}" + (f": {task.summary}" if task else ""),
        "",
        f"{machine['cpu']} ({vnni}), {machine['cores']} cores; latency: {first['threads']} thread, median of "
        f"{first['rounds']} interleaved rounds, ONNX Runtime {first['versions'].get('onnxruntime', '?')}; "
        f"commit {first['commit']}, {first['date']}.",
        "",
        "| method | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(titles),
    ]
    lines += [f"| {name} | " + " | ".join(rows[name][title] for title in titles) + " |" for name in order]
    lines += [f"\n{name} failed: {record['error']}" for name, record in group.items() if record["error"]]
    return "\n".join(lines)


def render_limits(group: Mapping[str, records.Record]) -> tuple[str, bool]:
    """One line per limit of the task, and whether none is missed; what could not be checked is said."""
    task = TASKS.get(next(iter(group.values()))["task"])
    lines, holds = [], True
    for verdict in (check(limit, group) for limit in (task.limits if task else ())):
        word = {True: "reached", False: "MISSED", None: "not checked"}[verdict.reached]
        value = "" if verdict.value is None else f": {verdict.value:.3f}"
        lines.append(f"- {word}: {verdict.limit}{value}" + (f" ({verdict.why})" if verdict.why else ""))
        holds = holds and verdict.reached is not False
    return "\n".join(lines), holds


def tables(all_records: list[records.Record], task: str | None, every_run: bool) -> tuple[str, bool]:
    """Tables and limits of the last run of each task, or of every run; and whether no limit is broken."""
    groups = {key: group for key, group in records.by_run(all_records).items() if task in (None, key[0])}
    if not every_run:
        groups = dict({name: ((name, run), group) for (name, run), group in groups.items()}.values())
    parts, holds = [], True
    for group in groups.values():
        verdicts, good = render_limits(group)
        parts += [render(group), verdicts]
        holds = holds and good
    return "\n\n".join(part for part in parts if part), holds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="JSON lines that run.py wrote")
    parser.add_argument("--task", choices=sorted(TASKS), help="only this task")
    parser.add_argument("--all", action="store_true", help="every run, not only the last of each task")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a limit is missed")
    arguments = parser.parse_args()
    try:
        text, holds = tables(records.read(arguments.file), arguments.task, arguments.all)
    except (OSError, ValueError) as error:
        print(f"table.py: {error}", file=sys.stderr)
        return 2
    print(text)
    return 1 if arguments.check and not holds else 0


if __name__ == "__main__":
    sys.exit(main())
