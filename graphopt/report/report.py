"""Report: the figures of a run as plain data, read from a Result or from a saved report.json.

It holds what a person wants to know and nothing that needs the program: sizes, bits, errors and latency
before and after, what every pass did, what was skipped and why, what did not fuse and why, and which bounds
of the budget do not hold.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from rich.console import RenderableType

from graphopt.backend import ExportReport
from graphopt.budget import Budget
from graphopt.causes import Causes
from graphopt.errors import GraphoptError, first_line
from graphopt.ir.rewriter import Site
from graphopt.pipeline import PassRecord, Trace
from graphopt.pipeline.trace import finite, html_table
from graphopt.rundir import MARKER, damaged, read_text

if TYPE_CHECKING:
    from graphopt.result import Result


@dataclass(frozen=True)
class Change:
    """A quantity of the captured model and of the optimized one; None where not known."""

    # `int` too, so that counts stay whole through JSON.
    before: int | float | None = None
    after: int | float | None = None

    @property
    def ratio(self) -> float | None:
        """after / before."""
        if self.before is None or self.after is None or self.before == 0:
            return None
        return self.after / self.before

    @property
    def difference(self) -> float | None:
        """after - before."""
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Places:
    """Places of the program of which a pass says the same thing."""

    reason: str
    nodes: list[str]


@dataclass(frozen=True)
class PassRow:
    """One line of the table of passes.

    Attributes:
        index, key: position and name (`name#2` for a second time). inserted: who required it.
        rejected: why its changes were dropped.
        changed: whether the program's text changed.
        nodes, bytes, macs: operators, parameter bytes and multiply-accumulates, after minus before; of the capture,
            those it starts with.
        error, rounding_error, sqnr_db: as in PassRecord. seconds: pass and validation.
        touched, skipped: places by what was done, or why nothing was.
        facts: single figures that the pass reports (the trace has all).
        stem: name of its files in trace/, without ending.
    """

    index: int
    key: str
    exact: bool = True
    changed: bool = False
    inserted: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    nodes: int = 0
    bytes: int = 0
    macs: int = 0
    error: float | None = None
    rounding_error: float | None = None
    sqnr_db: float | None = None
    seconds: float = 0.0
    rejected: str = ""
    touched: list[Places] = field(default_factory=list)
    skipped: list[Places] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    stem: str = ""

    @staticmethod
    def of(record: PassRecord, before: PassRecord | None) -> PassRow:
        """Summarize a record; `before` is the one it follows, None for the capture."""
        return PassRow(
            record.index,
            record.key,
            record.exact,
            record.changed,
            record.inserted,
            dict(record.options),
            record.nodes - (before.nodes if before else 0),
            record.parameter_bytes - (before.parameter_bytes if before else 0),
            record.macs - (before.macs if before else 0),
            record.error,
            record.rounding_error,
            record.sqnr_db,
            record.seconds + record.validation_seconds,
            record.rejected,
            _grouped(record.touched),
            _grouped(record.skipped),
            {key: value for key, value in record.facts.items() if isinstance(value, bool | int | float | str)},
            record.stem,
        )


def _grouped(sites: list[Site]) -> list[Places]:
    """Group sites by what is said of them, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(site.reason, []).append(site.node)
    return sorted((Places(*each) for each in groups.items()), key=lambda each: -len(each.nodes))


@dataclass(frozen=True)
class Report:
    """What is known about a run; `str(report)` is the summary a person reads.

    Attributes:
        version: of graphopt. recipe, target: their names. notes: sentences about choices made on the way.
        metric: of the user's `evaluate`. macs: multiply-accumulates.
        parameters: weight elements. parameter_bytes: their bytes, one storage element a value.
        average_bits: bits of all weights, scales included, per weight element of the captured model.
        exported: what the export found, None before the first. passes: in order; the first is the capture.
        budget: bounds that were given. exceeded: a sentence for every bound that does not hold.
        causes: where the result loses what it loses, None where nobody looked.
        trace: the programs between the passes, for diffs; not part of the JSON.
    """

    version: str = ""
    recipe: str = ""
    target: str = ""
    notes: list[str] = field(default_factory=list)
    metric: Change = Change()
    parameters: Change = Change()
    parameter_bytes: Change = Change()
    average_bits: Change = Change()
    macs: Change = Change()
    exported: ExportReport | None = None
    passes: list[PassRow] = field(default_factory=list)
    budget: dict[str, float] = field(default_factory=dict)
    exceeded: list[str] = field(default_factory=list)
    causes: Causes | None = None
    trace: Trace = field(default_factory=Trace, repr=False, compare=False)

    @staticmethod
    def of(result: Result) -> Report:
        """Collect what a result knows by now."""
        records = result.trace.records
        before, after = (records[0], records[-1]) if records else (None, None)
        report = Report(
            version=graphopt_version(),
            recipe=result.recipe.name,
            target=result.target.name,
            notes=list(result.notes),
            metric=Change(result.original_metric, result.metric),
            exported=result.exported,
            passes=[PassRow.of(each, records[i - 1] if i else None) for i, each in enumerate(records)],
            budget=result.budget.bounds(),
            causes=result.causes,
            trace=result.trace,
        )
        if before is not None and after is not None:
            elements = before.parameters
            report = dataclasses.replace(
                report,
                parameters=Change(before.parameters, after.parameters),
                parameter_bytes=Change(before.parameter_bytes, after.parameter_bytes),
                macs=Change(before.macs, after.macs),
                average_bits=Change(before.weight_bits / elements, after.weight_bits / elements)
                if elements
                else Change(),
            )
        return dataclasses.replace(report, exceeded=result.budget.exceeded(report.measured()))

    @property
    def size_bytes(self) -> Change:
        """Bytes of the float export and of the exported file."""
        found = self.exported
        return Change(found.baseline_size_bytes, found.size_bytes) if found else Change()

    @property
    def latency_ms(self) -> Change:
        """Median latencies of the float export and of the exported file."""
        return Change(self.exported.baseline_latency_ms, self.exported.latency_ms) if self.exported else Change()

    @property
    def costliest(self) -> PassRow | None:
        """The pass after which the outputs of the example were farthest from where they were before it."""
        most, found, before = 0.0, None, 0.0
        for row in self.passes:
            if row.changed and not row.rejected and row.sqnr_db is not None:
                noise = 10 ** (-row.sqnr_db / 10)
                if noise - before > most:
                    most, found = noise - before, row
                before = noise
        return found

    def measured(self) -> dict[str, float | None]:
        """The quantities a Budget bounds, by its field names."""
        difference = self.metric.difference
        return {
            "metric_drop": None if difference is None else -difference,
            "size_ratio": self.size_bytes.ratio,
            "latency_ratio": self.latency_ms.ratio,
            "macs_ratio": self.macs.ratio,
            "params_ratio": self.parameters.ratio,
            "average_bits": self.average_bits.after,
        }

    def to_json(self) -> str:
        """Return the report as JSON; infinities are written as text, since JSON has none."""
        data = {
            each.name: plain_data(getattr(self, each.name)) for each in dataclasses.fields(self) if each.name != "trace"
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_dict(data: Any, trace: Trace | None = None, source: str = MARKER) -> Report:
        """Read what `to_json` wrote; keys that are missing keep their defaults, unknown ones are left out.

        Raises GraphoptError where a value is not what it should be.
        """
        if not isinstance(data, dict):
            raise GraphoptError(f"{source} is damaged: it holds no mapping; run the optimization again")
        values = {}
        for key, adapter in _adapters().items():
            if key not in data:
                continue
            try:
                values[key] = adapter.validate_python(data[key])
            except ValidationError as error:
                if _newer(written := str(data.get("version", "")), graphopt_version()):
                    raise GraphoptError(
                        f"{source} was written by graphopt {written}, and this is {graphopt_version()}: "
                        "install that version to read it"
                    ) from None
                first = error.errors()[0]
                where = ".".join(str(part) for part in (key, *first["loc"]))
                raise GraphoptError(
                    f"{source} is damaged at {where} ({first['msg'].lower()}); run the optimization again"
                ) from None
        return Report(**values, trace=trace or Trace())

    @staticmethod
    def read(folder: str | Path) -> Report:
        """Read the report of a run directory with its trace; its program is not loaded."""
        root = Path(folder)
        text = read_text(root, MARKER)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise damaged(root / MARKER, first_line(error)) from None
        return Report.from_dict(data, Trace.load(root / "trace"), str(root / MARKER))

    def restore(self, result: Result) -> None:
        """Fill in what a saved report knows and the other files of a run directory do not."""
        result.notes = list(self.notes)
        result.original_metric, result.metric = self.metric.before, self.metric.after
        result.exported, result.causes = self.exported, self.causes
        budget = Budget()
        for name, bound in self.budget.items():
            budget = budget.with_bound(name, bound)
        result.budget = budget

    def summary(self, width: int = 110) -> str:
        """Return the summary as plain text."""
        from graphopt.report.text import plain, summary

        return plain(summary(self), width)

    def save_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that needs nothing else: no scripts, no network."""
        from graphopt.files import write_text
        from graphopt.report.html import html

        write_text(Path(path), html(self))

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """Return figures, passes and what does not hold, for notebooks; `save_html` writes everything."""
        from graphopt.report.text import figure_rows

        figures = html_table(("", "before", "after", ""), list(figure_rows(self)))
        said = [*self.exceeded, *self.notes]
        notes = "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in said) + "</ul>" if said else ""
        return f"<p>{escape(self.recipe)} for {escape(self.target)}</p>{figures}{self.trace._repr_html_()}{notes}"

    def __rich__(self) -> RenderableType:
        from graphopt.report.text import summary

        return summary(self)


def _newer(version: str, than: str) -> bool:
    """Return whether a version, `1.10.2` or with more behind it, comes after another; False where one says nothing."""
    found = [[int(part) for part in re.findall(r"\d+", each)[:3]] for each in (version, than)]
    return all(found) and found[0] > found[1]


def graphopt_version() -> str:
    """Return the installed version of graphopt."""
    try:
        return version("graphopt")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def _adapters() -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(Report)
    return {each.name: TypeAdapter(hints[each.name]) for each in dataclasses.fields(Report) if each.name != "trace"}


def plain_data(value: Any) -> Any:
    """Return a dataclass, or what holds some, as plain data that JSON can write."""
    if dataclasses.is_dataclass(value):
        return {each.name: plain_data(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain_data(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(each) for each in value]
    return finite(value)
