"""DropBlocks: what is left is the model without the blocks, criteria choose what they say, mistakes get a sentence."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import targets
import torch
from runtime_files import run_file
from small_decoder import Decoder
from torch import Tensor, nn
from zoo import MODELS

import graphopt
from graphopt import Budget, capture
from graphopt.analysis import macs, parameters
from graphopt.calibration import Batches
from graphopt.calibration.judge import Judge
from graphopt.errors import GraphoptError
from graphopt.ir import Program, Rewriter, operator
from graphopt.ir.verify import verify
from graphopt.passes import DropBlocks
from graphopt.passes.prune.drop_blocks import _Choice
from graphopt.pipeline import Context, run_passes
from graphopt.pipeline.trace import Trace

Given = list[tuple[Tensor, ...]]


class Block(nn.Module):
    """x + strength * down(relu(up(x))), the strength in the weights."""

    def __init__(self, width: int = 6, strength: float = 1.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)
        with torch.no_grad():
            self.down.weight.mul_(strength)
            self.down.bias.mul_(strength)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


STRENGTHS = (1.0, 0.1, 2.0, 0.05, 0.8)


def chain(strengths: tuple[float, ...] = STRENGTHS, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), *(Block(strength=each) for each in strengths), nn.Linear(6, 5))


def rows(count: int = 8, width: int = 6, seed: int = 0) -> Given:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, width, generator=random),) for _ in range(count)]


def dropped(
    module: nn.Module | Program, batches: Given, each: DropBlocks, **context: Any
) -> tuple[Program, Program, Trace]:
    program = module if isinstance(module, Program) else capture(module.eval(), batches[0])
    given = Context(targets.EXACT, calibration=Batches(batches, program), strict=True, **context)
    after, trace = run_passes(program, [each], given)
    verify(after)
    return program, after, trace


def without(model: nn.Sequential, gone: set[int]) -> nn.Sequential:
    return nn.Sequential(*(layer for index, layer in enumerate(model) if index not in gone))


CRITERIA = ("cosine", "influence", "additive", "greedy", "tail")


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_is_left_is_the_model_without_the_blocks(criterion: Any, count: int) -> None:
    model, batches = chain(), rows()
    each = DropBlocks(unit="branches", count=count, criterion=criterion, resolve=False)
    _, after, trace = dropped(model, batches, each)
    kept = [index for index in range(1, 6) if any(name.startswith(f"{index}.") for name in after.weights)]
    assert len(kept) == 5 - count
    smaller = without(model.eval(), set(range(1, 6)) - set(kept))
    for batch in batches:
        torch.testing.assert_close(after(*batch), smaller(*batch))
    assert len(trace["drop_blocks"].facts.get("removed", [])) == count
    expected = {"tail": {3, 4, 5}, "cosine": {1, 3, 5}, "influence": {1, 3, 5}}
    if count == 2 and criterion in expected:
        assert set(kept) == {"tail": {1, 2, 3}}.get(criterion, {1, 3, 5})


@torch.no_grad()
def test_cosine_is_the_mean_over_tokens() -> None:
    model, batches = chain(), rows()
    program = capture(model.eval(), batches[0])
    each = DropBlocks(unit="branches", count=1, criterion="cosine")
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True)
    units = each._units(program, Rewriter(program, "test"))
    found = _Choice(each, program, units, context)._cosines()
    for index, unit in enumerate(units, start=1):
        total, count = 0.0, 0
        for (x,) in batches:
            y = model[:index](x)
            z = model[index](y)
            total += float((1 - torch.nn.functional.cosine_similarity(y, z, -1)).sum())
            count += len(y)
        assert found[unit] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_greedy_with_exchanges_is_as_good_as_every_pair() -> None:
    worse = 0
    for seed in range(2):
        model, batches = chain((1.0, 0.6, 0.8, 0.5, 0.9), seed), rows()
        program, after, _ = dropped(model, batches, DropBlocks(unit="branches", count=2, resolve=False))
        judge = Judge(program, Batches(batches, program), 32)
        pairs = itertools.combinations(range(1, 6), 2)
        every = [judge(capture(without(model, set(pair)).eval(), batches[0])) for pair in pairs]
        assert judge(after) >= min(every) * (1 - 1e-6)
        worse += judge(after) > min(every) * (1 + 1e-6)
    assert worse == 0


def test_the_knapsack_saves_enough_at_the_least_cost() -> None:
    """Blocks of different sizes: the cheapest set is not made of the cheapest blocks."""
    torch.manual_seed(0)
    model = chain()
    for index, inner in ((1, 40), (3, 4), (5, 30)):
        model[index].up, model[index].down = nn.Linear(6, inner), nn.Linear(inner, 6)
    batches = rows()
    program = capture(model.eval(), batches[0])
    limit = 0.6
    each = DropBlocks(unit="branches", criterion="additive", resolve=False)
    _, after, _ = dropped(program, batches, each, budget=Budget(params_ratio=limit))
    assert parameters(after) <= limit * parameters(program)
    judge = Judge(program, Batches(batches, program), 32)
    alone = {i: judge(capture(without(model, {i}).eval(), batches[0])) for i in range(1, 6)}
    sizes = {i: sum(p.numel() for p in model[i].parameters()) for i in range(1, 6)}
    needed = (1 - limit) * parameters(program)
    sets = [chosen for n in range(6) for chosen in itertools.combinations(range(1, 6), n)]
    best = min(sum(alone[i] for i in chosen) for chosen in sets if sum(sizes[i] for i in chosen) >= needed)
    gone = [i for i in range(1, 6) if not any(name.startswith(f"{i}.") for name in after.weights)]
    assert sum(alone[i] for i in gone) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("field", ["macs_ratio", "params_ratio"])
def test_budgets_hold(field: str) -> None:
    program, after, _ = dropped(chain(), rows(), DropBlocks(unit="branches"), budget=Budget(**{field: 0.7}))
    count: Any = macs if field == "macs_ratio" else parameters
    assert count(after) <= 0.7 * count(program)


def test_what_stays_is_fitted_to_the_original() -> None:
    batches = rows(16)
    errors = {}
    for resolve in (False, True):
        program, after, trace = dropped(chain(), batches, DropBlocks(unit="branches", count=1, resolve=resolve))
        judged = rows(8, seed=1)
        errors[resolve] = sum(float((after(*b) - program(*b)).square().sum()) for b in judged)
    assert errors[True] < 0.7 * errors[False]
    assert all(error < 1 for error in trace["drop_blocks"].facts["relative_errors"].values())


def test_fitting_is_least_squares_to_the_original_stream() -> None:
    model, batches = chain((0.3, 0.9)).eval(), rows(16)
    _, after, _ = dropped(model, batches, DropBlocks(unit="branches", count=1, criterion="cosine"))
    x = torch.cat([model[0](*batch) for batch in batches])
    target = model[2](model[1](x)) - x
    hidden = torch.relu(model[2].up(x))
    columns = torch.cat([hidden, torch.ones(len(x), 1)], 1).double()
    solved = torch.linalg.lstsq(columns, target.double()).solution
    fitted = torch.cat([after.weights["2.down.weight"].mT, after.weights["2.down.bias"][None]]).double()
    best, found = ((columns @ each - target).square().sum() for each in (solved, fitted))
    assert float(found) <= float(best) * 1.01


def test_a_linear_map_stands_for_what_is_gone() -> None:
    torch.manual_seed(0)
    model = chain((1.0, 1.0, 1.0)).eval()
    with torch.no_grad():
        model[2].up.bias.fill_(10)  # relu never binds: the branch is linear
    batches = rows(16)
    _, after, trace = dropped(model, batches, DropBlocks(unit="branches", count=1, replace="linear", only=("2",)))
    for batch in rows(4, seed=1):
        torch.testing.assert_close(after(*batch), model(*batch), rtol=2e-2, atol=2e-3)
    assert any("a linear map stands for it" in site.reason for site in trace["drop_blocks"].touched)


class Residual(nn.Module):
    """A residual block of convolutions, with a projection where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(before, after, 3, stride, 1), nn.Conv2d(after, after, 3, 1, 1)
        self.skip = nn.Conv2d(before, after, 1, stride) if stride != 1 or before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.two(torch.relu(self.one(x))) + self.skip(x))


def images(count: int = 6, seed: int = 0) -> Given:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 3, 8, 8, generator=random),) for _ in range(count)]


@pytest.mark.parametrize("replace", ["none", "linear"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_residual_convolutions(criterion: Any, replace: Any) -> None:
    torch.manual_seed(0)
    blocks = Residual(4, 4, 1), Residual(4, 8, 2), Residual(8, 8, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), *blocks, nn.Flatten(), nn.Linear(128, 3))
    program, after, _ = dropped(
        model, images(), DropBlocks(unit="branches", count=1, criterion=criterion, replace=replace)
    )
    assert parameters(after) < parameters(program)
    assert after(*images()[0]).isfinite().all()


class UNet(nn.Module):
    """Down, a residual middle, up, with a skip by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.down = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 8, 2, 2)
        self.middle = nn.Sequential(Residual(8, 8, 1), Residual(8, 8, 1))
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        y = self.up(self.middle(self.down(x)))
        return self.out(torch.cat([x, y], 1))  # type: ignore[no-any-return]


def test_a_unet_loses_a_residual_block() -> None:
    torch.manual_seed(0)
    program, after, trace = dropped(UNet(), images(), DropBlocks(unit="branches", count=1))
    assert len(trace["drop_blocks"].facts["removed"]) == 1
    assert sum(operator(node) == "conv2d" for node in program.nodes) - 2 == sum(
        operator(node) == "conv2d" for node in after.nodes
    )


@pytest.mark.parametrize("post", [False, True])
def test_a_decoder_loses_attention_or_mlp(post: bool) -> None:
    torch.manual_seed(0)
    batches: Given = [(torch.randint(11, (2, 12)),) for _ in range(6)]
    for criterion in CRITERIA:
        program, after, _ = dropped(
            Decoder(post=post), batches, DropBlocks(unit="branches", count=1, criterion=criterion)  # type: ignore[arg-type]
        )
        assert parameters(after) < parameters(program)


@pytest.mark.parametrize("name", ["Llama", "ViT"])
def test_the_zoo(name: str) -> None:
    model, inputs = MODELS[name].build()
    program = capture(model, inputs)
    context = Context(targets.EXACT, calibration=Batches([inputs], program), strict=True)
    after, trace = run_passes(program, [DropBlocks(unit="branches", count=1, resolve=False)], context)
    verify(after)
    assert trace["drop_blocks"].changed and parameters(after) < parameters(program)


def test_the_metric_may_judge() -> None:
    seen = []

    def metric(module: nn.Module) -> float:
        with torch.no_grad():
            seen.append(module)
            return -float((module(*rows()[0]) - 1).square().mean())

    _, after, _ = dropped(chain(), rows(), DropBlocks(unit="branches", count=1, judge="metric"), evaluate=metric)
    assert len(seen) > 5
    assert len(after.weights) < 24


def test_export_and_run(tmp_path: Any) -> None:
    result = graphopt.optimize(
        chain(), rows()[0], recipe="drop_blocks", calibration=rows(), budget=Budget(params_ratio=0.7)
    )
    result.export(tmp_path / "model.onnx")
    (x,) = rows()[0]
    torch.testing.assert_close(run_file(tmp_path / "model.onnx", x), result(x), rtol=1e-4, atol=1e-5)
    assert result.report.parameters.ratio <= 0.7


# Mistakes -------------------------------------------------------------------------------------------------------------


def refused(module: nn.Module, batches: Given, each: DropBlocks, **context: Any) -> str:
    with pytest.raises(GraphoptError) as caught:
        dropped(module, batches, each, **context)
    return str(caught.value)


def test_mistakes_are_sentences() -> None:
    assert "needs to know how much goes" in refused(chain(), rows(), DropBlocks())
    assert "cannot remove 9 branches: there are 5" in refused(chain(), rows(), DropBlocks(unit="branches", count=9))
    said = refused(chain(), rows(), DropBlocks(unit="branches"), budget=Budget(macs_ratio=0.01))
    assert "budget.macs_ratio ≤ 0.01 (it gets down to 0." in said and "removing all 5 branches" in said
    assert "needs a metric" in refused(chain(), rows(), DropBlocks(unit="branches", count=1, judge="metric"))


def test_too_few_rows_to_fit() -> None:
    batches = [(torch.randn(2, 6),)]
    assert "to 2 rows of calibration data" in refused(chain(), batches, DropBlocks(unit="branches", count=1))


def test_no_data() -> None:
    program = capture(chain().eval(), rows()[0])
    with pytest.raises(GraphoptError, match="drop_blocks needs calibration data"):
        run_passes(program, [DropBlocks(unit="branches", count=1)], Context(targets.EXACT, strict=True))


def test_the_tail_needs_no_data() -> None:
    program = capture(chain().eval(), rows()[0])
    each = DropBlocks(unit="branches", count=1, criterion="tail", resolve=False)
    after, _ = run_passes(program, [each], Context(targets.EXACT, strict=True))
    assert parameters(after) < parameters(program)


def test_no_residual_branch() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    _, _, trace = dropped(model, rows(), DropBlocks(count=0))
    assert any("no residual branch was found" in site.reason for site in trace["drop_blocks"].skipped)
    assert "cannot remove 1 layers: there are 0" in refused(model, rows(), DropBlocks(count=1))


def test_only_and_skip() -> None:
    _, after, trace = dropped(chain(), rows(), DropBlocks(unit="branches", count=1, skip=("4",)))
    assert any(name.startswith("4.") for name in after.weights)  # the weakest of all
    assert any("kept by skip" in site.reason for site in trace["drop_blocks"].skipped)
    _, after, _ = dropped(chain(), rows(), DropBlocks(unit="branches", count=1, only=("3",)))
    assert not any(name.startswith("3.") for name in after.weights)


def test_a_branch_that_something_else_reads_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            return self.b(x + y), y

    _, _, trace = dropped(Read(), rows(), DropBlocks(unit="branches", count=0))
    reasons = [site.reason for site in trace["drop_blocks"].skipped]
    assert any("read by more than an addition" in each or "no residual branch" in each for each in reasons)


def test_blocks_by_name() -> None:
    """As `allocate` chooses."""
    program = capture(chain().eval(), rows()[0])
    context = Context(targets.EXACT, calibration=Batches(rows(), program), strict=True)
    after, trace = run_passes(program, [DropBlocks(blocks=("linear_3",), resolve=False)], context)
    assert trace["drop_blocks"].facts["removed"] == ["linear_3"]
    assert parameters(after) < parameters(program)
    message = r"no block 'linear_2' that can go, did you mean 'linear_\d'\?; there are linear_1"
    with pytest.raises(GraphoptError, match=message):
        run_passes(program, [DropBlocks(blocks=("linear_2",))], context)
