"""`graphopt inspect`: what a run did, what one pass did, the story of one place, and where an error came in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.causes import Causes
from graphopt.cli.bounds import parse_bound
from graphopt.errors import GraphoptError
from graphopt.pipeline import PassRecord, Trace
from graphopt.report import Report
from graphopt.report.report import plain_data
from graphopt.report.story import Event, story
from graphopt.report.text import bullet, db_text, listed, passes, pipeline, section, summary

_TAKEN = "--bisect takes error=NUMBER, sqnr=DECIBELS or metric=NUMBER"
_FEW = 8  # figures that fit on a line
_STYLES = {"+": "green", "-": "red", "@": "cyan"}
_KINDS = {"made": "green", "gone": "red", "changed": "yellow", "skipped": "magenta"}


@dataclass(frozen=True)
class View:
    """What is shown: for people, and as plain data for machines."""

    parts: list[RenderableType]
    data: Any


def whole(report: Report) -> View:
    """Return the run: figures, the pipeline as a table, and what one should know besides."""
    data = json.loads(report.to_json())
    return View([summary(report, pipeline(report.passes))], data)


def one_pass(report: Report, name: str) -> View:
    """Return a pass's line, what it touched and skipped, and its diff; `name` is its key or index."""
    record = report.trace[_position(name, len(report.trace)) if name.isdigit() else name]
    rows = [row for row in report.passes if row.key == record.key]
    parts: list[RenderableType] = [passes(rows)]
    for option, value in record.options.items():
        parts.append(bullet(f"{option} = {value!r}"))
    parts += _facts(record.facts)
    for row in rows:
        for title, groups in (("touched", row.touched), ("skipped", row.skipped)):
            if groups:
                parts.append(section(title))
                parts += [bullet(f"{each.reason}: {', '.join(each.nodes)}") for each in groups]
    diff = record.diff()
    lines = (diff or (record.text if record.index == 0 else "")).splitlines()
    parts.append(Text(""))
    styles = _STYLES if diff else {}
    parts += [Text(line, styles.get(line[:1], ""), no_wrap=True, overflow="ignore") for line in lines]
    if not lines:
        parts.append(Text("The program is the same before and after."))
    return View(parts, record.to_dict() | {"diff": diff})


def why(report: Report, name: str) -> View:
    """Return the story of an operator, a weight, a module or a space."""
    events = story(report.trace, name)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    last = -1
    for each in events:
        place = "" if each.index == last else f"{each.index:03d} {each.key}"
        table.add_row(Text(place), Text(each.kind, _KINDS.get(each.kind, "")), Text(_told(each, name)))
        last = each.index
    data = {"name": name, "events": [dataclasses.asdict(each) for each in events]}
    return View([Text(f"why {name}\n", "bold"), table], data)


def _told(each: Event, name: str) -> str:
    of = "" if each.name == name or each.kind in ("made", "changed", "gone") else f"{each.name}: "
    return f"- {each.before}\n+ {each.text}" if each.before else of + each.text


def first_beyond(
    report: Report, bound: str, replayed: Callable[[Trace], Callable[[int], float]] | None
) -> View:
    """Return the first pass after which a bound does not hold.

    Args:
        bound: `error=1e-5` (of exact passes), `sqnr=30` (dB of the outputs, which must not fall below), or
            `metric=98.5`. replayed: returns for a trace what gives the metric after so many of its passes.
    """
    quantity, value = parse_bound(bound, ("error", "sqnr", "metric"), _TAKEN)
    if quantity == "metric":
        if replayed is None:
            raise GraphoptError("--bisect metric=... runs the passes again; give --model, --evaluate and --calibration")
        return _by_metric(report.trace, value, replayed(report.trace))
    told = [(record, _recorded(record, quantity)) for record in report.trace]
    known = [(record, each) for record, each in told if each is not None]
    shown = [{"index": record.index, "key": record.key, quantity: each} for record, each in known]
    # Changes that were rejected are not in the program.
    beyond = [record for record, each in known if _breaks(quantity, each, value) and not record.rejected]
    name = {"sqnr": "the SQNR of the outputs", "error": "the error of an exact pass"}[quantity]
    if not beyond:
        return View([Text(f"no pass crosses it: {name} {_side(quantity)} {value:g} all along")], _found(None, shown))
    first = beyond[0]
    at = _recorded(first, quantity)
    return _first(first, f"is the first: {name} is {at:.4g} after it", shown)


def _recorded(record: PassRecord, quantity: str) -> float | None:
    return record.error if quantity == "error" else record.sqnr_db


def _breaks(quantity: str, found: float, bound: float) -> bool:
    return not (found <= bound if quantity == "error" else found >= bound)


def _side(quantity: str) -> str:
    return "is at most" if quantity == "error" else "is at least"


def _found(first: PassRecord | None, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"first": None if first is None else {"index": first.index, "key": first.key}, "passes": steps}


def _by_metric(trace: Trace, bound: float, metric: Callable[[int], float]) -> View:
    """Search by bisection between the captured program, whose metric holds, and the last, whose does not."""
    steps: list[dict[str, Any]] = []

    def after(index: int) -> float:
        found = metric(index)
        steps.append({"index": index, "key": trace[index].key, "metric": found})
        return found

    if (before := after(0)) < bound:
        below = Text(f"the captured model is below it already: its metric is {before:g}")
        return View([below], _found(trace[0], steps))
    if (last := after(len(trace) - 1)) >= bound:
        return View([Text(f"no pass crosses it: the metric is {last:g} after the last")], _found(None, steps))
    low, high = 0, len(trace) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if after(middle) >= bound else (low, middle)
    known = {each["index"]: each["metric"] for each in steps}
    first = trace[high]
    return _first(first, f"crosses it: the metric is {known[low]:g} before it and {known[high]:g} after it", steps)


def _first(first: PassRecord, what: str, steps: list[dict[str, Any]]) -> View:
    then = f"graphopt inspect RUN_DIR --pass {first.key} shows what it did"
    return View([Text(f"{first.key} (pass {first.index}) {what}"), Text(then)], _found(first, steps))


def where_from(causes: Causes | None) -> View:
    """Return where the error comes from: every place as a line of a table, what is wrong, and what helps."""
    if causes is None:
        raise GraphoptError(
            "this run does not tell where its error comes from; give --model, and --calibration, to measure it now"
        )
    data = plain_data(causes)
    if not causes.sites:
        return View([Text("Nothing that is quantized differs from the captured model.")], data)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    words = ("place", "weights", "inputs")
    numbers = ("share", "at outputs", "own", "of weights", "of inputs", "behind", "in runtime")
    for index, heading in enumerate((*words, *numbers)):
        table.add_column(heading, justify="left" if index < 3 else "right", overflow="fold")
    for each in causes.sites:
        share = "" if each.share is None else f"{100 * each.share:.3g} %"
        figures = (each.effect_db, each.local_db, each.weights_db, each.inputs_db, each.propagated_db)
        cells = (each.node, each.weights, each.inputs, share, *map(db_text, figures), each.runtime)
        table.add_row(*map(Text, cells), style="yellow" if each.defects else "")
    parts: list[RenderableType] = [table]
    if causes.defective:
        parts.append(section("something is wrong"))
        ordered = sorted(causes.defective, key=lambda each: each.position)
        parts += [bullet(f"{each.node}: {'; '.join(each.defects)}", "yellow") for each in ordered]
    if causes.unseen:
        parts += [section("not to be seen in the runtime"), bullet(listed(causes.unseen))]
    if causes.remedies:
        parts.append(section("what helps (tried)"))
        parts += [bullet(str(each)) for each in causes.remedies]
    return View(parts, data)


def measured_causes(run_dir: Path, model: str, calibration: Path | None, file: Path | None, trust: bool) -> Causes:
    """Measure where the error of a run comes from, in torch and in the runtime.

    Args:
        model, calibration: what was optimized, and with what data. file: to look at in the place of the run's own.
    """
    from graphopt.capture import capture
    from graphopt.cli.named import load_model
    from graphopt.cli.samples import SampleFile
    from graphopt.result import load

    result = load(run_dir, trust=trust)
    named = load_model(model)
    result.original = capture(named.model, named.example_inputs, dynamic_shapes=named.dynamic_shapes, trust=trust)
    data = SampleFile.open(calibration).batches(result.original) if calibration is not None else None
    found = result.explain(data, file)
    return found if found is not None else Causes()


def _facts(facts: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield the figures and sentences that a pass reports; long tables of figures are in the trace's JSON."""
    for name, value in facts.items():
        title = name.replace("_", " ")
        if isinstance(value, bool | int | float | str):
            yield bullet(f"{title}: {value}")
        elif isinstance(value, dict) and value and len(value) <= _FEW and not any(map(_nested, value.values())):
            yield bullet(f"{title}: " + ", ".join(f"{key} {each}" for key, each in value.items()))
        elif isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            yield section(title)
            yield from (bullet(each) for each in value)


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _position(text: str, count: int) -> int:
    if int(text) >= count:
        raise GraphoptError(f"the trace has no pass {int(text)}; it has 0 to {count - 1}")
    return int(text)


@dataclass(frozen=True)
class Replay:
    """What it takes to run the passes of a run again: the arguments of the command."""

    model: str
    evaluate: str
    calibration: Path | None
    trust: bool
    target: str

    def __call__(self, trace: Trace) -> Callable[[int], float]:
        """Return what gives the metric after the passes up to an index."""
        from graphopt.api import optimize
        from graphopt.capture import capture
        from graphopt.cli.named import load_function, load_model
        from graphopt.cli.samples import SampleFile
        from graphopt.metric import rated
        from graphopt.pipeline import Composite, make_pass, pass_class
        from graphopt.progress import default_progress

        samples = SampleFile.open(self.calibration) if self.calibration is not None else None
        evaluate = load_function(self.evaluate, "--evaluate")
        named = load_model(self.model)
        program = capture(named.model, named.example_inputs, dynamic_shapes=named.dynamic_shapes, trust=self.trust)
        progress = default_progress()

        def metric(index: int) -> float:
            records = trace.records[1 : index + 1]  # those of composite passes stand before these
            plain = [each for each in records if not issubclass(pass_class(each.name), Composite)]
            passes = [make_pass(each.name, each.options) for each in plain]
            data = samples.batches(program) if samples is not None else None
            with progress.stage(f"the passes up to {trace[index].key}"):
                made = optimize(program, recipe=passes, calibration=data, target=self.target, progress=progress)
            return rated(evaluate, made.program, f"the program after {trace[index].key}", seed=0)

        return metric
