"""QuantizeActivations: scales where they are asked for, one pair a value, what a reference says."""

from __future__ import annotations

from typing import Any

import pytest
import targets
import torch
from torch import Tensor, nn

from graphopt import capture
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program, operator
from graphopt.passes import QuantizeActivations, QuantizeWeights
from graphopt.pipeline import Context, Pass, run_passes
from graphopt.pipeline.trace import Trace
from graphopt.quantization.grids import grid


class Two(nn.Module):
    """Two linears that read one value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(70, 8), nn.Linear(70, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], -1)


def optimized(module: nn.Module, batches: list[tuple[Tensor, ...]], *passes: Pass) -> tuple[Program, Program, Trace]:
    program = capture(module.eval(), batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True)
    after, trace = run_passes(program, list(passes), context)
    return program, after, trace


def reference(x: Tensor, name: str, block: int, symmetric: bool) -> Tensor:
    """Block by block, with the scales that bring the largest magnitude, or both ends, to the ends of the grid."""
    form, made = grid(name), torch.empty_like(x)
    for row, out in zip(x.reshape(-1, x.shape[-1]), made.reshape(-1, x.shape[-1]), strict=True):
        for start in range(0, len(row), block):
            part = row[start : start + block]
            if form.affine and not symmetric:
                low, high = part.min().clamp(max=0), part.max().clamp(min=0)
                scale = (high - low) / (form.code_max - form.code_min)
                zero = (form.code_min - low / scale).round().clamp(form.code_min, form.code_max)
                out[start : start + block] = form.nearest(part, scale, zero)
            else:
                largest = part.abs().max()
                scale = form.scale_for(largest) if not form.affine else largest / form.code_max
                out[start : start + block] = form.nearest(part, scale)
    return made


@pytest.mark.parametrize(
    ("options", "block", "symmetric"),
    [
        ({"grid": "int8"}, 70, False),
        ({"grid": "int4", "symmetric": True}, 70, True),
        ({"grid": "int4", "granularity": "group", "group_size": 16}, 16, False),
        ({"grid": "e4m3"}, 70, True),
        ({"grid": "mxfp4"}, 32, True),
        ({"grid": "nf4", "granularity": "group", "group_size": 20}, 20, True),
    ],
    ids=str,
)
def test_equals_a_reference_block_by_block(options: dict[str, Any], block: int, symmetric: bool) -> None:
    module, x = Two(), torch.randn(3, 5, 70)
    x[0, 0] = 0
    _, after, trace = optimized(module, [(x,)], QuantizeActivations(**options))
    expected = reference(x, options["grid"], block, symmetric).nan_to_num()  # a block of zeros has no range
    torch.testing.assert_close(after(x), module(expected), rtol=1e-4, atol=1e-5)
    names = [operator(node) for node in after.graph.nodes]
    assert names.count("graphopt.quantize") == 1, "readers of one value share its codes"
    assert len(trace["quantize_activations"].touched) == 2


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize(
    ("name", "symmetric"),  # half of the values would have no code on a symmetric uint8
    [("int8", False), ("int8", True), ("uint8", False), ("e4m3", True), ("e2m1", True), ("nf4", True)],
)
def test_fixed_ranges(name: str, observer: str, symmetric: bool) -> None:
    module, batches = Two(), [(torch.randn(4, 70),) for _ in range(6)]
    each = QuantizeActivations(grid=name, granularity="tensor", static=True, observer=observer, symmetric=symmetric)  # type: ignore[arg-type]
    if observer == "entropy" and name in ("e4m3", "e2m1", "nf4"):
        with pytest.raises(GraphoptError, match="take mse"):
            optimized(module, batches, each)
        return
    program, after, _ = optimized(module, batches, each)
    (x,) = batches[0]
    ratio = float((after(x) - program(x)).square().sum() / program(x).square().sum())
    assert 0 < ratio < (0.05 if grid(name).bits < 8 else 2e-3)
    assert "graphopt.dynamic_scale" not in [operator(node) for node in after.graph.nodes]


def test_a_searched_scale_is_no_worse_than_the_largest() -> None:
    module, batches = Two(), [(torch.randn(40, 70),) for _ in range(6)]

    def noise(observer: str) -> float:
        each = QuantizeActivations(grid="e2m1", granularity="tensor", static=True, observer=observer)  # type: ignore[arg-type]
        program, after, _ = optimized(module, batches, each)
        return sum(float((after(*b) - program(*b)).square().sum()) for b in batches)

    assert noise("mse") < 0.9 * noise("minmax")


@pytest.mark.parametrize("name", ["int8", "mxfp8_e4m3", "e5m2"])
def test_convolutions_take_one_scale_or_blocks_of_channels(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(40, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 40, 6, 5)
    program, after, trace = optimized(module, [(x,)], QuantizeActivations(grid=name))
    assert len(trace["quantize_activations"].touched) == 2
    assert 0 < float((after(x) - program(x)).square().sum() / program(x).square().sum()) < 0.01


def test_weights_quantized_afterwards_make_up_for_activations() -> None:
    """The exact lane reads the activations as they were: drift pulls the weights towards the original outputs."""
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    mix = torch.randn(32, 32) * torch.logspace(0, -1.5, 32)
    batches = [(torch.randn(40, 32) @ mix,) for _ in range(12)]
    activations = QuantizeActivations(grid="int4")

    def noise(drift: bool) -> float:
        program, after, _ = optimized(module, batches, activations, QuantizeWeights(group_size=8, drift=drift))
        return sum(float((after(*b) - program(*b)).square().sum()) for b in batches)

    assert noise(True) < noise(False)


def test_what_is_refused() -> None:
    with pytest.raises(GraphoptError, match="give granularity='tensor'"):
        QuantizeActivations(static=True)
    with pytest.raises(GraphoptError, match="a codebook is learned for weights"):
        QuantizeActivations(grid="codebook4")
    _, _, trace = optimized(nn.Sequential(nn.ReLU()), [(torch.randn(2),)], QuantizeActivations())
    assert "no linear or convolution" in trace["quantize_activations"].skipped[0].reason
    _, _, trace = optimized(Two(), [(torch.randn(2, 70),)], QuantizeActivations(), QuantizeActivations())
    assert trace["quantize_activations#2"].skipped[0].reason == "its input is quantized already"
    _, _, trace = optimized(Two(), [(torch.randn(2, 70),)], QuantizeActivations(skip=("two",)))
    assert [site.reason for site in trace["quantize_activations"].skipped] == ["kept by skip='two'"]
