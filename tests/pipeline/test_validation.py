"""Translation validation: the measures, the resampled inputs, and models that are hard to validate."""

from __future__ import annotations

import math
from typing import Any

import made_up_passes as made
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from graphopt.capture import capture
from graphopt.ir import Program
from graphopt.pipeline import relative_error, run_passes, sqnr_db
from graphopt.pipeline.validation import Validator, resample

INF, NAN = math.inf, math.nan


def tensors(*values: Any) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(
    ("new", "old", "error"),
    [
        ([2.0, 4.0], [2.0, 4.0], 0.0),
        ([2.0, 4.5], [2.0, 4.0], 0.125),
        ([0.5], [0.0], 0.5),  # nothing to be relative to
        ([NAN, INF, 1.0], [NAN, INF, 1.0], 0.0),
        ([NAN, 1.0], [1.0, 1.0], INF),
        ([1.0, 1.0], [NAN, 1.0], INF),
        ([-INF], [INF], INF),
        ([INF], [1.0], INF),
        ([3, 4], [3, 5], 0.2),
        ([True], [False], 1.0),
        ([2**60 + 1], [2**60], 1e-6),  # one and the same in float64
        ([1.0 + 2.0j], [1.0 + 1.0j], 1 / math.sqrt(2)),
        ([1.0], [[1.0]], INF),
    ],
)
def test_relative_error_of_tensors(new: Any, old: Any, error: float) -> None:
    assert relative_error(tensors(new), tensors(old)) == pytest.approx(error)


@pytest.mark.parametrize(
    ("new", "old", "error"),
    [(3, 3, 0.0), (3, 4, INF), (None, None, 0.0), (NAN, NAN, 0.0), (True, 1, INF), (torch.tensor(1.0), 1.0, INF)],
)
def test_relative_error_of_plain_outputs(new: Any, old: Any, error: float) -> None:
    assert relative_error([new], [old]) == error


def test_the_worst_output_counts() -> None:
    assert relative_error([*tensors(1.0, 3.0), 1], [*tensors(1.0, 2.0), 1]) == 0.5
    assert relative_error([torch.zeros(0)], [torch.zeros(0)]) == 0.0
    assert relative_error([], []) == 0.0


def test_sqnr() -> None:
    old = torch.tensor([3.0, 4.0])
    assert sqnr_db([old + 0.5], [old]) == pytest.approx(10 * math.log10(25 / 0.5))
    assert sqnr_db([old, old + 0.5], [old, old]) == pytest.approx(10 * math.log10(25 / 0.5))
    assert sqnr_db([old], [old]) == INF
    assert sqnr_db([torch.tensor([NAN, 4.0])], [old]) == -INF
    assert sqnr_db([torch.tensor([INF, 4.0])], [old]) == -INF
    assert sqnr_db([old], [torch.zeros(2)]) == -INF
    assert sqnr_db([torch.tensor([INF, 4.0])], [torch.tensor([INF, 4.0])]) == INF
    assert sqnr_db([torch.tensor([1])], [torch.tensor([2])]) == INF  # integers carry no signal
    tiny = torch.tensor([1e-200, 0.0], dtype=torch.float64)
    assert sqnr_db([tiny * 2], [tiny]) in (INF, -INF, pytest.approx(0.0, abs=1e-9))


class Mixed(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return (x * mask).sum(-1) + ids.to(x.dtype) + bias


def mixed() -> Program:
    x, ids = 5 + 2 * torch.randn(4, 64), torch.tensor([3, 7, 7, 9])
    bias = torch.where(torch.arange(64).reshape(4, 16) % 2 > 0, 0.0, torch.finfo(torch.float32).min)
    return capture(Mixed(), (x, ids, torch.rand(4, 64) > 0.5, bias[:, :4].contiguous()))


def test_resampling_keeps_to_what_the_example_holds() -> None:
    program = mixed()
    x, ids, mask, bias = resample(program, 0)
    old = program.flat_example
    assert not torch.equal(x, old[0])
    assert abs(x.mean() - 5) < 0.5 and abs(x.std() - 2) < 0.4
    assert set(ids.tolist()) <= {3, 7, 9} and ids.dtype == torch.int64
    assert mask.dtype == torch.bool and 0 < mask.sum() < mask.numel()
    assert set(bias.unique().tolist()) <= set(old[3].unique().tolist())
    assert all(torch.equal(a, b) for a, b in zip(resample(program, 0), resample(program, 0), strict=True))
    assert not torch.equal(resample(program, 1)[0], x)


@given(st.floats(0, 100), st.floats(0.01, 100), st.integers(1, 40))
def test_nonnegative_inputs_stay_so(mean: float, spread: float, count: int) -> None:
    from graphopt.pipeline.validation import _redraw

    value = (torch.rand(count) * spread + mean).to(torch.float32)
    drawn = _redraw(value, [7, 3], torch.Generator().manual_seed(0))
    assert drawn.shape == (7, 3) and drawn.dtype == value.dtype
    assert bool((drawn >= 0).all()) and bool(torch.isfinite(drawn).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.uint8])
def test_resampling_stays_in_the_type(dtype: torch.dtype) -> None:
    from graphopt.pipeline.validation import _redraw

    value = torch.rand(20).mul(1.2e5).sub(6e4).to(dtype) if dtype != torch.uint8 else torch.arange(20).to(dtype)
    drawn = _redraw(value, [5, 5], torch.Generator().manual_seed(0))
    assert drawn.dtype == dtype and bool(torch.isfinite(drawn).all())
    assert _redraw(value[:0], [0, 3], torch.Generator()).shape == (0, 3)


class Pairs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.reshape(y.shape[0], 2, -1).sum(1) + y


@pytest.mark.parametrize(("rows", "other"), [(3, 4), (8, 7)])
def test_dynamic_sizes_are_resampled_together_and_within_bounds(rows: int, other: int) -> None:
    s = Dim("s", min=2, max=8)
    shapes = ({0: 2 * s}, {0: s})
    program = capture(Pairs(), (torch.randn(2 * rows, 4), torch.randn(rows, 4)), dynamic_shapes=shapes)
    x, y = resample(program, 0)
    assert (x.shape, y.shape) == ((2 * other, 4), (other, 4))
    assert resample(program, 0, resize=False)[0].shape == (2 * rows, 4)
    assert Validator(program, 0).note == ""


def test_a_mistake_that_shows_at_another_size_only_is_caught() -> None:
    program = made.net(dynamic=True)

    class FixBatch(made.Exact):
        def edit(self, rewriter: Any) -> None:
            (relu,) = made.calls(rewriter.program, "relu")
            head = rewriter.insert(torch.ops.aten.slice.Tensor, relu, 0, 0, 5, before=relu.next)
            zero = rewriter.insert(torch.ops.aten.mul.Tensor, relu, 0.0, before=head.next)
            fixed = rewriter.insert(torch.ops.aten.slice_scatter.default, zero, head, 0, 0, 5, before=zero.next)
            for reader in made.calls(rewriter.program, "linear")[1:]:
                rewriter.redirect(reader, relu, fixed)

    _, trace = run_passes(program, (FixBatch(),), made.context())
    assert "first at linear_1" in trace[1].rejected


class Refuses(nn.Module):
    """Runs on the values of its example only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.linalg.cholesky(x))


def test_a_model_that_runs_on_its_example_only_is_checked_there() -> None:
    program = capture(Refuses().eval(), (2 * torch.eye(6) + torch.diag(torch.rand(6)),))
    optimized, trace = run_passes(program, (made.LieByRelu(),), made.context())
    assert trace.notes == [
        "the model does not run on resampled inputs; exact passes were checked on the example inputs only"
    ]
    assert not trace[1].rejected  # on a positive diagonal the relu does nothing, which is all that can be seen
    assert program.notes == [] and optimized.notes == []


def test_a_model_that_does_not_run_in_float64_is_checked_in_its_own_types(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.pipeline import validation

    class NoFloat64(validation.Retyped):
        def outputs(self, flat_inputs: list[Any]) -> list[Any]:
            raise NotImplementedError("no kernel for Double")

    monkeypatch.setattr(validation, "Retyped", NoFloat64)
    program = made.net()
    _, trace = run_passes(program, (made.MoveScale(), made.LieByRelu(), made.LieByInteger()), made.context())
    assert trace.notes == [
        "the model does not run in float64 (no kernel for Double); exact passes were checked in its own types"
    ]
    assert not trace["move_scale"].rejected and trace["move_scale"].error < 1e-5
    assert trace["lie_by_relu"].rejected and trace["lie_by_integer"].rejected


def test_random_operators_draw_the_same_before_and_after() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) + torch.rand_like(x)

    _, trace = run_passes(capture(Noisy(), (torch.rand(4, 4),)), (made.LieByRelu(),), made.context())
    assert not trace[1].rejected and trace[1].error == 0.0


def test_an_exact_pass_after_quantization_is_validated_in_float64() -> None:
    program, _ = run_passes(made.net(), (made.Coarse(),), made.context())

    class DropRound(made.Exact):
        def edit(self, rewriter: Any) -> None:
            node = made.calls(rewriter.program, "graphopt.fake_quantize")[0]
            rewriter.replace(node, node.args[0])

    _, trace = run_passes(program, (DropRound(),), made.context())
    assert trace[1].rejected
