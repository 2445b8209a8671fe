"""The manager: runs a list of passes in order, checks each and records what it did."""

from __future__ import annotations

import fnmatch
import inspect
import time
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from graphopt.analysis.cost import macs, parameter_bytes, parameters, weight_bits
from graphopt.errors import GraphoptError, described
from graphopt.ir.printing import node_text, program_text
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Changes
from graphopt.ir.verify import verify
from graphopt.memory import peak_bytes, release_freed
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Branch, Composite, LossyPass, Pass, Step, site_names
from graphopt.pipeline.registry import make_pass
from graphopt.pipeline.trace import PassRecord, Trace
from graphopt.pipeline.unfinished import Unfinished
from graphopt.pipeline.validation import ValidationError, Validator, run_seeded, sqnr_db


class PassError(RuntimeError):
    """A pass failed: a defect of the pass, not a mistake of the user."""


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    trace: Trace | None = None,
    unfinished: Unfinished | None = None,
) -> tuple[Program, Trace]:
    """Run `passes` over `program` and return the new program with its trace; `program` itself is not changed.

    With `unfinished` the run goes on where an interrupted one was, and is saved after every pass that reads user data.

    An exact pass that changes the function, breaks the IR or fails is rejected: the model is right without it, so its
    changes are dropped, the record says why and the run goes on (with `context.strict` the error is raised).

    Raises:
        GraphoptError: a mistake of the user that a pass found.
        PassError: a lossy pass failed, or a pass wrote into a weight in place, which cannot be undone.
    """
    if context.original is None:
        context.original = program
    run = _Run(program, context, trace if trace is not None else Trace())
    if not run.trace.records:
        run.trace.records.append(_capture_record(program))
    schedule = with_requirements(passes)
    done = 0
    if unfinished is not None and (found := unfinished.restore()) is not None:
        done, program, run.trace = found
        run.note(f"resumed after {run.trace.records[-1].key}: the steps before were done by an interrupted run")
    with context.progress.stage("passes", len(schedule)) as stage:
        for index, (each, inserted) in enumerate(schedule):
            if index >= done:
                program = run.step(each, inserted, program)
                if unfinished is not None and each.needs:
                    unfinished.save(index + 1, program, run.trace)
            stage.advance()
    return program, run.trace


def with_requirements(passes: Sequence[Pass], before: Collection[str] = ()) -> list[tuple[Pass, str]]:
    """Return the passes with missing required ones inserted, each with the name of who required it (or empty).

    `before`: names of passes that ran already. Raises GraphoptError where passes require each other.
    """
    schedule: list[tuple[Pass, str]] = []
    ran = set(before)

    def add(each: Pass, inserted: str, waiting: tuple[str, ...]) -> None:
        if each.name in waiting:
            raise GraphoptError(f"passes require each other: {' -> '.join((*waiting, each.name))}")
        for required in each.requires:
            if required not in ran:
                add(make_pass(required), each.name, (*waiting, each.name))
        schedule.append((each, inserted))
        ran.add(each.name)

    for each in passes:
        add(each, "", ())
    return schedule


@dataclass
class _Run:
    """What lives as long as a run: the captured program, its outputs, the validator of a stretch of exact passes.

    With a list `unchecked`, steps are put there instead of being checked.
    """

    original: Program
    context: Context
    trace: Trace
    validator: Validator | None = None
    reference: list[object] | None = None
    names: set[str] = field(default_factory=set)
    unchecked: list[Step] | None = None

    def compose(self, each: Composite, inserted: str, program: Program) -> Program:
        """Run a composite pass; what it tried and did not keep is in its own record only."""
        started = time.perf_counter()
        chosen, changes = self._try(each, program, check=False)
        if chosen is not None and (defect := self._defect(chosen)):
            self.note(defect)
            # One of its passes is defective, and what came behind it stands on its changes.
            chosen, changes = self._try(each, program, check=True)
        self.validator = None
        for kept in chosen.records if chosen is not None else ():
            kept.index = len(self.trace)
            self.trace.records.append(kept)
        record = PassRecord(len(self.trace), each.name, self.trace.key_for(each.name), "", self.trace.records[-1].text)
        record.options, record.exact, record.inserted = each.options, each.exact, inserted
        record.seconds = time.perf_counter() - started
        made = chosen.program if chosen is not None else program
        _describe(record, made, made, changes)
        self.trace.records.append(record)
        return made

    def _try(self, each: Composite, program: Program, check: bool) -> tuple[Branch | None, Changes]:
        """Compose on branches, whose passes are checked here or by `_defect`."""
        first = len(self.trace.records)
        known: dict[tuple[int, tuple[str, ...]], Branch] = {}

        def branch(passes: Sequence[Pass], context: Context) -> Branch:
            """Go on from the longest branch that begins with the same passes, in the same context."""
            names, same = tuple(map(str, passes)), id(context)
            known.setdefault((same, ()), Branch(program, []))
            shared = next(length for length in range(len(names), -1, -1) if (same, names[:length]) in known)
            begun = known[same, names[:shared]]
            run = _Run(self.original, context, self.trace, None, self.reference, self.names, None if check else [])
            made = begun.program
            self.trace.records += begun.records
            for one, requirer in with_requirements(passes[shared:], {record.name for record in self.trace}):
                made = run.step(one, requirer or each.name, made)
            known[same, names] = Branch(made, self.trace.records[first:], (*begun.unchecked, *(run.unchecked or ())))
            del self.trace.records[first:]
            return known[same, names]

        return each.compose(program, branch, self.context)

    def _defect(self, chosen: Branch) -> str:
        """Check the passes of a branch and return a sentence about the first that does not hold, or an empty string."""
        self.validator = None
        for step in chosen.unchecked:
            started = time.perf_counter()
            if reason := self._check(step.each, step.before, step.after, step.changes, step.record):
                return f"{step.each.name}: {reason}"
            step.record.validation_seconds += time.perf_counter() - started
        return ""

    def step(self, each: Pass, inserted: str, program: Program) -> Program:
        """Run one pass on a clone, check it, record it, and return the program to go on with."""
        if isinstance(each, Composite):
            return self.compose(each, inserted, program)
        record = PassRecord(len(self.trace), each.name, self.trace.key_for(each.name), "", self.trace.records[-1].text)
        record.options, record.exact, record.inserted = each.options, each.exact, inserted
        if each.quantizes and all(known.given is None for known in self.trace.records):
            record.given = program
        self._note_unmatched(each, program)
        candidate, changes, versions = program.clone(), Changes(), _versions(program)
        try:
            changes = self._transform(each, candidate, record)
            _check_untouched(each, program, versions)
            # The text tells what a pass did even where its own record is silent about it.
            if changes.changed or program_text(candidate) != record.before:
                started = time.perf_counter()
                verify(candidate, reference=program)
                if self.unchecked is None:
                    record.rejected = self._check(each, program, candidate, changes, record)
                else:
                    self.unchecked.append(Step(each, program, candidate, changes, record))
                record.validation_seconds = time.perf_counter() - started
        except (GraphoptError, PassError, ValidationError, MemoryError):
            raise
        except Exception as error:
            _check_untouched(each, program, versions)
            reason = f"it failed with {described(error)}{_place(each, error)}"
            if self.context.strict:
                raise
            if not each.exact:
                raise PassError(f"{each.name}: {reason}; leave it out, or leave out the place with skip") from error
            record.rejected = f"{reason}; its changes were dropped"
        if record.rejected:
            candidate, changes = program, Changes(skipped=changes.skipped)
        _describe(record, program, candidate, changes)
        self.trace.records.append(record)
        release_freed()
        return candidate

    def _transform(self, each: Pass, candidate: Program, record: PassRecord) -> Changes:
        started = time.perf_counter()
        # Seeded anew for every pass: what one draws does not depend on which ran before it.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.context.seed)
            changes = each.run(candidate, self.context)
        record.seconds = time.perf_counter() - started
        return changes

    def _check(self, each: Pass, program: Program, candidate: Program, changes: Changes, record: PassRecord) -> str:
        """Fill in the record's errors; return why the candidate is not to be taken, or an empty string."""
        if not each.exact:
            self.validator = None  # the reference of a later exact pass is the program after this one
            flat = self.original.flat_example
            self.reference = self.reference or run_seeded(self.original, flat)
            record.sqnr_db = sqnr_db(run_seeded(candidate, flat), self.reference)
            return ""
        if self.validator is None:
            self.validator = Validator(program, self.context.seed)
            self.note(self.validator.note)
        record.error, record.rounding_error = self.validator.check(candidate, changes.unrounded)
        tolerance = self.validator.allowed(each.tolerance)
        if record.error <= tolerance:
            self.validator.accept()
            return ""
        where = self.validator.first_difference(program, candidate, changes.unrounded, tolerance)
        reason = (
            f"it changed the outputs by {record.error:.1e} relative, more than {tolerance:.0e}"
            + (f", first at {where}" if where else "")
            + "; its changes were dropped"
        )
        if self.context.strict:
            raise ValidationError(f"{each.name}: {reason}\n{program_text(candidate)}")
        return reason

    def _note_unmatched(self, each: Pass, program: Program) -> None:
        """Say which globs mean nothing, in the program as it is and as it was captured: they may be misspelt."""
        if not isinstance(each, LossyPass) or not (each.only or each.skip):
            return
        self.names = self.names or _all_names(self.original)
        names = self.names | _all_names(program)
        for option in ("only", "skip"):
            for glob in getattr(each, option):
                if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                    self.note(f"{option}={glob!r} matches no node, weight or module")

    def note(self, sentence: str) -> None:
        if sentence and sentence not in self.trace.notes:
            self.trace.notes.append(sentence)


def _all_names(program: Program) -> set[str]:
    return {name for node in program.nodes if node.op == "call_function" for name in site_names(program, node)}


def _versions(program: Program) -> dict[str, int | None]:
    """Count the writes into each weight, which programs share; tensors made in inference mode keep no count."""
    return {name: None if weight.is_inference() else weight._version for name, weight in program.weights.items()}


def _check_untouched(each: Pass, program: Program, before: dict[str, int | None]) -> None:
    for name, version in _versions(program).items():
        if version != before[name]:
            raise PassError(
                f"{each.name} wrote into the weight {name} in place; weights are replaced, never overwritten"
            )


def _place(each: Pass, error: Exception) -> str:
    """Return the line of the pass's own file that the error came through."""
    try:
        home = inspect.getfile(type(each))
    except (OSError, TypeError):
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == home]
    return f" (line {frames[-1].lineno} of {type(each).__module__})" if frames else ""


def _capture_record(program: Program) -> PassRecord:
    text = program_text(program)
    record = PassRecord(0, "capture", "capture", text, text)
    _measure(record, program)
    return record


def _describe(record: PassRecord, before: Program, after: Program, changes: Changes) -> None:
    record.text = program_text(after)
    old, new = _lines(before), _lines(after)
    for kind, names in (("weights", True), ("nodes", False)):
        was = {name: line for (is_weight, name), line in old.items() if is_weight is names}
        now = {name: line for (is_weight, name), line in new.items() if is_weight is names}
        setattr(record, f"{kind}_added", [name for name in now if name not in was])
        setattr(record, f"{kind}_removed", [name for name in was if name not in now])
        setattr(record, f"{kind}_changed", [name for name in now if name in was and was[name] != now[name]])
    record.touched, record.skipped = list(changes.touched), list(changes.skipped)
    record.facts = dict(changes.facts)
    _measure(record, after)


def _lines(program: Program) -> dict[tuple[bool, str], str]:
    return {
        (node.op == "get_attr", str(node.target) if node.op == "get_attr" else node.name): node_text(program, node)
        for node in program.graph.nodes
        if node.op in ("get_attr", "call_function")
    }


def _measure(record: PassRecord, program: Program) -> None:
    record.nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    record.parameter_bytes, record.macs = parameter_bytes(program), macs(program)
    record.parameters, record.weight_bits = parameters(program), weight_bits(program)
    record.peak_memory_bytes = peak_bytes()
