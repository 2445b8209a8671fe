"""Estimates from derivatives agree with what they estimate, on models small enough to know it."""

from __future__ import annotations

import pytest
import torch
from small_decoder import Decoder
from torch import Tensor, nn

from graphopt import capture
from graphopt.calibration.judge import divergence
from graphopt.ir import Program
from graphopt.search import correlation, curvature

ROWS = 64


def classifier() -> tuple[Program, list[list[Tensor]]]:
    torch.manual_seed(0)
    batches = [[torch.randn(ROWS, 4)] for _ in range(3)]
    return capture(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval(), (batches[0][0],)), batches


def test_the_trace_is_that_of_the_divergence() -> None:
    program, batches = classifier()
    name = "2.weight"
    weight = program.weight(name).detach()

    def loss(changed: Tensor) -> Tensor:
        twin = program.map_weights(lambda each, value: changed if each == name else value.detach())
        made, target = twin.run(batches[0])[0], program.run(batches[0])[0].detach()
        return divergence(made, target) / ROWS

    exact = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), -1).trace()
    step = torch.full_like(weight, 0.01)
    found = curvature.hessian(program, {(0, 1): {name: weight + step}}, batches[:1], None, 0, draws=400)
    assert found[0, 1] == pytest.approx(0.5 * float(exact) / weight.numel() * float(step.square().sum()), rel=0.1)


def test_the_fisher_information_is_the_second_derivative() -> None:
    """For one weight that changes alone, half g^2 dw^2 is the divergence a row, times the rows that a gradient sums."""
    program, batches = classifier()
    name, found, true = "2.weight", [], []
    weight = program.weight(name).detach()
    for at in range(weight.numel()):
        step = torch.zeros(weight.numel())
        step[at] = 0.02
        new = weight + step.reshape(weight.shape)
        many = batches * 60  # labels are drawn anew for each
        found.append(curvature.fisher(program, {(0, 1): {name: new}}, many, None, at)[0, 1])
        twin = program.map_weights(lambda each, value, new=new: new if each == name else value)  # type: ignore[misc]
        true.append(sum(float(divergence(twin.run(b)[0], program.run(b)[0]).detach()) for b in batches) / len(batches))
    assert sum(found) == pytest.approx(sum(true), rel=0.1)
    rank, logarithm = correlation(found, true)
    assert rank > 0.8 and logarithm > 0.9


def test_of_a_decoder_with_fused_attention_and_a_loss_of_ones_own() -> None:
    torch.manual_seed(0)
    data = [torch.randint(11, (2, 6))]
    program = capture(Decoder().eval(), (data[0],))
    names = [name for name, weight in program.weights.items() if weight.dim() == 2]
    changes = {(at, 1): {name: program.weight(name) + 0.01} for at, name in enumerate(names)}

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.cross_entropy(module(*batch)[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    for given in (None, loss):
        for by in (curvature.hessian, curvature.fisher):
            found = by(program, changes, [data], given, 0)
            assert found.keys() == changes.keys() and all(each >= 0 for each in found.values())
    noise = curvature.sqnr(program, changes)
    first = program.weight(names[0])
    assert noise[0, 1] == pytest.approx(1e-4 * first.numel() / float(first.square().sum()), rel=1e-3)


def test_correlations_of_too_little_are_none() -> None:
    rank, logarithm = correlation([1.0, 2.0], [1.0, 2.0])
    assert rank != rank and logarithm != logarithm
    assert correlation([1.0, 2.0, 4.0], [1.0, 4.0, 16.0]) == pytest.approx((1.0, 1.0))
