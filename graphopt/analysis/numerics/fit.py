"""How well a rounding fits what it rounds.

    coarseness   √(mean square error of a rounding / that of its format with a range fitted to the values)

A uniform step Δ leaves Δ²/12 where nothing is clipped, and the fitted one is the range of the values over the number of
steps, for each channel, group or token that has a scale of its own. Around 1 all is well: a range that leaves out
outliers is below it, a range for more data than this a little above. A scale that is off by eight is at 8, one that is
too small, so that values are cut off, as high as it may be.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.arguments import arguments, operator
from graphopt.quantization.grids import IntegerGrid, grid

_MOST_BITS = 16  # a 32-bit bias has the scale of a product, not one of its own


def coarseness(rounded: fx.Node, exact: Tensor, made: Tensor) -> float | None:
    """Return how coarse the rounding that node `rounded` reads is for the values `exact`, which it made `made`.

    None where it is no rounding to integers, or where there is nothing to round.
    """
    node = dequantize_of(rounded)
    if node is None:
        return None
    named = arguments(node)
    form = grid(str(named["format"]))
    if not isinstance(form, IntegerGrid) or form.bits > _MOST_BITS or exact.numel() == 0 or exact.shape != made.shape:
        return None
    codes, scale = (named[each].meta["val"] for each in ("codes", "scale"))
    shape = [int(size) for size in codes.shape] if node is not rounded else list(exact.shape)
    if math.prod(shape) != exact.numel() or not bool(exact.isfinite().all()):
        return None
    values = exact.detach().double().reshape(shape)
    low, high = _ends(values, named["axis"], named["group_size"], scale.dim() > 0)
    reach = 2 * torch.maximum(-low, high) if form.signed else high.clamp(min=0) - low.clamp(max=0)
    fitted = float((reach / (form.code_max - form.code_min)).square().mean()) / 12
    found = float((made.detach().double().reshape(shape) - values).square().mean())
    if found == 0:
        return 0.0
    return math.sqrt(found / fitted) if fitted > 0 else math.inf


def dequantize_of(node: Any) -> fx.Node | None:
    """Return the dequantize that a value comes from, perhaps in another shape; None where there is none."""
    while isinstance(node, fx.Node) and operator(node) in ("view", "reshape") and node.args:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and operator(node) == "graphopt.dequantize" else None


def _ends(values: Tensor, axis: int, group: int, channels: bool) -> tuple[Tensor, Tensor]:
    """Return the least and the largest of the values that share a scale."""
    if group == 0:
        others = [each for each in range(values.dim()) if each != axis % values.dim()] if channels else None
        if others is None:
            return values.amin(), values.amax()
        return (values.amin(others), values.amax(others)) if others else (values, values)
    blocks = torch.split(values, values.shape[axis] if group < 0 else group, axis)
    return tuple(torch.cat([end(each, axis, True) for each in blocks], axis) for end in (torch.amin, torch.amax))  # type: ignore[return-value]
