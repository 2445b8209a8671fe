"""Root causes: sabotaged layers come first, in torch and in the runtime, and what is advised holds when it is done."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import MODELS
from onnx import numpy_helper
from report_runs import result as small_result
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.causes import Cause, Causes, causes_of
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.passes import (
    Canonicalize,
    FoldBatchNorm,
    QuantizeEmbedding,
    QuantizeStatic,
    QuantizeWeights,
    RetypeFloats,
)
from graphopt.result import Result

KINDS = ["residual_cnn", "vision_transformer", "tied_language_model"]
EXACT = (Canonicalize(), FoldBatchNorm(), RetypeFloats())


@functools.cache
def _quantized(name: str) -> tuple[Result, Program, list[list[Any]]]:
    """A model in int8 by static scales, what it was before, and what is looked at: it costs a second each time."""
    case = MODELS[name]()
    calibration = list(case.calibration)
    run = graphopt.optimize(
        case.module, case.example_inputs, [*EXACT, QuantizeEmbedding(), QuantizeStatic()], calibration=calibration
    )
    before = next(each.given for each in run.trace if each.given is not None)
    batches = [before.signature.flatten(*_call(batch)) for batch in calibration[:2]]
    return run, before, batches


def _call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), batch) if isinstance(batch, dict) else (tuple(batch), {})


def _weight_scales(program: Program) -> list[str]:
    return [name for name in program.weights if name.endswith("weight_scale")]


def _readers(program: Program, scale: str) -> set[str]:
    """The operators that read the weight of a scale; several where it is tied."""
    weight = scale.removesuffix("_scale")
    return {
        node.name
        for node in program.graph.nodes
        if any(each.op == "get_attr" and each.target == weight for each in node.all_input_nodes)
    }


def _broken(result: Result, scales: list[str], times: float = 8.0) -> Result:
    program = result.program.map_weights(lambda name, value: value * times if name in scales else value)
    return dataclasses.replace(result, program=program)


def _sabotage(path: Path, scales: list[str], times: float = 8.0) -> Path:
    model = onnx.load(path)
    found = [each for each in model.graph.initializer if each.name in scales]
    assert len(found) == len(scales)
    for each in found:
        each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each) * np.float32(times), each.name))
    broken = path.with_name("broken.onnx")
    onnx.save(model, broken)
    return broken


_ranked = functools.partial(causes_of, tries=False)


@pytest.mark.parametrize("name", KINDS)
def test_a_sabotaged_layer_comes_first_in_torch_and_in_the_file(name: str, tmp_path: Path) -> None:
    result, before, batches = _quantized(name)
    result.export(tmp_path / "model.onnx", measure=False)
    scales = _weight_scales(result.program)
    assert len(scales) > 5
    for victim in (scales[0], scales[-1]):
        wanted = _readers(before, victim)
        found = _ranked(before, _broken(result, [victim]), batches)
        assert found.sites[0].node in wanted and found.sites[0].misfits
        file = _sabotage(tmp_path / "model.onnx", [victim])
        seen = _ranked(before, result, batches, file)
        assert seen.in_runtime[0] in wanted
        assert {each.node for each in seen.sites if each.differ} <= wanted


@pytest.mark.parametrize("name", KINDS)
def test_of_two_sabotaged_layers_both_are_in_the_first_three(name: str, tmp_path: Path) -> None:
    result, before, batches = _quantized(name)
    result.export(tmp_path / "model.onnx", measure=False)
    scales = _weight_scales(result.program)
    victims = [scales[1], scales[-3]]
    wanted = {reader for victim in victims for reader in _readers(before, victim)}
    assert len(wanted) == 2
    found = _ranked(before, _broken(result, victims), batches)
    assert wanted <= {each.node for each in found.sites[:3]}
    seen = _ranked(before, result, batches, _sabotage(tmp_path / "model.onnx", victims))
    assert wanted <= set(seen.in_runtime[:3])


@pytest.mark.parametrize("name", KINDS)
def test_a_sabotaged_activation_comes_first_however_little_it_does(name: str) -> None:
    result, before, batches = _quantized(name)
    healthy = {each.node for each in _ranked(before, result, batches).defective}
    scales = [each for each in result.program.weights if each.endswith("_scale") and "weight" not in each]
    scales = [each for each in scales if result.program.weights[each].dim() == 0]
    assert len(scales) > 3
    for victim in (scales[0], scales[len(scales) // 2]):
        found = _ranked(before, _broken(result, [victim]), batches)
        first = next(each for each in found.sites if each.node not in healthy)
        value = victim.removesuffix("_scale")
        assert any(value in name for name in first.misfits), (victim, first)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_wrong_with_a_healthy_file(name: str, tmp_path: Path) -> None:
    result, before, batches = _quantized(name)
    result.export(tmp_path / "model.onnx", measure=False)
    found = _ranked(before, result, batches, tmp_path / "model.onnx")
    assert not any(each.differ for each in found.sites) and found.unseen == []
    assert {each.node for each in found.sites} == set(found.in_runtime)
    assert sum(each.share or 0 for each in found.sites) == pytest.approx(1)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))  # type: ignore[no-any-return]


def _chain() -> tuple[nn.Module, tuple[Tensor], list[tuple[Tensor]]]:
    torch.manual_seed(0)
    return Chain(), (torch.randn(16, 6),), [(torch.randn(16, 6),) for _ in range(2)]


def _left(result: Result, beside: Result, batches: list[tuple[Tensor]]) -> float:
    """The noise at the outputs of one result over that of another, whose exact passes it shares."""
    before = next(each.given for each in beside.trace if each.given is not None)
    with torch.no_grad():
        wanted = [before.run(list(each))[0].double() for each in batches]
        noise = [
            sum(float((run.program.run(list(x))[0] - y).square().sum()) for x, y in zip(batches, wanted, strict=True))
            for run in (result, beside)
        ]
    return noise[0] / noise[1]


def test_keeping_a_site_in_float_does_what_was_said_when_it_is_done() -> None:
    module, inputs, data = _chain()
    run = graphopt.optimize(module, inputs, [Canonicalize(), QuantizeStatic()], calibration=data)
    found = run.explain(data[:1])
    assert found is not None
    remedy = next(each for each in found.remedies if each.change == "keep float")
    kept = graphopt.optimize(
        module, inputs, [Canonicalize(), QuantizeStatic(skip=(remedy.site,))], calibration=data
    )
    assert remedy.error_ratio == pytest.approx(_left(kept, run, data[:1]), rel=1e-3)
    assert remedy.size_ratio > 1 and remedy.site in remedy.how


def test_wider_weights_are_advised_where_they_are_narrow_and_help() -> None:
    module, inputs, data = _chain()
    narrow = QuantizeWeights(grid="int3", group_size=0, objective="plain", rounding="nearest")
    run = graphopt.optimize(module, inputs, [Canonicalize(), narrow], calibration=data)
    found = run.explain(data[:1])
    assert found is not None
    wider = next(each for each in found.remedies if each.change == "8-bit weights")
    alone = QuantizeWeights(grid="int8", only=(wider.site,))
    done = graphopt.optimize(module, inputs, [Canonicalize(), alone, narrow], calibration=data)
    assert wider.error_ratio < 0.98 and wider.size_ratio > 1
    assert wider.error_ratio == pytest.approx(_left(done, run, data[:1]), rel=0.05)
    eight = graphopt.optimize(module, inputs, [Canonicalize(), QuantizeWeights(grid="int8")], calibration=data)
    found = eight.explain(data)
    assert found is not None and not any(each.change == "8-bit weights" for each in found.remedies)


def test_where_places_make_up_for_each_other_one_is_kept_and_the_others_are_rounded_anew() -> None:
    module, inputs, data = _chain()
    tuned = QuantizeWeights(grid="int2", group_size=0, tune="model")
    run = graphopt.optimize(module, inputs, [Canonicalize(), tuned], calibration=data)
    found = run.explain()  # on the first rows of the data that the passes were given
    assert found is not None
    (remedy,) = [each for each in found.remedies if each.change == "keep float"]
    less = dataclasses.replace(tuned, skip=(remedy.site,))
    kept = graphopt.optimize(module, inputs, [Canonicalize(), less], calibration=data)
    assert remedy.error_ratio == pytest.approx(_left(kept, run, data[:1]), rel=1e-3)


class Unbalanced(nn.Module):
    """A norm whose channels differ by a thousand, and a linear that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 8)
        with torch.no_grad():
            self.norm.weight[::4] *= 300
            self.head.weight[:, ::4] /= 300

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def test_smoothing_is_advised_where_it_helps_and_was_not_done() -> None:
    torch.manual_seed(0)
    module, data = Unbalanced(), [(torch.randn(32, 16),) for _ in range(2)]
    run = graphopt.optimize(module, data[0], [Canonicalize(), QuantizeStatic()], calibration=data)
    found = run.explain(data)
    assert found is not None
    smooth = next(each for each in found.remedies if each.change.startswith("smooth"))
    assert smooth.error_ratio < 0.5 and smooth.how == "smooth before quantize_static"
    done = graphopt.optimize(module, data[0], "int8", calibration=data).explain(data)
    assert done is not None and not any(each.change.startswith("smooth") for each in done.remedies)


def test_a_saved_run_tells_its_causes_and_reads_them_again(tmp_path: Path) -> None:
    module, inputs, data = _chain()
    passes = [Canonicalize(), QuantizeStatic()]
    run = graphopt.optimize(module, inputs, passes, calibration=data, run_dir=tmp_path / "run")
    assert run.causes is not None and {each.node for each in run.causes.sites} == {"linear", "linear_1", "linear_2"}
    assert set(run.causes.in_runtime) == {"linear", "linear_1", "linear_2"}
    again = graphopt.load(tmp_path / "run")
    assert again.causes == run.causes and again.report.causes == run.causes
    assert "where the error comes from" in str(again.report) and "quantize_static" in str(again.report)
    with pytest.raises(GraphoptError, match="captured model is not at hand"):
        again.explain(data)


def test_a_loaded_run_is_explained_against_the_model_captured_anew(tmp_path: Path) -> None:
    module, inputs, data = _chain()
    passes = [Canonicalize(), QuantizeStatic()]
    run = graphopt.optimize(module, inputs, passes, calibration=data, run_dir=tmp_path / "run")
    again = graphopt.load(tmp_path / "run")
    again.original = graphopt.capture(module, inputs)
    found = again.explain(data)
    assert found is not None and run.causes is not None
    assert [each.node for each in found.sites] == [each.node for each in run.causes.sites]
    assert found.sqnr_db == pytest.approx(run.causes.sqnr_db)


def test_an_explanation_that_fails_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a strange model")

    monkeypatch.setattr("graphopt.causes.site_errors", fail)
    module, inputs, data = _chain()
    run = graphopt.optimize(module, inputs, [QuantizeStatic()], calibration=data, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "model.onnx").exists() and run.causes is None
    assert any("root causes are not known: RuntimeError: a strange model" in each for each in run.notes)


def test_what_is_not_quantized_has_no_causes() -> None:
    module, inputs, _ = _chain()
    assert graphopt.optimize(module, inputs, "exact").explain() is None
    assert small_result(exported=False).explain() is None  # made-up passes that say nothing of quantizing


def test_a_file_that_is_not_there_or_not_onnx_is_one_sentence(tmp_path: Path) -> None:
    module, inputs, data = _chain()
    run = graphopt.optimize(module, inputs, [QuantizeStatic()], calibration=data)
    with pytest.raises(GraphoptError, match="no file"):
        run.explain(data, tmp_path / "missing.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(GraphoptError, match="does not load"):
        run.explain(data, tmp_path / "bad.onnx")


def test_an_open_batch_is_looked_at_by_its_first_rows() -> None:
    module, inputs, _ = _chain()
    data = [(torch.randn(100, 6),)]
    run = graphopt.optimize(
        module, inputs, [QuantizeStatic()], calibration=data, dynamic_shapes={"x": {0: Dim("batch", min=2)}}
    )
    found = run.explain()
    assert found is not None and found.samples == 8


def test_sentences() -> None:
    errors = {"local_db": 30.0, "weights_db": 40.0, "inputs_db": 31.0, "effect_db": 25.0}
    cause = Cause("conv", "conv2d", by="quantize_static", **errors)  # type: ignore[arg-type]
    assert str(cause) == (
        "conv (conv2d, quantize_static): alone it leaves 25.0 dB at the outputs; "
        "own error 30.0 dB (weights 40.0 dB, inputs 31.0 dB)"
    )
    wrong = dataclasses.replace(cause, misfits={"relu": 8.0}, runtime_db=3.0, apart_db=3.0, differ=True)
    assert wrong.defects == [
        "the rounding of relu is 8 times as coarse as it need be",
        "the runtime gives something else than torch does here (3.0 dB apart)",
    ]
    assert Causes([cause, wrong]).defective == [wrong] and cause.runtime == ""
