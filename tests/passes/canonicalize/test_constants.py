"""What depends on no input is evaluated, with a cap, and only where the value is the model's."""

from __future__ import annotations

import pytest
import torch
from harness import Example, Function, apply, captured, four_tests, operators
from torch import Tensor, fx, nn

from graphopt.errors import GraphoptError
from graphopt.ir import Rewriter, dialect
from graphopt.passes import Canonicalize
from graphopt.passes.canonicalize.constants import result_name

SHAPE = (2, 4, 6)
ONE_LEFT = """
mul = mul(x, @w)
return mul
"""


def _buckets(x: Tensor, table: Tensor) -> Tensor:
    """Relative positions in logarithmic buckets, as integers."""
    distance = (torch.arange(6)[None, :] - torch.arange(6)[:, None]).abs().clamp(min=1)
    return x[:, :1] @ table[(torch.log(distance.float()) * 1.9).to(torch.int64)]  # type: ignore[no-any-return]


def _on_the_edge(x: Tensor) -> Tensor:
    """0.1 + 0.2 is 0.3 in float32 and a little more in float64."""
    above = torch.full((6,), 0.1) + torch.full((6,), 0.2) > torch.full((6,), 0.3)
    return x * above


def _overflow(x: Tensor) -> Tensor:
    large = torch.full((6,), 6e4, dtype=torch.float16)
    return x * (large * large / large / large)


EXAMPLES = [
    Example("of_a_weight", lambda: Function(lambda x, w: x * (1 + w), w=torch.rand(6)), SHAPE, golden=ONE_LEFT),
    Example(
        "of_two_weights",
        lambda: Function(lambda x, w, b: x * (w + b), w=torch.rand(6), b=torch.rand(6)),
        SHAPE,
        golden="""
        mul = mul(x, @add)
        return mul
        """,
    ),
    Example(
        "mask",
        lambda: Function(lambda x: x.masked_fill((torch.arange(6) > 3)[None, :], 0.0)),
        SHAPE,
        fires=1,
        rule="evaluate_constants",
    ),
    Example("bits_of_a_mask", lambda: Function(lambda x, m: x * ~m, buffer_m=torch.rand(6) > 0.5), SHAPE, fires=1),
    Example("buckets", lambda: Function(_buckets, table=torch.rand(8)), SHAPE, fires=3),
    Example(
        "parts",
        lambda: Function(lambda x, w: (lambda a, b: x * a + b)(*w.chunk(2)), w=torch.rand(2, 6)),
        SHAPE,
        fires=2,
        golden="""
        mul = mul(x, @w)
        add = add(mul, @w_2)
        return add
        """,
    ),
    Example(
        "rounding_decides",
        lambda: Function(_on_the_edge),
        SHAPE,
        declines="rounding to torch.bool decides its value",
        fires=0,
    ),
    Example(
        "overflow", lambda: Function(_overflow), SHAPE, declines="its value overflows torch.float16 on the way", fires=0
    ),
    Example(
        "complex",
        lambda: Function(lambda x, a: x * torch.polar(torch.ones(6), a), buffer_a=torch.rand(6)),
        SHAPE,
        declines="it is complex",
    ),
    Example(
        "nothing_depends_on_sizes_unknown",
        lambda: Function(lambda x: x * torch.arange(x.shape[0])[:, None, None]),
        SHAPE,
        fires=1,
        rule="evaluate_constants",
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(Canonicalize(), EXAMPLES)

# [64, 64] floats take 16 KiB, the vector that they come from 256 bytes.
LARGE = Example("large", lambda: Function(lambda x, w: x[:, :1, :1] * (w[:, None] * w), w=torch.rand(64)), SHAPE)


def test_what_is_larger_than_the_cap_stays() -> None:
    after, changes = apply(Canonicalize(max_bytes=16383), captured(LARGE))
    assert "unsqueeze" in operators(after) or operators(after).count("mul") == 2
    assert [site.reason for site in changes.skipped] == ["its value takes 16384 bytes, more than max_bytes=16383"]
    after, _ = apply(Canonicalize(max_bytes=16384), captured(LARGE))
    assert operators(after).count("mul") == 1


def test_what_replaces_as_much_as_it_takes_is_evaluated_under_any_cap() -> None:
    grown = Function(lambda x, w: x * (1 + w), w=torch.rand(64, 4, 6))
    after, _ = apply(Canonicalize(max_bytes=0), captured(Example("dies", lambda: grown, (64, 4, 6), batch=False)))
    assert operators(after) == ["mul"]
    read_twice = Function(lambda x, w: x * (1 + w) + w, w=torch.rand(64, 4, 6))
    after, _ = apply(Canonicalize(max_bytes=0), captured(Example("stays", lambda: read_twice, (64, 4, 6), batch=False)))
    assert operators(after) == ["add", "mul", "add"]


def test_the_cap_is_checked() -> None:
    with pytest.raises(GraphoptError, match=r"canonicalize.max_bytes cannot be -1"):
        Canonicalize(max_bytes=-1)


def test_quantize_and_dequantize_of_weights_stay() -> None:
    program = captured(Example("mul", lambda: Function(lambda x, w: x * w, w=torch.rand(6)), SHAPE)).clone()
    rewriter = Rewriter(program, "test")
    product = next(node for node in program.nodes if node.op == "call_function")
    weight = next(node for node in program.nodes if node.op == "get_attr")
    scale = rewriter.weight(torch.tensor(0.01), "scale", torch.float32)
    codes = rewriter.insert(dialect.quantize, weight, scale, None, 0, 0, "int8", before=product)
    value = rewriter.insert(dialect.dequantize, codes, scale, None, None, 0, 0, "int8", before=product)
    again = rewriter.insert(dialect.dequantize, codes, scale, None, None, 0, 0, "int8", before=product)
    rewriter.redirect(product, weight, value)
    other = rewriter.insert(torch.ops.aten.mul.Tensor, product, again, before=program.graph.output_node())
    rewriter.redirect(program.graph.output_node(), product, other)
    rewriter.finish()
    after, changes = apply(Canonicalize(), program)
    assert operators(after) == ["graphopt.quantize", "graphopt.dequantize", "graphopt.dequantize", "mul", "mul"]
    assert not changes.changed


def test_parameters_stay_parameters_and_masks_buffers() -> None:
    def masked(x: Tensor, w: Tensor) -> Tensor:
        return (x * (1 + w)).masked_fill((torch.arange(6) > 3)[None, :], 0.0) + torch.full((6,), 0.5).cos()

    after, _ = apply(Canonicalize(), captured(Example("kinds", lambda: Function(masked, w=torch.rand(6)), SHAPE)))
    kinds = {name: isinstance(weight, nn.Parameter) for name, weight in after.weights.items()}
    assert kinds.pop("w") is True
    assert list(kinds.values()) == [False, False]


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        (["conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"], "conv.weight"),
        (["parametrizations.weight.original"], "weight"),
        (["conv.weight_g", "conv.weight_v"], "conv.weight"),
        (["conv.weight_orig", "conv.weight_u", "conv.weight_v"], "conv.weight"),
        (["block.one.weight", "block.two.weight"], "block.add"),
        (["gate_v"], "add"),
        ([], "add"),
    ],
)
def test_names(weights: list[str], name: str) -> None:
    node = fx.Graph().call_function(torch.ops.aten.add.Tensor, (1, 2))
    node.name = "add"
    assert result_name(node, weights, form=False) == name
    assert result_name(node, ["conv.weight"], form=True) == "conv.weight"
