"""The ONNX backend: lower, write, check, run in ONNX Runtime, compare and measure."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.backend import ExportReport, Timing
from graphopt.backends.onnx.compare import max_steps, output_scales, run_onnx, sqnr_db
from graphopt.backends.onnx.fusion import check_fusion
from graphopt.backends.onnx.latency import measure_latency
from graphopt.backends.onnx.lowering import lower
from graphopt.backends.onnx.profile import explain_slowdown
from graphopt.backends.onnx.target import TARGETS
from graphopt.backends.onnx.timing import measure
from graphopt.errors import GraphoptError
from graphopt.files import replacing_folder_content
from graphopt.ir import Program
from graphopt.target import Target

# A protobuf message ends at 2 GiB; weights beyond this go to a file of their own.
_EXTERNAL_BYTES = 3 << 29
_UNSCALED_STEPS = 255  # an output without a scale of its own is measured in steps of its range / 255


class OnnxBackend:
    """ONNX files for ONNX Runtime."""

    name: ClassVar[str] = "onnx"
    targets: ClassVar[Sequence[Target]] = TARGETS

    def lower(self, program: Program, path: Path) -> int:
        """Write `program` to `path` atomically (weights beyond 1.5 GiB to `path.data`) and return the opset."""
        model = lower(program)
        weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        external = f"{path.name}.data" if weight_bytes > _EXTERNAL_BYTES else None
        with replacing_folder_content(path.parent, [path.name, f"{path.name}.data"]) as folder:
            ir.save(model, folder / path.name, external_data=external)
            self._check(folder / path.name)
        return model.opset_imports[""]

    @staticmethod
    def _check(path: Path) -> None:
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise GraphoptError(f"the exported model is not valid ONNX: {str(error).splitlines()[0]}") from error

    def run(self, path: Path, flat_inputs: Sequence[Any]) -> list[Any]:
        """Run the file on flat inputs, given in the order of its inputs, and return its outputs in order."""
        model = onnx.load(path, load_external_data=False)
        names = [value.name for value in model.graph.input]
        arrays = [_array(value) for value in flat_inputs if isinstance(value, Tensor | np.ndarray)]
        return list(run_onnx(path, dict(zip(names, arrays, strict=True))).values())

    def export(self, program: Program, path: Path, baseline: Program | None, measure: bool) -> ExportReport:
        """Lower to `path`, prove what fused, compare with `program` (steps) and `baseline` (SQNR), and measure both."""
        opset = self.lower(program, path)
        fusion = check_fusion(path)
        report = ExportReport(path, _file_bytes(path), opset, dict(fusion.fused), list(fusion.unfused))
        feeds = feeds_of(program)
        emulated = _torch_outputs(program)
        written = list(run_onnx(path, feeds).values())
        report.max_steps = _steps(path, emulated, written)
        if baseline is None:
            report.notes.append("the float model is not at hand, so nothing was compared with it")
            return report
        report.sqnr_db = _worst_sqnr(_torch_outputs(baseline), written)
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            reference = Path(folder) / "float.onnx"
            try:
                self.lower(baseline, reference)
                report.baseline_size_bytes = _file_bytes(reference)
                if measure:
                    self._measure(report, reference, feeds)
            except GraphoptError as error:
                report.notes.append(f"there is no float file to compare with: {error}")
        return report

    @staticmethod
    def _measure(report: ExportReport, reference: Path, feeds: dict[str, Any]) -> None:
        times = measure_latency({"float": reference, "optimized": report.path}, feeds)
        report.latency_ms, report.baseline_latency_ms = times["optimized"].median_ms, times["float"].median_ms
        ratio = report.latency_ratio
        if ratio is not None and ratio > 1.0:
            report.notes.append(f"the file is slower than its float export ({ratio:.2f}x); see where the time goes")
            report.slow_nodes = explain_slowdown(reference, report.path, feeds)

    def measure(self, paths: Mapping[str, Path], threads: int) -> dict[str, Timing]:
        """Time files that take the same inputs in turns; see `timing.measure`."""
        return measure(paths, threads)


def feeds_of(program: Program) -> dict[str, Any]:
    """Return the example inputs as ONNX feeds, by name."""
    pairs = zip(program.signature.inputs, program.flat_example, strict=True)
    return {name: _array(value) for name, value in pairs if isinstance(value, Tensor)}


def _array(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    plain = value.detach().cpu()
    return plain.float().numpy() if plain.dtype is torch.bfloat16 else plain.numpy()


def _torch_outputs(program: Program) -> list[Any]:
    with torch.no_grad():
        outputs = program.run(program.flat_example)
    return [_array(value) for value in outputs if isinstance(value, Tensor)]


def _worst_sqnr(reference: list[Any], outputs: list[Any]) -> float:
    floating = [
        sqnr_db(old, new) for old, new in zip(reference, outputs, strict=True) if np.issubdtype(old.dtype, np.floating)
    ]
    return min(floating, default=math.inf)


def _steps(path: Path, reference: list[Any], outputs: list[Any]) -> float:
    scales = output_scales(path)
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.output]
    worst = 0.0
    for name, old, new in zip(names, reference, outputs, strict=True):
        if not np.issubdtype(old.dtype, np.floating) or old.size == 0:
            continue
        finite = old[np.isfinite(old)]
        spread = float(finite.max() - finite.min()) if finite.size else 0.0
        scale = scales.get(name) or spread / _UNSCALED_STEPS
        if scale > 0:
            worst = max(worst, max_steps(old, new, scale))
    return worst


def _file_bytes(path: Path) -> int:
    data = path.with_name(f"{path.name}.data")
    return os.path.getsize(path) + (os.path.getsize(data) if data.exists() else 0)
