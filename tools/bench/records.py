"""JSON lines: one record for each task and method of a run, appended, never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCHEMA = 1
Record = dict[str, Any]
"""schema, run, date (UTC), commit, task, method, machine, threads, rounds, versions, figures {quantity:
value}, detail, error.

Quantities carry their unit in the name; ratios are to the fp32 file of the same run. `total_seconds` is
optimization plus, for a method that starts from the fp32 export, that export; `peak_bytes` the larger of the
two processes'.
"""


def append(path: Path, records: Iterable[Record]) -> None:
    """Append whole lines in one write, so that two runners on one file do not mix theirs."""
    lines = "".join(json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """All records of a file, oldest first. Raises ValueError naming a line that is no such record."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"{path}:{number} is not a record of schema {SCHEMA}")
        records.append(record)
    return records


def by_run(records: Iterable[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """Group records: (task, run) -> method -> record; ratios mean something only inside one group."""
    groups: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["run"]), {})[record["method"]] = record
    return groups
