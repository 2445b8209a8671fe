"""Uneven padding goes into the convolution behind it, on floats and on codes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import graphopt
from graphopt.backends.onnx.backend import OnnxBackend


class Uneven(nn.Module):
    def __init__(self, value: float = 0.0, widths: tuple[int, ...] = (0, 1, 2, 1)) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.last = nn.Conv2d(8, 4, 1)
        self.value, self.widths = value, widths

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(pad(x, self.widths, value=self.value)))
        return self.last(torch.relu(self.second(pad(x, self.widths, value=self.value))))  # type: ignore[no-any-return]


def _kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture
def images() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, 9, 8, generator=generator),) for _ in range(3)]


def test_convolutions_on_integers_pad(images: list[tuple[Tensor]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = graphopt.optimize(Uneven(), images[0], recipe="int8_static", calibration=images)
    report = result.export(tmp_path / "m.onnx", measure=False)
    assert report.fused == {"QLinearConv": 3} and report.unfused == []
    assert report.max_steps is not None and report.max_steps <= 1
    assert "Pad" not in _kinds(tmp_path / "m.onnx")


def test_float_convolutions_pad(images: list[tuple[Tensor]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Uneven()
    backend = OnnxBackend()
    backend.lower(graphopt.capture(module, images[0]), tmp_path / "m.onnx")
    assert _kinds(tmp_path / "m.onnx")["Pad"] == 0
    np.testing.assert_allclose(
        backend.run(tmp_path / "m.onnx", list(images[1]))[0], module(*images[1]).detach(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("module", [Uneven(value=0.5), Uneven(widths=(1, -1, 0, 1))])
def test_other_paddings_stay(module: nn.Module, images: list[tuple[Tensor]], tmp_path: Path) -> None:
    result = graphopt.optimize(module, images[0], recipe="int8_static", calibration=images)
    result.export(tmp_path / "m.onnx", measure=False)
    assert _kinds(tmp_path / "m.onnx")["Pad"] == 2
    made = OnnxBackend().run(tmp_path / "m.onnx", list(images[0]))[0]
    exact = module(*images[0]).detach().numpy()
    assert np.abs(made - exact).max() < 0.2 * np.abs(exact).max()
