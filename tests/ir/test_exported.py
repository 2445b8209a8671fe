"""Program <-> ExportedProgram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError
from graphopt.ir import from_exported, source_line, to_exported, verify
from graphopt.ir.exported import flat_names


def functional(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, shapes: Any = None) -> Any:
    return torch.export.export(module.eval(), args, kwargs, dynamic_shapes=shapes).run_decompositions({})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("depthwise_cnn", False),
        ("masked_encoder", True),
        ("two_inputs_dataclass", False),
        ("tied_language_model", False),
        ("mlp_bf16", False),
    ],
)
def test_round_trip(name: str, dynamic: bool) -> None:
    model = MODELS[name]()
    program = from_exported(model.export(dynamic).run_decompositions({}))
    verify(program)
    exported = to_exported(program)
    again = from_exported(exported)
    verify(again)
    assert str(again) == str(program)
    assert again.signature == program.signature
    assert again.range_constraints == program.range_constraints
    given = model.example_inputs
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    expected = pytree.tree_leaves(model.run())
    for call in (program, again, exported.module()):
        for ours, theirs in zip(pytree.tree_leaves(call(*args, **kwargs)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.ones(3))
        self.register_buffer("same_mask", self.mask)
        self.register_buffer("part", self.first.weight.detach()[0])
        self.register_buffer("unused", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x * self.mask)) * self.same_mask + self.part


def test_tied_weights_become_one_node_and_views_do_not() -> None:
    module, x = Tied(), torch.randn(2, 3)
    program = from_exported(functional(module, (x,)))
    assert program.aliases == {"second.weight": "first.weight", "same_mask": "mask"}
    assert set(program.weights) == {"first.weight", "first.bias", "second.bias", "mask", "part"}
    assert program.weight("first.weight") is module.first.weight
    torch.testing.assert_close(program(x), module(x))


def test_equal_weights_are_not_tied() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].load_state_dict(module[0].state_dict())
    assert from_exported(functional(module, (torch.randn(1, 3),))).aliases == {}


class Empty(nn.Module):
    """Empty tensors share the null pointer, and are not tied for that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.a, self.b])


def test_empty_weights() -> None:
    program = from_exported(functional(Empty(), (torch.randn(2, 3),)))
    assert set(program.weights) == {"a", "b"}
    assert program.aliases == {}


@dataclass
class Features:
    mask: Tensor
    sizes: list[Tensor]


pytree.register_dataclass(Features)


class Nested(nn.Module):
    def forward(self, x: Tensor, features: Features, *, flag: bool = True) -> dict[str, Any]:
        y = x * features.mask + features.sizes[0] - features.sizes[1]
        return {"y": y, "parts": (y + 1, [y * 2]), "none": None, "features": Features(y, [x])}


def test_nested_inputs_and_outputs() -> None:
    x = torch.randn(3)
    features = Features(torch.randn(3), [torch.randn(3), torch.randn(3)])
    program = from_exported(functional(Nested(), (x, features), {"flag": True}))
    assert program.signature.parameters == ("x", "features", "flag")
    assert program.signature.inputs == ("x", "features.mask", "features.sizes.0", "features.sizes.1", "flag")
    for each in (program, from_exported(to_exported(program))):
        got, expected = each(x, features, flag=True), Nested()(x, features)
        assert isinstance(got["features"], Features)
        assert pytree.tree_structure(got) == pytree.tree_structure(expected)
        assert torch.equal(got["parts"][1][0], expected["parts"][1][0])


def test_names_of_flat_inputs() -> None:
    _, spec = pytree.tree_flatten(((1, {"a": 2, "b": (3, 4)}, 5), {"last": [6]}))
    assert flat_names(spec, ("x", "batch")) == ("x", "batch.a", "batch.b.0", "batch.b.1", "input_2", "last.0")


def test_symbolic_shapes_survive() -> None:
    module = nn.Sequential(nn.Flatten(1), nn.Linear(12, 2))
    batch = Dim("batch", min=2, max=64)
    program = from_exported(functional(module, (torch.randn(4, 3, 4),), shapes=({0: batch},)))
    verify(program)
    again = from_exported(to_exported(program))
    for each in (program, again):
        assert isinstance(each.placeholders[0].meta["val"].shape[0], torch.SymInt)
        ((_, bounds),) = each.range_constraints.items()
        assert (bounds.lower, bounds.upper) == (2, 64)
        assert each(torch.randn(9, 3, 4)).shape == (9, 2)


class Checked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[0] % 2 == 0)
        return x.reshape(-1, 2, 3).sum(1)


def test_assertions_are_dropped() -> None:
    shapes = ({0: 2 * Dim("half", min=2, max=50)},)
    program = from_exported(functional(Checked(), (torch.randn(4, 3),), shapes=shapes))
    verify(program)
    assert not [node for node in program.graph.nodes if "assert" in str(node.target)]
    assert all(node.users for node in program.graph.nodes if node.op == "call_function")
    assert program(torch.randn(10, 3)).shape == (5, 3)


@torch.library.custom_op("graphopt_tests::double_check", mutates_args=())
def double_check(x: Tensor) -> Tensor:
    return x * 2


@double_check.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class CustomOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double_check(x) + 1


def test_an_operator_whose_name_sounds_like_an_assertion_stays() -> None:
    x = torch.randn(3)
    program = from_exported(functional(CustomOperator(), (x,)))
    assert torch.equal(program(x), x * 2 + 1)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


def test_a_model_with_state_is_refused() -> None:
    with pytest.raises(GraphoptError, match="updates its buffer 'count' in forward; return the new value"):
        from_exported(functional(Counter(), (torch.randn(3),)))


class Overwriting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1


def test_an_overwritten_input_is_left_alone() -> None:
    program = from_exported(functional(Overwriting(), (torch.randn(3),)))
    x = torch.ones(3)
    assert program(x).tolist() == [3.0] * 3
    assert x.tolist() == [1.0] * 3


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


def test_control_flow_is_refused_with_its_line() -> None:
    with pytest.raises(GraphoptError, match=r"cond.* at .*test_exported\.py:\d+, in forward"):
        from_exported(torch.export.export(Branching(), (torch.randn(3),)))


def test_source_line_is_the_users() -> None:
    program = from_exported(functional(Tied(), (torch.randn(2, 3),)))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in calls:
        assert "test_exported.py:" in source_line(node)
        assert source_line(node).endswith(", in forward")
    assert source_line(program.placeholders[0]) == ""


class OddNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("a-b", "a_b", "1", "with space", "é"):
            self.register_parameter(name, nn.Parameter(torch.randn(2)))
        self.layers = nn.ModuleDict({"a-b": nn.Linear(2, 2), "x": nn.ModuleList([nn.Linear(2, 2)])})

    def forward(self, x: Tensor, p_a_b: Tensor) -> Tensor:
        for parameter in self._parameters.values():
            x = x + parameter
        return self.layers["x"][0](self.layers["a-b"](x)) + p_a_b


def test_names_with_odd_characters() -> None:
    module, x = OddNames(), torch.randn(3, 2)
    program = from_exported(functional(module, (x, x)))
    verify(program)
    again = from_exported(to_exported(program))
    for each in (program, program.clone(), again, to_exported(program).module()):
        torch.testing.assert_close(each(x, x), module(x, x))
    assert set(again.weights) == set(dict(module.named_parameters()))


class FrozenPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.linear.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_round_trip_keeps_parameters_and_buffers_apart() -> None:
    program = from_exported(functional(FrozenPart(), (torch.randn(1, 3),)))
    again = from_exported(to_exported(program))
    for name, weight in program.weights.items():
        assert isinstance(again.weight(name), nn.Parameter)
        assert again.weight(name).requires_grad == weight.requires_grad
