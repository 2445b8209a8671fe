"""Program: running it, its calling convention, its weights and names, clones and copies."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

from graphopt import capture
from graphopt.errors import GraphoptError
from graphopt.ir import Program, Rewriter, from_exported, is_floating, is_tensor, static_shape, verify
from graphopt.ir.program import assign_weight, remove_weight, storable_name


class Small(nn.Module):
    """Tied weights, a buffer of integers, a scalar, a weight that is a view, and a name that is no identifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.arange(3))
        self.register_parameter("gain-1", nn.Parameter(torch.tensor(1.5)))
        self.turned = nn.Parameter(torch.randn(4, 6).t())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids + self.offset) * self.get_parameter("gain-1")
        return self.head(x) + (x @ self.turned.t()).sum(-1, keepdim=True)


@pytest.fixture
def small() -> tuple[Small, Program, Tensor]:
    module, ids = Small().eval(), torch.tensor([[0, 1, 2], [2, 1, 0]])
    return module, capture(module, (ids,)), ids


def flat(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.parametrize("name", ["two_inputs_dict", "two_inputs_dataclass", "shared_modules", "mlp_bf16"])
def test_runs_as_the_model_does_and_so_do_its_clone_and_copy(name: str) -> None:
    model = MODELS[name]()
    program = capture(model.module, model.example_inputs)
    arguments = model.example_inputs
    args, kwargs = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
    expected = flat(model.run())
    modules = [program, program.module(), program.clone(), copy.deepcopy(program), copy.deepcopy(program.module())]
    for each in modules:
        got = each(*args, **kwargs)
        assert type(got) is type(model.run())
        for ours, theirs in zip(flat(got), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert str(program.clone()) == str(program)


def test_the_module_has_the_models_names(small: tuple[Small, Program, Tensor]) -> None:
    module, program, ids = small
    ours, theirs = program.module(), module.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.items())
    assert set(dict(ours.named_parameters())) == set(dict(module.named_parameters()))
    assert not ours.training

    other = Small()
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(ids), other(ids))


def test_the_module_within_another_module(small: tuple[Small, Program, Tensor]) -> None:
    _, program, ids = small
    outer = nn.Sequential(program.module())
    assert "0.head.weight" in outer.state_dict()
    outer.load_state_dict({f"0.{name}": value for name, value in Small().state_dict().items()})
    assert outer(ids).shape == (2, 3, 5)


def test_a_copied_module_is_independent(small: tuple[Small, Program, Tensor]) -> None:
    _, program, ids = small
    before = program(ids)
    twin = copy.deepcopy(program.module()).double()
    assert twin(ids).dtype == torch.float64
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(program(ids), before)
    assert twin(ids).abs().sum() == 0


def test_the_module_moves_with_its_buffers(small: tuple[Small, Program, Tensor]) -> None:
    """`to` replaces buffers in the module's own dictionaries; the graph must read the new ones."""
    _, program, ids = small
    module = copy.deepcopy(program).module()
    assert module.to(torch.float64)(ids).dtype == torch.float64


def test_tied_weights_are_one_tensor_under_both_names(small: tuple[Small, Program, Tensor]) -> None:
    _, program, _ = small
    assert program.aliases == {"head.weight": "embed.weight"}
    assert program.weight("head.weight") is program.weight("embed.weight")
    assert "head.weight" not in program.weights


def test_weights_keep_their_kind_and_strides(small: tuple[Small, Program, Tensor]) -> None:
    _, program, _ = small
    assert program.weights.keys() == {"embed.weight", "offset", "gain-1", "turned"}
    assert program.weight("offset").dtype == torch.int64
    assert program.weight("gain-1").shape == ()
    assert isinstance(program.weight("gain-1"), nn.Parameter)
    assert not isinstance(program.weight("offset"), nn.Parameter)
    assert program.weight("turned").stride() == (1, 6)
    with pytest.raises(AttributeError):
        program.weight("nothing")
    with pytest.raises(TypeError, match="not a tensor"):
        program.weight("embed")


def test_clones_share_weights_but_no_graph(small: tuple[Small, Program, Tensor]) -> None:
    _, program, ids = small
    clone = program.clone()
    assert all(clone.weight(name) is weight for name, weight in program.weights.items())
    text, output = str(program), program(ids)
    rewriter = Rewriter(clone, "test")
    for node in list(clone.graph.nodes):
        if node.op == "get_attr" and is_floating(node):
            rewriter.replace(node, rewriter.edit(node, "twice", lambda value: value.mul_(2)))
    clone.notes.append("changed")
    clone.aliases["other"] = "turned"
    rewriter.finish()
    assert not torch.equal(clone(ids), output)
    assert torch.equal(program(ids), output)
    assert str(program) == text
    assert program.notes == []
    assert "other" not in program.aliases


def test_map_weights(small: tuple[Small, Program, Tensor]) -> None:
    _, program, ids = small
    double = program.map_weights(lambda name, weight: weight * 2 if name == "gain-1" else weight)
    torch.testing.assert_close(double(ids), program(ids) * 2)


def test_it_is_differentiable(small: tuple[Small, Program, Tensor]) -> None:
    module, program, ids = small
    program(ids).sum().backward()
    ours = module.turned.grad
    assert ours is not None
    module.zero_grad()
    module(ids).sum().backward()
    torch.testing.assert_close(ours, module.turned.grad)


class Direct(nn.Module):
    """Outputs that are an input, a weight, a buffer, one tensor twice, a constant and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("steps", torch.arange(2))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = x + 1
        return x, self.weight, self.steps, y, y, {"twice": y, "nothing": None, "three": 3}


def test_outputs_that_are_no_calls() -> None:
    module, x = Direct(), torch.randn(2, 3)
    exported = torch.export.export(module, (x,)).run_decompositions({})
    program = from_exported(exported)
    verify(program)
    got, expected = program(x), module(x)
    assert got[0] is x
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2], expected[2])
    assert torch.equal(got[3], expected[3])
    assert got[4] is got[3]
    assert got[5]["nothing"] is None
    assert got[5]["three"] == 3
    # An edit reaches an output that is a weight.
    clone = program.clone()
    rewriter = Rewriter(clone, "test")
    (weight,) = [node for node in clone.graph.nodes if node.target == "weight"]
    rewriter.replace(weight, rewriter.edit(weight, "negative", lambda value: -value))
    rewriter.finish()
    verify(clone, program)
    assert torch.equal(clone(x)[1], -module.weight)


# Calls --------------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    def forward(self, x: Tensor, pair: dict[str, Tensor], *, scale: int = 2, bias: Tensor | None = None) -> Tensor:
        y = x * scale + pair["a"] - pair["b"]
        return y if bias is None else y + bias


@pytest.fixture(scope="module")
def calls() -> tuple[Program, Tensor, dict[str, Tensor]]:
    x, pair = torch.randn(3), {"a": torch.randn(3), "b": torch.randn(3)}
    exported = torch.export.export(Calls(), (x, pair), {"scale": 3}).run_decompositions({})
    return from_exported(exported, ("x", "pair", "scale", "bias")), x, pair


def test_calls_in_any_order_are_one_call(calls: tuple[Program, Tensor, dict[str, Tensor]]) -> None:
    program, x, pair = calls
    assert program.signature.inputs == ("x", "pair.a", "pair.b", "scale")
    expected = x * 3 + pair["a"] - pair["b"]
    turned = {"b": pair["b"], "a": pair["a"]}
    for given in (
        program(x, pair, scale=3),
        program(x, pair, 3),
        program(scale=3, pair=pair, x=x),
        program(x, turned, scale=3),
        program(pair=turned, x=x, scale=3),
        program(x, pair, scale=3, bias=None),
    ):
        assert torch.equal(given, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda p, x, pair: p(x),
        lambda p, x, pair: p(x, pair),
        lambda p, x, pair: p(x, x, scale=3),
        lambda p, x, pair: p(x, {"a": x}, scale=3),
        lambda p, x, pair: p(x, {"a": x, "c": x}, scale=3),
        lambda p, x, pair: p([x], pair, scale=3),
        lambda p, x, pair: p(x, pair, scale=3, bias=x),
        lambda p, x, pair: p(x, pair, x=x, scale=3),
        lambda p, x, pair: p(x, pair, 3, None, x),
    ],
)
def test_calls_of_another_structure_are_refused(call: Any, calls: tuple[Program, Tensor, dict[str, Tensor]]) -> None:
    with pytest.raises(GraphoptError, match="do not have the structure the model was captured with: expected x"):
        call(*calls)


@pytest.mark.parametrize("scale", [2, 3.0, True])
def test_another_value_of_a_fixed_input_is_refused(
    scale: object, calls: tuple[Program, Tensor, dict[str, Tensor]]
) -> None:
    program, x, pair = calls
    with pytest.raises(GraphoptError, match="input scale was captured as 3 and is fixed"):
        program(x, pair, scale=scale)


def test_threads_may_edit_and_verify_clones_at_once(small: tuple[Small, Program, Tensor]) -> None:
    _, program, ids = small
    expected, failures = program(ids), []

    def work() -> None:
        try:
            for _ in range(5):
                clone = program.clone()
                rewriter = Rewriter(clone, "thread")
                for node in [node for node in clone.graph.nodes if node.op == "call_function" and is_floating(node)]:
                    copied = rewriter.insert(torch.ops.aten.clone.default, node, before=node.next)
                    rewriter.replace(node, copied)
                rewriter.finish()
                verify(clone, program)
                assert torch.equal(clone(ids), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Names --------------------------------------------------------------------------------------------------------


class Clashing(nn.Module):
    """Names that fx.GraphModule needs for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.meta = nn.Linear(3, 3)
        self.graph = nn.Parameter(torch.randn(3))
        self.graph_ = nn.Parameter(torch.randn(3))
        self.register_buffer("code", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.meta(x) * self.graph + self.graph_ + self.code


def test_weights_whose_names_fx_uses_itself() -> None:
    module, x = Clashing(), torch.randn(2, 3)
    program = from_exported(torch.export.export(module, (x,)))
    verify(program)
    torch.testing.assert_close(program(x), module(x))
    assert program.weight("graph").shape == (3,)
    assert torch.equal(program.weight("meta.weight"), module.meta.weight)
    state = program.module().state_dict()
    assert state.keys() == module.state_dict().keys()
    other = Clashing()
    program.module().load_state_dict(other.state_dict())
    torch.testing.assert_close(program(x), other(x))


def test_storable_names() -> None:
    assert storable_name("conv.weight") == "conv.weight"
    assert storable_name("graph") == "graph_"
    assert storable_name("graph", {"graph_"}) == "graph__"
    assert storable_name("block.graph.weight") == "block.graph.weight"
    assert storable_name("block.forward.weight") == "block.forward_.weight"


def test_assigning_and_removing_weights() -> None:
    root = nn.Module()
    assign_weight(root, "a.b.c", torch.ones(2))
    assign_weight(root, "a.d", nn.Parameter(torch.ones(1)))
    assign_weight(root, "a.b.c", nn.Parameter(torch.zeros(2)))
    assert dict(root.named_buffers()) == {}
    assert set(dict(root.named_parameters())) == {"a.b.c", "a.d"}
    with pytest.raises(TypeError, match="d is no module"):
        assign_weight(root, "a.d.scale", torch.ones(1))
    remove_weight(root, "a.b.c")
    assert not hasattr(root.a, "b")
    remove_weight(root, "a.d")
    assert not hasattr(root, "a")


def test_questions_about_nodes(small: tuple[Small, Program, Tensor]) -> None:
    _, program, _ = small
    ids, head = program.placeholders[0], program.outputs[0]
    assert is_tensor(ids)
    assert not is_floating(ids)
    assert is_floating(head)
    assert static_shape(head) == (2, 3, 5)
    assert not is_tensor(3)
    dynamic = capture(nn.Linear(3, 3), (torch.randn(2, 3),), ({0: torch.export.Dim("batch")},))
    assert static_shape(dynamic.placeholders[0]) is None
    assert repr(program).startswith("<Program: 1 inputs")
