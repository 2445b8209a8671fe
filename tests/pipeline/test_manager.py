"""The manager: order, checks, records, and what becomes of passes that lie or fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import made_up_passes as made
import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.ir.printing import program_text
from graphopt.pipeline import Pass, PassError, Trace, ValidationError, manager, run_passes, validation
from graphopt.pipeline.manager import with_requirements


def state(program: Program) -> tuple[str, dict[str, bytes], list[str]]:
    weights = {name: w.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, w in program.weights.items()}
    return program_text(program), weights, list(program.notes)


def test_the_input_program_is_not_changed() -> None:
    program = made.net()
    before = state(program)
    passes = (made.MoveScale(), made.LieByRelu(), made.Coarse(skip=("nowhere*",)), made.Fail(), made.Draw())
    optimized, _ = run_passes(program, passes, made.context())
    assert state(program) == before
    assert program_text(optimized) != before[0]


def test_an_exact_pass_is_measured_and_its_rounding_apart() -> None:
    _, trace = run_passes(made.net(), (made.MoveScale(),), made.context(strict=True))
    record = trace["move_scale"]
    assert record.changed and not record.rejected
    assert record.error is not None and record.error < 1e-14
    assert record.rounding_error is not None and 1e-9 < record.rounding_error < 1e-6
    assert record.weights_changed == ["body.0.bias", "body.0.weight", "head.weight"]
    assert [site.reason for site in record.touched] == ["scaled", "scaled"]


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.bfloat16, 1e-4, 5e-2), (torch.float16, 1e-5, 5e-3)])
def test_rounding_of_narrow_weights_is_no_error_of_the_algebra(dtype: torch.dtype, low: float, high: float) -> None:
    _, trace = run_passes(made.net(dtype), (made.MoveScale(),), made.context(strict=True))
    record = trace["move_scale"]
    assert record.error is not None and record.error < 1e-14
    assert record.rounding_error is not None and low < record.rounding_error < high


@pytest.mark.parametrize(
    ("lie", "where"),
    [
        (made.LieByWeight(), "linear_1"),
        (made.LieByRelu(), "linear_1"),
        (made.LieByInteger(), "add"),
        (made.LieSilently(), "add"),
    ],
    ids=str,
)
def test_a_lie_is_caught_and_placed(lie: Pass, where: str) -> None:
    program = made.net()
    optimized, trace = run_passes(program, (lie, made.MoveScale()), made.context())
    record = trace[lie.name]
    assert f"first at {where};" in record.rejected
    assert record.error is not None and record.error > 1e-7
    assert not record.changed and not record.touched
    assert not trace["move_scale"].rejected  # the run goes on, from the program before the lie
    x = torch.randn(5, 6)
    torch.testing.assert_close(optimized(x)[0], program(x)[0])
    with pytest.raises(ValidationError, match=lie.name):
        run_passes(program, (lie,), made.context(strict=True))


def test_a_dropped_output_is_placed_by_its_position() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, torch.relu(x)

    program = capture(Last(), (torch.randn(4),))
    _, trace = run_passes(program, (made.LieByRelu(),), made.context())
    assert "first at output 1;" in trace[1].rejected


def test_writing_in_place_is_always_an_error() -> None:
    with pytest.raises(PassError, match=r"write_in_place wrote into the weight head\.weight in place"):
        run_passes(made.net(), (made.WriteInPlace(),), made.context())


def test_broken_ir_is_rejected() -> None:
    program = made.net()
    optimized, trace = run_passes(program, (made.BreakShapes(),), made.context())
    assert trace[1].rejected.startswith("it failed with VerificationError: relu")
    assert program_text(optimized) == program_text(program)


def test_a_failing_exact_pass_is_dropped_with_its_place() -> None:
    program = made.net()
    optimized, trace = run_passes(program, (made.Fail(), made.MoveScale()), made.context())
    assert trace["fail"].rejected.startswith("it failed with KeyError: 'nowhere' (line ")
    assert trace["fail"].rejected.endswith("made_up_passes); its changes were dropped")
    assert trace["move_scale"].changed
    assert program_text(optimized) != program_text(program)
    with pytest.raises(KeyError):
        run_passes(program, (made.Fail(),), made.context(strict=True))


def test_a_failing_lossy_pass_ends_the_run_by_its_name() -> None:
    trace = Trace()
    with pytest.raises(PassError, match="fail_lossy: it failed with KeyError: 'nowhere'") as caught:
        run_passes(made.net(), (made.MoveScale(), made.FailLossy()), made.context(), trace)
    assert isinstance(caught.value.__cause__, KeyError)
    assert [record.key for record in trace] == ["capture", "move_scale"]  # what was done before is not lost


def test_interruption_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_passes(made.net(), (made.Interrupted(),), made.context())


def test_a_pass_without_changes() -> None:
    program = made.net()
    optimized, trace = run_passes(program, (made.Nothing(),), made.context())
    record = trace["nothing"]
    assert not record.changed and record.diff() == ""
    assert (record.error, record.rounding_error, record.sqnr_db) == (None, None, None)
    assert [(site.node, site.reason) for site in record.skipped] == [("relu", "it is good as it is")]
    assert program_text(optimized) == program_text(program)


def test_lossy_passes_record_noise_against_the_captured_program() -> None:
    program = made.net()
    optimized, trace = run_passes(program, (made.MoveScale(), made.Coarse()), made.context())
    found = trace["coarse"].sqnr_db
    x = program.example_inputs[0][0]
    noise, signal = (optimized(x)[0] - program(x)[0]).square().sum(), program(x)[0].square().sum()
    assert found == pytest.approx(10 * (signal / noise).log10().item(), abs=0.1)
    assert 15 < found < 60
    assert trace["coarse"].facts == {"step": 0.125}


def test_an_exact_pass_after_a_lossy_one_is_checked_against_what_that_left() -> None:
    passes = (made.DoubleRelu(), made.Coarse(), made.DoubleRelu(), made.LieByRelu())
    _, trace = run_passes(made.net(), passes, made.context())
    assert trace["double_relu#2"].error == 0.0 and not trace["double_relu#2"].rejected
    # Scaling through a rounding is not exact, and is found out.
    _, trace = run_passes(made.net(), (made.Coarse(), made.MoveScale()), made.context())
    assert trace["move_scale"].rejected


def test_repeated_passes_are_numbered() -> None:
    _, trace = run_passes(
        made.net(), (made.Nothing(), made.MoveScale(), made.Nothing(), made.Nothing()), made.context()
    )
    assert [record.key for record in trace] == ["capture", "nothing", "move_scale", "nothing#2", "nothing#3"]
    assert trace["nothing#3"] is trace[4]
    with pytest.raises(GraphoptError, match=r"did you mean 'nothing#3'\?|did you mean 'nothing"):
        trace["nothing#4"]


def test_required_passes_are_entries_of_their_own() -> None:
    @dataclass(frozen=True)
    class Asks(made.Nothing):
        requires: ClassVar[tuple[str, ...]] = ("fold_batch_norm",)

    _, trace = run_passes(made.net(), (Asks(), Asks()), made.context())
    keys = [(record.key, record.inserted) for record in trace]
    assert keys[-3:] == [("fold_batch_norm", "asks"), ("asks", ""), ("asks#2", "")]
    assert ("canonicalize", "fold_batch_norm") in keys


def test_passes_that_require_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Egg(made.Nothing):
        requires: ClassVar[tuple[str, ...]] = ("hen",)

    @dataclass(frozen=True)
    class Hen(made.Nothing):
        requires: ClassVar[tuple[str, ...]] = ("egg",)

    monkeypatch.setattr(manager, "make_pass", lambda name: {"egg": Egg, "hen": Hen}[name]())
    with pytest.raises(GraphoptError, match="require each other: egg -> hen -> egg"):
        with_requirements((Egg(),))


def test_globs_that_mean_nothing_are_said_once() -> None:
    passes = (made.Coarse(skip=("hed*", "head")), made.Coarse(skip=("hed*",), only=("body.0.weight",)))
    optimized, trace = run_passes(made.net(), passes, made.context())
    assert trace.notes == ["skip='hed*' matches no node, weight or module"]
    assert len(made.calls(optimized, "graphopt.fake_quantize")) == 2  # the first linear, twice
    assert [site.reason for site in trace["coarse"].skipped] == ["kept by skip='head'"]
    assert [site.reason for site in trace["coarse#2"].skipped] == ["not among only=['body.0.weight']"]


def test_what_a_pass_draws_depends_on_the_seed_alone() -> None:
    program = made.net()

    def drawn(passes: tuple[Pass, ...], seed: int) -> Tensor:
        torch.rand(3)  # the caller's own generator has moved on
        return run_passes(program, passes, made.context(seed=seed))[0].weight("body.0.weight")

    state = torch.random.get_rng_state()
    first = drawn((made.Draw(),), 0)
    torch.random.set_rng_state(state)
    torch.rand(3)
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    drawn((made.Draw(),), 0)
    assert torch.equal(torch.random.get_rng_state(), after)  # and is left as it was
    assert torch.equal(first, drawn((made.Nothing(), made.Draw()), 0))
    assert not torch.equal(first, drawn((made.Draw(),), 1))


def test_a_changing_pass_costs_two_runs_an_input_set(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    true = validation._outputs
    monkeypatch.setattr(validation, "_outputs", lambda twin, flat: runs.append(0) or true(twin, flat))
    run_passes(made.net(), (made.Nothing(), made.Nothing()), made.context())
    assert len(runs) == 0
    run_passes(made.net(), (made.MoveScale(),), made.context())
    assert len(runs) == 2 + 2 * 2  # the reference once, then unrounded and rounded
    runs.clear()
    run_passes(made.net(), (made.MoveScale(),) * 4, made.context())
    assert len(runs) == 2 + 4 * 2 * 2


def test_the_record_of_the_capture_measures_the_model() -> None:
    _, trace = run_passes(made.net(), (), made.context())
    record = trace["capture"]
    assert (record.index, record.nodes, record.parameters) == (0, 5, 84)
    assert record.parameter_bytes == 4 * 84 and record.macs == 2 * 5 * 36
    assert record.peak_memory_bytes > 10 << 20


def test_passes_may_run_in_inference_mode() -> None:
    with torch.inference_mode():
        program = made.net()
        optimized, trace = run_passes(program, (made.MoveScale(), made.Coarse()), made.context())
    assert not trace["move_scale"].rejected and trace["coarse"].sqnr_db is not None
    assert optimized(torch.randn(5, 6))[0].shape == (5, 6)
