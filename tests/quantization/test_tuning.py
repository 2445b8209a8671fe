"""Learned scales: the least squares solution where there is one, never worse, and what cannot be learned stays."""

from __future__ import annotations

from typing import Any

import pytest
import targets
import torch
from small_decoder import Decoder
from torch import Tensor, nn

from graphopt import capture
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.passes import QuantizeActivations, QuantizeWeights
from graphopt.pipeline import Context, Pass, run_passes
from graphopt.pipeline.trace import Trace

PIECES = 3  # of the decoder: attention, the MLP, the head
NEAREST: dict[str, Any] = {"objective": "plain", "rounding": "nearest", "range": "minmax"}


def optimized(module: nn.Module, batches: list[tuple[Any, ...]], *passes: Pass) -> tuple[Program, Program, Trace]:
    program = capture(module.eval(), batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True)
    after, trace = run_passes(program, list(passes), context)
    return program, after, trace


def divergence(program: Program, after: Program, batches: list[tuple[Any, ...]]) -> float:
    total = 0.0
    for batch in batches:
        expected, found = (each(*batch).detach().double().log_softmax(-1) for each in (program, after))
        total += float((expected.exp() * (expected - found)).sum())
    return total


def rows(count: int = 8) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator) * torch.logspace(0, -1, 16)
    return [(torch.randn(24, 16, generator=generator) @ mix,) for _ in range(count)]


def decoder() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return Decoder(width=32), [(torch.randint(11, (2, 6)),) for _ in range(8)]


def test_one_scale_a_channel_reaches_least_squares() -> None:
    """One linear of one channel, whose output has one number a row: no distribution, and a closed form."""
    torch.manual_seed(0)
    module, batches = nn.Linear(16, 1, bias=False), rows()
    options = {"grid": "int3", "group_size": 0, "symmetric": True, **NEAREST}
    program, plain, _ = optimized(module, batches, QuantizeWeights(**options))
    _, after, trace = optimized(module, batches, QuantizeWeights(**options, tune="model", tune_steps=300))
    x = torch.cat([batch[0] for batch in batches])
    wanted, given = program(x).detach(), plain(x).detach()
    factor = float((wanted * given).sum() / given.square().sum())
    torch.testing.assert_close(after(x), factor * given, rtol=2e-3, atol=1e-5)
    (gains,) = trace["quantize_weights"].facts["tuned"]
    best = float((factor * given - wanted).square().sum() / (given - wanted).square().sum())
    assert list(gains.values()) == [pytest.approx(best, rel=1e-2)]


@pytest.mark.parametrize(
    ("grid", "tune"),
    [
        ("int3", "blocks"),
        ("codebook2", "model"),
        *(
            pytest.param(grid, tune, marks=pytest.mark.slow)
            for grid, tune in (
                ("e2m1", "blocks"), ("codebook2", "blocks"), ("nf4", "blocks"),
                ("int3", "model"), ("e2m1", "model"), ("nf4", "model"),
            )
        ),
    ],
)  # fmt: skip
def test_gains_on_a_decoder(grid: str, tune: str) -> None:
    module, batches = decoder()
    options = {"grid": grid, "group_size": 0 if grid.startswith("codebook") else 16, "sweeps": 0}
    program, plain, _ = optimized(module, batches, QuantizeWeights(**options))
    _, after, trace = optimized(module, batches, QuantizeWeights(**options, tune=tune, tune_steps=60))
    assert divergence(program, after, batches) < (0.9 if tune == "model" else 1.0) * divergence(program, plain, batches)
    assert len(trace["quantize_weights"].facts["tuned"]) == (1 if tune == "model" else PIECES)
    for name, weight in plain.weights.items():
        if not weight.is_floating_point():
            torch.testing.assert_close(after.weights[name], weight)  # codes stay
        elif name.endswith("_scale"):
            assert bool((after.weights[name] > 0).all())
            torch.testing.assert_close(after.weights[name].half().float(), after.weights[name])


def test_gains_with_quantized_activations_and_side_information() -> None:
    module, batches = decoder()
    passes = [QuantizeActivations(grid="int8"), QuantizeWeights(grid="int3", group_size=16, outliers=0.01, rank=1)]
    program, plain, _ = optimized(module, batches, *passes)
    tuned = QuantizeWeights(grid="int3", group_size=16, outliers=0.01, rank=1, tune="model", tune_steps=60)
    _, after, _ = optimized(module, batches, passes[0], tuned)
    assert divergence(program, after, batches) < 0.95 * divergence(program, plain, batches)


def test_same_seed_same_scales() -> None:
    module, batches = decoder()
    each = QuantizeWeights(grid="int3", group_size=16, tune="model", tune_steps=10)
    first, second = (optimized(module, batches, each)[1] for _ in range(2))
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name])


def test_scales_that_hang_together_stay_and_it_says_so() -> None:
    module, batches = decoder()
    _, after, trace = optimized(module, batches, QuantizeWeights(grid="mxfp4", tune="model"))
    _, plain, _ = optimized(module, batches, QuantizeWeights(grid="mxfp4"))
    for name, weight in plain.weights.items():
        assert torch.equal(weight, after.weights[name])
    assert any("tune has nothing to learn" in site.reason for site in trace["quantize_weights"].skipped)


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu()).argmax(-1)


def test_a_program_without_floating_outputs() -> None:
    options = {"grid": "int4", "group_size": 8}
    _, _, trace = optimized(Chosen(), rows(), QuantizeWeights(**options, tune="model"))
    assert any("tune has nothing to learn" in site.reason for site in trace["quantize_weights"].skipped)


class Masked(nn.Module):
    """Some classes are impossible."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.two(self.one(x).relu())
        return logits.masked_fill(torch.tensor([False, True, False, False]), -torch.inf)


def test_places_that_are_masked_are_no_error() -> None:
    options = {"grid": "int3", "group_size": 8, "sweeps": 0}
    _, _, trace = optimized(Masked(), rows(), QuantizeWeights(**options, tune="model", tune_steps=40))
    (gains,) = trace["quantize_weights"].facts["tuned"]
    assert all(0 < gain < 1 for gain in gains.values())


def test_a_shared_weight_has_one_scale_for_all_who_read_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(x + self.one(x + self.one(x).relu()).relu())
            return out

    module, batches = Twice(), rows()
    options = {"grid": "int3", "group_size": 8, "sweeps": 0}
    program, plain, _ = optimized(module, batches, QuantizeWeights(**options))
    for tune in ("blocks", "model"):
        _, after, trace = optimized(module, batches, QuantizeWeights(**options, tune=tune, tune_steps=60))
        assert sum(name.startswith("one") and name.endswith("scale") for name in after.weights) == 1
        assert trace["quantize_weights"].facts["tuned"]
    assert divergence(program, after, batches) < divergence(program, plain, batches)


def test_needs_data() -> None:
    program = capture(Chosen().eval(), rows()[0])
    with pytest.raises(GraphoptError, match="calibration"):
        run_passes(program, [QuantizeWeights(**NEAREST, tune="model")], Context(targets.EXACT))


def test_nothing_to_gain() -> None:
    """Weights that are on the grid already: every term is zero from the start, and nothing moves."""
    torch.manual_seed(0)
    module, batches = nn.Linear(16, 4), rows(2)
    with torch.no_grad():
        module.weight.copy_(torch.randint(-7, 8, (4, 16)) / 16)
        module.weight[:, 0] = 7 / 16
    options = {"grid": "int4", "group_size": 0, "symmetric": True, **NEAREST}
    program, after, trace = optimized(module, batches, QuantizeWeights(**options, tune="model", tune_steps=5))
    (x,) = batches[0]
    torch.testing.assert_close(after(x), program(x))
    assert trace["quantize_weights"].facts["tuned"] == [{}]
