"""How the runner and its child processes talk: one JSON file in, one JSON file out.

The runner starts `python children/X.py JOB.json`. The job holds what the child needs and, under `result`,
where to write its answer. Each child is a process of its own so that its time and peak memory are its own; it
may live in a peer's virtual environment, so this module needs the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Result = dict[str, Any]


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def peak_bytes() -> int:
    """The largest resident size that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions(*distributions: str) -> dict[str, str]:
    """Installed version of each named distribution; those not installed are left out."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Clock:
    """Seconds spent inside `with clock:` blocks, imports and reading the job left out on every side alike."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def main(work: Callable[[Job, Clock], Result]) -> None:
    """Run a child: read the job named on the command line, do `work`, write its result, time and peak."""
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    clock = Clock()
    result = work(job, clock)
    write_json(Path(job["result"]), {**result, "seconds": clock.seconds, "peak_bytes": peak_bytes()})
