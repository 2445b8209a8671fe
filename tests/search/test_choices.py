"""What passes offer, and candidates put together from it: the same as the passes themselves would make."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import targets
import torch
from small_decoder import Decoder
from torch import Tensor, nn

from graphopt import capture
from graphopt.analysis import resources
from graphopt.calibration import Batches
from graphopt.calibration.judge import Judge, divergence, targets_of
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.passes import Canonicalize, DropBlocks, QuantizeWeights
from graphopt.pipeline import Context, Pass, run_passes
from graphopt.search import (
    Assembler,
    Assignment,
    Choices,
    EffectsTask,
    Evaluator,
    LossTask,
    Pool,
    Store,
    StoredCandidates,
    gathered,
)

LEVELS = QuantizeWeights(levels=("int8", "int4"), objective="plain", rounding="nearest", group_size=0)
DROPS = DropBlocks(unit="branches", resolve=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Block(), Block(), nn.Linear(8, 5)).eval()


@pytest.fixture(name="made")
def fixture_made(tmp_path: Path) -> tuple[Program, Context, Choices, Store]:
    return offered(network(), [DROPS, LEVELS], [(torch.randn(16, 6),) for _ in range(4)], tmp_path)


@torch.no_grad()
def offered(
    module: nn.Module, passes: list[Pass], data: list[tuple[Tensor, ...]], folder: Path
) -> tuple[Program, Context, Choices, Store]:
    program, _ = run_passes(capture(module, data[0]), [Canonicalize()], Context(targets.EXACT))
    context = Context(targets.EXACT, calibration=Batches(data, program))
    store = Store(folder)
    return program, context, gathered(passes, program, context, store, resources(program)), store


def drawn(choices: Choices, seed: int) -> Assignment:
    random = torch.Generator().manual_seed(seed)
    levels = [int(torch.randint(len(unit.levels), (), generator=random)) for unit in choices.problem.units]
    return choices.problem.settled(levels)


@pytest.mark.parametrize("seed", range(6))
def test_a_candidate_is_what_the_passes_make(seed: int, made: tuple[Program, Context, Choices, Store]) -> None:
    program, context, choices, store = made
    assembler = Assembler(program, choices, store)
    for assignment in (drawn(choices, 100 + seed), drawn(choices, seed)):  # the second after another one
        swapped = assembler(assignment)
        done, _ = run_passes(program, choices.chosen(assignment), context)
        for flat in context.needed_calibration("").first(2):
            torch.testing.assert_close(swapped.run(flat), done.run(flat))


@pytest.mark.parametrize("seed", range(6))
def test_costs_are_those_of_the_program(seed: int, made: tuple[Program, Context, Choices, Store]) -> None:
    program, context, choices, _ = made
    assignment = drawn(choices, seed)
    done, _ = run_passes(program, choices.chosen(assignment), context)
    found, true = choices.problem.costs(assignment), resources(done)
    assert found["bits"] == pytest.approx(true["bits"])
    assert found["macs"] == pytest.approx(true["macs"])
    assert choices.problem.costs(choices.problem.start) == pytest.approx(resources(program))


def test_a_decoder_with_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Decoder(width=16).eval()
    module.head.weight = module.table.weight
    passes: list[Pass] = [QuantizeWeights(levels=("int4", "int2"), embeddings="int8"), DropBlocks(resolve=False)]
    data = [(torch.randint(11, (2, 6)),) for _ in range(3)]
    program, _, choices, store = offered(module, passes, data, tmp_path)
    units = [unit.name for unit in choices.problem.units]
    assert units.count("table.weight") == 1
    assembler = Assembler(program, choices, store)
    for seed in range(4):
        assert all(each.isfinite().all() for each in assembler(drawn(choices, seed)).run([data[0][0]]))


def test_what_stays_is_fitted_when_a_block_goes(tmp_path: Path) -> None:
    data = [(torch.randn(16, 6),) for _ in range(4)]
    program, context, choices, store = offered(network(), [DropBlocks(unit="branches"), LEVELS], data, tmp_path)
    assembler, start = Assembler(program, choices, store), choices.problem.start
    blocks = [at for at, unit in enumerate(choices.problem.units) if unit.levels[1].name == "goes"]
    fitted = [name for at in blocks for name in store.get(choices.problem.units[at].name, "goes")]
    assert len(blocks) == 2 and "2.down.weight" in fitted
    for at in blocks:
        assignment = choices.problem.settled([int(each == at) for each in range(len(start))])
        made, _ = run_passes(program, choices.chosen(assignment), context)
        (swapped,), (done,) = assembler(assignment).run([data[0][0]]), made.run([data[0][0]])
        torch.testing.assert_close(swapped, done)


def test_from_json_is_the_inverse(made: tuple[Program, Context, Choices, Store]) -> None:
    choices = made[2]
    assert Choices.from_json(choices.to_json()) == choices


def test_two_processes_judge_what_this_one_does(made: tuple[Program, Context, Choices, Store]) -> None:
    program, context, choices, store = made
    batches = context.needed_calibration("").first(3)
    kept = StoredCandidates.keep(store.folder, "key", program, program, choices, batches, 0, lambda module: 3.0)
    assignments = [drawn(choices, seed) for seed in range(5)]
    one, two = Evaluator(choices.problem, kept), Evaluator(choices.problem, kept, Pool(2))
    judge, assembler = Judge.of(batches, targets_of(program, batches)), Assembler(program, choices, store)
    expected = [sum(judge.piece(assembler(each), at) for at in range(3)) / 3 for each in assignments]
    assert one.losses(assignments) == two.losses(assignments) == pytest.approx(expected)
    assert one.losses([choices.problem.start]) == [0.0]
    assert one.metric(assignments[:2]) == two.metric(assignments[:2]) == [3.0, 3.0]
    first = judge.piece(assembler(assignments[0]), 0)
    assert kept.load()(LossTask(assignments[0], (0, 1, 2), bound=0.0)) == [pytest.approx(first)]


def test_effects_say_what_two_changes_lose_together(made: tuple[Program, Context, Choices, Store]) -> None:
    """|z|^2 is the loss, and 2 <z, z'> what two units lose beyond the sum, for small changes."""
    program, context, choices, store = made
    batches = context.needed_calibration("").first(1)
    kept = StoredCandidates.keep(store.folder, "key", program, program, choices, batches, 0, None)
    problem = choices.problem
    weights = [at for at, unit in enumerate(problem.units) if unit.name.endswith("weight")][:3]
    single = [tuple(1 if at == unit else 0 for at in range(len(problem.units))) for unit in weights]
    products = torch.tensor(kept.load()(EffectsTask(tuple(single), 0)))
    evaluator = Evaluator(problem, kept)
    alone = evaluator.losses(single)
    torch.testing.assert_close(products.diagonal(), torch.tensor(alone, dtype=products.dtype), rtol=0.02, atol=0)
    both = tuple(max(a, b) for a, b in zip(single[0], single[1], strict=True))
    (together,) = evaluator.losses([both])
    assert together == pytest.approx(alone[0] + alone[1] + 2 * float(products[0, 1]), rel=0.05)


def test_passes_that_offer_nothing_or_the_same(tmp_path: Path) -> None:
    data = [(torch.randn(16, 6),)]
    with pytest.raises(GraphoptError, match="canonicalize has nothing to choose from"):
        offered(network(), [Canonicalize()], data, tmp_path)
    with pytest.raises(GraphoptError, match=r"two passes offer the level 'int8' for 0.weight"):
        offered(network(), [LEVELS, LEVELS], data, tmp_path)
    with pytest.raises(GraphoptError, match="has no levels to choose from; give levels="):
        offered(network(), [QuantizeWeights()], data, tmp_path)
    with pytest.raises(GraphoptError, match=r"quantize_weights.levels: there is no grid called 'int9'"):
        QuantizeWeights(levels=("int9",))


def test_a_full_disk_is_one_sentence(made: tuple[Program, Context, Choices, Store], monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file: no space")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(GraphoptError, match=r"cannot write .*level-.*\(.*\); free some space"):
        made[3].put("unit", "level", {"w": torch.ones(1)})


def test_a_divergence_does_not_vanish_in_rounding() -> None:
    torch.manual_seed(0)
    target = torch.randn(64, 10)
    for size in (1e-5, 1e-3, 1e-1, 10.0):
        other = target + size * torch.randn(64, 10)
        expected, found = (each.double().log_softmax(-1) for each in (target, other))
        true = float((expected.exp() * (expected - found)).sum())
        assert float(divergence(other, target)) == pytest.approx(true, rel=0.02)
    assert float(divergence(target, target)) == 0.0
    masked = target.index_fill(-1, torch.tensor([3]), -math.inf)
    assert float(divergence(masked, masked)) == pytest.approx(0.0, abs=1e-4)


def test_what_a_target_computes_as_one_is_decided_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [(torch.randint(11, (2, 6)),) for _ in range(2)]
    program, _ = run_passes(capture(Decoder(width=16).eval(), data[0]), [Canonicalize()], Context(targets.EXACT))
    target = dataclasses.replace(targets.EXACT, merges_readers=True)
    context, store = Context(target, calibration=Batches(data, program)), Store(tmp_path)
    passes: list[Pass] = [LEVELS, DropBlocks(unit="branches", resolve=False)]
    with torch.no_grad():
        choices = gathered(passes, program, context, store, resources(program))
    members = {names for names in choices.members if len(names) > 1}
    assert members == {("q.weight", "k.weight", "v.weight"), ("gate.weight", "up.weight")}
    (unit,) = [at for at, each in enumerate(choices.problem.units) if each.name == "gate.weight"]
    assert choices.problem.units[unit].levels[0].costs["parameters"] == 2 * 16 * 20
    assignment = choices.problem.settled([1 if at == unit else 0 for at in range(len(choices.problem.units))])
    assert choices.levels_of(assignment)[0] == {"gate.weight": "int8", "up.weight": "int8"}
    assert set(choices.weights_of(unit, 1, store)) == {"gate.weight", "up.weight"}
    assert choices.problem.costs(choices.problem.start) == pytest.approx(resources(program))
    assert Choices.from_json(choices.to_json()) == choices
