"""The manager: runs a list of passes in order, checks each and records what it did."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

import torch

from graphopt.analysis.cost import macs, parameter_bytes, parameters, weight_bits
from graphopt.ir.printing import node_text, program_text
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Changes
from graphopt.ir.verify import verify
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.registry import make_pass
from graphopt.pipeline.trace import PassRecord, Trace
from graphopt.pipeline.validation import ValidationError, Validator, sqnr_db


def run_passes(program: Program, passes: Sequence[Pass], context: Context, trace: Trace | None = None) -> tuple[Program, Trace]:
    """Run `passes` over `program` and return the new program with its trace; `program` itself is not changed.

    An exact pass whose float64 check fails is rejected: its changes are dropped, the record says so, and the run goes on
    (with `context.strict` it raises ValidationError).
    """
    trace = trace if trace is not None else Trace()
    original = program
    if not trace.records:
        trace.records.append(_capture_record(program))
    validator: Validator | None = None
    reference: list[list[object]] | None = None
    schedule = with_requirements(passes)
    with context.progress.stage("passes", len(schedule)) as stage:
        for each, inserted in schedule:
            record = PassRecord(len(trace), each.name, trace.key_for(each.name), "", trace.records[-1].text)
            record.options, record.exact, record.inserted = each.options, each.exact, inserted
            candidate, started = program.clone(), time.perf_counter()
            with torch.no_grad():
                changes = each.run(candidate, context)
            record.seconds = time.perf_counter() - started
            started = time.perf_counter()
            if changes.changed:
                verify(candidate, reference=program)
                if each.exact:
                    validator = validator or _validator(program, context, original)
                    candidate = _validate(each, validator, program, candidate, changes, record, context)
                else:
                    validator = None  # the reference of a later exact pass is the program after this one
                    reference = reference if reference is not None else _outputs(original, original)
                    record.sqnr_db = min(
                        (sqnr_db(new, old) for new, old in zip(_outputs(candidate, original), reference, strict=True))
                    )
            record.validation_seconds = time.perf_counter() - started
            _describe(record, program, candidate, changes)
            trace.records.append(record)
            program = candidate
            stage.advance()
    return program, trace


def with_requirements(passes: Sequence[Pass]) -> list[tuple[Pass, str]]:
    """Return the passes with missing required ones inserted, each with the name of who required it (or empty)."""
    schedule: list[tuple[Pass, str]] = []
    ran: set[str] = set()

    def add(each: Pass, inserted: str) -> None:
        for required in each.requires:
            if required not in ran:
                add(make_pass(required), each.name)
        schedule.append((each, inserted))
        ran.add(each.name)

    for each in passes:
        add(each, "")
    return schedule


def _validator(program: Program, context: Context, original: Program) -> Validator:
    validator = Validator(program, context.seed)
    if validator.note and validator.note not in original.notes:
        original.notes.append(validator.note)
    return validator


def _validate(
    each: Pass,
    validator: Validator,
    program: Program,
    candidate: Program,
    changes: Changes,
    record: PassRecord,
    context: Context,
) -> Program:
    record.error, record.rounding_error = validator.check(candidate, changes.unrounded)
    if record.error <= each.tolerance:
        validator.accept()
        return candidate
    where = validator.first_difference(program, candidate, changes.unrounded, each.tolerance)
    record.rejected = (
        f"it changed the outputs by {record.error:.1e} relative, more than {each.tolerance:.0e}"
        + (f", first at {where}" if where else "")
        + "; its changes were dropped"
    )
    if context.strict:
        raise ValidationError(f"{each.name}: {record.rejected}\n{program_text(candidate)}")
    return program


def _outputs(program: Program, example: Program) -> list[list[object]]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [program.run(example.flat_example)]


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record.peak_memory_bytes = peak if sys.platform == "darwin" else peak * 1024
