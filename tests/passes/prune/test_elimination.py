"""Every step of the elimination against least squares done anew, and its result against every choice."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.passes.prune.elimination import Fit, Normal, Unfitted, eliminate

K, R, T = 8, 3, 200


def drawn(seed: int, constant: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that are correlated, W [K + constant, R], targets with noise."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(T, K, generator=random, dtype=torch.float64)
    x = x @ torch.randn(K, K, generator=random, dtype=torch.float64) + 0.5
    weight = torch.randn(K + constant, R, generator=random, dtype=torch.float64)
    target = x @ weight[:K] + (weight[K] if constant else 0)
    return x, weight, target + 0.1 * torch.randn(target.shape, generator=random, dtype=torch.float64)


def fitted(x: Tensor, weight: Tensor, target: Tensor, labels: Tensor) -> Fit:
    normal = Normal(x.shape[1], target.shape[1], len(weight) > x.shape[1])
    for rows, wanted in zip(x.split(37), target.split(37), strict=True):  # type: ignore[no-untyped-call]
        normal.update(rows, wanted)
    return Fit(normal, weight, labels, damping=1e-12)


def least_squares(x: Tensor, target: Tensor, inputs: Tensor, constant: bool = True) -> tuple[Tensor, float]:
    """The weight [K (+ 1), R] and its squared error relative to what the target varies, from the rows themselves."""
    columns = [x[:, inputs]] + ([torch.ones(len(x), 1, dtype=x.dtype)] if constant else [])
    rows = torch.cat(columns, 1)
    solved = torch.linalg.lstsq(rows, target).solution
    error = float((rows @ solved - target).square().sum() / (target - target.mean(0)).square().sum())
    whole = torch.zeros(x.shape[1] + constant, target.shape[1], dtype=x.dtype)
    rows_of = torch.cat([inputs, torch.ones(int(constant), dtype=torch.bool)])
    whole[rows_of] = solved
    return whole, error


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4]), st.booleans())
def test_every_step_is_least_squares_on_what_is_left(seed: int, each: int, constant: bool) -> None:
    x, weight, target = drawn(seed, constant)
    labels = torch.arange(K) // each
    fit = fitted(x, weight, target, labels)
    left = torch.ones(K, dtype=torch.bool)
    before = fit.error()
    while fit.groups:
        found, costs = fit.costs()
        gone = int(found[costs.argmin()])
        fit.remove([gone])
        left &= labels != gone
        solved, error = least_squares(x, target, left, constant)
        # Inputs whose covariance has a condition of 1e6 or more leave half of the digits.
        assert fit.error() == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert fit.error() - before == pytest.approx(float(costs.min()), rel=1e-3, abs=1e-6)
        assert float((x @ (fit.weight - solved)[:K]).square().sum()) < 1e-5 * float(target.square().sum())
        before = fit.error()


def test_elimination_is_near_the_best_of_all_choices() -> None:
    ratios = []
    for seed in range(8):
        x, weight, target = drawn(seed)
        gone, errors = eliminate([fitted(x, weight, target, torch.arange(K))], K, K // 2)
        best = min(
            least_squares(x, target, torch.tensor([i in kept for i in range(K)]))[1]
            for kept in itertools.combinations(range(K), K // 2)
        )
        assert len(gone.unique()) == K // 2 and errors == sorted(errors)
        assert errors[-1] >= best * 0.98 - 1e-3
        ratios.append(errors[-1] / best)
    assert sorted(ratios)[len(ratios) // 2] < 1.25


def test_as_many_of_every_fibre_and_inputs_of_none_stay() -> None:
    x, weight, target = drawn(3)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, -1, -1])
    fit = fitted(x, weight, target, labels)
    gone, errors = eliminate([fit], 6, 2, fibres=2)
    assert gone.shape == (2, 2) and len(errors) == 3 and len(set(gone[:, 0].tolist())) == 2
    assert bool((fit.weight[gone + torch.tensor([0, 3])] == 0).all()) and float(fit.weight[6:8].abs().min()) > 0


def test_readers_add_up_their_costs() -> None:
    """What one reader can do without, another needs."""
    x, _, _ = drawn(0)
    one, two = (torch.zeros(K + 1, 1, dtype=torch.float64) for _ in range(2))
    one[0], two[1] = 1.0, 1.0
    one[2], two[2] = 0.01, 0.01
    fits = [fitted(x, w, x @ w[:K], torch.arange(K)) for w in (one, two)]
    gone, _ = eliminate(fits, K, K - 2)
    assert set(range(K)) - set(gone.flatten().tolist()) == {0, 1}


def test_many_at_once_are_nearly_as_good_as_one_by_one() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(900, 300, generator=random, dtype=torch.float64)
    weight = torch.randn(301, 20, generator=random, dtype=torch.float64) * torch.linspace(0.1, 2, 301)[:, None]
    target = x @ weight[:300]
    _, together = eliminate([fitted(x, weight, target, torch.arange(300))], 300, 200)
    fit = fitted(x, weight, target, torch.arange(300))
    for _ in range(200):
        left, costs = fit.costs()
        fit.remove([int(left[costs.argmin()])])
    assert together[-1] < 1.02 * fit.error()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2]))
def test_what_is_not_fitted_leaves_what_its_terms_add_up_to(seed: int, each: int) -> None:
    """Of a reader and of scores q k^T, after every step, against the sums themselves."""
    x, weight, _ = drawn(seed, constant=False)
    random = torch.Generator().manual_seed(seed + 1)
    k = torch.randn(50, K, generator=random, dtype=torch.float64)
    labels = torch.arange(K) // each
    for terms, products in (
        (x[:, None] * weight.mT, (x.mT @ x) * (weight @ weight.mT)),
        (x[:, None] * k, (x.mT @ x) * (k.mT @ k)),
    ):
        whole = float(terms.sum(-1).square().sum())
        unfitted = Unfitted(products, labels, whole)
        gone = torch.zeros(K, dtype=torch.bool)
        while bool((~gone).any()):
            left, costs = unfitted.costs()
            before, chosen = unfitted.error(), int(left[costs.argmin()])
            unfitted.remove([chosen])
            gone |= labels == chosen
            error = float(terms[..., gone].sum(-1).square().sum()) / whole
            assert unfitted.error() == pytest.approx(error, rel=1e-6, abs=1e-9)
            assert unfitted.error() - before == pytest.approx(float(costs.min()), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_inputs_stay_near_the_original(rows: int) -> None:
    """With one row anything fits it; damping keeps the rest of the weight where it was."""
    x, weight, _ = drawn(1)
    x = x[:rows]
    fit = fitted(x, weight, x @ weight[:K] + weight[K], torch.arange(K))
    assert bool(fit.weight.isfinite().all())
    assert float((fit.weight - weight).abs().max()) < 1e-3 * float(weight.abs().max())


def test_inputs_that_are_always_zero_go_first() -> None:
    x, weight, _ = drawn(2)
    x[:, [2, 5]] = 0
    gone, errors = eliminate([fitted(x, weight, x @ weight[:K] + weight[K], torch.arange(K))], K, 2)
    assert sorted(gone.flatten().tolist()) == [2, 5] and errors[-1] < 1e-9
