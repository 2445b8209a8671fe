"""Spelled-out layer norms, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Example, Function, four_tests
from torch import Tensor

from graphopt.passes import Canonicalize

SHAPE = (2, 5, 16)
W, B = torch.rand(16) + 0.5, torch.rand(16)


def _spelled(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-6)


def _wide(x: Tensor, w: Tensor) -> Tensor:
    """As language models write it, without a bias."""
    wide = x.to(torch.float32)
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    wide = (wide - mean) * torch.rsqrt(variance + 1e-6)
    return (w.to(torch.float32) * wide).to(x.dtype)


def _example(name: str, function: Callable[..., Tensor], **rest: object) -> Example:
    weights = {"w": W, "b": B} if "b" in function.__code__.co_varnames else {"w": W}
    return Example(name, lambda: Function(function, **weights), SHAPE, **rest)  # type: ignore[arg-type]


EXAMPLES = [
    _example("weight", lambda x, w: _spelled(x) * w, rule="recognise_layer_norm", fires=1),
    _example("with_casts", _wide, rule="recognise_layer_norm", fires=1),
    _example("weight_and_bias", lambda x, w, b: w * _spelled(x) + b, rule="take_layer_norm_bias", fires=1),
    _example(
        "operator_and_vectors",
        lambda x, w, b: b + torch.nn.functional.layer_norm(x, [16]) * w[None],
        rule="take_layer_norm_weight",
        fires=1,
    ),
    _example(
        "another_type",
        lambda x, w: torch.nn.functional.layer_norm(x, [16]) * w.half(),
        rule="take_layer_norm_weight",
        declines="are of different types",
    ),
    _example("another_axis", lambda x, w: (lambda c: c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6))(
        x - x.mean(1, keepdim=True)) * w, rule="recognise_layer_norm", fires=0),
    _example("another_mean", lambda x, w: (lambda c: c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6))(
        x - (x * 2).mean(-1, keepdim=True)) * w, rule="recognise_layer_norm", fires=0),
    _example("a_full_norm_and_a_vector", lambda x, w, b: torch.nn.functional.layer_norm(x, [16], w, b) + b,
        rule="take_layer_norm_bias", fires=0),
]  # fmt: skip
test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(Canonicalize(), EXAMPLES)
