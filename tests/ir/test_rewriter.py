"""The rewriter: edits, sharing, names, provenance, and abstract values that stay true."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from graphopt import capture
from graphopt.ir import Program, Rewriter, arguments, module_path, operator, provenance, verify

aten = torch.ops.aten


class Tied(nn.Module):
    """`first` and `second` share a weight; `third` has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(self.first(x))))


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(Tied().eval(), (torch.randn(2, 4),))


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.clone()


def named(program: Program, name: str) -> fx.Node:
    (node,) = [node for node in program.graph.nodes if name in (node.name, node.target)]
    return node


def linears(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if operator(node) == "linear"]


def snapshot(program: Program) -> tuple[str, dict[str, Tensor], list[Any]]:
    """Return what must not change: text, bytes and outputs."""
    weights = {name: weight.detach().clone() for name, weight in program.weights.items()}
    return str(program), weights, [output.detach().clone() for output in program.run(program.flat_example)]


def assert_unchanged(program: Program, before: tuple[str, dict[str, Tensor], list[Any]]) -> None:
    text, weights, outputs = before
    assert str(program) == text
    assert all(torch.equal(program.weight(name), value) for name, value in weights.items())
    assert all(map(torch.equal, program.run(program.flat_example), outputs))


# Weights ------------------------------------------------------------------------------------------------------


def test_users_of_a_tied_weight_share_an_edit(program: Program) -> None:
    before = snapshot(program)
    clone = program.clone()
    rewriter = Rewriter(clone, "test")
    calls = 0

    def change(value: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return value * 2

    first, second, third = linears(clone)
    for node in (first, second):
        rewriter.rewire(node, weight=rewriter.edit(arguments(node)["weight"], "twice", change))
    rewriter.rewire(third, weight=rewriter.edit(arguments(third)["weight"], "twice", change))
    rewriter.finish()
    verify(clone, program)
    assert calls == 2
    assert arguments(first)["weight"] is arguments(second)["weight"]
    assert set(clone.weights) == set(program.weights)
    assert clone.aliases == {"second.weight": "first.weight"}
    assert torch.equal(clone.weight("first.weight"), program.weight("first.weight") * 2)
    assert_unchanged(program, before)


def test_another_key_is_another_weight_and_the_rest_stays_tied(program: Program) -> None:
    clone = program.clone()
    rewriter = Rewriter(clone, "test")
    first, second, _ = linears(clone)
    source = arguments(first)["weight"]
    rewriter.rewire(first, weight=rewriter.edit(source, "twice", lambda value: value * 2))
    rewriter.finish()
    verify(clone, program)
    # The other user still reads the old tensor under the old name.
    assert arguments(second)["weight"].target == "first.weight"
    assert clone.weight("first.weight") is program.weight("first.weight")
    assert clone.weights.keys() - program.weights.keys() == {"first.weight_1"}

    both = program.clone()
    rewriter = Rewriter(both, "test")
    first, second, _ = linears(both)
    source = arguments(first)["weight"]
    rewriter.rewire(first, weight=rewriter.edit(source, "twice", lambda value: value * 2))
    rewriter.rewire(second, weight=rewriter.edit(source, "thrice", lambda value: value * 3))
    rewriter.finish()
    verify(both, program)
    assert torch.equal(both.weight("first.weight"), program.weight("first.weight") * 2)
    assert torch.equal(both.weight(arguments(second)["weight"]), program.weight("first.weight") * 3)


def test_a_pass_cannot_write_to_weights() -> None:
    """Writing into what `value` gives, or into what `weight` was given, changes nothing else."""
    double = capture(Tied().eval().double(), (torch.randn(2, 4, dtype=torch.float64),))
    before = snapshot(double)
    clone = double.clone()
    rewriter = Rewriter(clone, "test")
    weight = arguments(linears(clone)[2])["weight"]
    rewriter.value(weight).zero_()
    given = torch.ones(4, 4, dtype=torch.float64)
    new = rewriter.weight(given, "third.weight", torch.float64, weight)
    given.zero_()
    rewriter.value(new).zero_()
    rewriter.rewire(linears(clone)[2], weight=new)
    rewriter.finish()
    assert torch.equal(clone.weight("third.weight"), torch.ones(4, 4, dtype=torch.float64))
    assert_unchanged(double, before)


def test_chained_edits_keep_the_name_and_round_once(program: Program) -> None:
    clone = program.clone()
    rewriter = Rewriter(clone, "test")
    (*_, third) = linears(clone)
    source = arguments(third)["weight"]
    for factor in (1 / 3, 3.0, 1 / 7):
        node = rewriter.edit(arguments(third)["weight"], f"times {factor}", lambda value, by=factor: value * by)
        rewriter.rewire(third, weight=node)
    changes = rewriter.finish()
    verify(clone, program)
    exact = program.weight(source).detach().double() * (1 / 3) * 3.0 * (1 / 7)
    assert set(clone.weights) == set(program.weights)
    assert torch.equal(clone.weight("third.weight"), exact.float())
    assert changes.unrounded.keys() == {"third.weight"}
    assert torch.equal(changes.unrounded["third.weight"], exact)


def test_kinds_of_new_weights(program: Program) -> None:
    clone = program.clone()
    rewriter = Rewriter(clone, "test")
    third = linears(clone)[2]
    source = arguments(third)["weight"]
    expanded = torch.ones(1, 4).expand(4, 4)
    scale = rewriter.weight(torch.tensor(0.5), "third.weight.scale", torch.float32)
    codes = rewriter.weight(torch.eye(4), "third.weight", torch.int8, source)
    half = rewriter.weight(expanded, "third.narrow", torch.float16, source)
    buffer = rewriter.weight(torch.ones(4), "third.buffer", torch.float32, parameter=False)
    module = rewriter.weight(torch.ones(1), "third", torch.float32)
    reserved = rewriter.weight(torch.ones(1), "graph", torch.float32)
    alias = rewriter.weight(torch.ones(1), "second.weight", torch.float32)
    # A weight holds no weight, and a module's or a tied weight's name is taken.
    assert [node.target for node in (scale, codes, half, buffer)] == [
        "third.weight_scale", "third.weight_1", "third.narrow", "third.buffer",
    ]  # fmt: skip
    assert [node.target for node in (module, reserved, alias)] == ["third_1", "graph_1", "second.weight_1"]
    assert isinstance(clone.weight(scale), nn.Parameter)
    assert not clone.weight(scale).requires_grad
    assert not isinstance(clone.weight(codes), nn.Parameter)
    assert not isinstance(clone.weight(buffer), nn.Parameter)
    assert clone.weight(half).is_contiguous()
    assert set(rewriter.changes.unrounded) == {"third.narrow"}
    for node in (scale, codes, half, buffer, module, reserved, alias):
        assert node.meta["val"].shape == clone.weight(node).shape
        assert node.meta["val"].dtype == clone.weight(node).dtype
    # Nobody reads them, so they go, with the modules that held them.
    rewriter.finish()
    verify(clone, program)
    assert set(clone.weights) == set(program.weights)


def test_codes_take_the_name_of_the_weight_they_replace(program: Program) -> None:
    clone = program.clone()
    rewriter = Rewriter(clone, "test")
    third = linears(clone)[2]
    source = arguments(third)["weight"]
    codes = rewriter.weight(torch.ones(4, 4), "third.weight", torch.int8, source)
    wide = rewriter.insert(aten._to_copy.default, codes, before=third, dtype=torch.float32)
    rewriter.rewire(third, weight=wide)
    rewriter.finish()
    verify(clone, program)
    assert clone.weight("third.weight").dtype == torch.int8
    assert set(clone.module().state_dict()) == {*program.module().state_dict()}


def test_equal_codes_are_stored_once_under_every_name_they_replace(program: Program) -> None:
    clone = program.clone()
    rewriter = Rewriter(clone, "test")
    first, _, third = linears(clone)
    old = [arguments(node)["weight"] for node in (first, third)]
    codes = [rewriter.weight(torch.ones(4, 4), str(node.target), torch.int8, node) for node in old]
    other = rewriter.weight(torch.zeros(4, 4), "third.weight", torch.int8, old[1])
    assert codes[0] is codes[1]
    assert other is not codes[0]
    for before in old:
        wide = rewriter.insert(aten._to_copy.default, codes[0], before=first, dtype=torch.float32)
        rewriter.replace(before, wide)
    rewriter.finish()
    verify(clone, program)
    assert clone.aliases == {"second.weight": "first.weight", "third.weight": "first.weight"}
    assert set(clone.module().state_dict()) == set(program.module().state_dict())


def test_names_with_dots_next_to_modules_survive_a_clone(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    third = linears(program)[2]
    scale = rewriter.weight(torch.tensor([0.5]), "third.weight.scale", torch.float32)
    rewriter.replace(third, rewriter.insert(aten.mul.Tensor, third, scale, before=program.graph.output_node()))
    rewriter.finish()
    verify(program)
    assert str(program.clone()) == str(program)
    assert "third.weight_scale" in program.module().state_dict()


# Nodes --------------------------------------------------------------------------------------------------------


def test_replace_leaves_what_feeds_the_replacement(program: Program) -> None:
    """Wrapping a node in calls that read it makes no cycle."""
    before = program.clone()
    rewriter = Rewriter(program, "test")
    relu = named(program, "relu")
    one = rewriter.insert(aten.add.Tensor, relu, relu, before=relu.next)
    two = rewriter.insert(aten.sub.Tensor, one, relu, before=one.next)
    rewriter.replace(relu, two)
    rewriter.finish()
    verify(program, before)
    assert list(relu.users) == [one, two]
    assert arguments(linears(program)[2])["input"] is two
    for ours, theirs in zip(program.run(program.flat_example), before.run(before.flat_example), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_replace_by_an_input_and_dead_code(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    rewriter.rule = "drop_relu"
    relu = named(program, "relu")
    rewriter.replace(relu, arguments(relu)["self"])
    rewriter.replace(linears(program)[0], linears(program)[0])
    changes = rewriter.finish()
    verify(program)
    assert [(edit.kind, edit.node, edit.rule) for edit in changes.edits] == [
        ("replaced", "relu", "drop_relu"),
        ("removed", "relu", ""),
    ]
    assert not [node for node in program.graph.nodes if node.name == "relu"]


def test_nothing_done_is_no_change(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    third = linears(program)[2]
    rewriter.rewire(third, weight=arguments(third)["weight"])
    rewriter.redirect(third, arguments(third)["weight"], arguments(third)["weight"])
    rewriter.decline(third, "no reason")
    changes = rewriter.finish()
    assert not changes.changed


def test_redirect_one_user_only(program: Program) -> None:
    before = program.clone()
    rewriter = Rewriter(program, "test")
    first, second, third = linears(program)
    weight = arguments(first)["weight"]
    own = rewriter.edit(weight, "same", lambda value: value)
    rewriter.redirect(second, weight, own)
    with pytest.raises(ValueError, match="linear_2 does not read first_weight"):
        rewriter.redirect(third, weight, own)
    rewriter.finish()
    verify(program, before)
    assert arguments(first)["weight"] is weight
    assert arguments(second)["weight"] is own


def test_redirect_an_output(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    third, relu, end = linears(program)[2], named(program, "relu"), program.graph.output_node()
    rewriter.redirect(end, third, relu)
    rewriter.finish()
    verify(program)
    assert program.outputs == [relu]
    assert set(program.weights) == {"first.weight", "first.bias", "second.bias"}


def test_rewire_fills_defaults_and_refuses_unknown_arguments(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    third = linears(program)[2]
    rewriter.rewire(third, bias=named(program, "first.bias"))
    assert arguments(third)["bias"].target == "first.bias"
    rewriter.rewire(third, bias=None)
    assert len(third.args) == 2
    with pytest.raises(TypeError, match="has no argument"):
        rewriter.rewire(third, padding=1)


def test_once(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    weight = named(program, "first.weight")
    made = [rewriter.once(weight, key, list) for key in ("a", "a", "b")]
    assert made[0] is made[1]
    assert made[0] is not made[2]


# The record ---------------------------------------------------------------------------------------------------


def test_provenance(program: Program) -> None:
    first, _, third = linears(program)
    assert provenance(first) == {"by": "", "rule": "", "from": []}
    assert module_path(first) == "first"
    rewriter = Rewriter(program, "scale_up")
    rewriter.rule = "double"
    new = rewriter.insert(aten.add.Tensor, third, third, before=program.graph.output_node(), origin=[third, first])
    rewriter.replace(third, new)
    rewriter.rewire(first, bias=None)
    rewriter.finish()
    assert provenance(new) == {"by": "scale_up", "rule": "double", "from": ["linear_2", "linear"]}
    assert provenance(first) == {"by": "scale_up", "rule": "double", "from": ["linear"]}
    assert module_path(new) == "third"
    # A second pass keeps the captured ancestors, and a clone's record is its own.
    clone = program.clone()
    again = Rewriter(clone, "scale_down")
    (node,) = [node for node in clone.graph.nodes if node.name == new.name]
    half = again.insert(aten.mul.Tensor, node, 0.5, before=clone.graph.output_node(), origin=[node])
    again.replace(node, half)
    again.rewire(node, alpha=2)
    again.finish()
    assert provenance(half)["from"] == ["linear_2", "linear"]
    assert provenance(node)["by"] == "scale_down"
    assert provenance(new)["by"] == "scale_up"


def test_declines_are_recorded_once_and_not_where_something_was_done(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    first, second, third = linears(program)
    for _ in range(3):
        rewriter.decline(first, "it is small")
        rewriter.decline(second, "it is small")
    rewriter.decline(second, "it is large")
    rewriter.decline(third, "not yet")
    rewriter.touch(third, "done after all")
    rewriter.note(places=3)
    changes = rewriter.finish()
    assert [(site.node, site.reason) for site in changes.skipped] == [
        ("linear", "it is small"), ("linear_1", "it is small"), ("linear_1", "it is large"),
    ]  # fmt: skip
    assert [site.node for site in changes.touched] == ["linear_2"]
    assert changes.facts == {"places": 3}


# Abstract values ----------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (torch.relu(x.reshape(-1, 3)) * 2).sum(1) + y.mean()


def test_values_downstream_of_a_change_are_refreshed() -> None:
    before = capture(Chain(), (torch.randn(4, 3), torch.randn(3)))
    program = before.clone()
    rewriter = Rewriter(program, "test")
    x = program.placeholders[0]
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    half = rewriter.insert(aten._to_copy.default, x, before=first, dtype=torch.float16)
    rewriter.redirect(first, x, half)
    by_name = {node.name: node for node in program.graph.nodes}
    assert by_name["relu"].meta["val"].dtype == torch.float32  # stale until finish
    rewriter.finish()
    dtypes = {name: node.meta["val"].dtype for name, node in by_name.items() if node.op == "call_function"}
    assert {dtypes[name] for name in ("relu", "mul", "sum_1")} == {torch.float16}
    assert dtypes["mean"] == torch.float32
    verify(program)
    # The old program's values are other objects.
    assert next(node for node in before.graph.nodes if node.name == "relu").meta["val"].dtype == torch.float32


def test_values_downstream_of_a_replacement_are_refreshed() -> None:
    program = capture(Chain(), (torch.randn(4, 3), torch.randn(3)))
    rewriter = Rewriter(program, "test")
    relu, mul = named(program, "relu"), named(program, "mul")
    rewriter.replace(relu, rewriter.insert(aten._to_copy.default, relu, before=mul, dtype=torch.float64))
    rewriter.finish()
    verify(program)
    assert relu.meta["val"].dtype == torch.float32
    assert mul.meta["val"].dtype == torch.float64


def test_shapes_downstream_of_a_change_are_refreshed_with_symbols() -> None:
    program = capture(Chain(), (torch.randn(4, 3), torch.randn(3)), ({0: Dim("n", min=2)}, None))
    rewriter = Rewriter(program, "test")
    x = program.placeholders[0]
    first = next(node for node in program.graph.nodes if operator(node) in ("reshape", "view"))
    twice = rewriter.insert(aten.cat.default, [x, x], before=first)
    rewriter.redirect(first, x, twice)
    rewriter.finish()
    verify(program)
    n = x.meta["val"].shape[0]
    (output,) = program.outputs
    assert str(output.meta["val"].shape[0]) == str(2 * n)
    assert program(torch.randn(5, 3), torch.randn(3)).shape == (10,)


def test_refreshing_stops_where_nothing_changed() -> None:
    """A value that is derived again and is what it was stays the same object, and so does all that follows."""
    before = capture(Chain(), (torch.randn(4, 3), torch.randn(3)))
    program = before.clone()
    rewriter = Rewriter(program, "test")
    relu = named(program, "relu")
    rewriter.replace(relu, rewriter.insert(aten.sigmoid.default, relu, before=relu.next))
    rewriter.finish()
    old = {node.name: node.meta["val"] for node in before.graph.nodes if node.op == "call_function"}
    for node in program.graph.nodes:
        if node.name in old:
            assert node.meta["val"] is old[node.name]


class Long(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(250):
            x = torch.relu(x) + 1
        return x


def test_refresh_and_verify_500_nodes_quickly() -> None:
    before = capture(Long(), (torch.randn(4, 3),))
    program = before.clone()
    rewriter = Rewriter(program, "test")
    x = program.placeholders[0]
    first = next(iter(x.users))
    rewriter.redirect(first, x, rewriter.insert(aten._to_copy.default, x, before=first, dtype=torch.float64))
    started = time.process_time()
    rewriter.finish()
    with pytest.raises(AssertionError, match="output 0 is f64"):
        verify(program, before)
    verify(program)
    # Measured 0.3 s; the bound allows for a slow machine and still catches a quadratic algorithm.
    assert time.process_time() - started < 3


def test_strides_downstream_of_a_change_are_refreshed() -> None:
    """Same shape and type, another layout: what follows must not believe it can be viewed."""
    program = capture(nn.ReLU(), (torch.randn(4, 4),))
    rewriter = Rewriter(program, "test")
    (relu,) = program.outputs
    x = program.placeholders[0]
    rewriter.redirect(relu, x, rewriter.insert(aten.permute.default, x, [1, 0], before=relu))
    rewriter.finish()
    assert relu.meta["val"].stride() == (1, 4)
