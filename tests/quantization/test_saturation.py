"""The bound against every activation there is, and against what ONNX Runtime's kernels do on this processor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import targets
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnx.backend import OnnxBackend
from graphopt.backends.onnx.processor import saturates_pairs
from graphopt.ir import operator
from graphopt.quantization.saturation import paired_rows, safe_scale, saturating

OVERFLOWING = dataclasses.replace(targets.EXACT, saturates_pairs=True)
CODES = st.integers(-127, 127)


@given(CODES, CODES)
def test_the_bound_is_exact_for_a_pair(first: int, second: int) -> None:
    """The extremes of x w + x' w' lie at activations of 0 and 255."""
    sums = [255 * (a * first + b * second) for a in (0, 1) for b in (0, 1)]
    clipped = any(not -32768 <= each <= 32767 for each in sums)
    assert bool(saturating(torch.tensor([[first, second]], dtype=torch.int8))) == clipped


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=9))
def test_codes_of_a_safe_scale_are_safe(values: list[float]) -> None:
    rows = torch.tensor([values], dtype=torch.float64)
    scale = torch.maximum(safe_scale(rows), rows.abs().amax(1) / 127).clamp_min(1e-30)
    codes = torch.round(rows / scale[:, None]).to(torch.int8)
    assert not bool(saturating(codes).any())


def test_no_channel_is_coarser_than_seven_bits_would_make_it() -> None:
    rows = torch.randn(64, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    largest = rows.abs().amax(1)
    assert bool((safe_scale(rows) <= largest / 63).all())
    alone = torch.tensor([[1.0, 0.0, -1.0, 0.3]], dtype=torch.float64)
    assert float(safe_scale(alone)) < 1 / 127  # one large weight beside small ones, or of the other sign, needs nothing


class Kernels(nn.Module):
    """Every kind of product: dense, strided, grouped and depthwise convolutions, linears of two and three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Conv2d(3, 8, 3, padding=1)
        self.dense = nn.Conv2d(8, 16, 3, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 8, 3, groups=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.rows, self.head = nn.Linear(8, 12), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.odd, self.dense, self.depthwise, self.grouped, self.point):
            x = torch.relu(layer(x))
        return self.head(torch.relu(self.rows(x.flatten(2).transpose(1, 2)).mean(1)))  # type: ignore[no-any-return]


def _extreme() -> tuple[nn.Module, list[tuple[Tensor]]]:
    """Weights of one size, so that a pair of one sign is as large as can be, and inputs at the end of their range."""
    generator = torch.Generator().manual_seed(0)
    module = Kernels().eval()
    with torch.no_grad():
        for weight in module.parameters():
            noise = torch.rand(weight.shape, generator=generator)
            weight.copy_((0.9 + 0.1 * noise) * torch.where(noise > 0.3, 1.0, -1.0) / weight[0].numel())
    return module, [(torch.rand(2, 3, 14, 14, generator=generator).round(),) for _ in range(2)]


def _largest_difference(recipe: str, target: object, tmp_path: Path) -> float:
    module, batches = _extreme()
    calibration = batches if recipe == "int8_static" else None
    result = graphopt.optimize(module, batches[0], recipe=recipe, calibration=calibration, target=target)
    OnnxBackend().lower(result.program, tmp_path / "m.onnx")
    made = OnnxBackend().run(tmp_path / "m.onnx", list(batches[0]))[0]
    exact = result(*batches[0]).detach().numpy()
    return float(np.abs(made - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("recipe", ["int8_static", "int8_dynamic"])
def test_no_kernel_saturates_with_weights_made_for_it(recipe: str, tmp_path: Path) -> None:
    assert _largest_difference(recipe, OVERFLOWING, tmp_path) < 0.02


@pytest.mark.skipif(not saturates_pairs(), reason="this processor adds products of eight bits in 32")
@pytest.mark.parametrize("recipe", ["int8_static", "int8_dynamic"])
def test_kernels_do_saturate_otherwise(recipe: str, tmp_path: Path) -> None:
    assert _largest_difference(recipe, targets.EXACT, tmp_path) > 0.05


def test_only_channels_that_need_it_are_coarser_and_the_trace_says_how_many() -> None:
    module, batches = _extreme()
    with torch.no_grad():
        module.head.weight[1:, ::2] *= 1e-3  # type: ignore[union-attr,operator]
    result = graphopt.optimize(module, batches[0], recipe="int8_static", calibration=batches, target=OVERFLOWING)
    said = {site.node: site.reason for site in result.trace["quantize_static"].touched}
    assert said["linear_1"].endswith("1 of 5 channels on a coarser grid against overflow")
    assert "coarser" not in said["conv2d_2"]  # depthwise
    plain = graphopt.optimize(module, batches[0], recipe="int8_static", calibration=batches, target=targets.EXACT)
    assert not any("coarser" in site.reason for site in plain.trace["quantize_static"].touched)


def test_kernels_read_positions_before_channels() -> None:
    module = nn.Conv2d(2, 1, (1, 2), bias=False)
    program = graphopt.capture(module, (torch.randn(1, 2, 4, 4),))
    node = next(node for node in program.graph.nodes if operator(node) == "conv2d")
    weight = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    rows = paired_rows(weight, node)
    assert rows is not None and rows.tolist() == [[1.0, 3.0, 2.0, 4.0]]
