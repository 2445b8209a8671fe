"""Numeric comparison of tensors and running ONNX files in ONNX Runtime's CPU provider as a reference.

    SQNR = 10 log10( sum reference^2 / sum (reference - output)^2 )   [dB]
    steps = max |reference - output| / scale                          [quantization steps]

Fused integer kernels may round differently from the graph as written, by a few steps; `disable_optimizations`
runs the graph as written, which is the reference for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from graphopt.backends.onnx.qdq_graph import DEQUANTIZE, MOVES_DATA, QdqGraph
from graphopt.errors import GraphoptError, NotExpressible, first_line

Array = npt.NDArray[Any]
_BFLOAT16 = "tensor(bfloat16)"
_UNSCALED_STEPS = 255


def sqnr_db(reference: npt.ArrayLike, output: npt.ArrayLike) -> float:
    """Signal to quantization noise of `output` against `reference` (same shape), in dB.

    inf when they are equal. -inf when the reference is zero and the output is not, or when one of them is NaN
    or infinite where the other is not the same. Where both are NaN, or the same infinity, they agree and do
    not count.
    Raises GraphoptError when the shapes differ.
    """
    expected, actual = _as_float64(reference, output)
    finite = np.isfinite(expected) & np.isfinite(actual)
    agree = (expected == actual) | (np.isnan(expected) & np.isnan(actual))
    if not np.all(finite | agree):
        return -math.inf
    signal, other = expected[finite], actual[finite]
    peak = max(np.abs(signal).max(initial=0.0), np.abs(other).max(initial=0.0))
    if peak == 0.0 or np.array_equal(signal, other):
        return math.inf
    # Divided by the peak first, since squares of large values overflow.
    signal, other = signal / peak, other / peak
    power, noise = float(np.sum(signal**2)), float(np.sum((signal - other) ** 2))
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(power / noise) if power > 0.0 else -math.inf


def max_steps(reference: npt.ArrayLike, output: npt.ArrayLike, scale: npt.ArrayLike) -> float:
    """The largest |reference - output| in units of `scale` (a scalar, or an array that broadcasts to them).

    inf where one is NaN or infinite and the other is not the same; 0 for empty tensors.
    Raises GraphoptError when the shapes differ or a scale is not positive.
    """
    expected, actual = _as_float64(reference, output)
    step = np.asarray(scale, dtype=np.float64)
    if not np.all(step > 0):
        raise GraphoptError("a quantization scale is zero, negative or NaN; scales must be positive")
    agree = (expected == actual) | (np.isnan(expected) & np.isnan(actual))
    with np.errstate(invalid="ignore"):
        steps = np.where(agree, 0.0, np.abs(expected - actual) / step)
    return float(np.where(np.isnan(steps), np.inf, steps).max(initial=0.0))


def output_steps(reference: npt.ArrayLike, output: npt.ArrayLike, scale: float | None) -> float:
    """`max_steps` of an output of the model: in steps of `scale`, or of 1/255 of its range where it has none.

    A constant output has no range: its steps are those of a range from zero to it.
    """
    if scale:
        return max_steps(reference, output, scale)
    expected = np.asarray(reference)
    finite = expected[np.isfinite(expected)].astype(np.float64)
    spread = float(finite.max() - finite.min()) if finite.size else 0.0
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    step = (spread or largest) / _UNSCALED_STEPS
    if step > 0:
        return max_steps(reference, output, step)
    return 0.0 if np.array_equal(*_as_float64(reference, output), equal_nan=True) else math.inf


def _as_float64(reference: npt.ArrayLike, output: npt.ArrayLike) -> tuple[Array, Array]:
    expected, actual = np.asarray(reference), np.asarray(output)
    if expected.shape != actual.shape:
        raise GraphoptError(
            f"the outputs have shapes {list(expected.shape)} and {list(actual.shape)}; "
            "compare tensors of one shape"
        )
    return expected.astype(np.float64), actual.astype(np.float64)


def output_scales(path: str | Path) -> dict[str, float]:
    """Graph output -> scale of the DequantizeLinear that writes it, seen through data movement.

    Outputs whose last operator is another one, or whose scale is no constant per-tensor scale, are absent.
    """
    model = onnx.load(path, load_external_data=False)
    graph = QdqGraph.of(model.graph, 0, Path(path).parent)
    scales: dict[str, float] = {}
    for output in model.graph.output:
        node = graph.producer_of(output.name)
        while node is not None and node.op_type in MOVES_DATA:
            node = graph.producer_of(node.input[0])
        if node is not None and node.op_type == DEQUANTIZE:
            scale = graph.value(node.input[1])
            if scale is not None and scale.size == 1:
                scales[output.name] = float(scale.reshape(-1)[0])
    return scales


def run_onnx(
    path: str | Path,
    feeds: Mapping[str, Array],
    disable_optimizations: bool = False,
    threads: int = 1,
) -> dict[str, Array]:
    """Run the file once on the CPU; return its outputs by name.

    `disable_optimizations` runs the graph as written. bfloat16 inputs are given in any floating dtype and
    bfloat16 outputs come back as float32, since NumPy has no bfloat16.

    Raises GraphoptError for a missing input, or when ONNX Runtime refuses the file or the feeds.
    """
    path = Path(path)
    options = session_options(threads)
    if disable_optimizations:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = load_session(path, options)
    if any(each.type == _BFLOAT16 for each in [*session.get_inputs(), *session.get_outputs()]):
        session = _float32_session(path, options)
    names = [output.name for output in session.get_outputs()]
    selected = select_feeds(session, feeds)
    try:
        values = session.run(names, selected)
    except Exception as error:  # onnxruntime's exception classes are not public
        raise GraphoptError(
            f"ONNX Runtime cannot run '{path}': {first_line(error)}; check the inputs"
        ) from None
    return dict(zip((name.removesuffix(FLOAT32) for name in names), values, strict=True))


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options of a quiet CPU session whose threads stop spinning when a run ends, to disturb no other."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def load_session(
    path: str | Path, options: onnxruntime.SessionOptions, model: bytes | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session on the file (or on `model`, an edited copy); GraphoptError when it does not load."""
    try:
        return onnxruntime.InferenceSession(model or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes are not public
        if not Path(path).exists():
            raise GraphoptError(f"there is no file '{path}'; give the path of an ONNX model") from None
        if "NOT_IMPLEMENTED" in str(error):
            raise NotExpressible(
                f"ONNX Runtime's CPU provider has no kernel for an operator of '{path}': {first_line(error)}; "
                "convert the model with .float(), or replace the operator"
            ) from None
        raise GraphoptError(f"ONNX Runtime does not load '{path}': {first_line(error)}; export it again") from None


def select_feeds(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds that `session` takes; GraphoptError names the first one that is missing."""
    names = [value.name.removesuffix(FLOAT32) for value in session.get_inputs()]
    for name in names:
        if name not in feeds:
            raise GraphoptError(
                f"the model's input '{name}' is not given; the inputs given are {sorted(feeds)}"
            )
    selected = {}
    for value, name in zip(session.get_inputs(), names, strict=True):
        array = np.asarray(feeds[name])
        selected[value.name] = array.astype(np.float32) if value.name.endswith(FLOAT32) else array
    return selected


FLOAT32 = "::float32"


def _float32_session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session on a copy of the file whose bfloat16 inputs and outputs are cast from and to float32."""
    model = onnx.load(path, load_external_data=False)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
    )
    float32_borders(model)
    return load_session(path, options, model.SerializeToString())


def float32_borders(model: onnx.ModelProto) -> None:
    """Cast bfloat16 inputs and outputs, which NumPy does not know, from and to float32, under names `x::float32`."""
    before, after = [], []
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            before.append(
                helper.make_node("Cast", [value.name + FLOAT32], [value.name], to=TensorProto.BFLOAT16)
            )
            value.name += FLOAT32
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for value in model.graph.output:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            after.append(helper.make_node("Cast", [value.name], [value.name + FLOAT32], to=TensorProto.FLOAT))
            value.name += FLOAT32
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [*before, *model.graph.node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
