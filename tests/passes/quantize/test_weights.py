"""QuantizeWeights: what it computes is what its parts say, on linears, convolutions, tables, and everything shared."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import targets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoder import Decoder
from torch import Tensor, nn

from graphopt import capture
from graphopt.analysis.cost import weight_bits
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program, arguments, operator
from graphopt.passes import QuantizeWeights
from graphopt.pipeline import Context, run_passes
from graphopt.pipeline.trace import Trace
from graphopt.quantization.grids import known_grids
from graphopt.quantization.objectives import Gram
from graphopt.quantization.solve import quantize_matrix

NEAREST: dict[str, Any] = {"objective": "plain", "rounding": "nearest"}


def optimized(
    module: nn.Module | Program, batches: list[tuple[Tensor, ...]], each: QuantizeWeights
) -> tuple[Program, Program, Trace]:
    program = module if isinstance(module, Program) else capture(module.eval(), batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True)
    after, trace = run_passes(program, [each], context)
    return program, after, trace


def noise(program: Program, after: Program, batches: list[tuple[Tensor, ...]]) -> float:
    errors = [(after(*batch) - program(*batch)).square().sum() for batch in batches]
    return float(sum(errors) / sum(program(*batch).square().sum() for batch in batches))


def rows(count: int = 6, width: int = 16, seed: int = 0) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -1, width)
    return [(torch.randn(24, width, generator=generator) @ mix,) for _ in range(count)]


def stack(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_a_linear_is_what_the_solver_makes_of_its_matrix() -> None:
    module, batches = stack(16, 8), rows()
    each = QuantizeWeights(grid="int4", group_size=4)
    _, after, trace = optimized(module, batches, each)
    gram = Gram(1, 16)
    for (x,) in batches:
        gram.update(x[None], "x")
    weight = module[0].weight.detach()  # type: ignore[index, union-attr]
    made = quantize_matrix(weight.mT[None], each.choices(False), gram)
    (x,) = batches[0]
    expected = torch.nn.functional.linear(x, made.value()[0].mT, module[0].bias)  # type: ignore[index, arg-type]
    torch.testing.assert_close(after(x), expected)
    bias = 8 * 32
    assert weight_bits(after) == made.bits() + bias
    assert [site.reason for site in trace["quantize_weights"].touched] == ["linear on int4 in groups of 4"]
    facts = trace["quantize_weights"].facts["relative_errors"]
    assert 0 < facts["0.weight"] < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"columns": 0.1},
        {"outliers": 0.05},
        {"rank": 3},
        {"columns": 0.1, "outliers": 0.05, "rank": 2},
        {"grid": "codebook2", "group_size": 0, "columns": 0.1},
    ],
    ids=str,
)
def test_side_information_in_the_graph_is_that_of_the_solver(options: dict[str, Any]) -> None:
    module, batches = stack(16, 8), rows()
    each = QuantizeWeights(**({"grid": "int3", "group_size": 8} | options))
    _, after, trace = optimized(module, batches, each)
    gram = Gram(1, 16)
    for (x,) in batches:
        gram.update(x[None], "x")
    made = quantize_matrix(module[0].weight.detach().mT[None], each.choices(False), gram)  # type: ignore[index, union-attr]
    (x,) = batches[0]
    expected = torch.nn.functional.linear(x, made.value()[0].mT, module[0].bias)  # type: ignore[index, arg-type]
    torch.testing.assert_close(after(x), expected, rtol=1e-4, atol=1e-5)
    assert weight_bits(after) == made.bits() + 8 * 32
    if "rank" in options:
        assert "a correction of rank" in trace["quantize_weights"].touched[0].reason


def test_each_choice_gains_over_the_plain_one() -> None:
    module, batches = stack(16, 32, 32, 8), rows(12)
    base: dict[str, Any] = {"grid": "int3", "group_size": 8, "range": "minmax"}

    def loss(**options: Any) -> float:
        return noise(*optimized(module, batches, QuantizeWeights(**(base | options)))[:2], batches)

    nearest = loss(**NEAREST)
    alone = loss(sweeps=0, sequential=False)
    swept = loss(range="mse")
    assert alone < 0.8 * nearest
    assert swept < 0.95 * alone


def test_later_layers_see_what_the_quantized_ones_before_give() -> None:
    """With drift the second layer makes up for the first: closer to the original than without."""
    module, batches = stack(16, 24, 8), rows(20)

    def loss(**options: Any) -> float:
        each = QuantizeWeights(grid="int2", group_size=8, **options)
        return noise(*optimized(module, batches, each)[:2], batches)

    assert loss() < loss(drift=False) * 1.02
    assert loss() < loss(sequential=False)


@pytest.mark.parametrize("options", [{}, {"conv_group_size": 6}, {"rank": 2}, {"outliers": 0.1}], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolutions(options: dict[str, Any], groups: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(6, 12, 3, 2, 1, groups=groups), nn.ReLU(), nn.Conv2d(12, 4, 1))
    batches = [(torch.randn(3, 6, 9, 8),) for _ in range(4)]
    program, after, trace = optimized(module, batches, QuantizeWeights(grid="int4", **options))
    if options.get("rank") and groups > 1:
        assert "without groups" in trace["quantize_weights"].skipped[0].reason
    else:
        assert weight_bits(after) < 0.5 * weight_bits(program)
        assert len(trace["quantize_weights"].touched) == 2
        assert not [site.reason for site in trace["quantize_weights"].skipped]
    assert 0 < noise(program, after, batches) < 0.02


def test_columns_of_a_convolution_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(6, 12, 3))
    _, _, trace = optimized(module, [(torch.randn(3, 6, 9, 8),)], QuantizeWeights(columns=0.1))
    assert trace["quantize_weights"].skipped[0].reason.startswith("columns are kept for linears; skip it")


@functools.cache
def small_decoder() -> Program:
    torch.manual_seed(0)
    return capture(Decoder().eval(), (torch.randint(11, (2, 5)),))


@settings(max_examples=14, deadline=None)
@given(
    st.sampled_from([name for name, form in known_grids().items() if form.bits <= 8]),
    st.sampled_from([0, -1, 5, 64]),
    st.booleans(),
    st.sampled_from(
        [
            NEAREST, {}, {"rounding": "nearest"}, {"order": "group"}, {"sequential": False}, {"spill": True},
            {"objective": "attention"}, {"objective": "gradient"}, {"objective": "fisher"}, {"rounding": "adaround"},
        ]
    ),
    st.sampled_from([{}, {"columns": 0.1}, {"outliers": 0.01}, {"rank": 2}]),
)
def test_every_combination_runs_on_a_decoder(
    name: str, group: int, symmetric: bool, rounding: dict[str, Any], side: dict[str, Any]
) -> None:
    batches = [(torch.randint(11, (2, 5)),) for _ in range(2)]
    each = QuantizeWeights(grid=name, group_size=group, symmetric=symmetric, **rounding, **side)
    program, after, trace = optimized(small_decoder(), batches, each)
    assert len(trace["quantize_weights"].touched) == 8
    assert bool(after(*batches[0]).isfinite().all())
    loose = 3.0 if known_grids()[name].bits < 2 else 1.2
    assert noise(program, after, batches) < loose


def test_spilling_changes_nothing() -> None:
    torch.manual_seed(0)
    module, batches = Decoder(), [(torch.randint(11, (2, 5)),) for _ in range(3)]
    kept = optimized(module, batches, QuantizeWeights(grid="int3", group_size=4))[1]
    spilled = optimized(module, batches, QuantizeWeights(grid="int3", group_size=4, spill=True))[1]
    assert all(torch.equal(kept.weights[name], spilled.weights[name]) for name in kept.weights)


def test_the_loss_decides_where_it_is_asked() -> None:
    """A loss that looks at one output alone: that output keeps more of its accuracy than with equal care for all."""
    module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    batches = rows(16)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        out: Tensor = model(*batch)[:, 3].square().sum()
        return out

    def noise_of_that(objective: str) -> float:
        program = capture(module.eval(), batches[0])
        context = Context(targets.EXACT, calibration=Batches(batches, program), loss=loss, strict=True)
        each = QuantizeWeights(grid="int3", group_size=8, drift=False, objective=objective, only=("0",))  # type: ignore[arg-type]
        after, _ = run_passes(program, [each], context)
        return sum(float((after(*b) - program(*b))[:, 3].square().sum()) for b in batches)

    # Only the first layer is rounded: its errors are free wherever the output that counts does not see them.
    assert noise_of_that("fisher") < 0.5 * noise_of_that("gram")


def test_the_trace_names_sites_whose_tokens_all_count_alike() -> None:
    batches = rows(2)
    _, _, trace = optimized(stack(16, 8), batches, QuantizeWeights(objective="attention", group_size=4))
    assert trace["quantize_weights"].facts["without_token_weights"] == ["linear"]
    _, _, trace = optimized(stack(16, 8), batches, QuantizeWeights(objective="fisher", group_size=4))
    facts = trace["quantize_weights"].facts
    assert "without_token_weights" not in facts
    assert facts["bits"] == {"0.weight": 4 + (16 + 4) / 4}


# What is shared -----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One linear, read in two places with different inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shared(self.first(x).relu() * 3) + self.shared(x)
        return out


def test_a_shared_weight_is_rounded_once_for_all_its_inputs() -> None:
    batches = rows(10)
    program, after, trace = optimized(Twice(), batches, QuantizeWeights(grid="int3", group_size=8))
    codes = {arguments(node)["codes"] for node in after.graph.nodes if operator(node) == "graphopt.dequantize"}
    assert len(codes) == 2
    assert len(trace["quantize_weights"].touched) == 3
    nearest = optimized(Twice(), batches, QuantizeWeights(grid="int3", group_size=8, **NEAREST))[1]
    assert noise(program, after, batches) < 0.7 * noise(program, nearest, batches)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(ids).tanh())
        return out


@pytest.mark.parametrize("group", [0, 8])
def test_a_tied_head_shares_its_codes_with_the_table_or_stays(group: int) -> None:
    batches = [(torch.randint(11, (4, 6)),) for _ in range(3)]
    _, after, trace = optimized(Tied(), batches, QuantizeWeights(group_size=group))
    assert "also the table of embedding; give embeddings='int8'" in trace["quantize_weights"].skipped[0].reason
    program, after, trace = optimized(Tied(), batches, QuantizeWeights(group_size=group, embeddings="int4"))
    assert len(trace["quantize_weights"].touched) == 2
    assert sum(value.dtype == torch.int8 and value.numel() == 11 * 16 for value in after.weights.values()) == 1
    assert noise(program, after, batches) < 0.05


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "mxfp4"])
def test_tables_of_embeddings(name: str) -> None:
    torch.manual_seed(0)
    batches = [(torch.randint(11, (2, 5)),)]
    program, after, _ = optimized(Decoder(width=32), batches, QuantizeWeights(embeddings=name))
    assert after.weights["table.weight"].dtype == known_grids()[name].storage
    assert noise(program, after, batches) < 0.2
    with pytest.raises(GraphoptError, match="its tables are for linears"):
        QuantizeWeights(embeddings="codebook4")


def test_a_weight_that_others_read_is_not_stored_twice() -> None:
    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.one(x) + (self.one.weight * x.mean()).sum()
            return out

    _, _, trace = optimized(Penalized(), rows(2), QuantizeWeights())
    assert trace["quantize_weights"].skipped[0].reason == "one.weight is also read by mul, and would be stored twice"


# Bad input ----------------------------------------------------------------------------------------------------


def test_odd_sizes() -> None:
    """Smaller than a group, not divisible by one, a single channel, a single input."""
    module, batches = stack(16, 70, 1, 5), rows(4)
    program, after, trace = optimized(module, batches, QuantizeWeights(group_size=64))
    assert len(trace["quantize_weights"].touched) == 3
    assert noise(program, after, batches) < 0.05


@pytest.mark.parametrize("value", [0.0, 0.5], ids=["zeros", "constant"])
def test_rows_without_variety(value: float) -> None:
    module, batches = stack(16, 8), rows(4)
    with torch.no_grad():
        module[0].weight[2] = value  # type: ignore[index, operator]
        module[0].weight[:, 3] = value  # type: ignore[index, operator]
    program, after, _ = optimized(module, batches, QuantizeWeights(group_size=4))
    assert noise(program, after, batches) < 0.02


@pytest.mark.parametrize("samples", [1, 3])
def test_fewer_samples_than_inputs(samples: int) -> None:
    module = stack(16, 8)
    batches = [(torch.randn(samples, 16),)]
    program, after, _ = optimized(module, batches, QuantizeWeights(group_size=4))
    other = rows(4)
    assert noise(program, after, other) < 0.05


def test_nan_in_one_batch_names_the_layer() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.inner(x).log())
            return out

    with pytest.raises(GraphoptError, match="at the input of linear_1; check the calibration data, or keep that place"):
        optimized(Logarithm(), rows(2), QuantizeWeights())


def test_weights_that_are_not_finite_stay() -> None:
    batches = rows(2)
    broken = torch.full((4, 8), float("nan"))
    program = capture(stack(16, 8, 4).eval(), batches[0]).map_weights(lambda n, w: broken if n == "2.weight" else w)
    _, trace = run_passes(program, [QuantizeWeights()], Context(targets.EXACT, calibration=Batches(batches, program)))
    assert trace["quantize_weights"].skipped[0].reason == "its weight 2.weight holds NaN or infinity"
    assert len(trace["quantize_weights"].touched) == 1


def test_nothing_to_do_and_twice_is_once() -> None:
    _, _, trace = optimized(nn.Sequential(nn.ReLU()), rows(1), QuantizeWeights())
    assert trace["quantize_weights"].skipped[0].reason == "it has no weight to quantize"
    module, batches = stack(16, 8), rows(1)
    program = capture(module.eval(), batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True)
    _, trace = run_passes(program, [QuantizeWeights(), QuantizeWeights()], context)
    assert not trace["quantize_weights#2"].touched


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "int44"}, "quantize_weights.grid: there is no grid called 'int44', did you mean"),
        ({"objective": "plain"}, "rounding='gptq' weighs inputs against each other; give objective='gram'"),
        ({"range": "entropy", "group_size": 64}, "take range='mse'"),
        ({"columns": 1.5}, "cannot be 1.5"),
    ],
)
def test_choices_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        QuantizeWeights(**options)


def test_needs_data_unless_plain() -> None:
    program = capture(stack(16, 8).eval(), rows(1)[0])
    with pytest.raises(GraphoptError, match="quantize_weights needs calibration data"):
        run_passes(program, [QuantizeWeights()], Context(targets.EXACT, strict=True))
    after, _ = run_passes(program, [QuantizeWeights(**NEAREST)], Context(targets.EXACT, strict=True))
    assert weight_bits(after) < weight_bits(program) / 4


def test_every_weight_on_a_grid_of_its_own() -> None:
    """As `allocate` chooses; a weight that is not named takes the common grid, and float leaves one as it is."""
    module, batches = stack(16, 8, 12, 4), rows()
    each = QuantizeWeights(grid="int8", grids=("0.weight=int4", "2.weight=float"), group_size=0, **NEAREST)
    program, after, trace = optimized(module, batches, each)
    formats = {n.target: f for n in after.graph.nodes for u in n.users if (f := arguments(u).get("format"))}
    coded = {name: form for name, form in formats.items() if name.endswith("weight")}
    assert coded == {"0.weight": "int4", "4.weight": "int8"}
    assert after.weight("2.weight") is program.weight("2.weight")
    assert [site.reason for site in trace["quantize_weights"].skipped] == ["kept float by grids"]
    with pytest.raises(GraphoptError, match=r"quantize_weights.grids: there is no grid called 'int9'"):
        QuantizeWeights(grids=("0.weight=int9",))
    with pytest.raises(GraphoptError, match=r"quantize_weights.grids: 'int4' is no name=grid"):
        QuantizeWeights(grids=("int4",))
