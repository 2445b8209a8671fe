"""Round one input after the other, and let the inputs that follow make up for the error so far.

With H = M^T D M, M unit lower triangular, the cost of the errors e = w - q of a channel is

    e^T H e  =  sum_i d_i (e_i + sum_{j<i} M_ij e_j)^2          so          q_i = nearest(w_i + sum_{j<i} M_ij e_j)

makes every term as small as the choices before allow. That is GPTQ's solution ("GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers"), written with one factorization of H in the place of an inverse
and two ("The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm" has the equivalence). M comes from
a Cholesky factor of H with its rows and columns reversed.

Inputs are taken in blocks: what earlier blocks contribute is one matrix product, within a block one row follows the
other. The order decides: inputs that matter most are rounded first, while there is most left to make up for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphopt.quantization.coding import Coding

Order = Literal["given", "activation", "group"]
_BLOCK = 64


def input_order(gram: Tensor, groups: Tensor, order: Order) -> Tensor:
    """Return the inputs [K] in the order of rounding.

    activation: by falling diagonal of H, over all parts; group: groups by their largest entry, and within a group by
    each input's, so that the inputs of a group stay together.
    """
    inputs = gram.shape[-1]
    if order == "given" or inputs == 0:
        return torch.arange(inputs)
    diagonal = gram.diagonal(dim1=-2, dim2=-1).sum(0)
    if order == "activation":
        return torch.argsort(diagonal, descending=True, stable=True)
    count = int(groups.max()) + 1
    largest = torch.zeros(count, dtype=diagonal.dtype).scatter_reduce(0, groups, diagonal, "amax")
    by_group = torch.argsort(largest, descending=True, stable=True)
    rank = torch.empty_like(by_group)
    rank[by_group] = torch.arange(count)
    within = torch.argsort(diagonal, descending=True, stable=True)
    return within[torch.argsort(rank[groups[within]], stable=True)]


def feedback(gram: Tensor) -> Tensor:
    """Return M - I [P, K, K] for a positive H [P, K, K]: strictly lower triangular."""
    reversed_factor = torch.linalg.cholesky(gram.flip(-1, -2))
    factor = reversed_factor.flip(-1, -2).mT  # H = factor^T factor, lower triangular
    unit: Tensor = factor / factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return unit.tril_(-1)


@dataclass(frozen=True)
class Prepared:
    """What rounding needs of H alone, made once for all output channels.

    Attributes:
        steps: the inputs [K] in the order of rounding, those that are kept last.
        kept: bool [K], inputs that are not rounded at all, or None.
        factor: M - I [P, K, K] for inputs in that order.
    """

    steps: Tensor
    kept: Tensor | None
    factor: Tensor


def prepare(
    gram: Tensor, groups: Tensor, order: Order, dtype: torch.dtype, together: bool = False, kept: Tensor | None = None
) -> Prepared:
    """Factorize H [P, K, K], positive, for inputs of the given groups [K].

    With `together` the inputs of a group follow each other, whatever order is asked for: ranges fitted on the way need
    that.
    """
    steps = input_order(gram, groups, "group" if together and order == "activation" else order)
    if kept is not None:
        steps = torch.cat([steps[~kept[steps]], steps[kept[steps]]])
    return Prepared(steps, kept, feedback(gram[:, steps][:, :, steps]).to(dtype))


def round_with_feedback(
    weight: Tensor,
    prepared: Prepared,
    coding: Coding,
    refit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None = None,
    free: Tensor | None = None,
) -> tuple[Tensor, Coding]:
    """Return Q [P, K, R] on the grid of `coding`, and the coding.

    Args:
        weight: W [P, K, R].
        prepared: order and factor; with `refit`, made with `together`.
        coding: scales and zero points; where `refit` is given, its scales are replaced group by group.
        refit: gives scale and zero point [P, 1, R] of a group, for its weights as corrected so far [P, g, R], and which
            inputs these are [g].
        free: bool [P, K, R], single weights that are not rounded.

    The result holds weights as they are where their inputs are kept or they are free, corrected for the others' errors.
    """
    steps, kept, factor = prepared.steps, prepared.kept, prepared.factor
    weight, free = weight[:, steps], None if free is None else free[:, steps]
    groups, fixed = coding.groups[steps], None if kept is None else kept[steps]
    rounded, error = torch.empty_like(weight), torch.zeros_like(weight)
    scale, zero = coding.scale.clone(), None if coding.zero_point is None else coding.zero_point.clone()
    start = 0
    while start < len(steps):
        stop = _group_end(groups, fixed, start) if refit is not None else min(start + _BLOCK, len(steps))
        base = weight[:, start:stop] + factor[:, start:stop, :start] @ error[:, :start]
        if refit is not None and (fixed is None or not bool(fixed[start])):
            number = int(groups[start])
            new_scale, new_zero = refit(base, steps[start:stop])
            scale[:, number : number + 1] = new_scale
            if zero is not None and new_zero is not None:
                zero[:, number : number + 1] = new_zero
        now = Coding(coding.grid, groups, scale, zero, coding.table)
        for first in range(start, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            block = base[:, first - start : last - start]
            if first > start:
                block = block + factor[:, first:last, start:first] @ error[:, start:first]
            here = slice(first, last)
            rounded[:, here] = _rounded_block(
                block,
                weight[:, here],
                now,
                factor[:, here, here],
                here,
                None if fixed is None else fixed[here],
                None if free is None else free[:, here],
            )
            error[:, here] = weight[:, here] - rounded[:, here]
        start = stop
    back = torch.argsort(steps)
    return rounded[:, back], Coding(coding.grid, coding.groups, scale, zero, coding.table)


def _group_end(groups: Tensor, fixed: Tensor | None, start: int) -> int:
    """Return where the run of inputs that share a group, and are all kept or all not, ends."""
    stop = start + 1
    while stop < len(groups) and groups[stop] == groups[start] and (fixed is None or fixed[stop] == fixed[start]):
        stop += 1
    return stop


def _rounded_block(
    block: Tensor,
    weight: Tensor,
    coding: Coding,
    factor: Tensor,
    here: slice,
    fixed: Tensor | None,
    free: Tensor | None,
) -> Tensor:
    """Return what the inputs `here` are rounded to; `block` is their `weight` with the errors of all before it."""
    nearest = coding.by_input(here)
    error, values = torch.zeros_like(block), torch.empty_like(block)
    for i, plain in enumerate(weight.unbind(1)):
        row = torch.baddbmm(block[:, i : i + 1], factor[:, i : i + 1, :i], error[:, :i])[:, 0]
        value = row if fixed is not None and bool(fixed[i]) else nearest(i, row)
        if free is not None:
            value = torch.where(free[:, i], row, value)
        values[:, i] = value
        torch.sub(plain, value, out=error[:, i])
    return values
