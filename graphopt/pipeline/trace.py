"""The trace: what every pass did, as data. Text, JSON and HTML are views of it.

On disk `trace/007_fold_batch_norm.txt` is the program after a pass and `.json` beside it the record; `000_capture` is
the start.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from torch import Tensor

from graphopt.errors import GraphoptError, first_line, nearest
from graphopt.files import write_text
from graphopt.ir.rewriter import Site


@dataclass
class PassRecord:
    """One pass of the pipeline.

    Attributes:
        index: position; 0 is the capture. name: of the pass. key: name, with `#2` when it ran before.
        options: those that differ from their defaults. exact: as the pass declares.
        inserted: who required it, when the recipe did not list it.
        text: the program after the pass. before: the program's text before it.
        nodes_added, nodes_removed, nodes_changed: names of operators; weights_added, ...: names of weights.
        parameter_bytes, macs, nodes: of the program after the pass.
        parameters: its weight elements, without scales. weight_bits: of all its weights, codes packed, scales included.
        seconds: of the pass itself; validation_seconds: of checking it. peak_memory_bytes: of the process so far.
        error: relative error of the algebra (exact passes that changed something). rounding_error: of rounding weights.
        sqnr_db: of the outputs against the captured program (lossy passes that changed something).
        rejected: why the manager dropped the changes, or empty.
        touched, skipped: places and reasons. facts: figures the pass reports.
        given: the program it was given, kept of the first pass that quantizes; not part of what is saved.
    """

    index: int
    name: str
    key: str
    text: str
    before: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    inserted: str = ""
    nodes_added: list[str] = field(default_factory=list)
    nodes_removed: list[str] = field(default_factory=list)
    nodes_changed: list[str] = field(default_factory=list)
    weights_added: list[str] = field(default_factory=list)
    weights_removed: list[str] = field(default_factory=list)
    weights_changed: list[str] = field(default_factory=list)
    nodes: int = 0
    parameter_bytes: int = 0
    parameters: int = 0
    weight_bits: float = 0
    macs: int = 0
    seconds: float = 0.0
    validation_seconds: float = 0.0
    peak_memory_bytes: int = 0
    error: float | None = None
    rounding_error: float | None = None
    sqnr_db: float | None = None
    rejected: str = ""
    touched: list[Site] = field(default_factory=list)
    skipped: list[Site] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    given: Any = field(default=None, repr=False, compare=False)

    @property
    def changed(self) -> bool:
        return self.text != self.before

    @property
    def stem(self) -> str:
        """Name of the record's files in a trace folder, without ending: `007_fold_batch_norm`."""
        return f"{self.index:03d}_{re.sub(r'[^A-Za-z0-9_]+', '_', self.key)}"

    def diff(self, context: int = 3) -> str:
        """Return the unified diff of the program's text before and after; empty when nothing changed."""
        old, new = self.before.splitlines(keepends=True), self.text.splitlines(keepends=True)
        return "".join(difflib.unified_diff(old, new, "before", f"after {self.key}", n=context))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data for JSON, without the program texts."""
        data = dataclasses.asdict(dataclasses.replace(self, given=None))
        del data["text"], data["before"], data["given"]
        return {key: finite(value) for key, value in data.items()}


def finite(value: Any) -> Any:
    """Return plain data that JSON can write: infinities, which it does not have, as text, and what is not plain too."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class Trace:
    """The records of a run, by position or by pass name (`name#2` for a second time).

    `notes` are sentences for the user that belong to no single pass; the report of a run keeps them.
    """

    def __init__(self, records: list[PassRecord] | None = None) -> None:
        self.records = records or []
        self.notes: list[str] = []

    def __getitem__(self, key: int | str) -> PassRecord:
        if isinstance(key, int):
            return self.records[key]
        known = {record.key: record for record in self.records}
        if key not in known:
            raise GraphoptError(f"the trace has no pass {key!r}{nearest(key, known)}; it has {', '.join(known)}")
        return known[key]

    def __iter__(self) -> Iterator[PassRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def _repr_html_(self) -> str:
        """Return the passes as a table, for notebooks."""
        rows = []
        for record in self.records:
            kind = "" if record.index == 0 else ("exact" if record.exact else "lossy")
            error = "rejected" if record.rejected else ("" if record.error is None else f"{record.error:.0e}")
            error = error or ("" if record.sqnr_db is None else f"{record.sqnr_db:.1f} dB")
            fired, declined = len(record.touched) or "", len(record.skipped) or ""
            cells = (f"{record.index:03d}", record.key, kind, record.nodes, f"{record.parameter_bytes:,}", error)
            rows.append((*cells, fired, declined, f"{record.seconds:.2f}"))
        heading = ("", "pass", "kind", "nodes", "parameter bytes", "error", "fired", "declined", "seconds")
        return html_table(heading, rows)

    def key_for(self, name: str) -> str:
        """Return the key that the next record of a pass gets."""
        count = sum(record.name == name for record in self.records)
        return name if count == 0 else f"{name}#{count + 1}"

    def save(self, folder: Path) -> None:
        """Write every record as text and JSON; records of an older trace in the folder go."""
        folder.mkdir(parents=True, exist_ok=True)
        for record in self.records:
            stem = folder / record.stem
            write_text(stem.with_suffix(".txt"), record.text)
            write_text(stem.with_suffix(".json"), json.dumps(record.to_dict(), indent=1) + "\n")
        stems = {record.stem for record in self.records}
        for path in _record_files(folder):
            if path.stem not in stems:
                path.unlink()
                path.with_suffix(".txt").unlink(missing_ok=True)

    @staticmethod
    def load(folder: Path) -> Trace:
        """Read what `save` wrote; GraphoptError where a record is damaged or missing."""
        known = {field.name for field in dataclasses.fields(PassRecord)} - {"text", "before", "given"}
        reader = TypeAdapter(PassRecord)
        records: list[PassRecord] = []
        for path in _record_files(folder):
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                text = path.with_suffix(".txt").read_text(encoding="utf-8")
                data = {key: value for key, value in data.items() if key in known}
                data |= {"text": text, "before": records[-1].text if records else text}
                record = reader.validate_python(data)
                if (record.index, record.stem) != (len(records), path.stem):
                    raise ValueError(f"record {len(records)} should come next")
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                raise GraphoptError(
                    f"the trace file {path} is damaged ({first_line(error)}); run the optimization again"
                ) from None
            records.append(record)
        if not records:
            raise GraphoptError(f"the trace {folder} is damaged (it holds no records); run the optimization again")
        return Trace(records)


def html_table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as HTML, escaped."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', heading)}</thead><tbody>{body}</tbody></table>"


def _record_files(folder: Path) -> list[Path]:
    """Return the JSON files of records in order; other files are not looked at."""
    found = [path for path in folder.glob("*.json") if re.match(r"\d{3,}_", path.name)]
    return sorted(found, key=lambda path: (int(path.name.partition("_")[0]), path.name))
