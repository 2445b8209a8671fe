"""OpenVINO as a second runtime: it loads, runs and times the file that was written for ONNX Runtime.

The extra `[openvino]` brings it. It is held to float32 where a file computes in floats (by default it takes bfloat16
where a processor has it) and to the same number of threads. Two runtimes that both run a quantized file right still
differ: each rounds where its own kernels requantize, so differences are told in quantization steps of the outputs.

What differs by design: linears with scales computed at run time, which ONNX Runtime fuses, OpenVINO runs in floats. Its
eight-bit kernels clip pairs of products too where a processor has no VNNI, and pair other weights: channels within
one position of a convolution (`graphopt.quantization.saturation`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.backends.onnx.compare import output_scales, output_steps, run_onnx, sqnr_db
from graphopt.backends.onnx.latency import Latency, interleaved, onnxruntime_runner
from graphopt.errors import GraphoptError, first_line

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """The same file in two runtimes.

    Attributes:
        version: of OpenVINO.
        latency_ms, onnxruntime_ms: medians of runs in turns.
        max_steps: largest difference between the outputs, in quantization steps of the output where it is, as the
            export report counts them; infinite where integer outputs are not equal.
        sqnr_db: of OpenVINO's outputs to ONNX Runtime's, the worst output; infinite where all are equal.
        output: the name of the output with the largest difference.
    """

    version: str
    latency_ms: float
    onnxruntime_ms: float
    max_steps: float
    sqnr_db: float
    output: str


def compare_with_openvino(path: Path, feeds: Mapping[str, Array], threads: int = 1) -> Comparison:
    """Run the file in both runtimes on `feeds`.

    Raises GraphoptError where OpenVINO is not installed, or does not load or run the file.
    """
    openvino = load_openvino()
    infer = _loaded(openvino, path, feeds, threads)
    found = infer()
    expected = run_onnx(path, feeds, threads=threads)
    scales = output_scales(path)
    steps, ratios = {}, []
    for name, reference in expected.items():
        made = found[name]
        if not np.issubdtype(reference.dtype, np.floating):
            steps[name] = 0.0 if np.array_equal(reference, made) else np.inf
            continue
        steps[name] = output_steps(reference, made, scales.get(name))
        ratios.append(sqnr_db(reference, made))
    worst = max(steps, key=lambda name: steps[name])
    times = _times({"onnxruntime": onnxruntime_runner(path, feeds, threads), "openvino": infer})
    return Comparison(
        str(openvino.__version__).split("-")[0],
        times["openvino"].median_ms,
        times["onnxruntime"].median_ms,
        steps[worst],
        min(ratios, default=np.inf),
        worst,
    )


def _times(runners: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
    return interleaved(runners, min_seconds=1.0, rounds=8, max_seconds=30.0)


def load_openvino() -> Any:
    """Import OpenVINO; GraphoptError says how to get it."""
    try:
        return importlib.import_module("openvino")
    except ImportError:
        raise GraphoptError(
            "OpenVINO is not installed; run pip install 'graphopt[openvino]', or leave out --runtime"
        ) from None


def _loaded(
    openvino: Any, path: Path, feeds: Mapping[str, Array], threads: int
) -> Callable[[], dict[str, Array]]:
    """Return a function that runs the file once and gives its outputs by name."""
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    try:
        model = openvino.Core().compile_model(str(path), "CPU", options)
        request = model.create_infer_request()
        inputs = {port.any_name: np.asarray(feeds[port.any_name], order="C") for port in model.inputs}
    except KeyError as error:
        raise GraphoptError(f"the model's input {error} is not given") from None
    except Exception as error:  # openvino raises RuntimeError with its own text for whatever it does not like
        raise GraphoptError(f"OpenVINO does not load {path}: {_reason(error)}") from None

    def infer() -> dict[str, Array]:
        try:
            found = request.infer(inputs)
        except Exception as error:
            raise GraphoptError(f"OpenVINO cannot run {path}: {_reason(error)}") from None
        return {name: np.array(found[port]) for port in model.outputs for name in port.names}

    return infer


def _reason(error: Exception) -> str:
    """Return the sentence in OpenVINO's message that says something: the last line that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)
