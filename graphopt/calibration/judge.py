"""How far a changed program's outputs are from the original's, over some calibration data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.calibration.batches import Batches, running
from graphopt.ir.program import Program

_SQUARES = 0.1  # what the squared error counts beside the divergence: what is no logits must stay, too


def divergence(made: Tensor, target: Tensor) -> Tensor:
    """Return the sum over rows of KL(softmax target || softmax made); what the target masks counts nothing.

    As sum p (log p - log q) = sum p (e^d - 1 - d), d = log q - log p, whose terms are never negative: what differs by a
    millionth still has a divergence in float32.
    """
    expected, found = (functional.log_softmax(each.float(), -1) for each in (target, made))
    if not bool(expected.isfinite().all()):
        return torch.where(expected.isfinite(), expected.exp() * (expected - found), 0.0).sum()
    chance, more = expected.exp(), found - expected
    near = more < 1
    small = torch.where(near, more, 0.0)
    return torch.where(near, chance * (small.expm1() - small), found.exp() - chance - chance * more).sum()


class Judge:
    """Compares programs with one whose outputs it keeps.

    Args:
        program: the original.
        batches: the data. count: how many of its batches are used, at most.
    """

    def __init__(self, program: Program, batches: Batches, count: int) -> None:
        self._batches = batches.first(count)
        self._targets = targets_of(program, self._batches)

    @classmethod
    def of(cls, batches: Sequence[list[Any]], targets: Sequence[list[Tensor]]) -> Judge:
        """Return a judge for outputs that are known, as `targets_of` gives them."""
        made = cls.__new__(cls)
        made._batches, made._targets = list(batches), list(targets)
        return made

    def __call__(self, program: Program) -> float:
        """Return the mean over outputs of KL a row, in nats, and a tenth of the squared error relative to the target's.

        Outputs whose last axis has one coordinate have no divergence. Infinity where an output is not finite.
        """
        return self._over(program, range(len(self._batches)))

    def piece(self, program: Program, index: int) -> float:
        """Return the same over one batch."""
        return self._over(program, [index])

    @torch.no_grad()
    def effect(self, program: Program, index: int, rows: int) -> Tensor:
        """Return what a program changes in the outputs of a batch, as a vector of `effect`, over all outputs."""
        with running(index):
            outputs = _floating(program.run(self._batches[index]))
        each = [effect(made, target, rows) for made, target in zip(outputs, self._targets[index], strict=True)]
        return torch.cat(each) / math.sqrt(max(len(each), 1))

    @torch.no_grad()
    def _over(self, program: Program, indices: Sequence[int]) -> float:
        total = [[0.0, 0, 0.0, 0.0] for _ in self._targets[0]]
        for index in indices:
            with running(index):
                outputs = _floating(program.run(self._batches[index]))
            for sums, made, target in zip(total, outputs, self._targets[index], strict=True):
                finite = target.isfinite()
                if not bool(made[finite].isfinite().all()):
                    return float("inf")
                if target.dim() and target.shape[-1] > 1:
                    sums[0] += float(divergence(made, target))
                    sums[1] += target.shape[:-1].numel()
                sums[2] += float(torch.where(finite, made - target, 0.0).double().square().sum())
                sums[3] += float(torch.where(finite, target, 0.0).double().square().sum())
        each = [kl / max(rows, 1) + _SQUARES * error / max(square, 1e-300) for kl, rows, error, square in total]
        return sum(each) / max(len(each), 1)


def effect(made: Tensor, target: Tensor, rows: int) -> Tensor:
    """Return a vector z with |z|^2 near to what `Judge` finds, where outputs differ little.

    Of the divergence that is its second order: half the variance of the difference under softmax(target). For two
    changes with vectors z and z', 2 <z, z'> is therefore what both lose together beyond the sum, as long as their
    effects add up. At most `rows` rows are looked at, evenly chosen.
    """
    classes = target.dim() > 0 and target.shape[-1] > 1
    if classes:
        made, target = _some(made, rows), _some(target, rows)
    whole = target.isfinite()
    moved = torch.where(whole, made - target, 0.0).double()
    square = torch.where(whole, target, 0.0).double().square().sum().clamp(min=1e-300)
    found = [((_SQUARES / square).sqrt() * moved).flatten()]
    if classes:
        chance = target.double().softmax(-1)
        moved = moved - (chance * moved).sum(-1, keepdim=True)
        found.append(((chance / (2 * max(len(moved), 1))).sqrt() * moved).flatten())
    return torch.cat(found)


def _some(value: Tensor, rows: int) -> Tensor:
    """Return at most so many rows of a value, evenly chosen, [rows, C]."""
    flat = value.reshape(-1, value.shape[-1])
    return flat[torch.linspace(0, len(flat) - 1, min(rows, len(flat))).long()]


@torch.no_grad()
def targets_of(program: Program, batches: Sequence[list[Any]]) -> list[list[Tensor]]:
    """Return a program's floating outputs on some batches."""
    found = []
    for index, flat in enumerate(batches):
        with running(index):
            found.append(_floating(program.run(flat)))
    return found


def _floating(outputs: Sequence[Any]) -> list[Tensor]:
    return [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
