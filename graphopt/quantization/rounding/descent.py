"""Go on from a rounded weight, one coordinate at a time; the cost never rises.

    code      q_k <- nearest(q_k + (H e)_k / H_kk)                              every input after the other
    scale     s_g <- s_g + <u_g, (H e)_g> / <u_g, H_gg u_g>                      u: codes less zero point, e = w - q
    table     t_l <- t_l + <1_l, H e> / <1_l, H 1_l>                             1_l: where the code is l

Each is the exact minimum in its coordinate of the cost (w - q)^T H (w - q), on the grid for codes, and along a line for
scales and entries of tables. Alternating codes and tables is LNQ of "GuidedQuant: Large Language Model Quantization via
Exploiting End Loss Guidance"; its closed form for a whole table is what the steps for its entries converge to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.quantization.coding import Coding, Form, stored_scale

_BLOCK = 64


def objective(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    """Return (w - q)^T H (w - q) of every channel, float64 [P, R]."""
    error = (weight - rounded).double()
    return (error * (gram.double() @ error)).sum(1)


def descend(
    weight: Tensor,
    rounded: Tensor,
    gram: Tensor,
    coding: Coding,
    kept: Tensor | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """Return Q [P, K, R] after one sweep over all inputs: each code is the best one while the others stay.

    Args as in `round_with_feedback`; inputs that are kept take their best real value, and so do weights that are free.
    """
    gram = gram.to(weight.dtype)
    rounded = rounded.clone()
    inputs = weight.shape[1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    error = weight - rounded
    for first in range(0, inputs, _BLOCK):
        here = slice(first, min(first + _BLOCK, inputs))
        pull, inner = gram[:, here] @ error, gram[:, here, here]  # H e as it was before this block
        nearest = coding.by_input(here)
        moved = torch.zeros_like(pull)
        for i, (before, slope) in enumerate(zip(rounded[:, here].unbind(1), diagonal[:, here].unbind(1), strict=True)):
            now = torch.baddbmm(pull[:, i : i + 1], inner[:, i : i + 1, :i], moved[:, :i])[:, 0]
            wanted = torch.addcdiv(before, now, slope)
            value = wanted if kept is not None and bool(kept[first + i]) else nearest(i, wanted)
            if free is not None:
                value = torch.where(free[:, first + i], wanted, value)
            torch.sub(before, value, out=moved[:, i])
            before.copy_(value)
        error[:, here] += moved
    return rounded


def refit_scales(
    weight: Tensor,
    rounded: Tensor,
    gram: Tensor,
    coding: Coding,
    form: Form,
    loose: Tensor | None = None,
) -> tuple[Tensor, Coding]:
    """Return Q and a coding with every group's best scale for its codes, group after group.

    A scale that is stored in few digits is taken where it lowers the cost still. `loose` bool [P, K, R] are weights
    that no scale holds (kept inputs, free weights). Formats whose scales are rounded together keep theirs.
    """
    if not coding.grid.scales_alone or form.group < 0:
        return rounded, coding
    gram = gram.to(weight.dtype)
    scale, zero = coding.scale.clone(), coding.zero_point
    rounded, error = rounded.clone(), weight - rounded
    for number in range(scale.shape[1]):
        (here,) = torch.nonzero(coding.groups == number, as_tuple=True)
        first, last = int(here[0]), int(here[-1]) + 1
        group = slice(first, last)  # groups are runs of inputs
        old = scale[:, number : number + 1]
        units = rounded[:, group] / old
        if loose is not None:
            units = torch.where(loose[:, group], 0.0, units)
        pull = gram[:, group] @ error
        curvature = (units * (gram[:, group, group] @ units)).sum(1, keepdim=True)
        slope = (units * pull).sum(1, keepdim=True)
        step = torch.where(curvature > 0, slope / curvature.clamp(min=1e-30), 0.0)
        new = old + step
        new = torch.where(new > 0, new, old)
        new = stored_scale(new, form.grid, form.half_scales)
        moved = new - old
        # cost(old) - cost(new) = 2 moved slope - moved^2 curvature: rounding the scale must not have spoiled it.
        gained = 2 * moved * slope - moved * moved * curvature
        moved = torch.where((gained > 0) & (new > 0), moved, 0.0)
        scale[:, number : number + 1] = torch.where(moved != 0, new, old)
        rounded[:, group] += moved * units
        error[:, group] -= moved * units
    return rounded, Coding(coding.grid, coding.groups, scale, zero, coding.table)


def refit_table(
    weight: Tensor, rounded: Tensor, gram: Tensor, coding: Coding, loose: Tensor | None = None
) -> tuple[Tensor, Coding]:
    """Return Q and a coding with each entry of the tables at its best, entry after entry, for the codes as they are.

    Entries are used as float16, as they are counted; a table stays ascending, or its entry stays.
    """
    assert coding.table is not None
    gram = gram.to(weight.dtype)
    codes = coding.codes(rounded).mT  # [P, K, R]
    scale, _ = coding.of()
    table = coding.table.clone()
    error = weight - rounded
    rounded = rounded.clone()
    for level in range(table.shape[-1]):
        members = (codes == level).to(weight.dtype) * scale
        if loose is not None:
            members = torch.where(loose, 0.0, members)
        pulled = gram @ members
        curvature, slope = (members * pulled).sum(1), (error * pulled).sum(1)  # [P, R]
        old = table[..., level]
        new = (old + torch.where(curvature > 0, slope / curvature.clamp(min=1e-30), 0.0)).half().to(old.dtype)
        moved = new - old
        ordered = torch.ones_like(moved, dtype=torch.bool)
        if level > 0:
            ordered &= new >= table[..., level - 1]
        if level + 1 < table.shape[-1]:
            ordered &= new <= table[..., level + 1]
        moved = torch.where((2 * moved * slope - moved * moved * curvature > 0) & ordered, moved, 0.0)
        table[..., level] = torch.where(moved != 0, new, old)
        change = moved.unsqueeze(1) * members
        rounded += change
        error -= change
    return rounded, coding.with_table(table)
