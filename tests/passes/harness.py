"""Four tests a rewrite: it fires, it declines, it means the same, it is idempotent.

    test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(FoldBatchNorm(), EXAMPLES)

An Example is a small model with what the pass must make of it. `tests/passes/test_harness.py` shows that each of the
four checks fails on a pass that deserves it.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import redraw
from torch import Tensor, nn

import graphopt
from graphopt.ir import Changes, Program, operator, program_text, verify
from graphopt.pipeline import Context, Pass, make_pass
from graphopt.pipeline.validation import Validator
from graphopt.target import Target

CONTEXT = Context(Target(name="none", backend="none"))


class Function(nn.Module):
    """A module out of a function of its inputs and of weights given by name, as parameters where they are floating."""

    def __init__(self, function: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            if weight.is_floating_point() and not name.startswith("buffer"):
                self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            else:
                self.register_buffer(name, weight)
        self.names = tuple(weights)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(getattr(self, name) for name in self.names))


@dataclass(frozen=True, eq=False)
class Example:
    """A model and what a pass must make of it.

    Attributes:
        name: of the test.
        module: builds the model.
        shape: of its one input, normal numbers; or a function that returns the inputs.
        fires: how many places are rewritten by the rule; None: not looked at.
        rule: whose places are counted; empty: any rule's.
        golden: the operators afterwards, one a line, as `body` writes them; empty: not looked at.
        declines: part of a reason that must be recorded; the rule must then rewrite nothing (unless `fires` says so).
        batch: whether the first axis is also tried as a symbol.
        prepare: sets values of the module after those that a new module has at 0 or 1 were redrawn.
    """

    name: str
    module: Callable[[], nn.Module]
    shape: tuple[int, ...] | Callable[[], tuple[Tensor, ...]]
    fires: int | None = None
    rule: str = ""
    golden: str = ""
    declines: str = ""
    batch: bool = True
    prepare: Callable[[Any], object] = lambda module: None

    def __str__(self) -> str:
        return self.name


def inputs_of(example: Example) -> tuple[Tensor, ...]:
    if callable(example.shape):
        return example.shape()
    return (torch.randn(example.shape, generator=torch.Generator().manual_seed(3)),)


@functools.cache
def captured(example: Example, symbolic: bool = False) -> Program:
    """Return the example's program; do not change it."""
    torch.manual_seed(0)
    module = redraw(example.module(), 1).eval()
    with torch.no_grad():
        example.prepare(module)
    inputs = inputs_of(example)
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if symbolic else None
    return graphopt.capture(module, inputs, dynamic_shapes=shapes)


def before(example: Example, pass_: Pass, symbolic: bool = False) -> Program:
    """Return a program that the pass may change, after the passes that it requires."""
    program = captured(example, symbolic).clone()
    with torch.no_grad():
        for needed in required(pass_):
            needed.run(program, CONTEXT)
    return program


def required(pass_: Pass) -> list[Pass]:
    """Return the passes that must run before another one, with their defaults, in order."""
    found: dict[str, Pass] = {}
    for name in pass_.requires:
        needed = make_pass(name)
        found |= {each.name: each for each in [*required(needed), needed]}
    return list(found.values())


def apply(pass_: Pass, program: Program) -> tuple[Program, Changes]:
    """Run a pass on a clone."""
    after = program.clone()
    with torch.no_grad():
        changes = pass_.run(after, CONTEXT)
    verify(after, reference=program)
    return after, changes


def body(program: Program) -> str:
    """Return the program's calls without types and remarks, a line each, and what it returns."""
    text = program_text(program)
    lines = text[text.index("{\n") + 2 : text.rindex("}")].splitlines()
    calls = (line.partition("  # ")[0].strip() for line in lines)
    return "\n".join(_without_type(call) for call in calls)


def _without_type(call: str) -> str:
    if call.startswith("return"):
        return call
    name, _, rest = call.partition(": ")
    return f"{name} = {rest.partition(' = ')[2]}"


def operators(program: Program) -> list[str]:
    return [operator(node) for node in program.nodes if node.op == "call_function"]


def sites(changes: Changes, rule: str) -> list[str]:
    return [site.node for site in changes.touched if not rule or site.rule == rule]


def check_fires(pass_: Pass, example: Example) -> None:
    after, changes = apply(pass_, before(example, pass_))
    if example.fires is not None:
        found = sites(changes, example.rule)
        assert len(found) == example.fires, f"rewrote {found}\n{program_text(after)}"
    if example.golden:
        assert body(after) == textwrap.dedent(example.golden).strip()


def check_declines(pass_: Pass, example: Example) -> None:
    _, changes = apply(pass_, before(example, pass_))
    reasons = [site.reason for site in changes.skipped]
    assert any(example.declines in reason for reason in reasons), f"recorded: {reasons}"
    if example.fires is None:
        assert sites(changes, example.rule) == []


def check_means_the_same(pass_: Pass, example: Example) -> None:
    """Compare in float64 with unrounded weights, on the example's inputs and on redrawn ones of another batch size."""
    for symbolic in (False, True) if example.batch else (False,):
        program = before(example, pass_, symbolic)
        validator = Validator(program, seed=5)
        assert validator.note == ""
        after, changes = apply(pass_, program)
        error, rounding = validator.check(after, changes.unrounded)
        assert error <= pass_.tolerance, f"relative error {error:.1e}\n{program_text(after)}"
        assert rounding <= 1e-2, f"rounding the weights changes the outputs by {rounding:.1e}"


def check_idempotent(pass_: Pass, example: Example) -> None:
    once, _ = apply(pass_, before(example, pass_))
    twice, changes = apply(pass_, once)
    assert not changes.changed, f"the second run did {changes.edits}"
    assert program_text(twice) == program_text(once)


def four_tests(pass_: Pass, examples: Iterable[Example]) -> tuple[Callable[[Example], None], ...]:
    """Return the tests (fires, declines, means the same, is idempotent), each over the examples that it is for."""
    examples = list(examples)

    def over(chosen: list[Example], check: Callable[[Pass, Example], None]) -> Callable[[Example], None]:
        @pytest.mark.parametrize("example", chosen, ids=str)
        def test(example: Example) -> None:
            check(pass_, example)

        return test

    return (
        over([e for e in examples if e.fires is not None or e.golden], check_fires),
        over([e for e in examples if e.declines], check_declines),
        over(examples, check_means_the_same),
        over(examples, check_idempotent),
    )
