"""How coarse a rounding is: against the closed form of a uniform step, in every granularity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.analysis.numerics.fit import coarseness
from graphopt.ir import Program, dialect


class Rounded(nn.Module):
    """x through quantize and dequantize of one granularity."""

    def __init__(self, scale: Tensor, axis: int, group: int, form: str, zero: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.axis, self.group, self.form = axis, group, form

    def forward(self, x: Tensor) -> Tensor:
        codes = dialect.quantize(x, self.scale, self.zero, self.axis, self.group, self.form)
        return dialect.dequantize(codes, self.scale, self.zero, None, self.axis, self.group, self.form)  # type: ignore[no-any-return]


def _last(program: Program) -> fx.Node:
    return next(node for node in reversed(program.graph.nodes) if node.op == "call_function")


def _values() -> Tensor:
    """Rows whose sizes differ by far: only a scale of their own fits them."""
    torch.manual_seed(0)
    return (torch.rand(8, 64) * 2 - 1) * torch.tensor([1.0, 10, 100, 1, 0.1, 5, 50, 2]).unsqueeze(1)


def _coarse(scale: Tensor, axis: int, group: int, form: str = "int8", zero: Tensor | None = None) -> float | None:
    x = _values()
    program = graphopt.capture(Rounded(scale, axis, group, form, zero), (x,))
    return coarseness(_last(program), x, program.run([x])[0])


CASES = {
    "tensor": (lambda x: x.abs().amax() / 127.5, 0, 0),
    "channel": (lambda x: x.abs().amax(1) / 127.5, 0, 0),
    "group": (lambda x: x.reshape(8, 4, 16).abs().amax(2) / 127.5, 1, 16),
    "token": (lambda x: x.abs().amax(1, keepdim=True) / 127.5, 1, -1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("times", [1.0, 8.0])
def test_a_scale_is_as_coarse_as_it_is_off(name: str, times: float) -> None:
    make, axis, group = CASES[name]
    found = _coarse(make(_values()) * times, axis, group)
    # Of a tensor as a whole: rows far below a step are rounded to zero, which costs less than a step would.
    assert found == pytest.approx(times, rel=0.25 if name == "tensor" else 0.15)


def test_a_range_that_cuts_off_is_coarse_too() -> None:
    found = _coarse(CASES["channel"][0](_values()) / 8, 0, 0)
    assert found is not None and found > 20


def test_an_unsigned_grid_is_judged_by_the_range_from_its_least_value() -> None:
    x = _values()
    scale = (x.amax() - x.amin()) / 255
    assert _coarse(scale, 0, 0, "uint8", torch.round(-x.amin() / scale).to(torch.uint8)) == pytest.approx(1, rel=0.1)


def test_what_is_no_such_rounding_has_no_coarseness() -> None:
    x = _values()
    plain = graphopt.capture(nn.ReLU(), (x,))
    assert coarseness(_last(plain), x, x) is None
    wide = graphopt.capture(Rounded(torch.tensor(1e-6), 0, 0, "int32"), (x,))
    assert coarseness(_last(wide), x, x) is None
    program = graphopt.capture(Rounded(torch.tensor(1.0), 0, 0, "int8"), (x,))
    last = _last(program)
    assert coarseness(last, x[:0], x[:0]) is None
    assert coarseness(last, x, x[:, :4]) is None
    assert coarseness(last, torch.full_like(x, math.nan), x) is None
    assert coarseness(last, x, x) == 0.0
    assert coarseness(last, torch.zeros_like(x), x) == math.inf
