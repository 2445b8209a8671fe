"""`trainable`: the same outputs, with gradients for masters and scales."""

from __future__ import annotations

import operator as python_operator

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt import capture
from graphopt.ir import Program, Rewriter, arguments, dialect, operator, trainable, verify

aten = torch.ops.aten


class Net(nn.Module):
    """A table tied to the head, a linear between them, a norm that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.inner(self.table(ids)))))


IDS = torch.tensor([[0, 1, 2], [6, 5, 4]])


def calls(program: Program, name: str) -> list[fx.Node]:
    return [node for node in program.graph.nodes if operator(node) == name]


def quantize_weights(rewriter: Rewriter) -> None:
    """Int8 codes for the table by row, the tied head and the linear by channel; an int32 bias."""
    for node in [*calls(rewriter.program, "embedding"), *calls(rewriter.program, "linear")]:
        named = arguments(node)
        source = named["weight"]

        def make(source: fx.Node = source) -> tuple[fx.Node, Tensor]:
            value = rewriter.value(source)
            scale = (value.abs().amax(1) / 127).float()
            codes = dialect.quantize(value, scale, None, 0, 0, "int8")
            return rewriter.weight(codes, str(source.target), torch.int8, source), scale

        codes, scale = rewriter.once(source, "codes", make)
        if operator(node) == "embedding":
            column = rewriter.weight(scale[:, None], "table.row_scale", torch.float32)
            rows = rewriter.insert(node.target, codes, named["indices"], before=node)
            scales = rewriter.insert(node.target, column, named["indices"], before=node)
            rewriter.replace(
                node, rewriter.insert(dialect.dequantize, rows, scales, None, None, -1, -1, "int8", before=node)
            )
            continue
        reader = rewriter.weight(scale, f"{source.target}_scale", torch.float32)
        changes = {"weight": rewriter.insert(dialect.dequantize, codes, reader, None, None, 0, 0, "int8", before=node)}
        if named["bias"] is not None:
            bias_scale = scale * 0.02
            bias = dialect.quantize(rewriter.value(named["bias"]), bias_scale, None, 0, 0, "int32")
            changes["bias"] = rewriter.insert(
                dialect.dequantize,
                rewriter.weight(bias, str(named["bias"].target), torch.int32, named["bias"]),
                rewriter.weight(bias_scale, "inner.bias_scale", torch.float32),
                rewriter.weight(torch.zeros(4, dtype=torch.int32), "inner.bias_zero", torch.int32),
                None, 0, 0, "int32", before=node,
            )  # fmt: skip
        rewriter.rewire(node, **changes)


def quantize_input(rewriter: Rewriter, node: fx.Node, dynamic: bool) -> fx.Node:
    """Put a pair before a linear's input, and return its quantize."""
    x = arguments(node)["input"]
    if dynamic:
        both = rewriter.insert(dialect.dynamic_scale, x, -1, -1, "int8", before=node)
        parameters = [rewriter.insert(python_operator.getitem, both, index, before=node) for index in (0, 1)]
    else:
        parameters = [
            rewriter.weight(torch.tensor(0.03), f"{node.name}_scale", torch.float32),
            rewriter.weight(torch.tensor(-2), f"{node.name}_zero", torch.int8),
        ]
    where = (-1, -1, "int8") if dynamic else (0, 0, "int8")
    codes = rewriter.insert(dialect.quantize, x, *parameters, *where, before=node)
    rewriter.rewire(node, input=rewriter.insert(dialect.dequantize, codes, *parameters, None, *where, before=node))
    return codes


@pytest.fixture(scope="module")
def captured() -> Program:
    torch.manual_seed(0)
    return capture(Net().eval(), (IDS,))


@pytest.fixture(params=[False, True], ids=["static", "dynamic"])
def quantized(captured: Program, request: pytest.FixtureRequest) -> Program:
    program = captured.clone()
    rewriter = Rewriter(program, "test")
    quantize_weights(rewriter)
    for node in calls(program, "linear"):
        quantize_input(rewriter, node, request.param)
    rewriter.finish()
    verify(program)
    assert len(calls(program, "graphopt.dequantize")) == 6
    return program


def test_outputs_are_the_same_and_no_codes_are_left(quantized: Program) -> None:
    text, before = str(quantized), quantized(IDS)
    program = trainable(quantized)
    verify(program)
    assert torch.equal(program(IDS), before)
    assert program.notes == quantized.notes
    assert not calls(program, "graphopt.dequantize")
    assert not calls(program, "graphopt.quantize")
    # Two inputs, the linear's weight, and the table once by row and once, for the head, by channel.
    assert len(calls(program, "graphopt.fake_quantize")) == 5
    assert str(quantized) == text


def test_masters_and_scales_are_parameters_with_the_models_names(quantized: Program) -> None:
    program = trainable(quantized)
    parameters = dict(program.module().named_parameters())
    static = {"linear_scale", "linear_1_scale"} & set(quantized.weights)
    assert set(parameters) == {
        "table.weight", "table.row_scale", "table.weight_scale", "inner.weight", "inner.weight_scale", "inner.bias",
        "norm.weight", "norm.bias", *static,
    }  # fmt: skip
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters.values())
    assert program.aliases == quantized.aliases == {"head.weight": "table.weight"}
    codes, scale = quantized.weight("inner.weight"), quantized.weight("inner.weight_scale")
    assert torch.equal(parameters["inner.weight"], dialect.dequantize(codes, scale, None, None, 0, 0, "int8"))


def test_gradients_reach_every_parameter(quantized: Program) -> None:
    program = trainable(quantized)
    (program(IDS) * torch.randn(2, 3, 7)).sum().backward()
    for name, parameter in program.module().named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().sum() > 0, name


def test_training_changes_the_copy_only(quantized: Program) -> None:
    weights = {name: weight.detach().clone() for name, weight in quantized.weights.items()}
    text, before = str(quantized), quantized(IDS)
    program = trainable(quantized)
    target = torch.randint(0, 7, (6,))
    optimizer = torch.optim.SGD(program.module().parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(program(IDS).flatten(0, 1), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(quantized.weight(name), value) for name, value in weights.items())
    assert torch.equal(quantized(IDS), before)
    assert str(quantized) == text
    # A step shows in the text, although weights were written in place.
    assert str(program) != str(trainable(quantized))


def test_straight_through_gradient_equals_that_of_the_float_model(captured: Program) -> None:
    """With nothing clipped, the gradient of a master is the gradient that its quantized value has."""
    program = captured.clone()
    rewriter = Rewriter(program, "test")
    quantize_weights(rewriter)
    rewriter.finish()
    ours = trainable(program)
    plain = captured.map_weights(lambda name, weight: nn.Parameter(ours.weight(name).detach().clone()))
    weight = torch.randn(2, 3, 7)
    for each in (ours, plain):
        (each(IDS) * weight).sum().backward()
    torch.testing.assert_close(ours.weight("inner.weight").grad, plain.weight("inner.weight").grad)
    torch.testing.assert_close(ours.weight("inner.bias").grad, plain.weight("inner.bias").grad)
    # The tied table is one master: it gets the gradients of both its places.
    torch.testing.assert_close(ours.weight("table.weight").grad, plain.weight("table.weight").grad)


class Fork(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.relu(x)
        return y + 1, y * 2, y


def test_one_quantize_with_several_readers() -> None:
    program = capture(Fork(), (torch.randn(5, 3),))
    rewriter = Rewriter(program, "test")
    relu = calls(program, "relu")[0]
    scale, zero = rewriter.weight(torch.tensor(0.01), "s", torch.float32), None
    codes = rewriter.insert(dialect.quantize, relu, scale, zero, 0, 0, "uint8", before=relu.next)
    for user in list(relu.users):
        if user is not codes:
            back = rewriter.insert(dialect.dequantize, codes, scale, zero, None, 0, 0, "uint8", before=user)
            rewriter.redirect(user, relu, back)
    rewriter.finish()
    verify(program)
    assert len(calls(program, "graphopt.dequantize")) == 3
    result = trainable(program)
    verify(result)
    assert len(calls(result, "graphopt.fake_quantize")) == 1
    x = torch.randn(5, 3, requires_grad=True)
    for ours, theirs in zip(result(x), program(x), strict=True):
        assert torch.equal(ours, theirs)
    sum(output.sum() for output in result(x)).backward()
    assert torch.equal(x.grad, torch.where((x > 0) & (x <= 2.55), 4.0, 0.0))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")])
def test_types_of_value_and_scale_differ(dtypes: tuple[str, str]) -> None:
    """`dequantize` gives the scale's type; the pair keeps doing so, to the last digit."""
    value, scale_type = (getattr(torch, name) for name in dtypes)
    program = capture(nn.ReLU(), (torch.randn(6, 3, dtype=value),))
    rewriter = Rewriter(program, "test")
    relu = calls(program, "relu")[0]
    scale = rewriter.weight(torch.rand(3) * 0.02 + 0.001, "s", scale_type)
    codes = rewriter.insert(dialect.quantize, relu, scale, None, 1, 0, "uint8", before=relu.next)
    end = program.graph.output_node()
    rewriter.redirect(
        end, relu, rewriter.insert(dialect.dequantize, codes, scale, None, None, 1, 0, "uint8", before=end)
    )
    rewriter.finish()
    result = trainable(program)
    verify(result)
    x = torch.randn(64, 3).to(value)[:6]
    assert result(x).dtype == scale_type
    assert torch.equal(result(x), program(x))


@pytest.mark.parametrize("format", ["int2", "uint3", "int4", "uint8"])
@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16])
def test_weights_in_groups_and_few_bits(format: str, scale_type: torch.dtype) -> None:
    module = nn.Linear(10, 6, bias=False).to(scale_type)
    program = capture(module, (torch.randn(2, 10, dtype=scale_type),))
    rewriter = Rewriter(program, "test")
    linear = calls(program, "linear")[0]
    source = arguments(linear)["weight"]
    value = rewriter.value(source)
    scale, zero = dialect.dynamic_scale(value, 1, 4, format)
    scale = scale.to(scale_type)
    codes = dialect.quantize(value, scale, zero, 1, 4, format)
    parts = [
        rewriter.weight(codes, "weight", codes.dtype, source),
        rewriter.weight(scale, "weight_scale", scale_type, parameter=False),
        rewriter.weight(zero, "weight_zero", zero.dtype),
    ]
    rewriter.rewire(linear, weight=rewriter.insert(dialect.dequantize, *parts, None, 1, 4, format, before=linear))
    rewriter.finish()
    result = trainable(program)
    verify(result)
    x = torch.randn(3, 10, dtype=scale_type)
    assert torch.equal(result(x), program(x))
    result(x).float().square().sum().backward()
    assert result.weight("weight").grad.abs().sum() > 0
    assert result.weight("weight_scale").grad.shape == scale.shape


def test_what_cannot_be_restored_stays_and_is_said() -> None:
    """Codes that are transposed on the way, and a pair whose two halves use different scales."""

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    program = capture(Plain(), (torch.randn(4, 4),))
    rewriter = Rewriter(program, "test")
    relu = calls(program, "relu")[0]
    one, two = (rewriter.weight(torch.tensor(value), name, torch.float32) for name, value in (("a", 0.01), ("b", 0.02)))
    end = program.graph.output_node()
    codes = rewriter.insert(dialect.quantize, relu, one, None, 0, 0, "uint8", before=end)
    other = rewriter.insert(dialect.dequantize, codes, two, None, None, 0, 0, "uint8", before=end)
    turned = rewriter.insert(aten.permute.default, codes, [1, 0], before=end)
    back = rewriter.insert(dialect.dequantize, turned, one, None, None, 0, 0, "uint8", before=end)
    rewriter.redirect(end, relu, rewriter.insert(aten.add.Tensor, other, back, before=end))
    rewriter.finish()
    result = trainable(program)
    verify(result)
    x = torch.randn(4, 4)
    assert torch.equal(result(x), program(x))
    assert len(calls(result, "graphopt.dequantize")) == 2
    assert result.notes == [
        *program.notes,
        f"{other.name} stays as it is in training: {codes.name} is neither a weight nor a quantize like it",
        f"{back.name} stays as it is in training: {turned.name} is neither a weight nor a quantize like it",
    ]
