"""What returns its input is dropped; what only looks like it stays."""

from __future__ import annotations

import torch
from harness import Example, Function, apply, captured, four_tests, operators
from torch import Tensor, nn

from graphopt.ir import Rewriter
from graphopt.passes import Canonicalize

PASS = Canonicalize()
SHAPE = (2, 4, 6)


def _same(name: str, function: object, rule: str, fires: int = 1, **options: object) -> Example:
    """`function` between two sines becomes the sines alone."""
    return Example(
        name,
        lambda: Function(lambda x: torch.sin(function(torch.sin(x)))),  # type: ignore[operator]
        SHAPE,
        fires=fires,
        rule=rule,
        golden="""
        sin = sin(x)
        sin_1 = sin(sin)
        return sin_1
        """,
        **options,  # type: ignore[arg-type]
    )


def _kept(name: str, function: object, operators: str, rule: str, **options: object) -> Example:
    return Example(name, lambda: Function(function), SHAPE, fires=0, rule=rule, golden=operators, **options)  # type: ignore[arg-type]


EXAMPLES = [
    _same("dropout", lambda x: nn.functional.dropout(x, 0.5, training=False), "drop_copy"),
    _same("clone", lambda x: x.clone(), "drop_copy"),
    _same("contiguous", lambda x: x.contiguous(), "drop_copy", fires=0),
    _same("cast_to_its_type", lambda x: torch.ops.aten._to_copy(x, dtype=torch.float32), "drop_copy"),
    _same("cast_there_and_back", lambda x: x.to(torch.float64).to(torch.float32), "merge_casts"),
    _same("view", lambda x: torch.ops.aten.view(x, [-1, 4, 6]), "drop_reshape"),
    _same("expand", lambda x: x.expand(-1, 4, 6), "drop_reshape"),
    _same("slice", lambda x: x[:, 0:4], "drop_reshape", fires=0),
    _same("slice_to_the_end", lambda x: torch.ops.aten.slice(x, 1, 0, 99, 1), "drop_reshape"),
    _same("squeeze", lambda x: torch.ops.aten.squeeze(x, 1), "drop_reshape"),
    _same("padding_of_no_width", lambda x: torch.ops.aten.constant_pad_nd(x, [0, 0, 0, 0]), "drop_padding"),
    _same("times_one", lambda x: x * 1, "drop_neutral"),
    _same("by_one", lambda x: x / 1.0, "drop_neutral"),
    _same("plus_zero", lambda x: x + 0.0, "drop_neutral"),
    _same("minus_zero", lambda x: x - 0, "drop_neutral"),
    _same("power_one", lambda x: x**1, "drop_neutral"),
    _kept(
        "narrowing_casts_stay",
        lambda x: torch.sin(x.to(torch.bfloat16).to(torch.float32)),
        """
        _to_copy = _to_copy(x, dtype=bfloat16)
        _to_copy_1 = _to_copy(_to_copy, dtype=float32)
        sin = sin(_to_copy_1)
        return sin
        """,
        "merge_casts",
    ),
    _kept(
        "floor_division_by_one_stays",
        lambda x: torch.div(x, 1, rounding_mode="floor"),
        """
        div = div(x, 1, rounding_mode='floor')
        return div
        """,
        "drop_neutral",
    ),
    _kept(
        "an_integer_divided_by_one_is_a_float",
        lambda x: (x > 0).to(torch.int64) / 1,
        """
        gt = gt(x, 0)
        _to_copy = _to_copy(gt, dtype=int64)
        div = div(_to_copy, 1)
        return div
        """,
        "drop_neutral",
    ),
    _kept(
        "adding_to_an_integer_promotes",
        lambda x: (x > 0).to(torch.int64) + 0.0,
        """
        gt = gt(x, 0)
        _to_copy = _to_copy(gt, dtype=int64)
        add = add(_to_copy, 0.0)
        return add
        """,
        "drop_neutral",
    ),
    _kept(
        "broadcasting_stays",
        lambda x: torch.sin(x[:, :1].expand(-1, 4, -1)),
        """
        slice_1 = slice(x, 1, start=0, end=1)
        expand = expand(slice_1, [-1, 4, -1])
        sin = sin(expand)
        return sin
        """,
        "drop_reshape",
    ),
    Example(
        "returned_copy_of_an_input",
        lambda: Function(lambda x: x.clone()),
        SHAPE,
        declines="the program returns it, and would return x itself",
    ),
    Example(
        "returned_in_another_layout",
        lambda: Function(lambda x: torch.sin(x).transpose(1, 2).contiguous()),
        SHAPE,
        declines="the caller gets its memory layout",
    ),
    Example(
        "layout_is_read",
        lambda: Function(
            lambda x: torch.view_as_real(
                torch.view_as_complex(torch.sin(x).reshape(-1, 3, 2, 4).transpose(2, 3).contiguous())
            )
        ),
        SHAPE,
        declines="view_as_complex looks at memory layouts",
    ),
    Example(
        "mask_that_hides_nothing",
        lambda: Function(
            lambda x, m: nn.functional.scaled_dot_product_attention(x, x, x, m), buffer_m=torch.ones(4, 4).bool()
        ),
        SHAPE,
        fires=1,
        rule="drop_open_mask",
        golden="""
        scaled_dot_product_attention = scaled_dot_product_attention(x, x, x)
        return scaled_dot_product_attention
        """,
    ),
    Example(
        "mask_of_zeros",
        lambda: Function(
            lambda x, m: nn.functional.scaled_dot_product_attention(x, x, x, m), buffer_m=torch.zeros(1, 4, 4)
        ),
        SHAPE,
        fires=1,
        rule="drop_open_mask",
    ),
    Example(
        "mask_that_hides_something",
        lambda: Function(
            lambda x, m: nn.functional.scaled_dot_product_attention(x, x, x, m),
            buffer_m=torch.ones(4, 4).tril().bool(),
        ),
        SHAPE,
        declines="the mask hides something",
    ),
    Example(
        "number_in_a_buffer",
        lambda: Function(lambda x, c: torch.sin(x) * c, buffer_c=torch.tensor(0.1, dtype=torch.float64)),
        SHAPE,
        fires=1,
        rule="write_number",
        golden="""
        sin = sin(x)
        mul_1 = mul(sin, 0.1)
        return mul_1
        """,
    ),
    Example(
        "neutral_number_in_a_buffer",
        lambda: Function(lambda x, c: c * torch.sin(x), buffer_c=torch.tensor(1.0)),
        SHAPE,
        golden="""
        sin = sin(x)
        return sin
        """,
    ),
    Example(
        "number_in_a_parameter",
        lambda: Function(lambda x, c: torch.sin(x) * c, c=torch.tensor(0.1)),
        SHAPE,
        fires=0,
        rule="write_number",
        declines="c is a parameter",
    ),
    Example(
        "infinite_number",
        lambda: Function(lambda x, c: torch.sin(x) * c, buffer_c=torch.tensor(float("-inf"))),
        SHAPE,
        fires=0,
        rule="write_number",
        declines="buffer_c is not finite",
    ),
    Example(
        "number_that_promotes",
        lambda: Function(lambda x, c: (x > 0).to(torch.int64) * c, buffer_c=torch.tensor(0.5, dtype=torch.float64)),
        SHAPE,
        fires=0,
        rule="write_number",
        declines="buffer_c is of type torch.float64, beside torch.int64",
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(PASS, EXAMPLES)


def test_dropout_operators() -> None:
    """Captured programs have lost them already; those that somebody built have not."""
    base = captured(Example("sines", lambda: Function(lambda x: torch.sin(torch.sin(x))), SHAPE))
    aten = torch.ops.aten
    for target, arguments, kept in (
        (aten.dropout.default, (0.5, False), False),
        (aten.dropout.default, (0.0, True), False),
        (aten.dropout.default, (0.5, True), True),
        (aten.feature_dropout.default, (0.5, False), False),
    ):
        program = base.clone()
        first = next(node for node in program.nodes if node.op == "call_function")
        rewriter = Rewriter(program, "test")
        after_first = first.next
        node = rewriter.insert(target, first, *arguments, before=after_first)
        rewriter.redirect(after_first, first, node)
        rewriter.finish()
        after, _ = apply(PASS, program)
        assert ("dropout" in " ".join(operators(after))) is kept


def test_random_numbers_are_drawn_each_time() -> None:
    def noisy(x: Tensor) -> Tensor:
        return torch.rand_like(x) + torch.rand_like(x) + torch.rand(4, 6)  # type: ignore[no-any-return]

    after, changes = apply(PASS, captured(Example("noise", lambda: Function(noisy), SHAPE)))
    assert sum(name.startswith("rand") for name in operators(after)) == 3
    assert not changes.changed
