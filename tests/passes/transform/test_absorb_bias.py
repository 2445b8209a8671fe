"""absorb_bias: the constant part of an activation into the biases behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import CONTEXT, Example, before
from torch import nn

from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, verify
from graphopt.passes import AbsorbBias
from graphopt.pipeline import Context


def _run(example: Example, pass_: AbsorbBias | None = None) -> tuple[Program, Program, Changes]:
    pass_ = pass_ or AbsorbBias()
    program = before(example, pass_)
    after = program.clone()
    context = Context(CONTEXT.target, calibration=Batches([program.flat_example[0]], program))
    with torch.no_grad():
        changes = pass_.run(after, context)
    verify(after, reference=program)
    return program, after, changes


def _high(module: Any) -> None:
    """Channels 1 and 3 stay far above 0, the others do not."""
    module[0].bias.copy_(torch.tensor([0.0, 40.0, 0.1, 50.0])[: len(module[0].bias)])


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def _conv(padding: int = 0) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=padding))


LINEAR = Example("linear", _linear, (64, 3), prepare=_high)


@pytest.mark.parametrize("example", [LINEAR, Example("conv", _conv, (4, 3, 8, 8), prepare=_high)], ids=str)
def test_where_activations_stay_above_nothing_changes_but_their_range(example: Example) -> None:
    program, after, changes = _run(example, AbsorbBias(deviations=6.0))
    x = program.flat_example[0]
    torch.testing.assert_close(after(x), program(x), rtol=0, atol=2e-4)
    assert [site.reason for site in changes.touched] == ["absorbed the bias of 2 of 4 channels"]
    bias = after.weights["0.bias"]
    assert bias[1] < 20 and bias[3] < 20
    assert torch.equal(bias[[0, 2]], program.weights["0.bias"][[0, 2]])


def test_the_shift_is_mean_less_deviations() -> None:
    program, after, _ = _run(LINEAR, AbsorbBias(deviations=2.0))
    x = program.flat_example[0].double()
    weight, bias = (program.weights[f"0.{name}"].double() for name in ("weight", "bias"))
    y = x @ weight.mT + bias
    shift = (y.mean(0) - 2 * y.std(0)).clamp_min(0)
    torch.testing.assert_close(after.weights["0.bias"].double(), bias - shift, rtol=1e-5, atol=1e-5)
    expected = program.weights["2.bias"].double() + program.weights["2.weight"].double() @ shift
    torch.testing.assert_close(after.weights["2.bias"].double(), expected, rtol=1e-5, atol=1e-5)


def test_what_falls_below_is_cut_off() -> None:
    """Lossy: with no deviation left, half of what comes by is below."""
    program, after, _ = _run(LINEAR, AbsorbBias(deviations=0.0))
    x = program.flat_example[0]
    assert (after(x) - program(x)).abs().max() > 1e-2


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z: torch.Tensor = self.b(y.relu()) + y.sum(-1, keepdim=True)
        return z


@pytest.mark.parametrize(
    ("build", "shape", "reason"),
    [
        (lambda: _conv(padding=1), (2, 3, 8, 8), "pads with zeros"),
        (_Branch, (8, 3), "others read what linear writes"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), (8, 3), "no linear operator writes"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), (8, 3), "the program returns relu"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.GELU(), nn.Linear(4, 2)), (8, 3), "does not take it in"),
    ],
    ids=["padded", "read_twice", "input", "output", "gelu"],
)
def test_declines(build: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    _, _, changes = _run(Example("declined", build, shape))
    assert not changes.changed
    assert any(reason in site.reason for site in changes.skipped), changes.skipped


def test_only_and_skip() -> None:
    _, _, changes = _run(LINEAR, AbsorbBias(skip=("relu*",)))
    assert [site.reason for site in changes.skipped] == ["kept by skip='relu*'"]
    assert not changes.changed


def test_a_second_run_finds_nothing_left() -> None:
    _, after, _ = _run(LINEAR)
    twice = after.clone()
    context = Context(CONTEXT.target, calibration=Batches([after.flat_example[0]], after))
    with torch.no_grad():
        changes = AbsorbBias().run(twice, context)
    # What stood three deviations above 0 now stands right on them, to rounding.
    for name, weight in after.weights.items():
        torch.testing.assert_close(twice.weights[name], weight, rtol=1e-5, atol=1e-5)
    assert len(changes.touched) <= 1


def test_without_data_it_says_what_to_pass() -> None:
    with pytest.raises(GraphoptError, match="absorb_bias needs calibration data"):
        AbsorbBias().run(before(LINEAR, AbsorbBias()), CONTEXT)
