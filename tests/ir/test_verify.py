"""The verifier finds each kind of broken IR, and shows where."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from graphopt import capture
from graphopt.ir import Program, Rewriter, VerificationError, from_exported, operator, verify

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.linear(x))  # this line made linear and relu
        values, indices = torch.topk(y + self.steps, 2)
        return values * 2, indices


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(Net().eval(), (torch.randn(2, 4),))


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.clone()


def find(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if name in (operator(node), node.name, node.target))


def tensor_like(node: fx.Node, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    mode = node.meta["val"].fake_mode
    with mode:
        return torch.empty(shape, dtype=dtype)


# Each breaks a program in one way and says what the verifier must answer ---------------------------------------


def mutate(program: Program) -> str:
    find(program, "relu").target = aten.relu_.default
    return r"relu: aten.relu_.default mutates its input"


def no_value(program: Program) -> str:
    del find(program, "relu").meta["val"]
    return "relu: it has no abstract value"


def input_without_value(program: Program) -> str:
    del program.placeholders[0].meta["val"]
    return "linear: its input x has no abstract value"


def wrong_shape(program: Program) -> str:
    relu = find(program, "relu")
    relu.meta["val"] = tensor_like(relu, 2, 5)
    return r"relu: its operator gives f32\[2, 3\], the node says f32\[2, 5\]"


def wrong_dtype(program: Program) -> str:
    relu = find(program, "relu")
    relu.meta["val"] = tensor_like(relu, 2, 3, dtype=torch.float16)
    return r"relu: its operator gives f32\[2, 3\], the node says f16\[2, 3\]"


def stale_value(program: Program) -> str:
    """What an edit past the rewriter leaves behind: an operator rewired, the values after it as they were."""
    linear, relu = find(program, "linear"), find(program, "relu")
    with program.graph.inserting_before(relu):
        half = program.graph.call_function(aten._to_copy.default, (linear,), {"dtype": torch.float16})
    half.meta["val"] = tensor_like(linear, 2, 3, dtype=torch.float16)
    relu.replace_input_with(linear, half)
    return r"relu: its operator gives f16\[2, 3\], the node says f32\[2, 3\]"


def stale_downstream(program: Program) -> str:
    """One value was brought up to date and the next was not; the second call itself is as it was."""
    linear, relu = find(program, "linear"), find(program, "relu")
    with program.graph.inserting_before(relu):
        half = program.graph.call_function(aten._to_copy.default, (linear,), {"dtype": torch.float16})
    half.meta["val"] = relu.meta["val"] = tensor_like(linear, 2, 3, dtype=torch.float16)
    relu.replace_input_with(linear, half)
    add = find(program, "add")
    add.args = (relu, 1)
    add.meta["val"] = tensor_like(linear, 2, 3, dtype=torch.float16)
    return r"topk: its operator gives \(f16\[2, 2\], i64\[2, 2\]\), the node says \(f32\[2, 2\], i64\[2, 2\]\)"


def refused_inputs(program: Program) -> str:
    linear = find(program, "linear")
    linear.args = (linear.args[0], find(program, "steps"), linear.args[2])
    return "linear: its operator refuses its inputs: "


def wrong_item(program: Program) -> str:
    topk = find(program, "topk")
    topk.meta["val"] = topk.meta["val"][:1]
    return r"topk: its operator gives \(f32\[2, 2\], i64\[2, 2\]\), the node says \(f32\[2, 2\]\)"


def swapped_items(program: Program) -> str:
    getitem = find(program, "getitem")
    getitem.args = (getitem.args[0], 1)
    return r"getitem: its operator gives i64\[2, 2\], the node says f32\[2, 2\]"


def missing_weight(program: Program) -> str:
    del program.graph_module.linear.weight
    return "references nonexistent attribute weight of linear"


def weight_of_another_shape(program: Program) -> str:
    program.graph_module.linear.weight = nn.Parameter(torch.zeros(3, 5))
    return r"weight linear.weight is f32\[3, 5\], its node says f32\[3, 4\]"


def weight_of_another_dtype(program: Program) -> str:
    program.graph_module.steps = torch.arange(3, dtype=torch.int32)
    return r"weight steps is i32\[3\], its node says i64\[3\]"


def weight_read_by_two_nodes(program: Program) -> str:
    steps = find(program, "steps")
    with program.graph.inserting_after(steps):
        again = program.graph.get_attr("steps")
    again.meta = dict(steps.meta)
    find(program, "add").replace_input_with(steps, again)
    return "weight steps is read by two nodes"


def stray_weight(program: Program) -> str:
    program.graph_module.register_buffer("old", torch.ones(1))
    return "no node reads the weight old"


def python_function(program: Program) -> str:
    find(program, "relu").target = nn.functional.relu
    return "relu: .* is no operator of a functional graph"


def higher_order(program: Program) -> str:
    find(program, "relu").target = torch.ops.higher_order.cond
    return "relu: .*cond.* is no operator of a functional graph"


def module_call(program: Program) -> str:
    program.graph_module.inner = nn.ReLU()
    relu = find(program, "relu")
    with program.graph.inserting_before(relu):
        call = program.graph.call_module("inner", (relu.args[0],))
    relu.replace_input_with(relu.args[0], call)
    return "call_module has no place in a Program"


def wrong_order(program: Program) -> str:
    find(program, "relu").prepend(find(program, "add"))
    return "the graph is malformed"


def other_output(program: Program) -> str:
    end = program.graph.output_node()
    end.replace_input_with(program.outputs[0], find(program, "relu"))
    return r"relu: output 0 is f32\[2, 3\], it was f32\[2, 2\]"


def fewer_outputs(program: Program) -> str:
    end = program.graph.output_node()
    end.args = (end.args[0][:1],)
    return "the program has 1 outputs, it had 2"


def constant_output(program: Program) -> str:
    end = program.graph.output_node()
    end.args = ((3, end.args[0][1]),)
    return r"output 0 is 3, it was f32\[2, 2\]"


def other_input(program: Program) -> str:
    x = program.placeholders[0]
    x.meta["val"] = tensor_like(x, 7, 4)
    for node in program.graph.nodes:
        if node.op == "call_function":
            value = node.meta["val"]
            node.meta["val"] = (
                tuple(tensor_like(x, 7, each.shape[1], dtype=each.dtype) for each in value)
                if isinstance(value, tuple | list)
                else tensor_like(x, 7, value.shape[1], dtype=value.dtype)
            )
    return r"input x is f32\[7, 4\], it was f32\[2, 4\]"


def extra_input(program: Program) -> str:
    with program.graph.inserting_before(program.placeholders[0]):
        program.graph.placeholder("y").meta["val"] = program.placeholders[-1].meta["val"]
    return r"the inputs changed: \['y', 'x'\]"


ALONE = (
    mutate, no_value, input_without_value, wrong_shape, wrong_dtype, stale_value, stale_downstream, refused_inputs,
    wrong_item, swapped_items, missing_weight, weight_of_another_shape, weight_of_another_dtype,
    weight_read_by_two_nodes, stray_weight, python_function, higher_order, module_call, wrong_order,
)  # fmt: skip
AGAINST_REFERENCE = (other_output, fewer_outputs, constant_output, other_input, extra_input)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fault", ALONE, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("with_reference", [False, True], ids=["alone", "with_reference"])
def test_faults_are_found(fault: Callable[[Program], str], with_reference: bool, program: Program) -> None:
    reference = program.clone()
    verify(program, reference)
    expected = fault(program)
    with pytest.raises(VerificationError, match=expected):
        verify(program, reference if with_reference else None)
    verify(reference)


@pytest.mark.parametrize("fault", AGAINST_REFERENCE, ids=lambda fault: fault.__name__)
def test_faults_against_a_reference_are_found(fault: Callable[[Program], str], program: Program) -> None:
    reference = program.clone()
    expected = fault(program)
    with pytest.raises(VerificationError, match=expected):
        verify(program, reference)


def test_a_changed_signature_is_found(program: Program) -> None:
    other = capture(nn.Linear(4, 3), (torch.randn(2, 4),))
    reference = program.clone()
    program.signature = other.signature
    with pytest.raises(VerificationError, match="the signature changed"):
        verify(program, reference)


def test_the_error_shows_node_neighbours_and_the_users_line(program: Program) -> None:
    wrong_shape(program)
    with pytest.raises(VerificationError) as caught:
        verify(program)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("relu: its operator gives")
    pointed = [line for line in lines if line.startswith("-> ")]
    assert len(pointed) == 1
    assert pointed[0].startswith("-> relu: f32[2, 5] = relu(linear)")
    assert any(line.startswith("   linear: f32[2, 3] = linear(x, @linear.weight") for line in lines)
    assert any(line.startswith("   add: ") for line in lines)
    assert lines[-1].startswith("   made by ")
    path, _, place = lines[-1].removeprefix("   made by ").partition(":")
    with open(path) as file:
        assert "this line made linear and relu" in file.read().splitlines()[int(place.partition(",")[0]) - 1]


def test_faults_in_what_did_not_change_are_not_looked_for(program: Program) -> None:
    """With a reference, only calls that differ from it are derived again: that is what makes the check cheap."""
    wrong_shape(program)
    broken_before = program.clone()
    verify(program, broken_before)
    with pytest.raises(VerificationError):
        verify(program)


# What is no fault ---------------------------------------------------------------------------------------------


def test_symbolic_sizes_in_another_spelling_are_the_same() -> None:
    class Reshape(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x]).reshape(2, -1, 3).sum(0) + x

    before = capture(Reshape(), (torch.randn(4, 3),), ({0: Dim("n", min=2)},))
    verify(before)
    program = before.clone()
    rewriter = Rewriter(program, "test")
    (output,) = program.outputs
    rewriter.replace(output, rewriter.insert(aten.mul.Tensor, output, 2.0, before=output.next))
    rewriter.finish()
    verify(program, before)


def test_a_size_that_became_fixed_is_a_fault() -> None:
    before = capture(nn.ReLU(), (torch.randn(4, 3),), ({0: Dim("n", min=2)},))
    program = before.clone()
    (output,) = program.outputs
    output.meta["val"] = tensor_like(output, 4, 3)
    with pytest.raises(VerificationError, match=r"its operator gives f32\[.*, 3\], the node says f32\[4, 3\]"):
        verify(program, before)


def test_sizes_that_depend_on_values() -> None:
    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nonzero(x) * 2

    before = from_exported(torch.export.export(Nonzero(), (torch.randn(4),)).run_decompositions({}))
    verify(before)
    program = before.clone()
    rewriter = Rewriter(program, "test")
    (output,) = program.outputs
    rewriter.replace(output, rewriter.insert(aten.add.Tensor, output, 1, before=output.next))
    rewriter.finish()
    verify(program, before)
    assert program(torch.tensor([0.0, 1.0, 0.0, 2.0])).tolist() == [[3], [7]]


def test_arithmetic_on_sizes_is_allowed() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x.reshape(x.shape[0] * 3), x.shape[0] * 3

    program = capture_sizes(Sizes())
    verify(program)
    assert python_operator.mul in {node.target for node in program.graph.nodes}
    assert program(torch.randn(5, 3))[1] == 15


def capture_sizes(module: nn.Module) -> Program:
    exported = torch.export.export(module, (torch.randn(4, 3),), dynamic_shapes=({0: Dim("n", min=2)},))
    return from_exported(exported.run_decompositions({}))
