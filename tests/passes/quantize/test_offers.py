"""Schemes as levels: a candidate is what the passes make, costs are those of the program, and weights may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import targets
import torch
from torch import Tensor, nn

import graphopt
from graphopt import capture
from graphopt.analysis import resources
from graphopt.analysis.numerics import Noise
from graphopt.calibration import Batches
from graphopt.ir import Program, operator
from graphopt.passes import Allocate, Canonicalize, QuantizeDynamic, QuantizeStatic, QuantizeWeights
from graphopt.pipeline import Context, Pass, builtin, run_passes
from graphopt.search import Assembler, Choices, Store, gathered

LEVELS = QuantizeWeights(levels=("int4",), objective="plain", rounding="nearest", group_size=0)


class Images(nn.Module):
    """Convolutions with a residual and a concatenation, a shared weight, and linears behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.hidden, self.last = nn.Linear(8, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + torch.relu(self.same(self.same(x)))
        x = torch.cat([self.left(x), self.right(x)], 1).mean((2, 3))
        return self.last(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    torch.manual_seed(0)
    return Images().eval()


def images(count: int = 4) -> list[tuple[Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=random),) for _ in range(count)]


@torch.no_grad()
def offered(passes: list[Pass], folder: Path) -> tuple[Program, Context, Choices, Store]:
    program, _ = run_passes(capture(network(), images()[0]), [Canonicalize()], Context(targets.EXACT))
    context, store = Context(targets.EXACT, calibration=Batches(images(), program)), Store(folder)
    return program, context, gathered(passes, program, context, store, resources(program)), store


def noise(one: Program, other: Program) -> float:
    found = Noise()
    with torch.no_grad():
        for (x,) in images():
            found.add(one.run([x])[0], other.run([x])[0])
    return found.ratio


@pytest.mark.parametrize("scheme", [QuantizeStatic(), QuantizeDynamic()])
def test_all_at_a_scheme_is_what_the_pass_makes(scheme: Any, tmp_path: Path) -> None:
    program, context, choices, store = offered([scheme], tmp_path)
    level = choices.problem.units[0].levels[1].name
    assignment = choices.problem.uniform(level)
    candidate = Assembler(program, choices, store)(assignment)
    made, _ = run_passes(program, choices.chosen(assignment), context)
    # The bias of a shared layer has two grids in the program, and one in the candidate.
    assert noise(candidate, made) < 0.1 * noise(made, program)
    assert choices.problem.costs(assignment)["bits"] == pytest.approx(resources(made)["bits"], rel=0.02)
    rounded = [sum(operator(node) == "graphopt.quantize" for node in each.graph.nodes) for each in (candidate, made)]
    assert rounded[0] == rounded[1] > 0
    assert choices.weights_of(0, 1, store) == {}  # weights are not all that it changes


@pytest.mark.parametrize("seed", range(8))
def test_a_mixture_is_near_what_the_passes_make(seed: int, tmp_path: Path) -> None:
    passes: list[Pass] = [QuantizeStatic(), QuantizeDynamic(), LEVELS]
    program, context, choices, store = offered(passes, tmp_path)
    units = choices.problem.units
    assert [unit.name for unit in units].count("same.weight") == 1
    names = {unit.name: [level.name for level in unit.levels] for unit in units}
    assert names["hidden.weight"] == ["float", "static", "dynamic", "int4"]
    assert names["first.weight"] == ["float", "static", "int4"]  # no kernel computes scales for convolutions
    random = torch.Generator().manual_seed(seed)
    drawn = tuple(int(torch.randint(len(unit.levels), (), generator=random)) for unit in units)
    assembler = Assembler(program, choices, store)
    assembler(choices.problem.uniform("static"))  # another one first
    candidate = assembler(drawn)
    made, _ = run_passes(program, choices.chosen(drawn), context)
    assert noise(candidate, made) <= 0.1 * noise(made, program) + 1e-12
    assert choices.problem.costs(drawn)["bits"] == pytest.approx(resources(made)["bits"], rel=0.02)
    again = Choices.from_json(choices.to_json())
    assert noise(Assembler(program, again, Store(tmp_path))(drawn), candidate) < 1e-12


def test_allocate_chooses_schemes() -> None:
    weights = "quantize_weights(levels=['int8', 'int4'], objective='plain', rounding='nearest')"
    recipe = [*builtin("exact").passes, Allocate(choices=("quantize_static", weights), evaluations=4, samples=2)]
    budget = graphopt.Budget(average_bits=7)
    result = graphopt.optimize(network(), images()[0], recipe, calibration=images(), budget=budget)
    levels = result.trace["allocate"].facts["levels"]
    assert set(levels.values()) <= {"float", "static", "int8", "int4"}
    assert resources(result.program)["bits"] <= 7 * resources(result.program)["parameters"] * 1.02
