"""Models of transformers with 4-bit weights, compiled: what becomes kernels, and that outputs stay."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor
from torch.utils import _pytree as pytree

import graphopt
from graphopt.passes import QuantizeWeights

_W4 = QuantizeWeights(grid="int4", group_size=16, objective="plain", rounding="nearest")
# Convolutions hold most of what multiplies by weights: torch runs all of it.
_LEFT = {"EfficientNet", "MobileNetV2", "RegNet", "ResNet", "SegFormer", "UNet"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("Llama", "BERT") else pytest.mark.slow) for name in zoo.CAPTURED]
)
def test_linears_become_kernels_and_outputs_stay(name: str) -> None:
    args, kwargs = zoo.capture(name).example_inputs
    inputs = kwargs or args
    result = graphopt.optimize(zoo.built(name)[0].eval(), inputs, [_W4], calibration=[inputs])
    compiled = result.compile("cuda", device="cpu")
    assert bool(compiled.regions) is (name not in _LEFT), compiled
    if compiled.regions:
        assert all("not quantized" in site.reason or "convolutions" in site.reason for site in compiled.kept), compiled
    given, wanted = (pytree.tree_leaves(model(*args, **kwargs)) for model in (compiled, result))
    for new, old in zip(given, wanted, strict=True):
        if isinstance(old, Tensor) and old.is_floating_point():
            with torch.no_grad():
                assert (new - old).abs().max() < 1e-2 * old.abs().max().clamp(min=1e-6)
