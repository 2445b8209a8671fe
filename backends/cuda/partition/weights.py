"""Weights of few bits, read from a program as kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from graphopt.backends.cuda.layouts import BITS, chunk_for
from graphopt.backends.cuda.operands import paired_rows
from graphopt.ir import Program, arguments, operator
from graphopt.quantization.grids import IntegerGrid, grid


@dataclass(frozen=True)
class Weight:
    """A weight [n, k] of few bits.

    Attributes:
        codes: [n, k], from 0. bits: 2, 3, 4 or 8. group: inputs that share a scale; 0: all.
        scale: [n, groups]. zero_point: [n, groups], or None where the middle code stands for zero.
        source: names of the tensors that it was read from.
    """

    codes: NDArray[np.uint8]
    bits: Literal[2, 3, 4, 8]
    group: int
    scale: NDArray[np.float32]
    zero_point: NDArray[np.uint8] | None
    source: tuple[str, ...] = ()

    @property
    def form(self) -> tuple[Any, ...]:
        """What weights must share to be multiplied by one kernel."""
        return self.codes.shape[1], self.bits, self.group, self.zero_point is None, self.half_scales

    @property
    def half_scales(self) -> bool:
        with np.errstate(over="ignore"):
            return bool((self.scale.astype(np.float16).astype(np.float32) == self.scale).all())

    @property
    def bytes(self) -> bool:
        """Whether it is int8 with a scale for each row, and no zero points."""
        return self.bits == 8 and self.group == 0 and self.zero_point is None


def quantized_weight(program: Program, node: object) -> Weight | str:
    """Return what a node gives as a weight of few bits, or why it is none."""
    if operator(node) != "graphopt.dequantize":
        return "its weight is not quantized"
    assert isinstance(node, fx.Node)
    named = arguments(node)
    parts = [named["codes"], named["scale"], named["zero_point"]]
    if any(isinstance(each, fx.Node) and each.op != "get_attr" for each in parts):
        return "its weight is computed"
    form = grid(named["format"])
    if not isinstance(form, IntegerGrid) or form.bits > 8:
        return f"there is no kernel for weights in {form.name} yet"
    codes = program.weight(parts[0])
    if codes.dim() != 2 or not codes.numel():
        return f"its weight has the shape {list(codes.shape)}"
    group, axis = int(named["group_size"]), int(named["axis"]) % 2
    scale, zero = program.weight(parts[1]).detach().float(), parts[2]
    by_row = _by_row(scale, codes, axis, group)
    if by_row is None:
        return f"its scales {list(scale.shape)} lie along its outputs"
    bits = cast(Literal[2, 3, 4, 8], next(width for width in BITS if width >= form.bits))
    offset = 1 << (bits - 1) if form.code_min < 0 else 0
    shift = np.full_like(by_row, offset)
    if zero is not None:
        found = _by_row(program.weight(zero).float(), codes, axis, group)
        assert found is not None
        shift = shift + found
    if (shift < 0).any() or (shift >= 1 << bits).any():
        return "a zero point is none of its codes"
    whole = codes.numpy(force=True).astype(np.int16) + offset
    group = 0 if by_row.shape[1] == 1 else group
    if not chunk_for(bits, group):
        return f"groups of {group} inputs fit no fragment of the tensor cores"
    middle = bool((shift == 1 << (bits - 1)).all())
    source = tuple(str(each.target) for each in parts if each is not None)
    return Weight(whole.astype(np.uint8), bits, group, by_row, None if middle else shift.astype(np.uint8), source)


def _by_row(values: Tensor, codes: Tensor, axis: int, group: int) -> NDArray[np.float32] | None:
    """Return scales or zero points as [n, groups], or None where they are no such thing."""
    n = codes.shape[0]
    if group == 0:
        if values.dim() == 0:
            return np.full((n, 1), float(values), np.float32)
        return values.numpy(force=True)[:, None] if axis == 0 else None
    if axis == 0:
        return None
    return np.ascontiguousarray(values.expand(n, -1).numpy(force=True))


def stacked(weights: list[Weight]) -> Weight:
    """Return weights of one form, one above the other."""
    if len(weights) == 1:
        return weights[0]
    zeros = [each.zero_point for each in weights]
    return replace(
        weights[0],
        source=tuple(name for each in weights for name in each.source),
        codes=np.concatenate([each.codes for each in weights]),
        scale=np.concatenate([each.scale for each in weights]),
        zero_point=None if any(each is None for each in zeros) else np.concatenate(zeros),  # type: ignore[arg-type]
    )


def paired(first: Weight, second: Weight) -> Weight:
    """Return weights of one form, their rows in eights by turns."""
    zeros = [each.zero_point for each in (first, second)]
    return replace(
        first,
        source=("paired", *first.source, *second.source),
        codes=paired_rows(first.codes, second.codes),
        scale=paired_rows(first.scale, second.scale),
        zero_point=None if zeros[0] is None or zeros[1] is None else paired_rows(zeros[0], zeros[1]),
    )
