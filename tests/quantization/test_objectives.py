"""Gram matrices: means of outer products, in any precision, positive when damped; drift by least squares."""

from __future__ import annotations

import pytest
import torch
from small_matrices import drawn_weight

from graphopt.errors import GraphoptError
from graphopt.quantization.coding import Form, fit
from graphopt.quantization.grids import grid
from graphopt.quantization.matrices import patches
from graphopt.quantization.objectives import Gram, damped
from graphopt.quantization.rounding import prepare, round_with_feedback
from graphopt.quantization.solve import Choices, quantize_matrix


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
    gram = Gram(1, 3)
    gram.update(x, "head")
    gram.update(torch.randn(1, 5, 3), "head")
    with pytest.raises(GraphoptError, match="at the input of head; check the calibration data"):
        _ = gram.mean


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


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [4, 12, 40, 4000])
def test_shrinkage_brings_few_inputs_nearer_to_the_truth(count: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 12)
    truth = mix.T @ mix
    plain = shrunk = 0.0
    for _ in range(30):
        gram = Gram(1, 12)
        weights = torch.rand(1, count, generator=generator, dtype=torch.float64) if weighted else None
        gram.update(torch.randn(1, count, 12, generator=generator, dtype=torch.float64) @ mix, "x", weights)
        found = gram.shrinkage()
        nearer = gram.damped(0.0)[0] / (1 + found)
        plain += float((gram.mean[0] - truth).square().sum())
        shrunk += float((nearer - truth).square().sum())
        assert 0 < float(found) <= 1 if count == 4 else float(found) <= (count == 12)
    assert shrunk < (0.9 if count == 4 else 1.001) * plain


def test_rounding_for_few_inputs_does_less_harm_to_all_others() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=generator) * torch.logspace(0, -1.5, 48)
    weight = drawn_weight(48, 24, 0).float()
    few, fixed = [], []
    for _ in range(5):
        gram = Gram(1, 48)
        gram.update(torch.randn(1, 16, 48, generator=generator) @ mix, "x")
        for found, hessian in ((few, gram.damped(0.01)), (fixed, damped(gram.mean, 0.01))):
            coding = fit(weight, Form(grid("int4"), 16, symmetric=False))
            prepared = prepare(hessian, coding.groups, "activation", torch.float32)
            rounded, _ = round_with_feedback(weight, prepared, coding)
            found.append(float((mix @ (weight - rounded)[0]).square().sum()))
    assert sum(few) < 0.9 * sum(fixed)


def test_shrinkage_of_nothing_and_of_one_input() -> None:
    assert float(Gram(1, 5).shrinkage()) == 0
    gram = Gram(2, 1)
    gram.update(torch.ones(2, 3, 1), "x")
    assert bool((gram.shrinkage() == 0).all())


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
    """W' minimises sum |W x - W' x'|^2 + d |W - W'|^2, d as few inputs demand."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 5, generator=generator, dtype=torch.float64)
    seen = x + 0.3 * torch.randn(1, 200, 5, generator=generator, dtype=torch.float64)
    gram = Gram(1, 5)
    gram.update(seen, "x", original=x)
    weight = drawn_weight(5, 3, 0)
    pull = (200 * gram.shrinkage() * gram.mean[0].diagonal().mean()).sqrt() * torch.eye(5)
    left, right = torch.cat([seen[0], pull]), torch.cat([x[0] @ weight[0], pull @ weight[0]])
    expected = torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(gram.target(weight, 0.0)[0], expected, rtol=1e-5, atol=1e-6)
    plain = Gram(1, 5)
    plain.update(seen, "x", original=seen)
    torch.testing.assert_close(plain.target(weight, 0.1), weight, rtol=1e-6, atol=1e-7)
