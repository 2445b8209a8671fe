"""`graphopt bench --backend cuda`: what it says without a GPU, and what it makes of times, here made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphopt
from graphopt.backends.cuda import timing
from graphopt.backends.cuda.backend import CudaBackend
from graphopt.backends.cuda.compiled import Compiled
from graphopt.errors import GraphoptError
from graphopt.passes import QuantizeWeights

_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without a GPU")


def _result(inputs: int = 64) -> graphopt.Result:
    x = (torch.randn(2, inputs),)
    weights = QuantizeWeights(grid="int4", group_size=32, objective="plain", rounding="nearest")
    return graphopt.optimize(nn.Linear(inputs, 32), x, [weights], calibration=[x])


@_no_gpu
def test_without_a_gpu_it_is_one_sentence(tmp_path: Path) -> None:
    from graphopt.cli.app import app

    result = _result()
    result.program.save(tmp_path / "model.pt2")
    with pytest.raises(GraphoptError, match="there is no GPU here to measure on"):
        CudaBackend().measure({"model": tmp_path / "model.pt2"}, 1)
    ran = CliRunner().invoke(app, ["bench", str(tmp_path / "model.pt2"), "--backend", "cuda"])
    assert isinstance(ran.exception, GraphoptError) and "there is no GPU here" in str(ran.exception)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays that take a millisecond for each operator of a program."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def captured(self: Compiled, flat: list[Any]) -> Callable[[], object]:
        calls = sum(node.op == "call_function" for node in self.program.graph.nodes)
        return lambda: clock.__setitem__(0, clock[0] + calls)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Compiled, "captured", captured)
    monkeypatch.setattr(timing, "_kernels", lambda replay: [("go_linear", "graphopt", 1.0)])


def test_programs_are_timed_in_turns(made_up: None) -> None:
    result = _result()
    found = timing.measure({"model": result.compile(device="cpu"), "against": result.compile(device="cpu")})
    assert found["model"].latency_ms == found["against"].minimum_ms == 1 and found["model"].inputs == ["float[2, 64]"]
    assert found["model"].nodes == [("go_linear", "graphopt", 1.0)] and found["model"].runs == 50


def test_other_inputs_cannot_be_compared(made_up: None) -> None:
    both = {"model": _result().compile(device="cpu"), "against": _result(96).compile(device="cpu")}
    with pytest.raises(GraphoptError, match=r"against takes float\[2, 96\], not float\[2, 64\]"):
        timing.measure(both)
