"""The journal: measurements that decide something, recorded so that a run that goes on decides alike."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Figures by key, in memory, and line by line in a file where there is one.

    What was recorded before is read from the file; a last line that was cut short does not count.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["value"]
                except (ValueError, TypeError, KeyError):
                    continue

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def recorded(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what is recorded under `key`, else what `compute` returns (plain data), recorded durably first."""
        if key not in self._known:
            value = compute()
            if self.path is not None:
                with open(self.path, "a+b") as file:
                    if file.tell() and not _ends_a_line(file):
                        file.write(b"\n")  # behind a line that was cut short
                    file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            self._known[key] = value
        return self._known[key]


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
