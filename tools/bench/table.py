#!/usr/bin/env python3
"""Make Markdown tables of the benchmark's JSON lines: the last run of each task, and whether its limits hold.

tools/bench/table.py runs/bench/results.jsonl [--task NAME] [--all] [--check]
tools/bench/table.py runs/bench/results.jsonl --docs docs/peers.md     needs a sentence in reasons.toml for each miss
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import records
from limits import BASELINE, check
from tasks import TASKS

Row = Mapping[str, Any]
Reasons = Mapping[str, Mapping[str, str]]  # task -> quantity -> why its limit is missed


def _number(figures: Row, name: str, form: str, divide_by: float = 1) -> str:
    value = figures.get(name)
    return "" if value is None else format(value / divide_by if divide_by != 1 else value, form)


def _kernels(figures: Row) -> str:
    return f"{figures['integer_kernels']} / {figures['float_kernels']}" if "float_kernels" in figures else ""


REASONS = Path(__file__).parent / "reasons.toml"
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


def render_limits(group: Mapping[str, records.Record], reasons: Reasons | None = None) -> tuple[str, bool]:
    """One line per limit of the task, and whether none is missed; what could not be checked is said.

    With `reasons`, a miss that they explain is no miss.
    """
    name = next(iter(group.values()))["task"]
    task, known = TASKS.get(name), (reasons or {}).get(name, {})
    lines, holds = [], True
    for verdict in (check(limit, group) for limit in (task.limits if task else ())):
        word = {True: "reached", False: "MISSED", None: "not checked"}[verdict.reached]
        value = "" if verdict.value is None else f": {verdict.value:.3f}"
        line = f"- {word}: {verdict.limit}{value}" + (f" ({verdict.why})" if verdict.why else "")
        why = known.get(verdict.limit.quantity, "") if verdict.reached is False else ""
        lines.append(f"{line}. {why}" if why else line)
        holds = holds and (verdict.reached is not False or bool(why))
    return "\n".join(lines), holds


def tables(
    all_records: list[records.Record], task: str | None, every_run: bool, reasons: Reasons | None = None
) -> tuple[str, bool]:
    """Tables and limits of the last run of each task, or of every run; and whether no limit is broken."""
    groups = {key: group for key, group in records.by_run(all_records).items() if task in (None, key[0])}
    if not every_run:
        groups = dict({name: ((name, run), group) for (name, run), group in groups.items()}.values())
    parts, holds = [], True
    for group in groups.values():
        verdicts, good = render_limits(group, reasons)
        parts += [render(group), verdicts]
        holds = holds and good
    return "\n\n".join(part for part in parts if part), holds


def read_reasons(path: Path) -> Reasons:
    """Return the sentences of a TOML file with a table per task. Raises ValueError where it is something else."""
    try:
        found = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    for task, sentences in found.items():
        if not isinstance(sentences, dict) or not all(isinstance(each, str) for each in sentences.values()):
            raise ValueError(f"{path}: [{task}] must give a sentence for each quantity")
        known = {limit.quantity for limit in TASKS[task].limits} if task in TASKS else set()
        for quantity in sentences:
            if quantity not in known:
                raise ValueError(f"{path}: {task}.{quantity} is no limit of a task")
    return found


def unexplained(all_records: list[records.Record], reasons: Reasons) -> list[str]:
    """Return `task: limit` for each limit that the last run of a task misses without a reason."""
    found = []
    for name, group in {key[0]: group for key, group in records.by_run(all_records).items()}.items():
        task = TASKS.get(name)
        for limit in task.limits if task else ():
            if check(limit, group).reached is False and not reasons.get(name, {}).get(limit.quantity):
                found.append(f"{name}: {limit}")
    return found


def write_docs(path: Path, all_records: list[records.Record], reasons: Reasons) -> None:
    """Write the page of all tasks, whole or not at all."""
    text, _ = tables(all_records, None, every_run=False, reasons=reasons)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(f"{_HEAD}\n{_versions(all_records)}\n\n{text}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


_HEAD = """# Integer networks beside other tools

Written by `tools/bench/table.py --docs` from the last run of each task; do not edit.

Peers run in environments of their own, on the same weights and the same 128 calibration samples. All files of a task
are timed in turns in one process with one thread. Seconds count the float export on both sides; making and timing
candidates is counted apart. A limit that is missed says why.
"""


def _versions(all_records: list[records.Record]) -> str:
    """Return a sentence with the versions of every tool that took part."""
    found: dict[str, set[str]] = {}
    for record in all_records:
        for name, version in record["versions"].items():
            found.setdefault(name, set()).add(version)
    return "Versions: " + ", ".join(f"{name} {' and '.join(sorted(found[name]))}" for name in sorted(found)) + "."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="JSON lines that run.py wrote")
    parser.add_argument("--task", choices=sorted(TASKS), help="only this task")
    parser.add_argument("--all", action="store_true", help="every run, not only the last of each task")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a limit is missed")
    parser.add_argument("--docs", type=Path, help="write the page of all tasks here")
    parser.add_argument("--reasons", type=Path, default=REASONS, help="why limits are missed; default: %(default)s")
    arguments = parser.parse_args()
    try:
        found = records.read(arguments.file)
        if arguments.docs:
            reasons = read_reasons(arguments.reasons)
            if missing := unexplained(found, reasons):
                print(f"table.py: {arguments.reasons} must say why:", *missing, sep="\n  ", file=sys.stderr)
                return 1
            write_docs(arguments.docs, found, reasons)
            return 0
        text, holds = tables(found, arguments.task, arguments.all)
    except (OSError, ValueError) as error:
        print(f"table.py: {error}", file=sys.stderr)
        return 2
    print(text)
    return 1 if arguments.check and not holds else 0


if __name__ == "__main__":
    sys.exit(main())
