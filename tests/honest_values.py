"""Values at which a wrong rewrite shows: what `redraw` draws, and what measures that it did.

At a fresh model's values much is invisible: gains of 1, biases of 0, layer scales of 1e-6 and weights of deviation 0.02
let a wrong rewrite pass, as what it broke does not reach the output.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Inputs = dict[str, Tensor]

_TABLE = re.compile(r"token|embedding|table|position")


@torch.no_grad()
def redraw(model: nn.Module, seed: int, gain: float = 1.2) -> nn.Module:
    """Draw every parameter and running statistic anew, in place; return the model.

    Gains are uniform in 0.5-1.5 where they are used: one that starts at 0 is used as 1 + w. Layer scales, which start
    small, are uniform in 0.25-0.75, running variances in 0.5-1.5. Biases are normal of deviation 0.2; running means
    and tables of tokens and positions of 0.5. Scalars, which are temperatures, stay. A tied tensor is drawn once.

    Args:
        gain: deviation of the other weights, times the root of how many products an output adds up. What an activation
            takes away should come back by it: 1 before none, 1.4 before a ReLU.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, deviation: float) -> None:
        like.copy_(deviation * torch.randn(like.shape, generator=generator))

    def uniform(like: Tensor, low: float, high: float) -> None:
        like.copy_(low + (high - low) * torch.rand(like.shape, generator=generator))

    drawn: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in drawn or weight.ndim == 0:
                continue
            drawn.add(id(weight))
            if name.endswith("bias"):
                normal(weight, 0.2)
            elif isinstance(module, nn.Embedding) or _TABLE.search(name):
                normal(weight, 0.5)
            elif weight.ndim > 1:
                normal(weight, gain / math.sqrt(_fan_in(module, weight)))
            elif weight[0] == 1 or weight.min() < weight.max():
                uniform(weight, 0.5, 1.5)
            elif weight[0] == 0:
                uniform(weight, -0.5, 0.5)
            else:
                uniform(weight, 0.25, 0.75)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                normal(buffer, 0.5)
            elif name == "running_var":
                uniform(buffer, 0.5, 1.5)
    return model


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    """Return how many products an output of the weight adds up."""
    if type(module).__name__ == "Conv1D":  # transformers' linear layer with its weight transposed: [in, out]
        return weight.shape[0]
    if isinstance(module, nn.ConvTranspose2d):  # [in, out, height, width], of which an output sees a part
        return weight[:, 0].numel() // math.prod(module.stride)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return weight[0].numel()
    return weight.shape[-1]  # a matrix or a stack of them, one an expert: [experts, out, in]


@torch.no_grad()
def branch_contributions(model: nn.Module, inputs: Inputs, branches: str) -> dict[str, float]:
    """Return for each residual branch max|Δ output| / max|output| when what it writes is replaced by zero.

    Args:
        branches: pattern of the full names of the modules that write the branches. Of a module that returns a tuple the
            first is replaced.
    """

    def zeroed(module: nn.Module, args: Any, result: Any) -> Any:
        if isinstance(result, tuple):
            return (torch.zeros_like(result[0]), *result[1:])
        return torch.zeros_like(result)

    reference = first_output(model, inputs)
    found = {}
    for name, module in model.named_modules():
        if re.fullmatch(branches, name):
            handle = module.register_forward_hook(zeroed)
            found[name] = relative_difference(first_output(model, inputs), reference)
            handle.remove()
    return found


@torch.no_grad()
def weight_effects(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Return for each parameter and running statistic max|Δ output| / max|output| when its elements move on by one."""
    reference = first_output(model, inputs)
    weights: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {}
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.numel() > 1:
            value = weight.detach().clone()
            weight.copy_(value.flatten().roll(1).view_as(value))
            found[name] = relative_difference(first_output(model, inputs), reference)
            weight.copy_(value)
    return found


def first_output(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the first tensor that the model returns: of those with a head, its logits."""
    leaf: Tensor = tree_leaves(model(**inputs))[0]
    return leaf


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return max|found − expected| / max|expected|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
