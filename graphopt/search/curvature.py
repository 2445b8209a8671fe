"""Estimates of what a change of weights loses, from derivatives at the original or from the weights alone.

    hessian    1/2 tr(H_w) / n_w |dw|^2     H: of the loss in the weight w of n_w elements, its trace by Hutchinson's
                                            estimator, E v' H v over random signs v ("HAWQ-V2: Hessian Aware
                                            trace-Weighted Quantization of Neural Networks")
    fisher     1/2 sum_i E g_i^2 dw_i^2     the diagonal of the Fisher information, from gradients for labels drawn from
                                            the model's own predictions
    sqnr       |dw|^2 / |w|^2               noise to signal of the weight: knows nothing of the loss

The loss is the user's, or the divergence from the original, whose second derivative is the Fisher information.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from graphopt.calibration.batches import running
from graphopt.calibration.gradients import own_loss
from graphopt.calibration.judge import divergence
from graphopt.ir import Program

Changes = Mapping[tuple[int, int], Mapping[str, Tensor]]  # of a unit at a level, the new weights by name


def sqnr(program: Program, changes: Changes) -> dict[tuple[int, int], float]:
    """Return the noise of each change, relative to the weights'."""
    return {
        key: sum(_square(new - program.weight(name)) for name, new in each.items())
        / max(sum(_square(program.weight(name)) for name in each), 1e-300)
        for key, each in changes.items()
    }


def hessian(
    program: Program, changes: Changes, batches: Sequence[list[Any]], loss: Callable[[Any, Any], Any] | None, seed: int,
    draws: int = 4,
) -> dict[tuple[int, int], float]:  # fmt: skip
    """Return half the mean curvature of each weight times the square of its change."""
    twin, weights = _differentiable(program, changes)
    random = torch.Generator().manual_seed(seed)
    traces = dict.fromkeys(weights, 0.0)
    for index, flat in enumerate(batches):
        with torch.enable_grad(), running(index), sdpa_kernel(SDPBackend.MATH):
            value = _loss(twin, flat, loss, random) if loss else _divergence(twin, flat)
            first = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
            used = [(name, each) for name, each in zip(weights, first, strict=True) if each is not None]
            for draw in range(draws):
                signs = [torch.randint(2, each.shape, generator=random).to(each.dtype) * 2 - 1 for _, each in used]
                second = torch.autograd.grad(
                    [each for _, each in used], [weights[name] for name, _ in used], signs,
                    retain_graph=draw < draws - 1, allow_unused=True,
                )  # fmt: skip
                for (name, _), sign, each in zip(used, signs, second, strict=True):
                    traces[name] += 0.0 if each is None else float((sign * each).double().sum())
    mean = {name: traces[name] / (draws * len(batches) * weight.numel()) for name, weight in weights.items()}
    return {
        key: sum(0.5 * abs(mean[name]) * _square(new - program.weight(name)) for name, new in each.items())
        for key, each in changes.items()
    }


def fisher(
    program: Program, changes: Changes, batches: Sequence[list[Any]], loss: Callable[[Any, Any], Any] | None, seed: int
) -> dict[tuple[int, int], float]:
    """Return half the sum of squared gradients times squared changes."""
    twin, weights = _differentiable(program, changes)
    random = torch.Generator().manual_seed(seed)
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for index, flat in enumerate(batches):
        with torch.enable_grad(), running(index):
            value = _loss(twin, flat, loss, random)
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        for name, each in zip(weights, found, strict=True):
            if each is not None:
                squares[name] += each.detach().square() / len(batches)
    return {
        key: sum(0.5 * _square(squares[n].sqrt() * (new - program.weight(n))) for n, new in each.items())
        for key, each in changes.items()
    }


def _differentiable(program: Program, changes: Changes) -> tuple[Program, dict[str, Tensor]]:
    """Return a clone whose weights that change have gradients, and these."""
    names = {name for each in changes.values() for name in each}

    def own(name: str, weight: Tensor) -> Tensor:
        return weight.detach().clone().requires_grad_() if name in names else weight.detach()

    twin = program.map_weights(own)
    for node in twin.graph.nodes:
        if node.target is torch.ops.aten.view.default:  # attention that can be differentiated twice has other strides
            node.target = torch.ops.aten.reshape.default
    twin.graph_module.recompile()
    return twin, {name: weight for name, weight in twin.weights.items() if name in names}


def _loss(program: Program, flat: list[Any], loss: Callable[[Any, Any], Any] | None, random: torch.Generator) -> Tensor:
    if loss is None:
        return own_loss(program.run(flat), random)
    args, kwargs = pytree.tree_unflatten(list(flat), program.signature.in_spec)
    value: Tensor = loss(program.module(), kwargs or args)
    return value


def _divergence(twin: Program, flat: list[Any]) -> Tensor:
    """Return how far the twin's outputs are from its own as they are: zero, but not its second derivative."""
    total = torch.zeros(())
    for each in twin.run(flat):
        if isinstance(each, Tensor) and each.is_floating_point():
            target = each.detach()
            if each.dim() and each.shape[-1] > 1:
                total = total + divergence(each, target) / max(each.shape[:-1].numel(), 1)
            else:
                total = total + (each - target).square().sum() / target.square().sum().clamp(min=1e-30)
    return total


def _square(value: Tensor) -> float:
    return float(value.detach().double().square().sum())
