"""Schemes follow what was measured; the measurement is made up here, and real in one test at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import targets
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backend import Profile
from graphopt.budget import Budget
from graphopt.calibration import Batches
from graphopt.capture import capture
from graphopt.errors import NotExpressible
from graphopt.ir import Program, operator
from graphopt.passes import ChooseSchemes, QuantizeDynamic, QuantizeStatic
from graphopt.pipeline import Context, run_passes
from graphopt.pipeline.trace import Trace

Times = Mapping[str, Mapping[str, float]]  # of each site, by scheme


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))  # type: ignore[no-any-return]


def _scheme(node: Any) -> str:
    """Read off the graph how a linear is quantized."""
    source = node.args[0]
    if operator(source) != "graphopt.dequantize":
        return "float"
    return "dynamic" if operator(source.args[1]) == "getitem" else "static"


def _schemes(program: Program) -> list[str]:
    return [_scheme(node) for node in program.graph.nodes if operator(node) == "linear"]


def _clock(times: Times, whole: Callable[[list[str]], float] | None = None) -> Callable[..., dict[str, Profile]]:
    """A measurement in which each linear takes the time of its scheme, and the whole their sum."""

    def measure(programs: Mapping[str, Program]) -> dict[str, Profile]:
        found = {}
        for label, program in programs.items():
            linears = [node for node in program.graph.nodes if operator(node) == "linear"]
            nodes = {node.name: times[node.name][_scheme(node)] for node in linears}
            schemes = [_scheme(node) for node in linears]
            found[label] = Profile(whole(schemes) if whole else sum(nodes.values()), nodes)
        return found

    return measure


def _run(
    measure: Any, evaluate: Any = None, budget: Budget | None = None, **options: Any
) -> tuple[Program, Trace, Program]:
    torch.manual_seed(0)
    batches = [(torch.randn(6, 8),) for _ in range(3)]
    program = capture(Layers().eval(), batches[0])
    context = Context(
        targets.EXACT, Batches(batches, program), evaluate, measure=measure, budget=budget or Budget(), strict=True
    )
    passes = [ChooseSchemes(**options), QuantizeStatic(), QuantizeDynamic()]
    after, trace = run_passes(program, passes, context)
    return after, trace, program


MIXED = {
    "linear": {"float": 3.0, "static": 1.0, "dynamic": 2.0},
    "linear_1": {"float": 3.0, "static": 2.0, "dynamic": 1.0},
    "linear_2": {"float": 1.0, "static": 2.0, "dynamic": 2.0},
}


def test_each_site_gets_its_fastest_scheme() -> None:
    after, trace, before = _run(_clock(MIXED), slack=0.0)
    assert _schemes(after) == ["static", "dynamic", "float"]
    record = trace["choose_schemes"]
    assert record.facts["schemes"] == {"static": 1, "dynamic": 1, "float": 1}
    assert {site.node for site in record.skipped} == {"linear_2"}
    assert "float 1.000 ms" in record.skipped[0].reason
    assert set(record.facts["site_errors"]) == {"linear", "linear_1", "linear_2"}
    assert trace["quantize_static"].skipped and "float was chosen" in str(trace["quantize_static"].skipped)
    assert _schemes(before) == ["float"] * 3
    assert not record.nodes_changed and not record.weights_changed


def test_without_a_measurement_all_is_static() -> None:
    for measure in (None, _unable):
        after, trace, _ = _run(measure)
        assert _schemes(after) == ["static"] * 3
        assert trace["choose_schemes"].facts["not_measured"]


def _unable(programs: Mapping[str, Program]) -> dict[str, Profile]:
    raise NotExpressible("the target has no form for it")


def test_a_mixture_that_is_slower_than_its_parts_is_dropped() -> None:
    """Conversions between schemes may cost what the sites gain."""

    def whole(schemes: list[str]) -> float:
        return 5.0 if len(set(schemes)) == 1 else 9.0

    after, trace, _ = _run(_clock(MIXED, whole), slack=0.0)
    assert _schemes(after) == ["static"] * 3
    assert "mixed takes 9.000 ms" in trace["choose_schemes"].facts["gate"]


def test_a_file_that_would_be_slower_than_float_stays_float() -> None:
    def whole(schemes: list[str]) -> float:
        return 1.0 if set(schemes) == {"float"} else 2.0

    after, trace, _ = _run(_clock(dict.fromkeys(MIXED, MIXED["linear"]), whole))
    assert _schemes(after) == ["float"] * 3
    assert "float was taken" in trace["choose_schemes"].facts["gate"]


def test_slack_buys_accuracy() -> None:
    """Scales at run time fit each batch; where they cost nearly nothing they are taken."""
    times = {name: {"float": 9.0, "static": 1.0, "dynamic": 1.001} for name in MIXED}
    after, trace, _ = _run(_clock(times), slack=0.0)
    assert _schemes(after) == ["static"] * 3
    errors = trace["choose_schemes"].facts["site_errors"]
    assert all(each["local_db"] > 20 for each in errors.values())


def test_the_worst_sites_go_back_to_float_until_the_metric_holds() -> None:
    torch.manual_seed(1)
    inputs = torch.randn(64, 8)
    times = {name: {"float": 9.0, "static": 1.0, "dynamic": 5.0} for name in MIXED}
    reference: list[Tensor] = []

    def fidelity(module: nn.Module) -> float:
        outputs = module(inputs)
        if not reference:
            reference.append(outputs)
        return -float((outputs - reference[0]).square().sum() / reference[0].square().sum())

    after, trace, _ = _run(_clock(times), fidelity, Budget(metric_drop=1e9))
    assert _schemes(after) == ["static"] * 3
    whole = -fidelity(after.module())
    reference.clear()
    after, trace, before = _run(_clock(times), fidelity, Budget(metric_drop=whole / 2))
    kept = trace["choose_schemes"].facts["kept_for_metric"]
    ranked = list(trace["choose_schemes"].facts["site_errors"])
    assert kept == ranked[: len(kept)] and 0 < len(kept) < 3
    assert _schemes(after).count("float") == len(kept)
    assert fidelity(before.module()) - fidelity(after.module()) <= whole / 2
    reference.clear()
    after, _, _ = _run(_clock(times), fidelity, Budget(metric_drop=0.0))
    assert _schemes(after) == ["float"] * 3


@pytest.mark.parametrize(("bounds", "sites"), [({"only": ("linear_1",)}, 1), ({"skip": ("linear_1",)}, 2)])
def test_only_and_skip_bound_the_sites(bounds: dict[str, Any], sites: int) -> None:
    _, trace, _ = _run(_clock(MIXED), **bounds)
    assert len(trace["choose_schemes"].facts["site_errors"]) == sites


def test_real_measurements_end_in_a_file_no_slower_than_float(tmp_path: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).eval()
    batches = [(torch.randn(64, 256),) for _ in range(2)]
    result = graphopt.optimize(module, batches[0], recipe="int8", calibration=batches)
    record = result.trace["choose_schemes"]
    assert set(record.facts["latency_ms"]) >= {"float", "static", "dynamic"}
    assert record.facts["measuring_seconds"] > 0
    assert sum(record.facts["schemes"].values()) == 2
    assert result.export(tmp_path / "m.onnx", measure=False).sqnr_db > 30


def test_inspect_prints_the_worst_sites_and_the_times(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from graphopt.cli import main

    torch.manual_seed(0)
    batches = [(torch.randn(6, 8),) for _ in range(2)]
    graphopt.optimize(Layers().eval(), batches[0], recipe="int8", calibration=batches, run_dir=tmp_path / "run")
    assert main(["inspect", str(tmp_path / "run"), "--pass", "choose_schemes"]) == 0
    shown = capsys.readouterr().out
    assert "worst sites" in shown and "alone it leaves" in shown and "latency ms: float" in shown
    assert main(["inspect", str(tmp_path / "run"), "--pass", "best_of"]) == 0
    assert "output noise: nothing" in capsys.readouterr().out
