"""Allocate: what is chosen holds the budget, beats uniform levels, ends alike, and says what it cannot do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import targets
import torch
from torch import Tensor, nn

import graphopt
from graphopt import capture
from graphopt.analysis import resources
from graphopt.backend import Profile
from graphopt.calibration import Batches
from graphopt.calibration.judge import Judge
from graphopt.errors import GraphoptError
from graphopt.ir import Program, arguments, operator
from graphopt.passes import Allocate, Prune, QuantizeWeights
from graphopt.pipeline import Context, run_passes
from graphopt.pipeline.journal import Journal
from graphopt.pipeline.trace import Trace

PLAIN = "objective='plain', rounding='nearest', group_size=0"
LEVELS = f"quantize_weights(levels=['int8', 'int4', 'int2'], {PLAIN})"
DROPS = "drop_blocks(resolve=False, unit='branches')"
QUICK: dict[str, Any] = {"choices": (LEVELS,), "evaluations": 4, "samples": 4, "alone": 2}


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.down.weight *= scale
            self.down.bias *= scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    """Blocks that matter more and less."""
    torch.manual_seed(0)
    blocks = [Block(scale) for scale in (0.002, 1.0, 3.0, 0.1)]
    return nn.Sequential(nn.Linear(6, 16), *blocks, nn.Linear(16, 5)).eval()


def rows(count: int = 8, seed: int = 0) -> list[tuple[Tensor, ...]]:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 6, generator=random),) for _ in range(count)]


@functools.cache
def captured() -> Program:
    """The network; nothing that is run on it changes it."""
    return capture(network(), rows()[0])


def allocated(
    budget: graphopt.Budget, evaluate: Any = None, journal: Path | None = None, **options: Any
) -> tuple[Program, Trace]:
    program = captured()
    context = Context(targets.EXACT, Batches(rows(), program), evaluate, budget=budget, strict=True)
    context.journal = Journal(journal)
    return run_passes(program, [Allocate(**(QUICK | options))], context)


def loss(program: Program) -> float:
    return Judge(captured(), Batches(rows(8, seed=1), captured()), 8)(program)


@pytest.mark.parametrize("solver", ["evolution", "integer", "bisection", "greedy", "random"])
def test_the_budget_holds_and_uniform_levels_are_beaten(solver: Any) -> None:
    program, trace = allocated(graphopt.Budget(average_bits=6.5), solver=solver)
    bits = resources(program)["bits"] / resources(captured())["parameters"]
    assert bits <= 6.5
    facts = trace["allocate"].facts
    assert facts["costs"]["bits"] == pytest.approx(resources(program)["bits"])
    context = Context(targets.EXACT, Batches(rows(), captured()))
    int4 = QuantizeWeights(grid="int4", objective="plain", rounding="nearest", group_size=0)
    uniform, _ = run_passes(captured(), [int4], context)
    assert loss(program) < (3.0 if solver == "random" else 0.5) * loss(uniform)
    assert set(facts["levels"].values()) <= {"float", "int8", "int4", "int2"}
    assert facts["correlations"]["fisher"]["rank"] > 0.5


@pytest.mark.parametrize("estimate", ["divergence", "interaction", "hessian", "fisher", "sqnr"])
def test_every_estimate_gives_a_choice(estimate: Any) -> None:
    _, trace = allocated(graphopt.Budget(size_ratio=0.25), solver="integer", estimate=estimate)
    assert trace["allocate"].facts["costs"]["size_bytes"] <= 0.25 * resources(captured())["size_bytes"]
    assert "quantize_weights" in [record.name for record in trace]


def test_blocks_and_bits_together() -> None:
    """Under one budget: blocks that hardly matter go, what stays keeps more bits than it could alone."""
    bound = graphopt.Budget(average_bits=5.0)
    together, trace = allocated(bound, choices=(DROPS, LEVELS), samples=8, evaluations=16)
    bits, _ = allocated(bound, samples=8, evaluations=16)
    names = trace["allocate"].facts["levels"]
    assert "goes" in names.values() and "gone" in names.values()
    assert {"drop_blocks", "quantize_weights"} <= {record.name for record in trace}
    assert resources(together)["bits"] <= 5.0 * resources(captured())["parameters"]
    assert loss(together) < loss(bits)
    whole = trace["drop_blocks"].options["blocks"]
    assert whole == [unit for unit, level in names.items() if level == "goes"]


def test_macs_bound_what_drops() -> None:
    program, trace = allocated(graphopt.Budget(macs_ratio=0.75), choices=(DROPS,))
    assert resources(program)["macs"] <= 0.75 * resources(captured())["macs"]
    assert list(trace["allocate"].facts["levels"].values()).count("goes") >= 1


def accuracy(module: Callable[..., Tensor]) -> float:
    same = [(module(x).argmax(-1) == captured().run([x])[0].argmax(-1)).float().mean() for (x,) in rows(16, seed=2)]
    return 100 * float(torch.stack(same).mean())


def test_a_metric_alone_is_met_by_bisection() -> None:
    program, trace = allocated(graphopt.Budget(metric_drop=2.0), accuracy)
    facts = trace["allocate"].facts
    assert facts["metric"] >= 98.0 and facts["origin"].startswith("bisection")
    assert accuracy(program.module()) >= 98.0
    assert resources(program)["size_bytes"] < 0.4 * resources(captured())["size_bytes"]
    assert facts["metrics"] < 12


def test_a_metric_that_falls_too_far_is_told() -> None:
    _, trace = allocated(graphopt.Budget(average_bits=4.4, metric_drop=0.5), accuracy)
    assert "below the 99.5 that the budget allows" in trace["allocate"].facts["note"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda module: float("nan"), "evaluate returned NaN on the original model"),
        (lambda module: torch.ones(3), "evaluate failed on a candidate: "),
        (lambda module: 1 / 0, "evaluate failed on a candidate: ZeroDivisionError"),
    ],
)
def test_a_metric_that_is_none(returned: Any, message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        allocated(graphopt.Budget(metric_drop=1.0), returned)


def test_a_metric_that_varies_is_told_by_how_much() -> None:
    drawn = iter([90.0, 91.0, 89.5] + [90.0] * 100)
    _, trace = allocated(graphopt.Budget(metric_drop=5.0), lambda module: next(drawn))
    assert trace["allocate"].facts["metric_spread"] == 1.5
    assert "it varied by 1.5 over 3 calls" in trace["allocate"].facts["note"]


def test_budgets_that_cannot_be_met() -> None:
    with pytest.raises(GraphoptError, match=r"budget.average_bits 1 is asked and budget.average_bits 4.28 the least"):
        allocated(graphopt.Budget(average_bits=1.0))
    with pytest.raises(GraphoptError, match="needs to know what must hold: give a budget with one of average_bits"):
        allocated(graphopt.Budget())
    with pytest.raises(GraphoptError, match="nothing can be timed for it here; bound another field"):
        allocated(graphopt.Budget(latency_ratio=0.5))
    with pytest.raises(GraphoptError, match=r"budget.metric_drop needs a metric; pass evaluate="):
        allocated(graphopt.Budget(metric_drop=1.0))
    nothing = f"quantize_weights(levels=['int4'], only=['nothing'], {PLAIN})"
    with pytest.raises(GraphoptError, match=r"found nothing to choose: .* offer no unit"):
        allocated(graphopt.Budget(average_bits=4), choices=(nothing,))
    with pytest.raises(GraphoptError, match="needs passes to choose for"):
        Allocate(choices=())
    with pytest.raises(GraphoptError, match="there is no pass called 'quantise'"):
        Allocate(choices=("quantise(levels=['int4'])",))


def test_a_budget_that_holds_already_changes_nothing() -> None:
    program, trace = allocated(graphopt.Budget(average_bits=40))
    assert trace["allocate"].facts["note"] == "the budget holds as it is"
    torch.testing.assert_close(program.run(list(rows()[0])), captured().run(list(rows()[0])))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_seed_gives_the_same_whatever_the_processes_and_interruptions(workers: int, tmp_path: Path) -> None:
    expected, first = allocated(graphopt.Budget(average_bits=5.5))
    journal = tmp_path / "journal"
    allocated(graphopt.Budget(average_bits=5.5), journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"key": "cut sho')
    again, second = allocated(graphopt.Budget(average_bits=5.5), journal=journal, workers=workers)
    assert first["allocate"].facts["levels"] == second["allocate"].facts["levels"]
    assert first["allocate"].facts["front"] == second["allocate"].facts["front"]
    assert str(expected) == str(again)
    assert not (tmp_path / "levels").exists()


def timed(programs: Mapping[str, Program]) -> dict[str, Profile]:
    """A runtime in which a linear takes a millisecond in float, half of it on int8, a quarter on fewer bits."""
    found = {}
    for name, program in programs.items():
        nodes = {}
        for node in program.graph.nodes:
            if operator(node) == "linear":
                form = arguments(arguments(node)["weight"]).get("format", "") if arguments(node)["weight"].args else ""
                nodes[node.name] = {"": 1.0, "int8": 0.5}.get(form, 0.25)
        found[name] = Profile(0.5 + sum(nodes.values()), nodes)
    return found


@pytest.mark.parametrize("choices", [(LEVELS,), (DROPS, LEVELS)])
def test_latency_is_bounded_by_what_was_timed(choices: tuple[str, ...]) -> None:
    program = captured()
    context = Context(targets.EXACT, Batches(rows(), program), budget=graphopt.Budget(latency_ratio=0.5), measure=timed)
    after, trace = run_passes(program, [Allocate(**(QUICK | {"choices": choices}))], context)
    times = timed({"before": program, "after": after})
    assert times["after"].latency_ms <= 0.5 * times["before"].latency_ms
    facts = trace["allocate"].facts
    assert facts["costs"]["latency_ms"] == pytest.approx(times["after"].latency_ms)
    assert (facts["latency_ratio"] <= 0.5 and "float" in facts["levels"].values()) or len(choices) > 1
    context.budget = graphopt.Budget(latency_ratio=0.1)
    with pytest.raises(GraphoptError, match=r"latency_ratio 0.1 is asked and budget.latency_ratio 0.\d+ the least"):
        run_passes(program, [Allocate(**QUICK)], context)


WIDTHS = "prune(shares=[0.75, 0.5, 0.25], multiple=1)"


def test_widths_are_levels() -> None:
    """The widths that matter least go, and a candidate is what the pass makes of it."""
    program, trace = allocated(graphopt.Budget(macs_ratio=0.6), choices=(WIDTHS,))
    assert resources(program)["macs"] <= 0.6 * resources(captured())["macs"]
    facts = trace["allocate"].facts
    assert facts["costs"]["macs"] == resources(program)["macs"]
    assert facts["costs"]["parameters"] == resources(program)["parameters"]
    assert loss(program) < 3 * facts["loss"] + 1e-6
    uniform, _ = run_passes(
        captured(), [Prune(ratio=0.5, multiple=1, streams=False, turn=False)],
        Context(targets.EXACT, Batches(rows(), captured())),
    )  # fmt: skip
    assert loss(program) < loss(uniform)


def test_widths_and_bits_together() -> None:
    bound = graphopt.Budget(average_bits=8, params_ratio=0.7)
    program, trace = allocated(bound, choices=(WIDTHS, LEVELS))
    names = trace["allocate"].facts["levels"]
    assert any(level.startswith("width") for level in names.values())
    assert resources(program)["bits"] <= 8 * resources(captured())["parameters"]
    assert resources(program)["parameters"] <= 0.7 * resources(captured())["parameters"]
    assert {"prune", "quantize_weights"} <= {record.name for record in trace}
    assert len(trace["quantize_weights"].touched) == sum(level.startswith("int") for level in names.values())
    assert loss(program) < 3 * trace["allocate"].facts["loss"] + 1e-6
