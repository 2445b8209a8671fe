"""Recover: what it is judged by falls or nothing changes, alike for a seed, with features and a loss of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import targets
import torch
from torch import Tensor, nn

import graphopt
from graphopt import capture
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.ir.verify import verify
from graphopt.passes import DropBlocks, Prune, QuantizeWeights, Recover
from graphopt.pipeline import Context, Pass, run_passes
from graphopt.pipeline.trace import Trace

Given = list[tuple[Tensor, ...]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Block(), Block(), Block(), nn.Linear(8, 5)).eval()


def rows(count: int = 16, seed: int = 0) -> Given:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 6, generator=random),) for _ in range(count)]


def recovered(passes: list[Pass], batches: Given | None = None, **options: Any) -> tuple[Program, Program, Trace]:
    batches = rows() if batches is None else batches
    program = capture(network(), batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True, **options)
    after, trace = run_passes(program, passes, context)
    verify(after)
    return program, after, trace


def error(program: Program, after: Program) -> float:
    return sum(float((after(*b) - program(*b)).square().sum()) for b in rows(4, seed=1))


CUT = Prune(ratio=0.5, resolve=False, criterion="magnitude")


def test_what_pruning_lost_comes_back() -> None:
    program, before, _ = recovered([CUT])
    _, after, trace = recovered([CUT, Recover(steps=200, rate=1e-2)])
    assert error(program, after) < 0.3 * error(program, before)
    facts = trace["recover"].facts
    assert facts["loss"][1] < 0.5 * facts["loss"][0] and len(facts["features"]) == 3


def test_also_behind_removed_blocks_and_quantized_weights() -> None:
    drop = DropBlocks(unit="branches", count=1, resolve=False)
    program, before, _ = recovered([drop])
    _, after, trace = recovered([drop, Recover(steps=150, rate=1e-2)])
    assert error(program, after) < 0.5 * error(program, before)
    assert len(trace["recover"].facts["features"]) == 2
    quantize = QuantizeWeights(grid="int3", objective="plain", rounding="nearest")
    _, after, _ = recovered([CUT, Recover(steps=20), quantize])
    assert after(*rows()[0]).isfinite().all()


def test_nothing_to_gain_changes_nothing() -> None:
    _, _, trace = recovered([Recover(steps=20)])
    assert not trace["recover"].changed
    assert "gained nothing" in trace["recover"].skipped[-1].reason


def test_a_rate_that_diverges_leaves_the_best() -> None:
    program, before, _ = recovered([CUT])
    _, after, _ = recovered([CUT, Recover(steps=40, rate=1e3)])
    assert error(program, after) <= error(program, before) * 1.5


def test_deterministic() -> None:
    one, two = (recovered([CUT, Recover(steps=30)])[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.weights.values(), two.weights.values(), strict=True))


def test_the_users_loss_takes_part() -> None:
    seen: list[Any] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return (module(*batch) - 3).square().mean()

    each = Recover(steps=100, rate=1e-2, outputs=0, features=0, task=1)
    _, after, _ = recovered([CUT, each], loss=loss)
    assert seen and float((after(*rows(1, seed=2)[0]) - 3).abs().mean()) < 1


def test_only_what_is_named_learns() -> None:
    _, before, _ = recovered([CUT])
    _, after, _ = recovered([CUT, Recover(steps=40, rate=1e-2, only=("4.*",))])
    changed = [n for n in before.weights if not torch.equal(before.weights[n], after.weights[n])]
    assert changed and all(name.startswith("4.") for name in changed)


def test_the_original_is_left_as_it_was() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graphopt.optimize(model, rows()[0], recipe=[CUT, Recover(steps=20)], calibration=rows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mistakes_are_sentences() -> None:
    with pytest.raises(GraphoptError, match="needs two batches"):
        recovered([Recover(steps=5)], rows(1))
    with pytest.raises(GraphoptError, match="needs a loss"):
        recovered([Recover(steps=5, task=1)])
    program = capture(network(), rows()[0])
    with pytest.raises(GraphoptError, match="recover needs calibration data"):
        run_passes(program, [Recover()], Context(targets.EXACT, strict=True))
