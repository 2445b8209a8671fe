"""What kernels read besides activations, as arrays in the order in which lanes read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graphopt.backends.cuda.layouts import TILE
from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan


class Bytes(NamedTuple):
    """What a product of bytes reads: codes x [..., k] with a scale and maybe a zero point for each token or for all."""

    x: Tensor
    x_scale: Tensor
    x_zero_point: Tensor | None
    weights: Tensor
    scales: Tensor
    row_sums: Tensor | None


def sizes(plan: LinearPlan | DequantizePlan | Int8Plan) -> dict[str, int]:
    """Return how many elements the packed arrays of a plan have, by name."""
    if isinstance(plan, Int8Plan):
        found = {"weights": plan.layout.tiles * plan.layout.chunks * 256, "scales": plan.n}
        return {**found, "row_sums": plan.n} if plan.zero_points else found
    places = plan.layout.tiles * plan.groups * 8  # two rows each
    found = {"weights": plan.layout.total_words, "scales": places * (2 if plan.scale_dtype == "float32" else 1)}
    return {**found, "zeros": places} if plan.zero_points else found


def pack_linear(
    plan: LinearPlan | DequantizePlan,
    codes: NDArray[Any],
    scale: NDArray[np.float32],
    zero_point: NDArray[Any] | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the arrays `weights`, `scales` and, where the plan has them, `zeros`.

    codes: [n, k], from 0 to 2**bits - 1. scale, zero_point: [n, groups of k]; zero points are codes.
    """
    layout = plan.layout
    fill: NDArray[Any] | int = 1 << (plan.bits - 1)
    if zero_point is not None:
        width = layout.padded_k // plan.groups
        fill = np.repeat(_filled(zero_point, plan.groups), width, axis=1)
    packed: dict[str, NDArray[Any]] = {"weights": layout.pack(codes, fill)}
    scales = _by_tile(_filled(scale, plan.groups).astype(plan.scale_dtype), layout.tiles)
    packed["scales"] = scales.view(np.uint32).reshape(-1)
    if zero_point is not None:
        zeros = _by_tile(_filled(zero_point, plan.groups).astype(np.uint8), layout.tiles)
        packed["zeros"] = zeros.view(np.uint16).reshape(-1)
    return packed


def pack_int8(plan: Int8Plan, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Return the arrays `weights`, `scales` and, where the plan has zero points, `row_sums`.

    codes: [n, k]. scale: [n].
    """
    packed: dict[str, NDArray[Any]] = {"weights": plan.layout.pack(codes), "scales": scale.view(np.uint32)}
    if plan.zero_points:
        packed["row_sums"] = codes.sum(axis=1, dtype=np.int32).view(np.uint32)
    return packed


def _filled(values: NDArray[Any], groups: int) -> NDArray[Any]:
    """Return [n, groups], the last column repeated where units hold more groups than the inputs make."""
    return np.pad(values, ((0, 0), (0, groups - values.shape[1])), mode="edge")


def _by_tile(values: NDArray[Any], tiles: int) -> NDArray[Any]:
    """Return [n, groups] as [tiles, groups, 8, 2]: what a lane needs of its two rows lies side by side."""
    rows = np.zeros((tiles * TILE, values.shape[1]), values.dtype)
    rows[: len(values)] = values
    return np.ascontiguousarray(rows.reshape(tiles, 2, 8, -1).transpose(0, 3, 2, 1))


def unpack_linear(
    plan: LinearPlan | DequantizePlan,
    weights: NDArray[np.uint32],
    scales: NDArray[np.uint32],
    zeros: NDArray[np.uint16] | None,
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[Any] | None]:
    """Return codes [n, padded_k], scale and zero point [n, groups] of what `pack_linear` gave."""
    layout = plan.layout
    scale = _by_row(scales.view(plan.scale_dtype), plan).astype(np.float32)
    return layout.unpack(weights), scale, None if zeros is None else _by_row(zeros.view(np.uint8), plan)


def _by_row(values: NDArray[Any], plan: LinearPlan | DequantizePlan) -> NDArray[Any]:
    """Inverse of `_by_tile`."""
    shaped = values.reshape(plan.layout.tiles, plan.groups, 8, 2)
    return shaped.transpose(0, 3, 2, 1).reshape(-1, plan.groups)[: plan.n]


def paired_rows(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Return rows of two matrices in eights, alternately, as a paired plan takes them."""
    eights = [each.reshape(-1, 8, *each.shape[1:]) for each in (first, second)]
    return np.stack(eights, axis=1).reshape(-1, *first.shape[1:])


def pack_signs(minus: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return a bit for each element of a row [n], set for minus, eight to a byte from below."""
    return np.packbits(minus, bitorder="little")
