"""How far a changed program's outputs are from the original's, over some calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.calibration.batches import Batches, running
from graphopt.ir.program import Program

_SQUARES = 0.1  # what the squared error counts beside the divergence: what is no logits must stay, too


def divergence(made: Tensor, target: Tensor) -> Tensor:
    """Return the sum over rows of KL(softmax target || softmax made); what the target masks counts nothing."""
    expected, found = (functional.log_softmax(each.float(), -1) for each in (target, made))
    return torch.where(expected.isfinite(), expected.exp() * (expected - found), 0.0).sum()


class Judge:
    """Compares programs with one whose outputs it keeps.

    Args:
        program: the original.
        batches: the data. count: how many of its batches are used, at most.
    """

    @torch.no_grad()
    def __init__(self, program: Program, batches: Batches, count: int) -> None:
        self._batches = batches.first(count)
        self._targets: list[list[Any]] = []
        for index, flat in enumerate(self._batches):
            with running(index):
                self._targets.append(_floating(program.run(flat)))

    @torch.no_grad()
    def __call__(self, program: Program) -> float:
        """Return the mean over outputs of KL a row, in nats, and a tenth of the squared error relative to the target's.

        Outputs whose last axis has one coordinate have no divergence. Infinity where an output is not finite.
        """
        total = [[0.0, 0, 0.0, 0.0] for _ in self._targets[0]]
        for index, (flat, targets) in enumerate(zip(self._batches, self._targets, strict=True)):
            with running(index):
                outputs = _floating(program.run(flat))
            for sums, made, target in zip(total, outputs, targets, strict=True):
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


def _floating(outputs: Sequence[Any]) -> list[Tensor]:
    return [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
