"""Export: all or nothing, honest sizes, and one sentence where it cannot be done."""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnx import backend as module
from graphopt.backends.onnx.backend import OnnxBackend
from graphopt.errors import GraphoptError, NotExpressible
from graphopt.ir import Program


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return graphopt.capture(Model(), (torch.randn(2, 16),))


@pytest.fixture(scope="module")
def quantized() -> Program:
    torch.manual_seed(0)
    return graphopt.optimize(Model(), (torch.randn(2, 16),), recipe="int8_dynamic").program


@pytest.fixture(autouse=True)
def lowered_once(program: Program, quantized: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the two programs once for all tests: these are about files."""
    lower = module.lower

    def cached(given: Program) -> Any:
        key = next((name for name, known in (("p", program), ("q", quantized)) if known is given), None)
        if key is None:
            return lower(given)
        if key not in _LOWERED:
            _LOWERED[key] = ir.to_proto(lower(given))
        return ir.from_proto(_LOWERED[key])

    monkeypatch.setattr(module, "lower", cached)


_LOWERED: dict[str, onnx.ModelProto] = {}


def left(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.rglob("*"))


def test_the_report_says_what_was_written(tmp_path: Path, program: Program, quantized: Program) -> None:
    path = tmp_path / "new" / "model.onnx"
    report = OnnxBackend().export(quantized, path, program, measure=True)
    assert left(tmp_path) == ["model.onnx", "new"]
    assert report.path == path and report.size_bytes == path.stat().st_size
    assert report.baseline_size_bytes is not None and report.size_bytes != report.baseline_size_bytes
    assert report.opset == 20 and report.fused == {"DynamicQuantizeMatMul": 2} and report.unfused == []
    assert report.max_steps is not None and report.max_steps < 0.01
    assert report.sqnr_db is not None and 30 < report.sqnr_db < 80
    assert report.latency_ms is not None and report.latency_ms > 0 and report.baseline_latency_ms is not None
    assert (report.latency_ratio or 0) <= 1 or (report.slow_nodes and "slower" in report.notes[0])


def test_without_the_float_model_nothing_is_compared(tmp_path: Path, quantized: Program) -> None:
    report = OnnxBackend().export(quantized, tmp_path / "model.onnx", None, measure=True)
    assert report.sqnr_db is None and report.latency_ms is None and len(report.notes) == 1


def test_run_takes_inputs_in_order(tmp_path: Path, program: Program) -> None:
    OnnxBackend().lower(program, tmp_path / "model.onnx")
    (written,) = OnnxBackend().run(tmp_path / "model.onnx", program.flat_example)
    with torch.no_grad():
        np.testing.assert_allclose(written, program.run(program.flat_example)[0], atol=1e-5)


def test_outputs_that_are_no_tensors_are_told(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * 2, None, 7

    mixed = graphopt.capture(Mixed(), (torch.randn(3),))
    report = OnnxBackend().export(mixed, tmp_path / "model.onnx", mixed, measure=False)
    assert report.notes == ["2 of the model's outputs are no tensors; the file leaves them out"]


# --- external data


def test_large_weights_go_to_a_file_of_their_own(
    tmp_path: Path, program: Program, quantized: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    monkeypatch.setattr(module, "_EXTERNAL_BYTES", 100)
    report = OnnxBackend().export(quantized, path, program, measure=False)
    assert left(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert report.size_bytes == path.stat().st_size + data.stat().st_size
    assert report.fused == {"DynamicQuantizeMatMul": 2} and report.max_steps is not None and report.max_steps < 0.01
    (moved,) = {
        entry.value
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert moved == "model.onnx.data"  # relative, so that the pair can be moved
    monkeypatch.setattr(module, "_EXTERNAL_BYTES", 1 << 30)
    report = OnnxBackend().export(quantized, path, program, measure=False)
    assert left(tmp_path) == ["model.onnx"] and report.size_bytes == path.stat().st_size


# --- what goes wrong


def test_a_folder_is_no_file(tmp_path: Path, program: Program) -> None:
    with pytest.raises(GraphoptError, match=r"is a folder; name a file in it, as in .*model\.onnx$"):
        OnnxBackend().lower(program, tmp_path)
    assert left(tmp_path) == []


def test_a_file_is_no_folder(tmp_path: Path, program: Program) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphoptError, match=r"cannot write .*file/model\.onnx: "):
        OnnxBackend().lower(program, tmp_path / "file" / "model.onnx")
    assert left(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, program: Program) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(GraphoptError, match="Permission denied"):
        OnnxBackend().lower(program, tmp_path / "model.onnx")


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB: the system's answer to one that does is an error as on a full disk.

    Kept to the call in question: the file that pytest's own output goes to must grow.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    if external:
        monkeypatch.setattr(module, "_EXTERNAL_BYTES", 100)
    with pytest.raises(GraphoptError, match=r"^cannot write .*model\.onnx: ") as raised, full_disk():
        OnnxBackend().lower(program, path)
    assert "\n" not in str(raised.value)
    assert left(tmp_path) == ["model.onnx"] and path.read_bytes() == b"the old one"


@pytest.mark.parametrize("failure", [GraphoptError("ONNX Runtime does not load it"), KeyboardInterrupt()])
def test_a_file_that_does_not_stand_the_proof_is_not_left(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(path: Path) -> None:
        assert path.is_file()
        raise failure

    monkeypatch.setattr(module, "check_fusion", fail)
    with pytest.raises(type(failure)):
        OnnxBackend().export(program, tmp_path / "model.onnx", None, measure=False)
    assert left(tmp_path) == []


def test_errors_name_the_users_file(tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise GraphoptError(f"ONNX Runtime does not load '{path}'")

    monkeypatch.setattr(module, "check_fusion", fail)
    path = tmp_path / "model.onnx"
    with pytest.raises(GraphoptError, match="does not load") as raised:
        OnnxBackend().export(program, path, None, measure=False)
    assert str(raised.value) == f"ONNX Runtime does not load '{path}'"


def test_an_invalid_model_is_refused(tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = module.lower

    def spoiled(given: Program) -> Any:
        model = lower(given)
        model.graph.outputs[0].type = None
        next(iter(model.graph)).op_type = "NoSuchOperator"
        return model

    monkeypatch.setattr(module, "lower", spoiled)
    with pytest.raises(GraphoptError, match="the exported model is not valid ONNX: "):
        OnnxBackend().lower(program, tmp_path / "model.onnx")
    assert left(tmp_path) == []


def test_without_a_float_file_the_report_says_so(
    tmp_path: Path, program: Program, quantized: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = module.lower

    def fails_for_the_baseline(given: Program) -> Any:
        if given is program:
            raise GraphoptError("no form")
        return lower(given)

    monkeypatch.setattr(module, "lower", fails_for_the_baseline)
    report = OnnxBackend().export(quantized, tmp_path / "model.onnx", program, measure=True)
    assert report.notes == ["there is no float file to compare with: no form"]
    assert report.sqnr_db is not None and report.latency_ms is None and (tmp_path / "model.onnx").exists()


def test_no_folder_for_temporary_files(
    tmp_path: Path, program: Program, quantized: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(GraphoptError, match="temporary files") as raised:
        OnnxBackend().export(quantized, tmp_path / "model.onnx", program, measure=False)
    assert "\n" not in str(raised.value) and left(tmp_path) == []


@pytest.mark.parametrize(
    ("torch_says", "runtime_says", "steps"), [(1.0, 101.0, 100 * 255), (0.0, 1e-3, math.inf), (2.0, 2.0, 0.0)]
)
def test_a_constant_output_is_compared_too(
    torch_says: float, runtime_says: float, steps: float, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    OnnxBackend().lower(graphopt.capture(torch.nn.Identity(), (torch.zeros(1),)), path)
    found = module._steps(path, [np.array([torch_says], np.float32)], [np.array([runtime_says], np.float32)])
    assert found == pytest.approx(steps)


def test_a_type_that_the_runtime_has_no_kernel_for_is_a_sentence_about_the_model(tmp_path: Path) -> None:
    program = graphopt.capture(torch.nn.Conv2d(1, 1, 1).double(), (torch.zeros(1, 1, 4, 4, dtype=torch.float64),))
    with pytest.raises(NotExpressible, match=r"no kernel for an operator .*\.float\(\)"):
        OnnxBackend().export(program, tmp_path / "m.onnx", None, False)
    assert list(tmp_path.iterdir()) == []
