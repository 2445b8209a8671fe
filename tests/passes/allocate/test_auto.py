"""auto: stops where the budget holds, says what it tried, and takes what misses least where nothing holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import targets
import torch
from torch import Tensor, nn

import graphopt
from graphopt import capture
from graphopt.analysis import file_bytes
from graphopt.backend import Profile
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.passes import Auto, Prune
from graphopt.pipeline import Context, builtin, run_passes
from graphopt.pipeline.journal import Journal
from graphopt.pipeline.trace import Trace


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(32 * 9, 10)).eval()


def rows(count: int = 6, seed: int = 0) -> list[tuple[Tensor, ...]]:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 3, 8, 8, generator=random),) for _ in range(count)]


def alike(module: Any) -> float:
    """Percent of the answers that are the original's."""
    model = network()
    with torch.no_grad():
        same = [(module(x).argmax(-1) == model(x).argmax(-1)).float().mean() for (x,) in rows(8, seed=1)]
    return 100 * float(torch.stack(same).mean())


def tried(
    budget: graphopt.Budget, journal: Path | None = None, measure: Any = None, **options: Any
) -> tuple[Program, Trace]:
    program = capture(network(), rows()[0])
    context = Context(targets.EXACT, Batches(rows(), program), alike, budget=budget, journal=Journal(journal))
    if measure is not None:
        context.measure = measure
    return run_passes(program, [Auto(evaluations=2, levels=("int8", "int4"), **options)], context)


def test_int8_is_enough_for_a_metric() -> None:
    program, trace = tried(graphopt.Budget(metric_drop=5.0))
    assert trace["auto"].facts["chosen"] == "int8"
    assert alike(program.module()) >= 95
    assert [record.name for record in trace if record.name == "quantize_static"]
    (step,) = trace["auto"].facts["path"]
    assert step.startswith("int8: size 0.2") and step.endswith("the budget holds")


def test_fewer_bits_where_int8_is_too_large() -> None:
    _, trace = tried(graphopt.Budget(metric_drop=30.0, size_ratio=0.2))
    facts = trace["auto"].facts
    assert facts["chosen"] == "bits" and facts["measured"]["size_ratio"] <= 0.2
    assert "size_ratio 0.2" in facts["path"][0] and "is more than 0.2" in facts["path"][0]


def test_fewer_channels_where_that_is_asked_for() -> None:
    _, trace = tried(graphopt.Budget(metric_drop=50.0, macs_ratio=0.7))
    assert trace["auto"].facts["measured"]["macs_ratio"] <= 0.7
    assert trace["auto"].facts["chosen"].startswith("prune")


def test_what_is_pruned_is_quantized_without_pruning_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[float] = []
    real = Prune.run
    monkeypatch.setattr(Prune, "run", lambda *given: runs.append(0) or real(*given))  # type: ignore[func-returns-value]
    _, trace = tried(graphopt.Budget(metric_drop=50.0, macs_ratio=0.7, size_ratio=0.25))
    assert trace["auto"].facts["chosen"] == "prune, then int8"
    assert len(runs) == 1


def test_what_is_not_allowed_is_not_tried_and_what_misses_least_is_taken(tmp_path: Path) -> None:
    _, trace = tried(graphopt.Budget(metric_drop=5.0, size_ratio=0.05), tmp_path / "journal", prune=False)
    path = trace["auto"].facts["path"]
    assert not any(each.startswith("prune") for each in path)
    assert path[-1].startswith("out of reach, the least of each alone was metric_drop")
    assert trace["auto"].facts["chosen"] in path[-1]
    assert Program.load(tmp_path / "best.pt2").run(list(rows()[0]))[0].shape == (16, 10)


def test_what_is_slower_than_float_is_the_last_choice() -> None:
    """Int4 takes three times as long here; a pruned int8 model holds the same budget and is faster."""

    def measure(programs: Mapping[str, Program]) -> dict[str, Profile]:
        slow = {name: "int4" in str(each) for name, each in programs.items()}
        sizes = {name: int(file_bytes(each, (4, 8))) for name, each in programs.items()}
        return {name: Profile(3.0 if slow[name] else 1.0, {}, sizes[name]) for name in programs}

    budget = graphopt.Budget(metric_drop=60.0, size_ratio=0.2)
    _, trace = tried(budget, measure=measure)
    path = trace["auto"].facts["path"]
    assert "bits is slower than the float model; others are tried" in path
    assert trace["auto"].facts["chosen"].startswith("prune")
    _, alone = tried(budget, measure=measure, prune=False)
    assert alone["auto"].facts["chosen"] == "bits"
    assert alone["auto"].facts["path"][-1] == "bits was taken: nothing faster holds the budget"


def test_what_would_take_too_long_or_cannot_reach_is_not_tried(tmp_path: Path) -> None:
    budget = graphopt.Budget(metric_drop=60.0, size_ratio=0.2)
    for _ in range(2):  # a run that goes on decides alike, however long it takes
        _, trace = tried(budget, tmp_path / "journal", minutes=1e-4)
        path = trace["auto"].facts["path"]
        assert trace["auto"].facts["chosen"] == "int8"
        assert path[1] == "bits was not tried: the 0.0001 minutes would not do, raise auto.minutes"
    _, trace = tried(graphopt.Budget(metric_drop=60.0, size_ratio=0.04))
    assert "bits was not tried: size_ratio could not fall below 0.12" in " ".join(trace["auto"].facts["path"])
    _, trace = tried(graphopt.Budget(metric_drop=60.0, average_bits=3), prune=True)
    assert len(trace["auto"].facts["path"]) == 6  # int8 misses it, the others cannot reach it


def test_it_is_chosen_where_data_a_metric_and_a_budget_are_given() -> None:
    result = graphopt.optimize(
        network(), rows()[0], calibration=rows(), evaluate=alike, budget=graphopt.Budget(metric_drop=10.0),
        target=targets.EXACT,
    )  # fmt: skip
    assert result.recipe.name == "auto"
    assert any("recipe auto was chosen" in note for note in result.notes)
    assert any(note.startswith("auto: int8: ") for note in result.notes)


def test_a_metric_that_is_none_is_one_sentence() -> None:
    with pytest.raises(GraphoptError, match="evaluate returned NaN on the original model"):
        graphopt.optimize(
            network(), rows()[0], "auto", calibration=rows(), evaluate=lambda module: float("nan"),
            budget=graphopt.Budget(metric_drop=10.0), target=targets.EXACT,
        )  # fmt: skip


@pytest.mark.parametrize("budget", [{"metric_drop": 60.0}, {"metric_drop": 60.0, "size_ratio": 0.25}])
def test_what_shall_stay_float_does(budget: dict[str, float]) -> None:
    recipe = builtin("auto").keeping_float(["5*"])  # the last linear
    result = graphopt.optimize(
        network(), rows()[0], recipe, calibration=rows(), evaluate=alike, budget=graphopt.Budget(**budget),
        target=targets.EXACT,
    )  # fmt: skip
    assert result.program.weight("5.weight").is_floating_point()
    assert not result.program.weight("2.weight").is_floating_point()
