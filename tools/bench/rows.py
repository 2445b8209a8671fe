"""Measure one row of a table in a process of its own and keep its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import records
from environments import ROOT


def measure_row(script: str, results: Path, job: list[Any], **fields: Any) -> None:
    """Run `script --child JOB`, which prints its figures as JSON last, and append what came of it to `results`.

    `fields` (task, method, ...) say which row it is.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, script, "--child", json.dumps(job)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    record: dict[str, Any] = {
        "schema": records.SCHEMA, "job": job, "date": datetime.now(UTC).date().isoformat(), "commit": commit.strip(),
        "machine": machine.describe(), **fields,
    }  # fmt: skip
    if child.returncode:
        record["error"] = child.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
    else:
        record["figures"] = json.loads(child.stdout.strip().splitlines()[-1])
    records.append(results, [record])
    shown = ", ".join(str(value) for value in fields.values())
    print(f"{shown}: {record.get('figures') or record['error']}", file=sys.stderr, flush=True)
