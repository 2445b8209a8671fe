"""Ranges, GPTQ, coordinate descent, codebooks and side information, each against brute force or a closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.quantization.codebooks import learned_table
from graphopt.quantization.coding import Coding, Form, WeightRange, fit
from graphopt.quantization.grids import grid, known_grids
from graphopt.quantization.matrices import patches
from graphopt.quantization.objectives import Gram, damped
from graphopt.quantization.rounding import (
    descend,
    objective,
    prepare,
    refit_scales,
    refit_table,
    round_with_feedback,
)
from graphopt.quantization.rounding.gptq import Order, feedback, input_order
from graphopt.quantization.solve import Choices, Quantized, quantize_matrix, relative_error


def drawn_gram(inputs: int, seed: int, parts: int = 1, rows: int = 0) -> Gram:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, inputs)
    x = torch.randn(parts, rows or 8 * inputs, inputs, generator=generator, dtype=torch.float64) @ mix
    gram = Gram(parts, inputs)
    gram.update(x, "x")
    return gram


def drawn_weight(inputs: int, channels: int, seed: int, parts: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(parts, inputs, channels, generator=generator, dtype=torch.float64)


def coding_of(weight: Tensor, name: str, group: int = 0, symmetric: bool = True) -> Coding:
    return fit(weight, Form(grid(name), group, symmetric, half_scales=False))


# Ranges -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["int4", "uint3", "int8", "e2m1", "ternary", "nf4"]),
    st.sampled_from([-1, 0, 2, 3, 16]),
    st.booleans(),
    st.sampled_from(["minmax", "percentile", "mse"]),
    st.integers(0, 1000),
)
def test_ranges_hold_zero_and_mse_is_no_worse(
    name: str, group: int, symmetric: bool, range: WeightRange, seed: int
) -> None:
    weight = drawn_weight(7, 5, seed, parts=2)
    form = Form(grid(name), group, symmetric, range, percentile=90)
    coding = fit(weight, form)
    assert coding.scale.shape == (2, 1 if group <= 0 or group > 7 else -(-7 // group), 5)
    assert bool((coding.scale > 0).all())
    assert torch.equal(coding.nearest(torch.zeros_like(weight)), torch.zeros_like(weight))
    if group < 0:
        assert bool((coding.scale == coding.scale[:1, :, :1]).all())
    if range == "mse":
        plain = fit(weight, Form(grid(name), group, symmetric, "minmax"))
        cost, other = ((each.nearest(weight) - weight).square().sum() for each in (coding, plain))
        assert cost <= other * (1 + 2e-3)  # scales in float16


def test_minmax_by_hand() -> None:
    weight = torch.tensor([[[-3.0, 0.0], [1.0, 0.0], [5.0, 2.0]]], dtype=torch.float64)
    coding = fit(weight, Form(grid("uint4"), 2, symmetric=False))
    assert coding.scale.shape == (1, 2, 2)
    torch.testing.assert_close(
        coding.scale[0], torch.tensor([[4 / 15, 1], [5 / 15, 2 / 15]], dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert coding.zero_point is not None
    assert coding.zero_point[0].tolist() == [[11, 0], [0, 0]]


def test_mse_finds_the_best_of_a_fine_search() -> None:
    weight = torch.randn(1, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[0, 3] = 9
    found = fit(weight, Form(grid("int4"), range="mse", half_scales=False))
    scales = torch.linspace(0.02, 1.0, 4000, dtype=torch.float64) * 9 / 7
    costs = torch.stack([(grid("int4").nearest(weight, s) - weight).square().sum() for s in scales])
    cost = (found.nearest(weight) - weight).square().sum()
    assert cost <= costs.min() * 1.05


def test_percentile_of_a_channel() -> None:
    weight = torch.arange(1.0, 101)[None, :, None].double()
    coding = fit(weight, Form(grid("int8"), range="percentile", percentile=95, half_scales=False))
    assert float(coding.scale) == pytest.approx(95 / 127)


def test_entropy_clips_an_outlier_and_refuses_groups() -> None:
    weight = drawn_weight(4000, 1, 0)
    weight[0, 0] = 40
    coding = fit(weight, Form(grid("int8"), range="entropy"))
    assert float(coding.scale) < 20 / 127
    with pytest.raises(GraphoptError, match="range='mse'"):
        Form(grid("int8"), 64, range="entropy")
    with pytest.raises(GraphoptError, match="for integer grids, not e2m1"):
        fit(weight, Form(grid("e2m1"), range="entropy"))


def test_block_formats_want_their_block() -> None:
    with pytest.raises(GraphoptError, match="mxfp4 has a scale for 32 elements; give group_size=32"):
        Form(grid("mxfp4"), 64)


def test_tiny_channels_do_not_cost_the_others_their_sixteen_bits() -> None:
    weight = torch.tensor([1.0, 1e-6, 0.0])[None, None]
    assert fit(weight, Form(grid("int8"))).scale.flatten().tolist() == pytest.approx([1 / 127, 2**-16, 1], rel=1e-3)
    tiny = fit(weight * 1e-6, Form(grid("int8")))  # all of it is small: float32 it is
    assert tiny.scale.flatten()[0].item() == pytest.approx(1e-6 / 127, rel=1e-6)


# Gram matrices ------------------------------------------------------------------------------------------------


def test_gram_is_the_weighted_mean_of_outer_products() -> None:
    x, r = torch.randn(2, 50, 4), torch.rand(2, 50)
    gram = Gram(2, 4)
    gram.update(x[:, :20], "x", r[:, :20])
    gram.update(x[:, 20:], "x", r[:, 20:])
    expected = torch.einsum("pt,pti,ptj->pij", r, x, x) / r.sum(1)[:, None, None]
    torch.testing.assert_close(gram.mean.float(), expected)
    assert gram.count == 50


def test_half_precision_inputs_do_not_overflow() -> None:
    gram = Gram(1, 2)
    gram.update(torch.full((1, 9, 2), 60000.0, dtype=torch.float16), "x")
    assert bool(gram.mean.isfinite().all())
    assert float(gram.mean[0, 0, 1]) == pytest.approx(60000.0**2, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_have_no_square_are_refused(bad: float) -> None:
    x = torch.randn(1, 5, 3)
    x[0, 2, 1] = bad
    with pytest.raises(GraphoptError, match="at the input of head; check the calibration data"):
        Gram(1, 3).update(x, "head")


@pytest.mark.parametrize("case", ["nothing", "one sample", "zero input", "twins"])
def test_damping_makes_any_gram_positive(case: str) -> None:
    x = {
        "nothing": torch.zeros(1, 3, 6),
        "one sample": torch.randn(1, 1, 6),
        "zero input": torch.randn(1, 30, 6) * torch.tensor([1, 1, 0, 1, 0, 1]),
        "twins": torch.randn(1, 30, 3).repeat(1, 1, 2),
    }[case].double()
    gram = Gram(1, 6)
    gram.update(x, "x")
    made = damped(gram.mean, 0.0)
    assert float(torch.linalg.eigvalsh(made).min()) > 0
    weight = drawn_weight(6, 4, 0)
    quantized = quantize_matrix(weight, Choices(Form(grid("int4"), 3), "gptq", sweeps=2), gram)
    assert bool(quantized.value().isfinite().all())
    # Where data says nothing, the weight is rounded as it is.
    assert float((quantized.value() - weight).abs().max()) < 2.5 * float(quantized.coding.scale.max())


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("conv1d", {}),
        ("conv2d", {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
        ("conv2d", {"groups": 2, "padding": "same"}),
        ("conv2d", {"groups": 4, "padding": "valid"}),
        ("conv3d", {"padding": 1, "stride": 2}),
    ],
)
def test_patches_times_weight_is_the_convolution(kind: str, kwargs: dict[str, object]) -> None:
    dims, groups = int(kind[4]), int(kwargs.get("groups", 1))  # type: ignore[call-overload]
    x = torch.randn(2, 4, *(7, 6, 5)[:dims], dtype=torch.float64)
    weight = torch.randn(8, 4 // groups, *(3, 2, 2)[:dims], dtype=torch.float64)
    expected = getattr(torch.nn.functional, kind)(x, weight, **kwargs)
    rows = patches(x, tuple(weight.shape), kwargs)
    out = rows @ weight.flatten(1).reshape(groups, 8 // groups, -1).mT  # [P, T, R]
    out = out.movedim(1, -1).reshape(8, 2, -1).movedim(1, 0).reshape(expected.shape)
    torch.testing.assert_close(out, expected)
    one = patches(x[0], tuple(weight.shape), kwargs)
    torch.testing.assert_close(one, rows[:, : one.shape[1]])


def test_drift_is_the_least_squares_solution() -> None:
    """W' minimises sum |W x - W' x'|^2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 5, generator=generator, dtype=torch.float64)
    seen = x + 0.3 * torch.randn(1, 200, 5, generator=generator, dtype=torch.float64)
    gram = Gram(1, 5)
    gram.update(seen, "x", original=x)
    weight = drawn_weight(5, 3, 0)
    expected = torch.linalg.lstsq(seen[0], x[0] @ weight[0]).solution
    torch.testing.assert_close(gram.target(weight, 0.0)[0], expected, rtol=1e-5, atol=1e-6)
    plain = Gram(1, 5)
    plain.update(seen, "x", original=seen)
    torch.testing.assert_close(plain.target(weight, 0.1), weight, rtol=1e-6, atol=1e-7)


# GPTQ ---------------------------------------------------------------------------------------------------------


def textbook_gptq(weight: Tensor, hessian: Tensor, coding: Coding) -> Tensor:
    """The paper's algorithm, one column after the other, with the inverse."""
    weight, rounded = weight.clone(), torch.zeros_like(weight)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for k in range(len(hessian)):
        rounded[k] = coding.nearest(weight[None, k : k + 1], slice(k, k + 1))[0, 0]
        error = (weight[k] - rounded[k]) / upper[k, k]
        weight[k + 1 :] -= upper[k, k + 1 :, None] * error
    return rounded


@pytest.mark.parametrize("order", ["given", "activation", "group"])
@pytest.mark.parametrize("group", [0, 5])
def test_equals_the_textbook(order: Order, group: int) -> None:
    inputs = 150  # more than a block
    hessian = damped(drawn_gram(inputs, 0).mean, 0.01)
    weight = drawn_weight(inputs, 6, 0)
    coding = coding_of(weight, "int3", group)
    rounded, _ = round_with_feedback(weight, prepare(hessian, coding.groups, order, weight.dtype), coding)
    steps = input_order(hessian, coding.groups, order)
    permuted = Coding(coding.grid, coding.groups[steps], coding.scale)
    expected = textbook_gptq(weight[0, steps], hessian[0][steps][:, steps], permuted)
    torch.testing.assert_close(rounded[0, steps], expected)


def test_order_by_group_keeps_groups_together() -> None:
    gram, groups = drawn_gram(20, 1).mean, torch.arange(20) // 4
    steps = input_order(gram, groups, "group")
    assert sorted(steps.tolist()) == list(range(20))
    assert len(list(itertools.groupby(groups[steps].tolist()))) == 5
    diagonal = gram[0].diagonal()
    assert int(steps[0]) == int(diagonal.argmax())
    assert input_order(gram, groups, "activation").tolist() == diagonal.argsort(descending=True).tolist()


def test_feedback_factorizes() -> None:
    hessian = damped(drawn_gram(9, 2, parts=3).mean, 0.01)
    lower = feedback(hessian) + torch.eye(9, dtype=torch.float64)
    middle = torch.linalg.inv(lower).mT @ hessian @ torch.linalg.inv(lower)
    off_diagonal = middle - torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1))
    assert float(off_diagonal.abs().max()) < 1e-9 * float(middle.abs().max())


def brute_force(weight: Tensor, hessian: Tensor, coding: Coding) -> float:
    """The least cost over every combination of codes of a single channel [K]."""
    ladder = coding.grid.ladder() * float(coding.scale)
    every = torch.tensor(list(itertools.product(ladder.tolist(), repeat=len(weight))), dtype=torch.float64)
    error = weight - every
    return float(((error @ hessian) * error).sum(1).min())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["int2", "ternary", "e2m1"]))
def test_close_to_the_best_of_all_codes_and_descent_never_rises(seed: int, name: str) -> None:
    inputs = 4
    hessian = damped(drawn_gram(inputs, seed).mean, 1e-4)
    weight = drawn_weight(inputs, 1, seed)
    coding = coding_of(weight, name)
    best = brute_force(weight[0, :, 0], hessian[0], coding)
    nearest = coding.nearest(weight)
    gptq, _ = round_with_feedback(weight, prepare(hessian, coding.groups, "activation", weight.dtype), coding)
    cost, before = (float(objective(weight, each, hessian)) for each in (nearest, gptq))
    assert best <= before * (1 + 1e-9)
    assert best <= cost * (1 + 1e-9)
    now = gptq
    for _ in range(200):  # until it rests: the cost falls at every change, over finitely many codes
        last, now = now, descend(weight, now, hessian, coding)
        if torch.equal(last, now):
            break
        after = float(objective(weight, now, hessian))
        assert after <= before * (1 + 1e-9) + 1e-15
        before = after
    # At rest no single code can be improved: what "coordinate" means.
    for k, value in itertools.product(range(inputs), (coding.grid.ladder() * float(coding.scale)).tolist()):
        other = now.clone()
        other[0, k, 0] = value
        assert float(objective(weight, other, hessian)) >= before * (1 - 1e-9) - 1e-15


def test_gains_over_nearest_and_descent_over_gptq_on_the_whole() -> None:
    ratios = []
    for seed in range(10):
        gram, weight = drawn_gram(64, seed), drawn_weight(64, 32, seed)
        form = Form(grid("uint3"), 16, symmetric=False, range="mse")
        made = [
            relative_error(weight, quantize_matrix(weight, choices, gram), gram)
            for choices in (Choices(form), Choices(form, "gptq"), Choices(form, "gptq", sweeps=5))
        ]
        ratios.append([made[1] / made[0], made[2] / made[1]])
    gptq, sweeps = np.mean(ratios, axis=0)
    assert gptq < 0.5
    assert sweeps < 0.99


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([name for name, form in known_grids().items() if form.bits <= 8]),
    st.booleans(),
    st.sampled_from([0, 4, -1]),
    st.integers(1, 3),
)
def test_no_step_of_a_sweep_raises_the_cost(seed: int, name: str, symmetric: bool, group: int, parts: int) -> None:
    form = Form(grid(name), grid(name).block or group, symmetric)
    hessian = damped(drawn_gram(9, seed, parts).mean, 0.01)
    weight = drawn_weight(9, 3, seed, parts)
    coding = fit(weight, form)
    if form.grid.tabled:
        table = learned_table(weight, hessian.diagonal(dim1=-2, dim2=-1), form.grid.code_max + 1)
        coding = coding.with_scale(torch.ones_like(coding.scale)).with_table(table)
    rounded, coding = round_with_feedback(weight, prepare(hessian, coding.groups, "given", weight.dtype), coding)
    cost = objective(weight, rounded, hessian)
    for _ in range(3):
        if form.grid.tabled:
            rounded, coding = refit_table(weight, rounded, hessian, coding)
        else:
            rounded, coding = refit_scales(weight, rounded, hessian, coding, form)
        after = objective(weight, rounded, hessian)
        assert bool((after <= cost * (1 + 1e-6) + 1e-12).all())
        rounded = descend(weight, rounded, hessian, coding)
        cost = objective(weight, rounded, hessian)
        assert bool((cost <= after * (1 + 1e-6) + 1e-12).all())
        torch.testing.assert_close(coding.nearest(rounded), rounded, rtol=1e-9, atol=1e-12)


def test_scales_reach_least_squares() -> None:
    """With a single group and real-valued scales one step is the closed form <u, H w> / <u, H u>."""
    hessian, weight = damped(drawn_gram(8, 3).mean, 0.01), drawn_weight(8, 4, 3)
    form = Form(grid("int3"), half_scales=False)
    coding = fit(weight, form)
    rounded = coding.nearest(weight)
    units = rounded / coding.scale
    expected = (units * (hessian @ weight)).sum(1) / (units * (hessian @ units)).sum(1)
    _, refitted = refit_scales(weight, rounded, hessian, coding, form)
    torch.testing.assert_close(refitted.scale[:, 0], expected, rtol=1e-6, atol=0)


def test_tables_reach_least_squares() -> None:
    """LNQ's closed form: the table that minimises |w - P t| in the norm of H, P the indicator of the codes."""
    hessian, weight = damped(drawn_gram(12, 4).mean, 0.01), drawn_weight(12, 1, 4)
    table = learned_table(weight, torch.ones(1, 12), 4)
    coding = Coding(grid("codebook2"), torch.zeros(12, dtype=torch.int64), torch.ones(1, 1, 1).double(), None, table)
    rounded = coding.nearest(weight)
    chosen = torch.nn.functional.one_hot(coding.codes(rounded)[0, 0].long(), 4).double()
    normal = chosen.T @ hessian[0] @ chosen
    expected = torch.linalg.solve(normal, chosen.T @ hessian[0] @ weight[0])
    for _ in range(200):
        rounded, coding = refit_table(weight, rounded, hessian, coding)
    assert coding.table is not None
    closed = weight[0] - chosen @ expected
    best = float((closed * (hessian[0] @ closed)).sum())
    assert float(objective(weight, rounded, hessian)) <= best * 1.01 + 1e-9


def total_cost(weight: Tensor, made: Quantized, gram: Gram, outputs: Tensor) -> float:
    error = (weight - made.value())[0].double()
    return float(((gram.mean[0] @ error @ outputs) * error).sum())


@pytest.mark.parametrize("name", ["uint3", "int2", "e2m1", "codebook2"])
def test_channels_that_know_of_each_other_do_less_harm(name: str) -> None:
    """tr G E^T H E falls against channels on their own, and G = I changes next to nothing."""
    gains = []
    for seed in range(4):
        gram, weight = drawn_gram(32, seed), drawn_weight(32, 96, seed)
        outputs = drawn_gram(96, seed + 50).mean[0]
        choices = Choices(Form(grid(name), 0 if name == "codebook2" else 8, False, "mse"), "gptq", sweeps=1)
        alone, together = (quantize_matrix(weight, choices, gram, each) for each in (None, outputs))
        gains.append(total_cost(weight, together, gram, outputs) / total_cost(weight, alone, gram, outputs))
        same = quantize_matrix(weight, choices, gram, torch.eye(96, dtype=torch.float64))
        assert relative_error(weight, same, gram) == pytest.approx(relative_error(weight, alone, gram), rel=0.02)
    assert np.mean(gains) < 0.9


def test_scales_that_hang_together_leave_channels_on_their_own() -> None:
    gram, weight, outputs = drawn_gram(32, 0), drawn_weight(32, 40, 0), drawn_gram(40, 1).mean[0]
    for form in (Form(grid("nvfp4"), 16), Form(grid("int4"), -1)):
        alone, together = (quantize_matrix(weight, Choices(form, "gptq"), gram, each) for each in (None, outputs))
        assert torch.equal(alone.codes, together.codes)


# Codebooks ----------------------------------------------------------------------------------------------------


def test_learned_tables_against_every_partition() -> None:
    """k-means in one dimension splits the sorted weights in runs: try all of them."""
    losses = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(9, generator=generator, dtype=torch.float64).sort().values
        mass = torch.rand(9, generator=generator, dtype=torch.float64) + 0.1
        best = np.inf
        for cuts in itertools.combinations(range(1, 9), 2):
            loss = 0.0
            for part in np.split(np.arange(9), cuts):
                center = (mass[part] * values[part]).sum() / mass[part].sum()
                loss += float((mass[part] * (values[part] - center) ** 2).sum())
            best = min(best, loss)
        table = learned_table(values[None, :, None], mass[None], 4)[0, 0]
        assert table.tolist() == sorted(table.tolist())
        found = float((mass * (values[:, None] - table).square().amin(1)).sum())
        losses.append(found / best)
    assert max(losses) < 1.001  # four levels are no worse than the best three


def test_constant_and_zero_channels() -> None:
    weight = torch.stack([torch.zeros(16), torch.full((16,), 0.3), torch.randn(16)], 1)[None]
    gram = drawn_gram(16, 0)
    for name, group in [("int4", 8), ("uint2", 8), ("codebook2", 0), ("nf4", 5), ("nvfp4", 16), ("ternary", 0)]:
        form = Form(grid(name), group, symmetric=False, range="mse")
        value = quantize_matrix(weight, Choices(form, "gptq", sweeps=2), gram).value()
        assert bool(value.isfinite().all()), name
        assert float(value[0, :, 0].abs().max()) < 1e-3, name
        assert float((value[0, :, 1] - 0.3).abs().mean()) < 0.1, name


# Side information ---------------------------------------------------------------------------------------------


def planted(inputs: int = 32, channels: int = 16) -> tuple[Tensor, Gram]:
    weight, gram = drawn_weight(inputs, channels, 5), drawn_gram(inputs, 5)
    weight[0, 3] *= 12
    weight[0, 7, 2] = 40
    return weight, gram


def test_the_column_that_costs_most_is_kept_exactly() -> None:
    weight, gram = planted()
    form = Form(grid("int3"), 8, range="minmax")
    made = quantize_matrix(weight, Choices(form, "gptq", columns=1 / 32, sweeps=2), gram)
    clipped = fit(weight, Form(grid("int3"), 8, range="mse"), gram.mean.diagonal(dim1=-2, dim2=-1)).nearest(weight)
    scores = (clipped - weight).square().sum((0, 2)) * damped(gram.mean, 0.01)[0].diagonal()
    assert made.columns.tolist() == [int(scores.argmax())]
    plain = quantize_matrix(weight, Choices(form, "gptq", sweeps=2), gram)
    assert relative_error(weight, made, gram) < relative_error(weight, plain, gram)
    assert made.bits() - plain.bits() == 16 * 16 + 32


def test_single_outliers_are_kept_and_counted() -> None:
    weight, gram = planted()
    form = Form(grid("int3"), 0)
    made = quantize_matrix(weight, Choices(form, "gptq", outliers=24 / 512, sweeps=1), gram)
    assert made.outliers is not None
    assert int((made.outliers != 0).sum()) == 24
    assert float(made.outliers[0, 7, 2]) != 0
    plain = quantize_matrix(weight, Choices(form, "gptq", sweeps=1), gram)
    assert relative_error(weight, made, gram) < 0.5 * relative_error(weight, plain, gram)
    assert made.bits() - plain.bits() == 24 * (16 + 32)


def test_low_rank_is_the_best_for_what_is_left() -> None:
    """Eckart-Young in the norm of H: what remains after rank r is the sum of the other singular values squared."""
    weight, gram = planted()
    form = Form(grid("int2"), 8)
    made = quantize_matrix(weight, Choices(form, "gptq", rank=3), gram)
    hessian = damped(gram.mean, 0.01)
    assert made.left is not None
    rest = weight - made.coded()
    root = torch.linalg.cholesky(hessian).mT
    singular = torch.linalg.svdvals(root @ rest)[0]
    cost = float(objective(weight, made.value(), hessian).sum())
    assert cost == pytest.approx(float(singular[3:].square().sum()), rel=2e-2)
    plain = quantize_matrix(weight, Choices(form, "gptq"), gram)
    assert relative_error(weight, made, gram) < relative_error(weight, plain, gram)
    assert made.bits() - plain.bits() == 16 * 3 * (32 + 16)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name, form in known_grids().items() if form.bits <= 8]),
    st.sampled_from(["nearest", "gptq"]),
    st.sampled_from([0, -1, 5]),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0, 2]),
    st.integers(1, 2),
    st.booleans(),
)
def test_every_combination_runs(
    name: str,
    rounding: str,
    group: int,
    symmetric: bool,
    columns: float,
    outliers: float,
    rank: int,
    parts: int,
    informed: bool,
) -> None:
    weight = drawn_weight(11, 6, 0, parts).float()
    form = Form(grid(name), grid(name).block or group, symmetric, "mse")
    choices = Choices(form, rounding, columns=columns, outliers=outliers, rank=rank, sweeps=1)  # type: ignore[arg-type]
    made = quantize_matrix(weight, choices, drawn_gram(11, 0, parts) if informed else None)
    value = made.value()
    assert value.shape == weight.shape
    assert bool(value.isfinite().all())
    assert made.codes.shape == (parts, 6, 11)
    torch.testing.assert_close(made.coding.nearest(made.coded()), made.coded())
    assert made.bits() >= form.grid.packed_bits(made.codes.numel())


def test_nothing_to_round() -> None:
    made: Quantized = quantize_matrix(torch.zeros(1, 0, 3), Choices(Form(grid("int4"), 8), "gptq"), Gram(1, 0))
    assert made.value().shape == (1, 0, 3)
