"""Prune: widths under a budget, readers fitted anew; what cannot be is said in a sentence."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import targets
import torch
from small_decoder import Decoder
from torch import Tensor, nn

import graphopt
from graphopt import Budget, capture
from graphopt.analysis import macs, parameters
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.ir.verify import verify
from graphopt.passes import Prune
from graphopt.passes.prune.criteria import CRITERIA
from graphopt.pipeline import Context, run_passes
from graphopt.pipeline.trace import Trace
from graphopt.search import Store

Given = list[tuple[Tensor, ...]]
TARGET = dataclasses.replace(targets.EXACT, width_multiple=1)


def pruned(
    module: nn.Module | Program, batches: Given, each: Prune, budget: Budget | None = None, **options: Any
) -> tuple[Program, Program, Trace]:
    program = module if isinstance(module, Program) else capture(module.eval(), batches[0])
    target = dataclasses.replace(TARGET, **options)
    context = Context(target, calibration=Batches(batches, program), budget=budget or Budget(), strict=True)
    after, trace = run_passes(program, [each], context)
    verify(after)
    return program, after, trace


@torch.no_grad()
def noise(program: Program, after: Program, batches: Given) -> float:
    errors = [(after(*batch) - program(*batch)).square().sum() for batch in batches]
    varies = [(program(*batch) - program(*batch).mean()).square().sum() for batch in batches]
    return float(sum(errors) / sum(varies))


class Block(nn.Module):
    """A convolution on two thirds of 12 channels' worth of directions, added to what it read."""

    def __init__(self, channels: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(channels, inner, 3, padding=1), nn.Conv2d(inner, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@functools.cache
def captured(seed: int = 0) -> Program:
    """The network; nothing that is run on it changes it."""
    return capture(network(seed).eval(), images()[0])


@functools.cache
def decoder() -> Program:
    torch.manual_seed(0)
    return capture(Decoder().eval(), tokens()[0])


def tokens() -> Given:
    random = torch.Generator().manual_seed(0)
    return [(torch.randint(11, (2, 12), generator=random),) for _ in range(8)]


def images(count: int = 8, seed: int = 0) -> Given:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, 8, 8, generator=random),) for _ in range(count)]


def redundant(keep: int = 5, seed: int = 0) -> nn.Module:
    """Of 12 inner channels all but `keep` are copies of others: they can go at no cost."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        for weight in (model[0].weight, model[0].bias):
            weight.copy_(weight[torch.arange(12) % keep])  # type: ignore[union-attr]
    return model


def rows(count: int = 8, width: int = 6, seed: int = 0) -> Given:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, width, generator=random),) for _ in range(count)]


def test_copies_go_at_no_cost() -> None:
    program, after, trace = pruned(redundant(), rows(), Prune(ratio=0.58))
    assert after.weights["0.weight"].shape == (5, 6) and after.weights["2.weight"].shape == (4, 5)
    assert noise(program, after, rows(seed=1)) < 1e-6
    assert trace["prune"].facts["widths"] == {"0.out": [12, 5]}
    assert "0.out: 5 of 12 coordinates stay" in [site.reason for site in trace["prune"].touched]


def test_nothing_is_the_identity() -> None:
    for each, budget in ((Prune(ratio=0), None), (Prune(), Budget(macs_ratio=1))):
        _, _, trace = pruned(captured(), images(), each, budget)
        assert not trace["prune"].changed and trace["prune"].diff() == ""


@pytest.mark.parametrize("criterion", ["reconstruction", *CRITERIA])
def test_every_criterion_prunes_and_fitting_helps(criterion: Any) -> None:
    errors = {}
    for resolve in (True, False):
        each = Prune(ratio=0.5, criterion=criterion, streams=False, resolve=resolve)
        program, after, _ = pruned(captured(), images(), each)
        assert macs(after) < 0.75 * macs(program)
        errors[resolve] = noise(program, after, images(seed=1))
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("criterion", ["reconstruction", *CRITERIA])
def test_every_criterion_ranks_streams_queries_and_keys(criterion: Any) -> None:
    each = Prune(criterion=criterion, resolve=False, turn=False)
    program, after, _ = pruned(decoder(), tokens(), each, Budget(params_ratio=0.5))
    assert 0.4 * parameters(program) < parameters(after) <= 0.5 * parameters(program)
    assert torch.isfinite(after(*tokens()[0])).all()


def test_elimination_beats_magnitude() -> None:
    ratios = []
    for seed in range(4):
        found = []
        for criterion in ("reconstruction", "magnitude"):
            program, after, _ = pruned(captured(seed), images(), Prune(ratio=0.5, criterion=criterion, streams=False))  # type: ignore[arg-type]
            found.append(noise(program, after, images(seed=1)))
        ratios.append(found[0] / found[1])
    assert sum(ratios) / len(ratios) < 0.9


@pytest.mark.parametrize(("field", "count"), [("macs_ratio", macs), ("params_ratio", parameters)])
@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_a_budget_holds_and_is_not_overdone(field: str, count: Any, ratio: float) -> None:
    program, after, _ = pruned(captured(), images(), Prune(), Budget(**{field: ratio}))
    assert ratio * 0.85 <= count(after) / count(program) <= ratio


def test_two_budgets_hold_together() -> None:
    program, after, _ = pruned(captured(), images(), Prune(), Budget(macs_ratio=0.7, params_ratio=0.5))
    assert macs(after) <= 0.7 * macs(program) and parameters(after) <= 0.5 * parameters(program)


def test_composes_with_itself() -> None:
    program, once, _ = pruned(captured(), images(), Prune(ratio=0.25))
    context = Context(TARGET, calibration=Batches(images(), once), strict=True)
    twice, _ = run_passes(once, [Prune(ratio=0.5)], context)
    verify(twice)
    assert macs(twice) < macs(once) < macs(program)


def test_budgets_refer_to_what_was_captured() -> None:
    program = captured()
    context = Context(TARGET, calibration=Batches(images(), program), budget=Budget(macs_ratio=0.6), strict=True)
    after, trace = run_passes(program, [Prune(ratio=0.5), Prune()], context)
    assert not trace["prune#2"].changed and macs(after) < 0.6 * macs(program)


@pytest.mark.parametrize("multiple", [2, 4])
def test_widths_are_what_kernels_like(multiple: int) -> None:
    for each, options in ((Prune(multiple=multiple), {}), (Prune(), {"width_multiple": multiple})):
        _, _, trace = pruned(captured(), images(), each, Budget(macs_ratio=0.7), **options)
        widths = [new for _, new in trace["prune"].facts["widths"].values()]
        assert widths and all(width % multiple == 0 for width in widths)


def test_a_decoder_loses_heads_values_and_neurons() -> None:
    _, _, trace = pruned(decoder(), tokens(), Prune(ratio=0.5))
    widths = trace["prune"].facts["widths"]
    halves = {"q.out[0]": [2, 1], "q.out[1]": [2, 1], "v.out[1]": [4, 2], "gate.out": [20, 10], "q.out[2]": [2, 1]}
    assert {name: widths[name] for name in halves} == halves
    assert {tuple(each) for name, each in widths.items() if name not in halves} == {(12, 6)}  # the stream


def test_the_stream_is_taken_back_where_a_reader_adds_to_it() -> None:
    """The last block's reader makes up for what the first one lost: its error is below that of fitting it alone."""
    program, after, trace = pruned(captured(), images(), Prune(ratio=0.5, streams=False))
    alone = pruned(captured(), images(), Prune(ratio=0.5, only=("2", "2.*")))[2]
    both, one = trace["prune"].facts["relative_errors"], alone["prune"].facts["relative_errors"]
    (name,) = one
    assert both[name] < 3 * one[name]
    assert noise(program, after, images(seed=1)) < 0.5


def test_only_and_skip_bound_where() -> None:
    _, _, trace = pruned(captured(), images(), Prune(ratio=0.5, streams=False, skip=("1.up",)))
    assert list(trace["prune"].facts["widths"]) == ["2.up.out"]
    assert any("kept by skip" in site.reason for site in trace["prune"].skipped)
    _, _, trace = pruned(captured(), images(), Prune(ratio=0.5, only=("1.down.weight",)))
    assert list(trace["prune"].facts["widths"]) == ["1.up.out"]


def test_result_does_not_depend_on_spilling() -> None:
    one, two = (pruned(captured(), images(), Prune(ratio=0.5, spill=spill))[1] for spill in (False, True))
    for name, weight in one.weights.items():
        assert torch.equal(weight, two.weights[name])


@pytest.mark.parametrize("kind", ["convolutions", "decoder"])
def test_the_exported_file_has_what_the_report_says(kind: str, tmp_path: Any) -> None:
    import onnx

    torch.manual_seed(0)
    batches = images() if kind == "convolutions" else tokens()
    result = graphopt.optimize(
        network() if kind == "convolutions" else Decoder(), batches[0], recipe=[Prune()], calibration=batches,
        budget=Budget(macs_ratio=0.5),
    )  # fmt: skip
    report = result.export(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    names = set(result.program.weights)
    weights = [each for each in model.graph.initializer if each.name in names]
    assert sum(torch.Size(each.dims).numel() for each in weights) == result.report.parameters.after
    assert report.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert counted_macs(model) == result.report.macs.after <= 0.5 * result.report.macs.before


def counted_macs(model: Any) -> int:
    """Multiply-accumulates of a file, from the shapes that its own tools infer."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = [*inferred.input, *inferred.value_info, *inferred.output]
    sizes = {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in known}
    sizes |= {each.name: list(each.dims) for each in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        made = torch.Size(sizes[node.output[0]]).numel() if node.op_type in ("Conv", "MatMul", "Gemm") else 0
        if node.op_type == "Conv":
            total += made * torch.Size(sizes[node.input[1]][1:]).numel()
        elif made:
            turned = any(each.name == "transA" and each.i for each in node.attribute)
            total += made * sizes[node.input[0]][-2 if turned else -1]
    return total


# Mistakes -------------------------------------------------------------------------------------------------------------


def refused(module: nn.Module | Program, batches: Given, each: Prune, budget: Budget | None = None) -> str:
    with pytest.raises(GraphoptError) as caught:
        pruned(module, batches, each, budget)
    return str(caught.value)


def test_a_budget_that_cannot_be_met_says_how_far_it_gets() -> None:
    said = refused(captured(), images(), Prune(streams=False), Budget(macs_ratio=0.01))
    assert "cannot meet budget.macs_ratio ≤ 0.01 (it gets down to 0." in said and "residual stream" in said


def test_no_budget_is_no_order() -> None:
    assert "needs to know how much goes" in refused(captured(), images(), Prune())


def test_everything_cannot_go() -> None:
    with pytest.raises(GraphoptError, match=r"prune.ratio cannot be 1"):
        Prune(ratio=1)


def test_too_few_rows_to_fit() -> None:
    said = refused(nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 4)), rows(1), Prune(ratio=0.5))
    assert "cannot fit the 101 inputs of linear_1 (2) to 16 rows" in said and "resolve=False" in said


def test_what_has_too_few_rows_is_left_where_others_have_enough() -> None:
    """A linear behind a pool sees one row an image, the convolutions before it many."""
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 200, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(200, 4)).eval()
    data = [(torch.randn(4, 3, 8, 8),) for _ in range(2)]
    result = graphopt.optimize(model, data[0], [Prune(ratio=0.5)], calibration=data)
    record = result.trace["prune"]
    assert [site.node for site in record.skipped if "too few rows" in site.reason] == ["linear"]
    assert record.facts["relative_errors"].keys() == {"conv2d_1"}
    assert result.program.weight("6.weight").shape[1] < 200


def test_few_rows_are_damped() -> None:
    """With half as many rows as inputs a fit is still better than none, on data it has not seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 4))
    errors = {}
    for resolve in (False, True):
        program, after, _ = pruned(model, rows(1), Prune(ratio=0.5, criterion="magnitude", resolve=resolve))
        errors[resolve] = noise(program, after, rows(seed=1))
    assert errors[True] < 0.7 * errors[False]


def test_no_data() -> None:
    program = captured()
    with pytest.raises(GraphoptError, match="prune needs calibration data"):
        run_passes(program, [Prune(ratio=0.5)], Context(TARGET, strict=True))


def test_criteria_that_look_at_weights_alone_need_no_data() -> None:
    program = captured()
    for criterion in ("magnitude", "lamp", "distortion"):
        each = Prune(ratio=0.5, criterion=criterion, resolve=False)  # type: ignore[arg-type]
        after, _ = run_passes(program, [each], Context(TARGET, strict=True))
        assert macs(after) < macs(program)


def test_nan_in_the_data_names_the_place() -> None:
    batches = images()
    batches[3][0][0, 0, 0, 0] = torch.nan
    assert "NaN" in refused(captured(), batches, Prune(ratio=0.5))


def test_what_the_model_returns_and_reads_stays() -> None:
    _, after, trace = pruned(nn.Sequential(nn.Linear(6, 4)), rows(), Prune(ratio=0.5))
    assert after.weights["0.weight"].shape == (4, 6)
    reasons = [site.reason for site in trace["prune"].skipped]
    assert any("where the model returns it" in reason for reason in reasons)
    assert "it has no width that can be pruned" in reasons


class Shared(nn.Module):
    """Two linears write one space, which one weight reads twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.a(x).relu()) + self.read(self.b(x).relu())  # type: ignore[no-any-return]


def test_a_weight_that_two_read_loses_what_adds_least_and_is_not_fitted() -> None:
    torch.manual_seed(0)
    model = Shared()
    program, after, trace = pruned(model, rows(), Prune(ratio=0.5))
    assert trace["prune"].facts["widths"] == {"a.out": [8, 4]} and "relative_errors" not in trace["prune"].facts
    kept = torch.tensor(trace["prune"].facts["kept"]["a.out"])
    assert torch.equal(after.weights["read.weight"], program.weights["read.weight"][:, kept])

    def error(stays: Any) -> float:
        gone = torch.tensor([index not in stays for index in range(8)])
        total = 0.0
        for (x,) in rows():
            for layer in (model.a, model.b):
                total += float((model.read.weight[:, gone] @ layer(x).relu()[:, gone].mT).square().sum())
        return total

    choices = {stays: error(stays) for stays in itertools.combinations(range(8), 4)}
    assert error(tuple(kept.tolist())) < 1.1 * min(choices.values())


def test_of_two_factors_that_differ_along_each_other_one_goes() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).unflatten(-1, (3, 4)).relu()
            return self.b((y * y.mean((-2, -1), keepdim=True)).flatten(-2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    _, after, trace = pruned(Grid(), rows(), Prune(ratio=0.5))
    assert len(trace["prune"].facts["widths"]) == 1 and after.weights["a.weight"].shape[0] < 12
    assert any("may differ along" in site.reason for site in trace["prune"].skipped)


def test_deterministic() -> None:
    one, two = (pruned(captured(), images(), Prune(), Budget(macs_ratio=0.5))[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.weights.values(), two.weights.values(), strict=True))


def test_every_step_down_is_counted_as_the_program_will_be() -> None:
    """Costs of widths, counted without rewriting, are those of the program that is made."""
    from graphopt.analysis.spaces import analyze
    from graphopt.passes.prune.candidates import Costs, find_candidates

    for budget in (0.9, 0.6, 0.4):
        program, after, trace = pruned(captured(), images(), Prune(), Budget(macs_ratio=budget))
        analysis = analyze(program)
        made = trace["prune"].facts["widths"]
        spaces = [each.space for each in find_candidates(program, analysis, lambda *_: None)]
        widths = {space: made[space.name][1] for space in spaces if space.name in made}
        costs = Costs(program, analysis)
        assert costs.macs(widths) == macs(after) and costs.parameters(widths) == parameters(after)


def test_widths_by_name() -> None:
    """As `allocate` chooses; spaces that are not named stay whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    batches = [(torch.randn(32, 6),) for _ in range(4)]
    program = capture(model, batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True)
    names = list(run_passes(program, [Prune(ratio=0.5, multiple=1)], context)[1]["prune"].facts["widths"])
    _, trace = run_passes(program, [Prune(widths=(f"{names[0]}=9",))], context)
    (width,) = trace["prune"].facts["widths"].values()
    assert width[1] == 9
    with pytest.raises(GraphoptError, match="no space 'nothing' that can lose width"):
        run_passes(program, [Prune(widths=("nothing=3",))], context)
    with pytest.raises(GraphoptError, match="cannot have the width '99'; it has"):
        run_passes(program, [Prune(widths=(f"{names[0]}=99",))], context)
    with pytest.raises(GraphoptError, match="has no levels to choose from; give shares="):
        Prune().offers(program, context, Store(Path()))
