"""Products with weight matrices."""

from __future__ import annotations

import torch
from harness import Example, Function, apply, captured, four_tests
from torch import Tensor, nn

from graphopt.ir import arguments, operator
from graphopt.passes import Canonicalize

W, B = torch.rand(4, 6), torch.rand(4)
GOLDEN = """
linear = linear(x, @w, @b)
return linear
"""
# The product was a linear of its own before it took the bias.
SUM = """
linear_1 = linear(x, @w, @b)
return linear_1
"""
NO_BIAS = """
linear = linear(x, @w)
return linear
"""
aten = torch.ops.aten

EXAMPLES = [
    Example(
        "addmm_transposed", lambda: Function(lambda x, w, b: aten.addmm(b, x, w.t()), w=W, b=B), (3, 6), golden=GOLDEN
    ),
    Example("addmm", lambda: Function(lambda x, w, b: aten.addmm(b, x, w), w=W.t(), b=B), (3, 6), golden=GOLDEN),
    Example("mm", lambda: Function(lambda x, w: aten.mm(x, w), w=W.t()), (3, 6), golden=NO_BIAS),
    Example(
        "matmul_of_more_axes",
        lambda: Function(lambda x, w: x @ w.transpose(0, 1), w=W),
        (3, 5, 6),
        golden=NO_BIAS,
    ),
    Example("permuted", lambda: Function(lambda x, w: x @ w.permute(1, 0), w=W), (3, 6), golden=NO_BIAS),
    Example("matmul_plus_bias", lambda: Function(lambda x, w, b: b + x @ w, w=W.t(), b=B), (3, 5, 6), golden=SUM),
    Example(
        "bias_with_leading_axes",
        lambda: Function(lambda x, w, b: x @ w.t() + b, w=W, b=B[None, None]),
        (3, 5, 6),
        golden=SUM,
    ),
    Example(
        "scaled_summands",
        lambda: Function(lambda x, w, b: aten.addmm(b, x, w, beta=0.5, alpha=2), w=W.t(), b=B),
        (3, 6),
        declines="addmm scales its summands by alpha=2 and beta=0.5",
    ),
    Example(
        "summand_for_each_row",
        lambda: Function(lambda x, w, b: aten.addmm(b, x, w), w=W.t(), b=torch.rand(3, 4)),
        (3, 6),
        declines="its summand b is [3, 4], not one number an output",
        batch=False,
    ),
    Example(
        "product_read_twice",
        lambda: Function(lambda x, w, b: ((y := x @ w) + b, y), w=W.t(), b=B),
        (3, 6),
        fires=0,
        rule="add_bias",
        declines="linear is read by 2 nodes (add, output)",
    ),
    Example(
        "bias_of_another_type",
        lambda: Function(lambda x, w, b: x @ w + b, w=W.t(), b=B.to(torch.bfloat16)),
        (3, 6),
        fires=0,
        rule="add_bias",
        declines="b is of type torch.bfloat16, linear of type torch.float32",
    ),
    Example(
        "two_activations",
        lambda: Function(lambda x: x @ x.transpose(-1, -2)),
        (3, 5, 6),
        golden="""
        transpose = transpose(x, -1, dim1=-2)
        matmul = matmul(x, transpose)
        return matmul
        """,
    ),
    Example(
        "matrix_repeated_for_each_batch",
        lambda: Function(lambda x, w: torch.sin(torch.bmm(x, w.t().expand(x.shape[0], 6, 4))), w=W),
        (3, 5, 6),
        golden="""
        linear = linear(x, @w)
        sin = sin(linear)
        return sin
        """,
    ),
    Example(
        "another_matrix_for_each_batch",
        lambda: Function(lambda x, w: torch.bmm(x, w), w=torch.rand(3, 6, 4)),
        (3, 5, 6),
        golden="""
        bmm = bmm(x, @w)
        return bmm
        """,
        batch=False,
    ),
    Example(
        "axes_kept",
        lambda: Function(lambda x, w, b: torch.sin(aten.addmm(b, x.view(-1, 6), w.t()).view(-1, 5, 4)), w=W, b=B),
        (3, 5, 6),
        golden="""
        linear_1 = linear(x, @w, @b)
        sin = sin(linear_1)
        return sin
        """,
        batch=False,
    ),
    Example(
        "axes_joined_before_and_split_otherwise",
        lambda: Function(lambda x, w: torch.sin(aten.mm(x.view(-1, 6), w.t()).view(-1, 5, 2, 2)), w=W),
        (3, 5, 6),
        golden="""
        linear_1 = linear(x, @w)
        reshape_1 = reshape(linear_1, [-1, 5, 2, 2])
        sin = sin(reshape_1)
        return sin
        """,
        batch=False,
    ),
    Example(
        "flat_result_is_read",
        lambda: Function(lambda x, w: torch.sin(aten.mm(x.view(-1, 6), w.t())), w=W),
        (3, 5, 6),
        fires=0,
        rule="keep_axes",
    ),
    Example(
        "last_axis_is_cut",
        lambda: Function(lambda x, w: aten.mm(x.reshape(-1, 6), w.t()).reshape(-1, 8), w=W),
        (3, 5, 12),
        fires=0,
        rule="keep_axes",
        batch=False,
    ),
    Example(
        "transposed_weight_of_linear",
        lambda: Function(lambda x, w: nn.functional.linear(x, w.t()), w=W.t()),
        (3, 6),
        fires=1,
        rule="evaluate_constants",
        golden=NO_BIAS,
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(Canonicalize(), EXAMPLES)


def test_a_tied_table_is_not_copied() -> None:
    """The head reads the embedding's table, transposed: linear takes it as it is."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.rand(10, 6))

        def forward(self, i: Tensor) -> Tensor:
            return nn.functional.embedding(i, self.table) @ self.table.t()  # type: ignore[no-any-return]

    example = Example("tied", Tied, lambda: (torch.randint(0, 10, (2, 3)),))
    after, _ = apply(Canonicalize(), captured(example))
    assert list(after.weights) == ["table"]


def test_uses_of_one_weight_share_its_transpose() -> None:
    example = Example("twice", lambda: Function(lambda x, w: torch.relu(x @ w) @ w, w=torch.rand(6, 6)), (3, 6))
    after, _ = apply(Canonicalize(), captured(example))
    assert [arguments(node)["weight"].target for node in after.nodes if operator(node) == "linear"] == ["w", "w"]
