"""Rules: conditions, and applying them until nothing fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt import capture
from graphopt.ir import (
    Match,
    Program,
    Rewriter,
    Rule,
    apply_rules,
    constant,
    finite,
    floating,
    operator,
    rule,
    sole_user,
    verify,
)  # fmt: skip

aten = torch.ops.aten


class Net(nn.Module):
    """Chains of relu, a sum that is read twice, arithmetic both ways round, integers."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4) + 0.5)
        self.broken = nn.Parameter(torch.tensor([1.0, float("nan"), 1.0, 1.0]))
        self.register_buffer("steps", torch.arange(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(torch.relu(torch.relu(x)))
        z = self.gain * (y + 1.0) + (y + 1.0) * self.gain
        return z * self.broken, z + self.steps * 2


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture_with_nan(Net().eval(), torch.randn(2, 4))


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.clone()


def capture_with_nan(module: nn.Module, x: Tensor) -> Program:
    """`capture` refuses weights with NaN; a pass may meet them in a program all the same."""
    from graphopt.ir import from_exported

    return from_exported(torch.export.export(module, (x,)).run_decompositions({}))


def find(program: Program, name: str) -> list[fx.Node]:
    return [node for node in program.graph.nodes if operator(node) == name]


def chain(*names: str) -> Callable[[fx.Node], Match | None]:
    """Match a chain of calls, the last reader first: parts are called by operator, and `x` is what the chain reads."""

    def match(node: fx.Node) -> Match | None:
        parts: dict[str, Any] = {}
        value: Any = node
        for name in names:
            if operator(value) != name:
                return None
            parts[name] = value
            value = value.args[0]
        return Match(node, parts | {"x": value})

    return match


def relus() -> Rule:
    """relu(relu(x)) -> relu(x)"""

    @rule(match=chain("relu", "relu"))
    def merge_relus(match: Match, rewriter: Rewriter) -> None:
        rewriter.replace(match.root, match.node("relu"))
        rewriter.touch(match.root, "merged")

    return merge_relus


# Applying -----------------------------------------------------------------------------------------------------


def test_rules_run_to_a_fixpoint(program: Program) -> None:
    before = program.clone()
    rewriter = Rewriter(program, "test")
    apply_rules([relus()], rewriter)
    changes = rewriter.finish()
    verify(program, before)
    assert len(find(program, "relu")) == 1
    assert len(changes.touched) == 2
    assert {edit.rule for edit in changes.edits if edit.kind == "replaced"} == {"merge_relus"}
    again = Rewriter(program, "test")
    apply_rules([relus()], again)
    assert not again.finish().changed


def test_a_rule_may_make_room_for_one_before_it(program: Program) -> None:
    """`merge` fits only after `drop` has removed what stands between."""

    def gained(node: fx.Node) -> Match | None:
        sums = [each for each in node.all_input_nodes if operator(each) == "add" and each.args[1] == 1.0]
        return Match(node, {"x": sums[0].args[0]}) if operator(node) == "mul" and sums else None

    @rule(match=gained)
    def drop(match: Match, rewriter: Rewriter) -> None:
        rewriter.replace(match.root, match.node("x"))

    def with_itself(node: fx.Node) -> Match | None:
        return Match(node) if operator(node) == "add" and node.args[0] is node.args[1] else None

    @rule(match=with_itself)
    def merge(match: Match, rewriter: Rewriter) -> None:
        (summand,) = match.root.all_input_nodes
        rewriter.replace(match.root, rewriter.insert(aten.mul.Tensor, summand, 2.0, before=match.root))

    rewriter = Rewriter(program, "test")
    apply_rules([merge, drop], rewriter)
    rewriter.finish()
    verify(program)
    assert len(find(program, "add")) == 1  # z + steps


def test_declines_are_recorded_once_with_their_reason(program: Program) -> None:
    def never(match: Match, program: Program) -> str:
        return f"{match.root.name} is kept"

    def also_never(match: Match, program: Program) -> str:
        raise AssertionError("conditions after the first that fails are not asked")

    @rule(match=chain("relu"), needs=[never], worth=[also_never])
    def remove(match: Match, rewriter: Rewriter) -> None:
        raise AssertionError("it was declined")

    rewriter = Rewriter(program, "test")
    apply_rules([remove, relus()], rewriter)
    changes = rewriter.finish()
    reasons = [(site.rule, site.node, site.reason) for site in changes.skipped]
    # The two that the other rule removed afterwards are not among the skipped ones.
    assert reasons == [("remove", "relu", "relu is kept")]


class Fork(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(x)
        return -y + 2.0, torch.tanh(y)


def test_a_reader_that_died_is_no_reader() -> None:
    """What a rule replaces is gone for the rules after it: `relu` has one reader once `neg` is dead."""
    program = capture(Fork(), (torch.randn(3),))

    @rule(match=chain("add", "neg", "relu"))
    def forget(match: Match, rewriter: Rewriter) -> None:
        rewriter.replace(match.root, match.node("x"))

    @rule(match=chain("tanh", "relu"), worth=[sole_user("relu")])
    def drop_relu(match: Match, rewriter: Rewriter) -> None:
        rewriter.replace(match.root, match.node("x"))

    rewriter = Rewriter(program, "test")
    apply_rules([drop_relu, forget], rewriter)
    changes = rewriter.finish()
    assert program.outputs == program.placeholders * 2
    assert changes.skipped == []


def test_out_of_bounds_comes_before_conditions(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    apply_rules([relus()], rewriter, lambda node: f"{node.name} is out of bounds")
    changes = rewriter.finish()
    assert not changes.changed
    assert {site.reason for site in changes.skipped} == {"relu_1 is out of bounds", "relu_2 is out of bounds"}


def test_worth_is_asked_after_needs() -> None:
    calls: list[str] = []

    def condition(name: str, answer: str) -> Any:
        def check(match: Match, program: Program) -> str:
            calls.append(name)
            return answer

        return check

    each = Rule("r", lambda node: None, lambda m, r: None, (condition("need", ""),), (condition("worth", "no gain"),))
    assert each.declined(Match(fx.Graph().placeholder("x")), None) == "no gain"  # type: ignore[arg-type]
    assert calls == ["need", "worth"]


def test_a_rule_that_turns_in_a_circle_is_stopped(program: Program) -> None:
    @rule(match=lambda node: Match(node) if operator(node) in ("relu", "sigmoid") else None)
    def flip(match: Match, rewriter: Rewriter) -> None:
        other = aten.sigmoid.default if operator(match.root) == "relu" else aten.relu.default
        (source,) = match.root.all_input_nodes
        rewriter.replace(match.root, rewriter.insert(other, source, before=match.root))

    rewriter = Rewriter(program, "circle")
    with pytest.raises(
        RuntimeError, match=r"rule flip of circle still fires, now at .*: what it leaves behind matches again"
    ):
        apply_rules([flip], rewriter)


def test_a_rule_that_doubles_its_places_is_stopped(program: Program) -> None:
    """Each firing makes two new places: without a bound the graph would outgrow memory before any count of rounds."""

    @rule(match=lambda node: Match(node) if operator(node) == "relu" else None)
    def double(match: Match, rewriter: Rewriter) -> None:
        (source,) = match.root.all_input_nodes
        one = rewriter.insert(aten.relu.default, source, before=match.root)
        rewriter.replace(match.root, rewriter.insert(aten.relu.default, one, before=match.root))

    with pytest.raises(RuntimeError, match="rule double"):
        apply_rules([double], Rewriter(program, "test"))


class Chain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = -x
        for _ in range(60):
            x = torch.relu(x)
        return x


def test_a_step_a_round_through_the_whole_graph_is_allowed() -> None:
    """An operator moved past every node of a long chain: as many rounds as nodes, and no circle."""
    program = capture(Chain(), (torch.randn(3),))

    @rule(match=chain("relu", "neg"))
    def sink(match: Match, rewriter: Rewriter) -> None:
        relu = rewriter.insert(aten.relu.default, match.node("x"), before=match.node("relu"))
        rewriter.replace(match.node("relu"), rewriter.insert(aten.neg.default, relu, before=match.node("relu")))

    rewriter = Rewriter(program, "test")
    apply_rules([sink], rewriter)
    rewriter.finish()
    verify(program)
    assert operator(program.outputs[0]) == "neg"
    assert len(find(program, "relu")) == 60


# Conditions ---------------------------------------------------------------------------------------------------


def test_conditions(program: Program) -> None:
    (mul_broken,) = [node for node in find(program, "mul") if "broken" in str(node.all_input_nodes)]
    (steps,) = [node for node in find(program, "mul") if "steps" in str(node.all_input_nodes)]
    z, broken = mul_broken.all_input_nodes
    (buffer,) = steps.all_input_nodes
    match = Match(mul_broken, {"z": z, "broken": broken, "steps": buffer, "none": None, "three": 3})

    assert constant("broken", "steps", "none", "three")(match, program) == ""
    assert constant("z")(match, program) == f"z of {mul_broken.name} is computed by {z.name}, not a weight"
    assert floating("z", "broken", "none")(match, program) == ""
    assert floating("steps")(match, program) == f"steps of {mul_broken.name} (steps) is not a floating-point tensor"
    assert sole_user("broken")(match, program) == ""
    assert sole_user("z")(match, program).startswith(f"{z.name} is read by 2 nodes (")
    assert finite("z", "steps", "none")(match, program) == ""
    assert finite("broken")(match, program) == "weight broken holds NaN or infinity"


def test_an_output_counts_as_a_user() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(x)
            return y, y + 1

    program = capture(Both(), (torch.randn(3),))
    (relu,) = find(program, "relu")
    assert "output" in sole_user("relu")(Match(relu, {"relu": relu}), program)


def test_parts_of_a_match(program: Program) -> None:
    (relu, *_) = find(program, "relu")
    match = Match(relu, {"x": relu.args[0], "number": 2})
    assert match["number"] == 2
    assert match.get("nothing") is None
    assert match.node("x") is relu.args[0]
    with pytest.raises(TypeError, match="number of the match at relu is no node"):
        match.node("number")
