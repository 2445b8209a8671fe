"""Quantize the weights, and the activations where asked, of an ONNX file with a peer; runs in the peer's environment.

    round_onnx.py JOB.json

The job names the float file, an npz of calibration batches [count, batch, ...] and one of held-out batches by the
input's name, a method and the bits of weights, which have a scale a channel. What it writes: the logits of the held-out
batches as an npy, and in the result the bits of each weight beside its codes, seconds and peak memory.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

_ADAROUND_STEPS = 1000  # for each layer; AIMET recommends 15000 for fewer than eight bits, hours on two cores
Batches = list[dict[str, Any]]
Job = dict[str, Any]
Made = tuple[Callable[[dict[str, Any]], Any], float]  # what runs a batch, and the bits beside codes


def onnxruntime_static(job: Job, calibration: Batches) -> Made:
    """onnxruntime.quantization: QInt4 weights by channel beside uint8 activations."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Samples(CalibrationDataReader):  # type: ignore[misc]  # the package publishes no types
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    prepared, output = (str(Path(job["logits"]).with_suffix(f".{name}.onnx")) for name in ("prepared", "quantized"))
    quant_pre_process(job["fp32"], prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        output,
        Samples(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt4,
        per_channel=True,
    )
    session = onnxruntime.InferenceSession(output)
    return lambda batch: session.run(None, batch)[0], _beside(onnx.load(job["fp32"]))


def aimet(job: Job, calibration: Batches, search: str, activations: bool) -> Made:
    """AIMET's quantization simulation, after sequential MSE or AdaRound; activations have eight bits or stay float."""
    from aimet_onnx import QuantizationSimModel, apply_adaround, apply_seq_mse, int8, qtype

    model = onnx.load(job["fp32"])
    sim: Any = QuantizationSimModel(
        model, param_type=qtype.int(job["bits"]), activation_type=int8, dummy_input=calibration[0]
    )
    if not activations:
        for name in sim.activation_names:
            if name in sim.qc_quantize_op_dict:
                sim.qc_quantize_op_dict[name].enabled = False
    if search == "seq_mse":
        apply_seq_mse(sim, calibration)
    elif search == "adaround":
        apply_adaround(sim, calibration, num_iterations=_ADAROUND_STEPS)
    sim.compute_encodings(calibration)
    return lambda batch: sim.session.run(None, batch)[0], _beside(model)


def _beside(model: Any) -> float:
    """Return the bits of scales, 16 a channel, for each weight of convolutions and linears, [R, ...] or [K, R]."""
    arrays = {each.name: list(each.dims) for each in model.graph.initializer}
    nodes = [each for each in model.graph.node if each.op_type in ("Conv", "MatMul", "Gemm")]
    read = [(each.op_type, arrays[each.input[1]]) for each in nodes if each.input[1] in arrays]
    scales = sum(shape[-1] if kind == "MatMul" else shape[0] for kind, shape in read)
    return float(16 * scales / sum(int(np.prod(shape)) for _, shape in read))


METHODS: dict[str, Callable[[Job, Batches], Made]] = {
    "static": onnxruntime_static,
    **{
        f"{search}{'_8' if eight else ''}": functools.partial(aimet, search=search, activations=eight)
        for search in ("nearest", "seq_mse", "adaround")
        for eight in (False, True)
    },
}


def peak_bytes() -> int:
    """Return the most memory held since this program started; getrusage counts what forked it, too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    started = time.perf_counter()
    run, beside = METHODS[job["method"]](job, _batches(job["calibration"]))
    seconds = time.perf_counter() - started
    np.save(job["logits"], np.stack([run(batch) for batch in _batches(job["heldout"])]))
    result = {"bits_beside": beside, "seconds": seconds, "peak_bytes": peak_bytes()}
    Path(job["result"]).write_text(json.dumps(result))


def _batches(path: str) -> Batches:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return [{name: array[index] for name, array in arrays.items()} for index in range(len(next(iter(arrays.values()))))]


if __name__ == "__main__":
    main()
