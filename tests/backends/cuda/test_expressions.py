"""Expressions mean the same in numpy, in torch and as text; what is none is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphopt.backends.cuda import arithmetic
from graphopt.backends.cuda.expressions import computed, emitted, evaluated, names, renamed


def test_names_once_each_in_order() -> None:
    assert names("add(mul(acc, silu(in0)), fma(acc, v0, 2.5))") == ["acc", "in0", "v0"]
    assert names("round(x)") == ["x"]


@pytest.mark.parametrize("name", sorted(arithmetic.FUNCTIONS))
def test_numpy_and_torch_agree(name: str) -> None:
    count = {"fma": 3}.get(name, 2 if name in ("add", "sub", "mul", "div", "max", "min") else 1)
    text = f"{name}({', '.join(f'in{i}' for i in range(count))})"
    values = {f"in{i}": np.linspace(0.1, 3, 50, dtype=np.float32) * (i + 1) for i in range(count)}
    got = evaluated(text, values, "float16")
    wanted = computed(text, {key: torch.from_numpy(value) for key, value in values.items()}, torch.float16)
    assert np.allclose(got, wanted.numpy(), rtol=2e-6)


def test_round_is_to_the_type() -> None:
    x = np.float32([1.0 + 2.0**-9])
    assert evaluated("round(x)", {"x": x}, "bfloat16")[0] == 1
    assert evaluated("round(x)", {"x": x}, "float16")[0] == x[0]


def test_text_in_the_dialect_has_all_bits_of_numbers() -> None:
    text = emitted("add(mul(x, 0.1), -2)", {"x": "x[e]"}, "float16")
    assert text == "go_add(go_mul(x[e], go_float(0x3dcccccdu)), go_float(0xc0000000u))"
    assert emitted("round(x)", {"x": "y"}, "bfloat16") == "go_of_b(go_to_b(y))"


def test_names_are_replaced_by_expressions() -> None:
    assert renamed("mul(silu(acc), in0)", {"in0": "add(acc2, v1)"}) == "mul(silu(acc), add(acc2, v1))"


@pytest.mark.parametrize(
    "text",
    ["", "acc +", "acc + 1", "__import__('os')", "acc.real", "silu(acc, acc)", "pow(acc, 2)", "silu(x=acc)", "'a'",
     "[acc]", "True and acc", "add(acc)"],
)  # fmt: skip
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(ValueError, match="is no expression of a kernel"):
        names(text)
