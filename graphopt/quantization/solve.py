"""Quantize one weight matrix by a choice from each column: grid, range, objective, rounding, side information.

    W  ~  Q + K + S + A B          Q on the grid; K some inputs, S some single weights, A B of low rank, all in float16

    columns    the inputs with the largest  H_kk |W_k - nearest(W_k)|^2  keep their weights ("OWQ: Outlier-Aware Weight
               Quantization for Efficient Fine-Tuning and Inference of Large Language Models")
    outliers   the single weights with the largest  H_kk (w - nearest(w))^2  keep theirs
    rank       A B = argmin tr (W - Q - A B)^T H (W - Q - A B): the leading singular vectors of S (W - Q), H = S^T S, in
               turns with Q ("LQER: Low-Rank Quantization Error Reconstruction for LLMs", whose S is diagonal)

With `outputs`, G, errors of different output channels are weighed against each other too: the cost is tr G E^T H E, the
loss's curvature as a Kronecker product ("Model-Preserving Adaptive Rounding").

The rest of the weight is rounded knowing what is kept. Sweeps of coordinate descent follow, each over codes and then
over scales or tables, until they gain nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from graphopt.quantization.codebooks import learned_table
from graphopt.quantization.coding import Coding, Form, fit
from graphopt.quantization.objectives import Gram
from graphopt.quantization.rounding import (
    descend,
    objective,
    prepare,
    refit_scales,
    refit_table,
    round_with_feedback,
)
from graphopt.quantization.rounding.adaround import learned_rounding
from graphopt.quantization.rounding.gptq import Order, Prepared, feedback

Rounding = Literal["nearest", "gptq", "adaround"]
_TURNS = 2  # of quantizing and low rank: the second gains a little, a third next to nothing
_GAIN = 1e-4  # relative: a sweep that gains less is the last
_TURNS_OF_CHANNELS = 16  # more gain a little, and take as much longer
_LEAST_CHANNELS, _MOST_CHANNELS = 4, 128  # rounded together
_OUTPUT_DAMPING = 0.1  # of the mean of the diagonal: the gradients of some batches know no more
_INDEX_BITS = 32  # of an outlier's place, and of an input that is kept


@dataclass(frozen=True)
class Choices:
    """What is to be done with a matrix.

    Attributes:
        form: grid, groups and range.
        rounding: nearest, gptq (round_with_feedback), or adaround (learned_rounding).
        order: of the inputs, for gptq.
        local_ranges: fit the range of a group when gptq reaches it, to its weights as corrected by then.
        sweeps: rounds of coordinate descent at most.
        columns: inputs kept, as a share of all.
        outliers: single weights kept, as a share of all.
        rank: of the correction.
        damping: added to the diagonal of H at least, relative to its mean; more where inputs are few (`Gram.damped`).
        spread: the exponent p of the weights with which a codebook is learned.
    """

    form: Form
    rounding: Rounding = "nearest"
    order: Order = "activation"
    local_ranges: bool = True
    sweeps: int = 0
    columns: float = 0.0
    outliers: float = 0.0
    rank: int = 0
    damping: float = 0.01
    spread: float = 1.0


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Attributes:
        codes: [P, R, K] in the grid's storage.
        coding: scales, zero points, tables.
        columns: inputs that are kept, int64 [k], and
        column_values: what they add to the codes' values, [P, k, R].
        outliers: what single weights add, [P, K, R], zero elsewhere; None without.
        left, right: A [P, K, r] and B [P, r, R] of the correction; None without.
    """

    codes: Tensor
    coding: Coding
    columns: Tensor
    column_values: Tensor
    outliers: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def coded(self) -> Tensor:
        """Return the values of the codes alone, [P, K, R]."""
        scale, zero = self.coding.of()
        inputs_first = self.codes.mT
        if self.coding.table is None:
            whole = None if zero is None else zero.to(torch.int32)
            return self.coding.grid.decode(inputs_first, scale, whole)
        table = self.coding.table
        return table.gather(-1, self.codes.to(torch.int64)).mT * scale

    def value(self) -> Tensor:
        """Return everything together, [P, K, R]."""
        whole = self.coded()
        whole[:, self.columns] += self.column_values
        if self.outliers is not None:
            whole = whole + self.outliers
        if self.left is not None and self.right is not None:
            whole = whole + self.left @ self.right
        return whole

    @property
    def single_scale(self) -> bool:
        """Whether one scale, and one zero point, serve everything."""
        coding = self.coding
        if coding.grid.block or coding.scale.shape[1] != 1 or not coding.scale.numel():
            return False
        found = [coding.scale] + ([] if coding.zero_point is None else [coding.zero_point])
        return all(bool((each == each.flatten()[0]).all()) for each in found)

    def file_bits(self, code_bits: Sequence[int]) -> float:
        """Return the bits in a file whose codes take one of some sizes; scales and tables take 32 bits a number."""
        grid, scale = self.coding.grid, self.coding.scale
        each = min((size for size in code_bits if size >= grid.bits), default=8 * self.codes.element_size())
        count = 1 if self.single_scale else scale.numel()
        zeros = 0 if self.coding.zero_point is None else count * each
        table = 0 if self.coding.table is None else 32 * self.coding.table.numel()
        return self.codes.numel() * each + 32.0 * count + zeros + table + self._bits_beside()

    def bits(self) -> float:
        """Return the bits of everything: codes, scales, zero points, tables, and 16 for each number in float16."""
        grid, scale = self.coding.grid, self.coding.scale
        total = grid.packed_bits(self.codes.numel())
        half = bool(torch.equal(scale.half().to(scale.dtype), scale))
        count = 1 if self.single_scale else scale.numel()
        total += count * (grid.scale_bits or (16 if half else 32))
        if self.coding.zero_point is not None:
            total += count * grid.bits
        if self.coding.table is not None:
            total += 16 * self.coding.table.numel()
        return float(total + self._bits_beside())

    def _bits_beside(self) -> int:
        """Return the bits of what is kept beside codes."""
        total = self.column_values.numel() * 16 + len(self.columns) * _INDEX_BITS
        if self.outliers is not None:
            total += int((self.outliers != 0).sum()) * (16 + _INDEX_BITS)
        if self.left is not None and self.right is not None:
            total += 16 * (self.left.numel() + self.right.numel())
        return total


def quantize_matrix(
    weight: Tensor, choices: Choices, gram: Gram | None = None, outputs: Tensor | None = None
) -> Quantized:
    """Return W [P, K, R] quantized; without a Gram matrix every input counts alike.

    `outputs` [R, R] says how errors of the output channels add up in the loss (the second moment of its gradients by
    them); without it each channel stands alone. So it does where there are parts, and where scales of several channels
    hang together.

    Computed in float32, in float64 where W is; factorizations always in float64.
    """
    parts, inputs, channels = weight.shape
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) if weight.dtype != torch.float64 else weight
    if gram is not None and gram.count > 0:
        hessian = gram.damped(choices.damping)
        weight = gram.target(weight, choices.damping)
    else:
        hessian = torch.eye(inputs, dtype=torch.float64).expand(parts, inputs, inputs)
    if parts > 1 or choices.form.group < 0 or not choices.form.grid.scales_alone:
        outputs = None
    left = right = None
    if choices.rank:
        left, right = weight.new_zeros(parts, inputs, 1), weight.new_zeros(parts, 1, channels)
    for _ in range(_TURNS if choices.rank else 1):
        rest = weight if left is None or right is None else weight - left @ right
        rounded, coding, kept, free = _quantized(rest, hessian, choices, gram is not None, outputs)
        if choices.rank:
            left, right = _low_rank(weight - rounded, hessian, choices.rank)
    codes = coding.codes(rounded)
    made = Quantized(codes, coding, torch.nonzero(kept).flatten(), weight.new_zeros(parts, int(kept.sum()), channels))
    rest = rounded - made.coded()
    column_values = _half(rest[:, kept])
    outliers = _half(torch.where(free, rest, 0.0)) if free is not None else None
    return Quantized(codes, coding, made.columns, column_values, outliers, left, right)


def relative_error(weight: Tensor, quantized: Quantized, gram: Gram | None = None) -> float:
    """Return the cost of the error over that of losing the weight altogether; 0 where that is 0."""
    hessian = None if gram is None or gram.count == 0 else gram.mean
    value = quantized.value().to(weight.dtype)
    if hessian is None:
        cost, whole = (weight - value).double().square().sum(), weight.double().square().sum()
    else:
        cost, whole = (objective(weight, each, hessian).sum() for each in (value, torch.zeros_like(weight)))
    return float(cost / whole) if whole > 0 else 0.0


@dataclass(frozen=True)
class _Site:
    """What is known of a matrix before any of its channels is rounded.

    Attributes:
        hessian: H [P, K, K] float64, and single: the same in the weight's dtype.
        kept: inputs that are kept, bool [K]; prepared: for gptq.
        informed: whether H says anything.
    """

    choices: Choices
    hessian: Tensor
    single: Tensor
    kept: Tensor
    prepared: Prepared | None
    informed: bool

    @property
    def some_kept(self) -> Tensor | None:
        return self.kept if bool(self.kept.any()) else None


def _quantized(
    weight: Tensor, hessian: Tensor, choices: Choices, informed: bool, outputs: Tensor | None
) -> tuple[Tensor, Coding, Tensor, Tensor | None]:
    """Return Q, its coding, the inputs that are kept and the weights that are free."""
    kept, free = _exceptions(weight, hessian, choices)
    form, prepared = choices.form, None
    if choices.rounding == "gptq" and informed:
        some = kept if bool(kept.any()) else None
        groups = form.groups(weight.shape[1])
        prepared = prepare(hessian, groups, choices.order, weight.dtype, _local(weight, choices), some)
    site = _Site(choices, hessian, hessian.to(weight.dtype), kept, prepared, informed)
    if outputs is None:
        return (*_rounded(weight, site, free), kept, free)
    return (*_channels_in_turn(weight, site, free, outputs), kept, free)


def _local(weight: Tensor, choices: Choices) -> bool:
    """Return whether ranges are fitted when rounding reaches their group."""
    grid = choices.form.grid
    several = 0 < choices.form.group < weight.shape[1]
    return choices.local_ranges and several and grid.scales_alone and not grid.tabled


def _channels_in_turn(
    weight: Tensor, site: _Site, free: Tensor | None, outputs: Tensor
) -> tuple[Tensor, Coding]:
    """Round some output channels after the others, each for what the errors before it have done to the loss.

    With G = M^T D M over the channels, as over the inputs in GPTQ,

        tr G E^T H E  =  sum_r d_r |e_r + sum_{s<r} M_rs e_s|_H^2        so channel r is rounded for w_r + sum M_rs e_s
    """
    mean = outputs.diagonal().mean()
    damped_outputs = outputs / mean + _OUTPUT_DAMPING * torch.eye(len(outputs), dtype=outputs.dtype)
    order = torch.argsort(damped_outputs.diagonal(), descending=True, stable=True)
    factor = feedback(damped_outputs[order][:, order][None])[0].to(weight.dtype)
    weight, free = weight[..., order], None if free is None else free[..., order]
    rounded, error, codings = torch.empty_like(weight), torch.zeros_like(weight), []
    together = min(max(len(order) // _TURNS_OF_CHANNELS, _LEAST_CHANNELS), _MOST_CHANNELS)
    for first in range(0, len(order), together):
        here = slice(first, min(first + together, len(order)))
        target = weight[..., here] + error[..., :first] @ factor[here, :first].mT
        rounded[..., here], coding = _rounded(target, site, None if free is None else free[..., here])
        error[..., here] = weight[..., here] - rounded[..., here]
        codings.append(coding)
    back = torch.argsort(order)
    zeros = [each.zero_point for each in codings if each.zero_point is not None]
    tables = [each.table for each in codings if each.table is not None]
    return rounded[..., back], Coding(
        codings[0].grid,
        codings[0].groups,
        torch.cat([each.scale for each in codings], -1)[..., back],
        torch.cat(zeros, -1)[..., back] if zeros else None,
        torch.cat(tables, 1)[:, back] if tables else None,
    )


def _rounded(weight: Tensor, site: _Site, free: Tensor | None) -> tuple[Tensor, Coding]:
    """Return Q and its coding for channels that are rounded together."""
    choices, form = site.choices, site.choices.form
    diagonal = site.hessian.diagonal(dim1=-2, dim2=-1)
    loose = None if site.some_kept is None and free is None else _loose(weight, site.kept, free)
    # What is kept does not widen the ranges of the rest.
    coding = _fitted(weight if loose is None else torch.where(loose, 0.0, weight), site.hessian, choices)
    if site.prepared is not None:

        def refit(block: Tensor, which: Tensor) -> tuple[Tensor, Tensor | None]:
            inner = block if free is None else torch.where(free[:, which], 0.0, block)
            local = fit(inner, form, diagonal[:, which])  # no more inputs than a group has
            return local.scale, local.zero_point

        local = _local(weight, choices)
        rounded, coding = round_with_feedback(weight, site.prepared, coding, refit if local else None, free)
    else:
        learned = choices.rounding == "adaround" and site.informed
        rounded = learned_rounding(weight, site.hessian, coding) if learned else coding.nearest(weight)
        rounded = rounded if loose is None else torch.where(loose, weight, rounded)
    if choices.sweeps and site.informed:
        rounded, coding = _swept(weight, rounded, coding, site, free)
    return rounded, coding


def _loose(weight: Tensor, kept: Tensor, free: Tensor | None) -> Tensor:
    """Return bool [P, K, R]: the weights that no code has to hold."""
    columns = kept[:, None].expand(weight.shape)
    return columns if free is None else free | columns


def _swept(
    weight: Tensor, rounded: Tensor, coding: Coding, site: _Site, free: Tensor | None
) -> tuple[Tensor, Coding]:
    """Sweep until nothing is gained."""
    kept, gram = site.some_kept, site.single
    loose = None if kept is None and free is None else _loose(weight, site.kept, free)
    cost = float(objective(weight, rounded, site.hessian).sum())
    for _ in range(site.choices.sweeps):
        if coding.table is not None:
            new, new_coding = refit_table(weight, rounded, gram, coding, loose)
        else:
            new, new_coding = refit_scales(weight, rounded, gram, coding, site.choices.form, loose)
        new = descend(weight, new, gram, new_coding, kept, free)
        now = float(objective(weight, new, site.hessian).sum())
        if not now < cost:
            break  # what is left is the rounding of float32
        rounded, coding, gained, cost = new, new_coding, cost - now, now
        if gained < _GAIN * cost:
            break
    return rounded, coding


def _fitted(weight: Tensor, hessian: Tensor, choices: Choices) -> Coding:
    """Return scales and zero points, or learned tables at scale 1."""
    coding = fit(weight, choices.form, hessian.diagonal(dim1=-2, dim2=-1))
    if not choices.form.grid.tabled:
        return coding
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).diagonal(dim1=-2, dim2=-1)
    table = learned_table(weight, inverse.reciprocal() ** choices.spread, choices.form.grid.code_max + 1)
    return coding.with_scale(torch.ones_like(coding.scale)).with_table(table)


def _exceptions(weight: Tensor, hessian: Tensor, choices: Choices) -> tuple[Tensor, Tensor | None]:
    """Return the inputs that are kept, bool [K], and the weights that are, bool [P, K, R] or None.

    Errors are those under ranges that clip: where the largest weight sets the range it has no error itself.
    """
    inputs = weight.shape[1]
    kept = torch.zeros(inputs, dtype=torch.bool)
    if not choices.columns and not choices.outliers:
        return kept, None
    coding = _fitted(weight, hessian, replace(choices, form=replace(choices.form, range="mse")))
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).to(weight.dtype)
    cost = (weight - coding.nearest(weight)).square() * diagonal.unsqueeze(-1)
    if choices.columns:
        count = min(max(round(choices.columns * inputs), 1), inputs)
        kept[cost.sum((0, 2)).topk(count).indices] = True
    free = None
    if choices.outliers:
        cost = torch.where(kept[:, None], 0.0, cost)
        count = min(max(round(choices.outliers * cost.numel()), 1), cost.numel())
        free = torch.zeros(cost.numel(), dtype=torch.bool)
        free[cost.flatten().topk(count).indices] = True
        free = free.reshape(cost.shape)
    return kept, free


def _low_rank(error: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [P, K, r] and B [P, r, R], float16 values, that take most of an error's cost."""
    factor = torch.linalg.cholesky(hessian).mT  # H = S^T S
    u, s, v = torch.linalg.svd(factor @ error.double(), full_matrices=False)
    rank = min(rank, s.shape[-1])
    root = s[..., :rank].sqrt()
    left = torch.linalg.solve_triangular(factor, u[..., :rank] * root[:, None], upper=True)
    return _half(left).to(error.dtype), _half(root[..., None] * v[:, :rank]).to(error.dtype)


def _half(values: Tensor) -> Tensor:
    """Return values that float16 holds."""
    return values.to(torch.float16).to(values.dtype)
