"""Factorize: the best map of its rank by closed form, layers left where nothing is saved, mistakes in a sentence."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import targets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_files import run_file
from torch import Tensor, nn

import graphopt
from graphopt import Budget, capture
from graphopt.analysis import macs, parameters
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program, operator
from graphopt.ir.verify import verify
from graphopt.passes import Factorize
from graphopt.pipeline import Context, run_passes
from graphopt.pipeline.trace import Trace

Given = list[tuple[Tensor, ...]]
TARGET = dataclasses.replace(targets.EXACT, width_multiple=1)


def rows(width: int = 12, count: int = 8, rank: int = 0, seed: int = 0) -> Given:
    """Batches of 16 rows, in `rank` directions where that is not 0."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or width, width, generator=torch.Generator().manual_seed(9))
    return [(torch.randn(16, rank or width, generator=random) @ mix,) for _ in range(count)]


def factorized(
    module: nn.Module, batches: Given, each: Factorize, budget: Budget | None = None
) -> tuple[Program, Program, Trace]:
    program = capture(module.eval(), batches[0])
    context = Context(TARGET, calibration=Batches(batches, program), budget=budget or Budget(), strict=True)
    after, trace = run_passes(program, [each], context)
    verify(after)
    return program, after, trace


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_is_the_best_map_of_its_rank(seed: int, rank: int, bias: bool) -> None:
    """Its error is that of the outputs' singular values that are left out, the least that a rank allows."""
    torch.manual_seed(seed)
    module, batches = nn.Sequential(nn.Linear(12, 10, bias=bias)), rows(seed=seed)
    share = (rank * 22 + 10 * bias) / (120 + 10 * bias)
    program, after, trace = factorized(module, batches, Factorize(), Budget(params_ratio=share))
    found = trace["factorize"].facts["ranks"]["linear"][1]
    x = torch.cat([batch[0] for batch in batches]).double()
    target = program(x.float()).double()
    center = target.mean(0) if bias else torch.zeros(10, dtype=torch.float64)
    singular = torch.linalg.svdvals(target - center)
    best = float(singular[found:].square().sum())
    error = float((after(x.float()).double() - target).square().sum())
    assert best * (1 - 1e-3) <= error <= best * 1.01 + 1e-6 * float(target.square().sum())


def test_data_of_few_directions_costs_nothing() -> None:
    torch.manual_seed(0)
    program, after, trace = factorized(nn.Sequential(nn.Linear(12, 12)), rows(rank=3), Factorize(lost=1e-6))
    assert trace["factorize"].facts["ranks"] == {"linear": [12, 3]}
    for batch in rows(rank=3, seed=1):
        torch.testing.assert_close(after(*batch), program(*batch), rtol=1e-3, atol=1e-3)
    assert after.weights["0.weight_in"].shape == (3, 12) and after.weights["0.weight_out"].shape == (12, 3)


def test_convolutions_become_one_with_few_channels_and_a_pointwise_one() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 12, 3, stride=2, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(12, 3, 1))
    with torch.no_grad():
        weight = module[0].weight  # of rank 2
        weight.copy_((torch.randn(12, 2) @ torch.randn(2, 36)).view(12, 4, 3, 3))
    batches = [(torch.randn(2, 4, 9, 9),) for _ in range(6)]
    program, after, trace = factorized(module, batches, Factorize(lost=1e-6))
    assert trace["factorize"].facts["ranks"]["conv2d"] == [12, 2]
    for batch in batches:
        torch.testing.assert_close(after(*batch), program(*batch), rtol=1e-2, atol=1e-3)
    assert sum(operator(node) == "conv2d" for node in after.nodes) == 3


@pytest.mark.parametrize("field", ["macs_ratio", "params_ratio"])
@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_budgets_hold(field: str, ratio: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6))
    program, after, _ = factorized(module, rows(), Factorize(), Budget(**{field: ratio}))
    count: Any = macs if field == "macs_ratio" else parameters
    assert 0.8 * ratio <= count(after) / count(program) <= ratio


def test_never_costs_more() -> None:
    torch.manual_seed(0)
    program, after, trace = factorized(nn.Sequential(nn.Linear(12, 12)), rows(), Factorize(lost=1e-9))
    assert str(after).count("linear") == str(program).count("linear") and not trace["factorize"].changed
    assert any("too many directions" in site.reason for site in trace["factorize"].skipped)


def test_better_than_the_svd_of_the_weights() -> None:
    """At the same ranks: inputs that are rarely there count little, and later layers make up for earlier ones."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6))
    program, after, trace = factorized(module, rows(count=16), Factorize(), Budget(params_ratio=0.6))
    plain = copy.deepcopy(module)
    for name, (_, rank) in trace["factorize"].facts["ranks"].items():
        layer: Any = plain[2 * int(name.partition("_")[2] or 0)]
        u, s, v = torch.linalg.svd(layer.weight.detach())
        layer.weight.data = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    judged = rows(seed=1)
    errors = [sum(float((made(*b) - program(*b)).square().sum()) for b in judged) for made in (after, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_only_and_what_cannot_be_written_so() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 1))
    batches = [(torch.randn(2, 4, 9, 9),) for _ in range(6)]
    _, _, trace = factorized(module, batches, Factorize(lost=0.3, only=("0", "2")))
    reasons = [site.reason for site in trace["factorize"].skipped]
    assert any("in groups" in each for each in reasons) and any("not among only" in each for each in reasons)


def test_exports_and_runs(tmp_path: Any) -> None:
    torch.manual_seed(0)
    result = graphopt.optimize(
        nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24)), rows()[0], recipe=[Factorize()],
        calibration=rows(), budget=Budget(params_ratio=0.7),
    )  # fmt: skip
    result.export(tmp_path / "model.onnx")
    (x,) = rows()[0]
    torch.testing.assert_close(run_file(tmp_path / "model.onnx", x), result(x), rtol=1e-4, atol=1e-5)
    assert result.report.parameters.ratio <= 0.7


def refused(module: nn.Module, batches: Given, each: Factorize, budget: Budget | None = None) -> str:
    with pytest.raises(GraphoptError) as caught:
        factorized(module, batches, each, budget)
    return str(caught.value)


def test_mistakes_are_sentences() -> None:
    module = nn.Sequential(nn.Linear(12, 12))
    assert "factorize needs to know how much goes" in refused(module, rows(), Factorize())
    assert "cannot meet budget.macs_ratio ≤ 0.01" in refused(module, rows(), Factorize(), Budget(macs_ratio=0.01))
    _, _, trace = factorized(nn.Sequential(nn.Linear(64, 64)), rows(64, 1), Factorize(lost=0.1))
    assert "fewer rows than it has inputs" in trace["factorize"].skipped[0].reason
    _, _, trace = factorized(nn.Sequential(nn.ReLU()), rows(), Factorize(lost=0.1))
    assert "it has no layer that two smaller ones could stand for" in trace["factorize"].skipped[-1].reason
