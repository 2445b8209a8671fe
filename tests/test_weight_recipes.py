"""The built-in recipes for weights: each runs from a name to a run directory, and writes what its numbers allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_decoder import Decoder
from torch import Tensor, nn

import graphopt

BITS = {"w8": 8, "w4": 4, "w3": 3, "w2": 2, "w4a8": 4, "w4a4": 4, "fp8": 8, "mxfp4": 4, "nvfp4": 4}
IN_A_FILE = ("w8", "w4", "w3", "w2")
ON_THE_DECODER = ("w3", "w4a4", "fp8", "mxfp4")  # the others run on the network; the rest is slow


def network() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 9, 10),
    )  # fmt: skip
    return module.eval(), [(torch.randn(4, 3, 8, 8),) for _ in range(4)]


def decoder() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return Decoder(width=32).eval(), [(torch.randint(11, (2, 6)),) for _ in range(4)]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(name, make, marks=() if (make is decoder) == (name in ON_THE_DECODER) else pytest.mark.slow)
        for name in BITS
        for make in (network, decoder)
    ],
)
def test_from_a_name_to_a_run_directory(name: str, make: object, tmp_path: Path) -> None:
    module, batches = make()  # type: ignore[operator]
    data = None if name == "w8" else batches
    result = graphopt.optimize(module, batches[0], name, calibration=data, run_dir=tmp_path)
    after = result.report.average_bits.after
    assert after is not None
    assert BITS[name] < after < BITS[name] + 6  # small matrices: biases and scales weigh much
    assert (tmp_path / "model.pt2").exists()
    assert (tmp_path / "model.onnx").exists() == (name in IN_A_FILE)
    loaded = graphopt.load(tmp_path)
    torch.testing.assert_close(loaded(*batches[0]), result(*batches[0]))
    with torch.no_grad():
        signal = module(*batches[0]).square().sum()
        error = (result(*batches[0]) - module(*batches[0])).square().sum()
    assert float(error / signal) < (0.6 if BITS[name] == 2 else 0.1)


class Chosen(nn.Module):
    """A classifier that gives labels: nothing has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu()).argmax(-1)


@pytest.mark.parametrize("name", ["w4", "w3", "w2", "w4a8"])
def test_a_model_whose_outputs_are_labels(name: str) -> None:
    module, batches = Chosen().eval(), [(torch.randn(16, 64),) for _ in range(4)]
    result = graphopt.optimize(module, batches[0], name, calibration=batches)
    record = result.trace["quantize_weights"]
    assert record.facts["without_token_weights"] == ["linear", "linear_1"]
    assert any("tune has nothing to learn" in site.reason for site in record.skipped)
    agree = torch.cat([result(*batch) == module(*batch) for batch in batches]).float().mean()
    assert agree > (0.7 if name == "w2" else 0.9)
