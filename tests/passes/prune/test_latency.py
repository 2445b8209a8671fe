"""Widths under a latency: a table from a few timed programs, and what it gets wrong is measured again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import targets
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt import Budget, capture
from graphopt.analysis.cost import node_macs
from graphopt.analysis.spaces import analyze
from graphopt.backend import Profile
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.passes import DropBlocks, Prune
from graphopt.passes.prune.allocation import admissible
from graphopt.passes.prune.candidates import Costs, find_candidates
from graphopt.passes.prune.latency import LatencyTable
from graphopt.pipeline import Context, run_passes

TARGET = dataclasses.replace(targets.EXACT, width_multiple=1)
Time = Callable[[fx.Node], float]


class Block(nn.Module):
    def __init__(self, width: int = 8, inner: int = 24) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Block(), Block(), Block(), nn.Linear(8, 4))


@functools.cache
def captured() -> Program:
    """The network; nothing that is run on it changes it."""
    return capture(network().eval(), rows()[0])


def rows() -> list[tuple[Tensor, ...]]:
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 6, generator=random),) for _ in range(8)]


def measuring(time: Time, asked: list[str] | None = None, rest: float = 100.0) -> Callable[..., dict[str, Profile]]:
    """A runtime in which every operator takes what `time` says, and everything together `rest` more."""

    def measure(programs: Mapping[str, Program]) -> dict[str, Profile]:
        found = {}
        for label, program in programs.items():
            if asked is not None:
                asked.append(label)
            nodes = {node.name: time(node) for node in program.graph.nodes if node.op == "call_function"}
            found[label] = Profile(sum(nodes.values()) + rest, nodes)
        return found

    return measure


def context(program: Program, ratio: float, measure: Any) -> Context:
    budget = Budget(latency_ratio=ratio)
    return Context(TARGET, calibration=Batches(rows(), program), budget=budget, measure=measure, strict=True)


def latency(program: Program, time: Time, rest: float = 100.0) -> float:
    return sum(time(node) for node in program.graph.nodes if node.op == "call_function") + rest


def by_macs(node: fx.Node) -> float:
    return float(node_macs(node))


def by_steps(node: fx.Node) -> float:
    """Products cost as much as if what they compute were a multiple of 1,000."""
    return float(-(-node_macs(node) // 1000) * 1000)


def test_between_its_points_the_table_is_a_line() -> None:
    program = captured()
    analysis = analyze(program)
    candidates = find_candidates(program, analysis, lambda *_: None)
    widths = {each.space: admissible(each, 1, 0.1) for each in candidates}
    given = dataclasses.replace(context(program, 0.5, measuring(by_macs)), original=program)
    table = LatencyTable(program, Costs(program, analysis), widths, given, "prune")
    assert table({}) == pytest.approx(1.0)
    for share in (0.2, 0.4, 0.9):
        chosen = {space: each[int(share * (len(each) - 1))] for space, each in widths.items()}
        made = table.made(chosen)
        assert table(chosen) == pytest.approx(latency(made, by_macs) / latency(program, by_macs))
        assert table.measured(chosen) == pytest.approx(table(chosen))


@pytest.mark.parametrize("time", [by_macs, by_steps])
@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_a_latency_holds_where_it_is_measured(time: Time, ratio: float) -> None:
    program = captured()
    after, trace = run_passes(program, [Prune()], context(program, ratio, measuring(time)))
    assert 0.75 * ratio <= latency(after, time) / latency(program, time) <= ratio
    assert trace["prune"].facts["widths"]


def test_what_holds_already_needs_no_table() -> None:
    program, asked = captured(), []  # type: ignore[var-annotated]
    _, trace = run_passes(program, [Prune()], context(program, 1.0, measuring(by_macs, asked)))
    assert not trace["prune"].changed and asked == ["original", "made"]


def test_blocks_go_until_a_latency_holds() -> None:
    program = captured()
    each = DropBlocks(unit="branches", resolve=False, samples=2)
    after, trace = run_passes(program, [each], context(program, 0.5, measuring(by_macs)))
    assert latency(after, by_macs) / latency(program, by_macs) <= 0.5
    assert len(trace["drop_blocks"].facts["removed"]) == 2


def refused(ratio: float, measure: Any) -> str:
    program = captured()
    with pytest.raises(GraphoptError) as caught:
        run_passes(program, [Prune()], context(program, ratio, measure))
    return str(caught.value)


def test_a_latency_out_of_reach_says_how_far_it_gets() -> None:
    said = refused(0.001, measuring(by_macs))
    assert "cannot meet budget.latency_ratio ≤ 0.001 (it gets down to 0.0" in said


def test_a_table_that_measurement_denies() -> None:
    """Alone, a program never takes less than three quarters of the original: no table knows that."""
    honest = measuring(by_macs)

    def measure(programs: Mapping[str, Program]) -> dict[str, Profile]:
        found = honest(programs)
        if "made" in found:
            found["made"].latency_ms = max(found["made"].latency_ms, 0.75 * found["original"].latency_ms)
        return found

    said = refused(0.7, measure)
    assert "cannot meet budget.latency_ratio ≤ 0.7" in said and "gets down to 0.75" in said


def test_where_nothing_can_be_timed() -> None:
    assert "nothing can be timed here" in refused(0.5, None)


@pytest.mark.slow
def test_in_the_runtime() -> None:
    """What the export measures is what was asked for, but for noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), Block(128, 1024), Block(128, 1024), nn.Linear(128, 4))
    batches = [(torch.randn(64, 64),) for _ in range(24)]
    result = graphopt.optimize(
        model, batches[0], recipe=[Prune()], calibration=batches, budget=Budget(latency_ratio=0.6)
    )
    assert result.report.macs.ratio < 0.8
