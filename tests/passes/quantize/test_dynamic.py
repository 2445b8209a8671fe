"""QuantizeDynamic: linears with scales computed at run time."""

from __future__ import annotations

from typing import Any

import targets
import torch
from torch import Tensor, nn

from graphopt import Program, capture
from graphopt.ir import operator
from graphopt.passes import QuantizeDynamic
from graphopt.pipeline import Context, PassRecord, run_passes


def quantized(module: nn.Module, *example: Any, **options: Any) -> tuple[Program, Program, PassRecord]:
    program = capture(module.eval(), example)
    after, trace = run_passes(program, [QuantizeDynamic(**options)], Context(targets.EXACT, strict=True))
    return program, after, trace["quantize_dynamic"]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x) * self.k(x).tanh())


def count(program: Program, name: str) -> int:
    return sum(operator(node) == f"graphopt.{name}" for node in program.nodes)


def test_fires_on_linears_and_readers_of_one_value_share_its_codes() -> None:
    _, after, record = quantized(Heads(), torch.randn(2, 5, 8))
    assert [site.node for site in record.touched] == ["linear", "linear_1", "linear_2"]
    assert count(after, "dynamic_scale") == 2 and count(after, "quantize") == 2, "q and k read the same codes"
    assert count(after, "dequantize") == 6
    assert record.sqnr_db is not None and record.sqnr_db > 30


def test_scales_follow_the_input() -> None:
    program, after, _ = quantized(Heads(), torch.randn(2, 5, 8))
    for gain in (1e-3, 1.0, 1e3):
        x = torch.randn(2, 5, 8) * gain
        with torch.no_grad():
            error = (after(x) - program(x)).abs().max() / program(x).abs().max()
        assert float(error) < 0.05, gain


def test_convolutions_stay_float_with_the_reason() -> None:
    _, after, record = quantized(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.randn(1, 3, 4, 4)
    )
    assert [site.node for site in record.touched] == ["linear"]
    assert [(site.node, site.reason) for site in record.skipped] == [
        ("conv2d", "onnxruntime-cpu has no fast conv2d with scales computed at run time")
    ]
    assert after.weights["0.weight"].dtype is torch.float32


def test_skip_keeps_a_linear_float() -> None:
    _, after, record = quantized(Heads(), torch.randn(2, 5, 8), skip=("out",))
    assert after.weights["out.weight"].dtype is torch.float32
    assert ("linear_2", "kept by skip='out'") in [(site.node, site.reason) for site in record.skipped]


def test_a_second_run_changes_nothing() -> None:
    program = capture(Heads().eval(), (torch.randn(2, 5, 8),))
    _, trace = run_passes(program, [QuantizeDynamic(), QuantizeDynamic()], Context(targets.EXACT))
    assert not trace["quantize_dynamic#2"].changed


def test_an_input_of_zeros_stays_zero() -> None:
    program, after, _ = quantized(nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4))
    zeros = torch.zeros(3, 4)
    assert torch.equal(after(zeros), program(zeros))
