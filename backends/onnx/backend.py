"""The ONNX backend: lower, write, check, run in ONNX Runtime, compare and measure."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.backend import ExportReport, Profile, Timing
from graphopt.backends.onnx.candidates import node_times, time_programs
from graphopt.backends.onnx.compare import load_session, output_scales, output_steps, run_onnx, session_options, sqnr_db
from graphopt.backends.onnx.fusion import check_fusion, has_signed_activations
from graphopt.backends.onnx.latency import measure_latency
from graphopt.backends.onnx.lowering import lower
from graphopt.backends.onnx.naming import input_names
from graphopt.backends.onnx.observer import OnnxObserver
from graphopt.backends.onnx.openvino_runtime import Comparison, compare_with_openvino, load_openvino
from graphopt.backends.onnx.profile import explain_slowdown
from graphopt.backends.onnx.target import TARGETS
from graphopt.backends.onnx.timing import declared_inputs, made_up_feeds, measure
from graphopt.errors import GraphoptError, first_line
from graphopt.files import replacing_folder_content
from graphopt.ir import Program, is_tensor
from graphopt.memory import release_freed
from graphopt.target import Target

# A protobuf message ends at 2 GiB; weights beyond this go to a file of their own.
_EXTERNAL_BYTES = 3 << 29
# Without this, every convolution would be told to be float, and the file to be slow, of a machine that it is not for.
_FAR = 64  # steps, a quarter of the range where an output has no scale: more than roundings add up to
_FOR_ARM = (
    "the activations are int8, which ONNX Runtime runs on integer kernels on ARM, not here: "
    "what fused is told as it is there, and nothing was timed"
)


class OnnxBackend:
    """ONNX files for ONNX Runtime."""

    name: ClassVar[str] = "onnx"
    targets: ClassVar[Sequence[Target]] = TARGETS
    file: ClassVar[str] = "model.onnx"

    def lower(self, program: Program, path: Path) -> int:
        """Write `program` to `path` atomically (weights beyond 1.5 GiB to `path.data`) and return the opset."""
        with self._written(program, path) as (_, opset):
            return opset

    @contextlib.contextmanager
    def _written(self, program: Program, path: Path) -> Iterator[tuple[Path, int]]:
        """Yield a temporary file and its opset; it takes its place when all goes well, else nothing is left."""
        if path.is_dir():
            raise GraphoptError(f"{path} is a folder; name a file in it, as in {path / 'model.onnx'}")
        model = lower(program)
        opset = model.opset_imports[""]
        weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        data = f"{path.name}.data"
        with replacing_folder_content(path.parent, [path.name, data]) as folder:
            ir.save(model, folder / path.name, external_data=data if weight_bytes > _EXTERNAL_BYTES else None)
            del model
            release_freed()  # a session holds the weights again
            self._check(folder / path.name)
            try:
                yield folder / path.name, opset
            except GraphoptError as error:
                # The user knows the file by the name that it was to have.
                raise type(error)(str(error).replace(str(folder / path.name), str(path))) from error

    @staticmethod
    def _check(path: Path) -> None:
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise GraphoptError(f"the exported model is not valid ONNX: {first_line(error)}") from error

    def run(self, path: Path, flat_inputs: Sequence[Any]) -> list[Any]:
        """Run the file on flat inputs, given in the order of its inputs, and return its outputs in order."""
        model = onnx.load(path, load_external_data=False)
        names = [value.name for value in model.graph.input]
        arrays = [_array(value) for value in flat_inputs if isinstance(value, Tensor | np.ndarray)]
        return list(run_onnx(path, dict(zip(names, arrays, strict=True))).values())

    def export(self, program: Program, path: Path, baseline: Program | None, measure: bool) -> ExportReport:
        """Lower to `path`, prove what fused, compare with `program` (steps) and `baseline` (SQNR), and measure both.

        The file appears when all of this has succeeded.
        """
        with scratch() as folder, self._written(program, path) as (file, opset):
            report = _proven(program, file, opset)
            if baseline is None:
                report.notes.append("the float model is not at hand, so nothing was compared with it")
            else:
                here = _FOR_ARM not in report.notes
                self._compare(report, program, baseline, folder / "float.onnx", measure and here)
        report.path = path
        return report

    def _compare(
        self, report: ExportReport, program: Program, baseline: Program, reference: Path, measure: bool
    ) -> None:
        """Compare outputs with the float model's, and the file with the float export, written to `reference`."""
        feeds = feeds_of(program)
        report.sqnr_db = _worst_sqnr(_torch_outputs(baseline), list(run_onnx(report.path, feeds).values()))
        try:
            self.lower(baseline, reference)
            load_session(reference, session_options(1))
        except GraphoptError as error:
            report.notes.append(f"there is no float file to compare with: {error}")
            return
        report.baseline_size_bytes = _file_bytes(reference)
        if measure:
            self._measure(report, reference, feeds)
            report.node_ms = node_times(program, report.path, feeds, report.latency_ms or 0.0)
            latency = report.baseline_latency_ms or 0.0
            report.baseline_node_ms = node_times(baseline, reference, feeds, latency, report.node_ms)

    @staticmethod
    def _measure(report: ExportReport, reference: Path, feeds: dict[str, Any]) -> None:
        times = measure_latency({"float": reference, "optimized": report.path}, feeds)
        report.latency_ms, report.baseline_latency_ms = times["optimized"].median_ms, times["float"].median_ms
        ratio = report.latency_ratio
        if ratio is not None and ratio > 1.0:
            report.notes.append(f"the file is slower than its float export ({ratio:.2f}x); see where the time goes")
            try:
                report.slow_nodes = explain_slowdown(reference, report.path, feeds)
            except GraphoptError as error:  # the file is good; only the explanation is missing
                report.notes.append(f"where the time goes is not known: {error}")

    def profile(self, programs: Mapping[str, Program]) -> dict[str, Profile]:
        """Lower programs of the same inputs to temporary files and time them in turns; see `time_programs`."""
        with scratch() as folder:
            files = {label: folder / f"{index}.onnx" for index, label in enumerate(programs)}
            for label, program in programs.items():
                self.lower(program, files[label])
            profiles = time_programs(programs, files, feeds_of(next(iter(programs.values()))))
            sizes = {label: _file_bytes(file) for label, file in files.items()}
            return {label: dataclasses.replace(each, size_bytes=sizes[label]) for label, each in profiles.items()}

    def other_runtimes(self, named: Sequence[str]) -> list[str]:
        """Return the runtimes in `named`, once each, that are not ONNX Runtime itself, which always runs.

        Raises GraphoptError where one is not known or not installed.
        """
        others = [each for each in dict.fromkeys(named) if each != "onnxruntime"]
        for each in others:
            if each != "openvino":
                raise GraphoptError(f"there is no runtime {each!r}; there are onnxruntime and openvino")
            load_openvino()
        return others

    def compare(self, path: Path, threads: int, runtime: str) -> Comparison:
        """Run the file in ONNX Runtime and in another runtime, on inputs made up from what it declares.

        Raises GraphoptError where the runtime is not known, not installed, or does not take the file.
        """
        self.other_runtimes([runtime])
        return compare_with_openvino(path, made_up_feeds(declared_inputs(path, threads)), threads)

    def observer(self, path: Path, program: Program) -> OnnxObserver:
        """Look into ONNX Runtime while it computes a file; see `OnnxObserver`."""
        return OnnxObserver(path, program)

    def measure(self, paths: Mapping[str, Path], threads: int) -> dict[str, Timing]:
        """Time files that take the same inputs in turns; see `timing.measure`."""
        return measure(paths, threads)


def _proven(program: Program, file: Path, opset: int) -> ExportReport:
    """Return what the runtime makes of the file, and how far it is from the torch emulation."""
    load_session(file, session_options(1))
    fusion, notes = check_fusion(file), []
    if has_signed_activations(file):
        on_arm = check_fusion(file, signed_activations=True)
        if on_arm.fused != fusion.fused:
            fusion, notes = on_arm, [_FOR_ARM]
    report = ExportReport(file, _file_bytes(file), opset, dict(fusion.fused), list(fusion.unfused), notes=notes)
    if others := len(program.outputs) - sum(is_tensor(value) for value in program.outputs):
        report.notes.append(f"{others} of the model's outputs are no tensors; the file leaves them out")
    report.max_steps = _steps(file, _torch_outputs(program), list(run_onnx(file, feeds_of(program)).values()))
    if report.max_steps > _FAR:
        report.notes.append(
            f"in ONNX Runtime the file's outputs are up to {report.max_steps:.0f} steps from the program's: there it "
            "computes something else; try another target or format"
        )
    return report


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder; GraphoptError where there is none to be had."""
    try:
        folder = tempfile.mkdtemp(prefix="graphopt-")
    except OSError as error:
        reason = error.strerror or error
        raise GraphoptError(f"there is no folder for temporary files: {reason}; set TMPDIR to one") from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def feeds_of(program: Program) -> dict[str, Any]:
    """Return the example inputs as ONNX feeds, by name."""
    tensors = [value for value in program.flat_example if isinstance(value, Tensor)]
    return {name: _array(value) for name, value in zip(input_names(program), tensors, strict=True)}


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
        worst = max(worst, output_steps(old, new, scales.get(name)))
    return worst


def _file_bytes(path: Path) -> int:
    data = path.with_name(f"{path.name}.data")
    return os.path.getsize(path) + (os.path.getsize(data) if data.exists() else 0)
