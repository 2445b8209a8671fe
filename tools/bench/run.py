#!/usr/bin/env python3
"""Run benchmark tasks: graphopt and its peers on the same weights and samples, one JSON line per method.

    tools/bench/run.py --list
    tools/bench/run.py --task cnn50                          every method; tables and limits at the end
    tools/bench/run.py --task cnn50 --method onnxruntime     one of them (fp32 is always measured)

Needs Python 3.11 alone: environments are made on demand. Each step is a process of its own, whose time and
peak memory are measured; latency of all files is measured interleaved in one process with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import records
import table
from environments import BENCH, ROOT, python_of
from limits import BASELINE
from methods import METHODS, OWN, Method
from tasks import TASKS

THREADS = 1
CHILD_ENVIRONMENT = {
    "PYTHONPATH": str(BENCH),
    "HF_HUB_OFFLINE": "1",  # models are made from their configuration; nothing is to be fetched
    "NNCF_CI": "1",  # NNCF sends usage data otherwise
}


class ChildFailed(Exception):
    """A step ended without a result; the text says which, with the last line that it wrote."""


@dataclass(frozen=True)
class Runner:
    """Runs the steps of one task in `folder`."""

    folder: Path
    timeout_seconds: int

    def child(self, label: str, script: str, environment: str, job: dict[str, Any]) -> dict[str, Any]:
        """Run children/`script` on `job`; its output goes to LABEL.log. Raises ChildFailed."""
        print(f"  {label} ...", end="", file=sys.stderr, flush=True)
        paths = {kind: self.folder / f"{label}.{kind}" for kind in ("job.json", "result.json", "log")}
        paths["result.json"].unlink(missing_ok=True)
        paths["log"].unlink(missing_ok=True)
        paths["job.json"].write_text(json.dumps({**job, "result": str(paths["result.json"])}))
        try:
            command = [python_of(environment), BENCH / "children" / script, paths["job.json"]]
            with paths["log"].open("w") as log:
                subprocess.run(
                    command,
                    cwd=self.folder,
                    env={**os.environ, **CHILD_ENVIRONMENT},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=self.timeout_seconds,
                    check=True,
                )
            result: dict[str, Any] = json.loads(paths["result.json"].read_text())
        except (subprocess.SubprocessError, OSError) as error:
            print(" failed", file=sys.stderr)
            written = paths["log"].read_text().split("\n") if paths["log"].exists() else []
            last = next((line.strip() for line in reversed(written) if line.strip()), "")
            raise ChildFailed(f"{label}: {last or error} (all of it in {paths['log']})") from error
        print(f" {result['seconds']:.1f} s, {result['peak_bytes'] / 1e6:.0f} MB", file=sys.stderr)
        return result


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_task(
    name: str, methods: Sequence[Method], work: Path, rounds: int, timeout_seconds: int
) -> list[records.Record]:
    """All steps of one task; a method that fails has a record with its error, and the others go on.

    Raises ChildFailed when the material, the baseline or the measurement itself cannot be had.
    """
    folder = (work / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(folder, timeout_seconds)
    described = machine.describe()
    job: dict[str, Any] = {
        "task": name,
        "folder": str(folder),
        "calibration": str(folder / "calibration.npz"),
        "heldout": str(folder / "heldout.npz"),
        "fp32": str(folder / "fp32.onnx"),
        "vnni": described["vnni"],
    }
    runner.child("prepare", "prepare.py", OWN, job)
    export = runner.child(BASELINE, "export_fp32.py", OWN, {**job, "output": job["fp32"]})
    results: dict[str, dict[str, Any]] = {BASELINE: export}
    errors: dict[str, str] = {}
    for method in (each for each in methods if TASKS[name].kind in each.kinds):
        output = folder / f"{method.name}.onnx"
        output.unlink(missing_ok=True)
        try:
            results[method.name] = runner.child(
                method.name,
                method.script,
                method.environment,
                {**job, "output": str(output), "options": dict(method.options)},
            )
        except ChildFailed as failure:
            errors[method.name] = str(failure)
    files = {method: str(folder / f"{method}.onnx") for method in results}
    measured = runner.child("measure", "measure.py", OWN, {**job, "files": files, "rounds": rounds})

    now = datetime.now(UTC)
    common = {
        "schema": records.SCHEMA,
        "run": now.strftime("%Y%m%dT%H%M%S.%fZ"),
        "date": now.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "task": name,
        "machine": described,
        "threads": THREADS,
        "rounds": rounds,
    }
    lines = []
    for method_name in (*results, *errors):
        result = results.get(method_name)
        figures: dict[str, Any] = {}
        if result is not None:
            from_export = method_name in METHODS and METHODS[method_name].from_export
            before = export if from_export else {"seconds": 0.0, "peak_bytes": 0}
            # What timing its own candidates took is not the cost of optimizing.
            measuring = result.get("detail", {}).get("measuring_seconds", 0.0)
            own = result["seconds"] - measuring
            figures = {
                **measured["figures"][method_name],
                "own_seconds": own,
                "measuring_seconds": measuring,
                "total_seconds": own + before["seconds"],
                "own_peak_bytes": result["peak_bytes"],
                "peak_bytes": max(result["peak_bytes"], before["peak_bytes"]),
            }
        lines.append(
            {
                **common,
                "method": method_name,
                "versions": {**(result or {}).get("versions", {}), **measured["versions"]},
                "figures": figures,
                "detail": (result or {}).get("detail", {}),
                "error": errors.get(method_name),
            }
        )
    return lines


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--list", action="store_true", help="list tasks and methods, run nothing")
    add = parser.add_argument
    runs = ROOT / "runs" / "bench"
    add("--task", action="append", choices=sorted(TASKS), help="repeatable; default: all")
    add("--method", action="append", choices=sorted(METHODS), help="repeatable; default: all")
    add("--out", type=Path, default=runs / "results.jsonl", help="appended to; default: %(default)s")
    add("--work", type=Path, default=runs, help="models and logs; default: %(default)s")
    add("--rounds", type=int, default=60, help="timings of each file; default: %(default)s")
    add("--timeout", type=int, default=1800, help="seconds for each step; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2: the spread is part of the record.")
    return arguments


def main() -> int:
    arguments = _parse()
    if arguments.list:
        for title, entries in (("tasks", TASKS), ("methods", METHODS)):
            print(title)
            for name, entry in entries.items():
                print(f"  {name:<21}{entry.summary}")
        return 0
    methods = [METHODS[name] for name in dict.fromkeys(arguments.method or METHODS)]
    status = 0
    fresh: list[records.Record] = []
    for name in dict.fromkeys(arguments.task or TASKS):
        print(name, file=sys.stderr)
        try:
            lines = run_task(name, methods, arguments.work, arguments.rounds, arguments.timeout)
        except ChildFailed as failure:
            print(f"run.py: {name}: {failure}", file=sys.stderr)
            status = 1
            continue
        records.append(arguments.out, lines)
        fresh += lines
    text, holds = table.tables(fresh, task=None, every_run=True)
    print(text)
    failed = any(record["error"] for record in fresh)
    return status or (0 if holds and not failed else 1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nrun.py: interrupted; what finished before stands in the file.", file=sys.stderr)
        sys.exit(130)
