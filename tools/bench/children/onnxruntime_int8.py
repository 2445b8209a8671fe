"""The peer onnxruntime.quantization with the settings that its documentation recommends for CNNs on x86.

Job: fp32, calibration, output, vnni, options.operators, options.dynamic. Runs in the peer's environment. Its page
"Quantize ONNX Models" recommends pre-processing, QDQ, per-channel int8 weights with uint8 activations, and
`reduce_range` on CPUs without VNNI, where the 8-bit products saturate; for transformers dynamic quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import protocol
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Samples(CalibrationDataReader):  # type: ignore[misc]  # the package publishes no types
    """The batches of an npz, one at a time."""

    def __init__(self, path: str) -> None:
        self.batches = self._read(path)

    @staticmethod
    def _read(path: str) -> Iterator[dict[str, Any]]:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        for index in range(len(next(iter(arrays.values())))):
            yield {name: array[index] for name, array in arrays.items()}

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def prepare(model: str, prepared: Path) -> bool:
    """Pre-process as documented; where symbolic shape inference fails, as on a graph it cannot follow, without it."""
    try:
        quant_pre_process(model, prepared)
        return True
    except Exception:  # whatever: a peer is given its best chance, and what was done is recorded
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        return False


def work(job: protocol.Job, clock: protocol.Clock) -> protocol.Result:
    prepared = Path(job["output"]).with_suffix(".pre.onnx")
    with clock.running():
        symbolic = prepare(job["fp32"], prepared)
        common = {"per_channel": True, "weight_type": QuantType.QInt8, "reduce_range": job["vnni"] is False}
        if job["options"].get("dynamic"):
            quantize_dynamic(prepared, job["output"], **common)
        else:
            quantize_static(
                prepared,
                job["output"],
                Samples(job["calibration"]),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                op_types_to_quantize=job["options"].get("operators"),
                **common,
            )
    prepared.unlink()
    detail = {} if symbolic else {"note": "pre-processed without symbolic shape inference, which failed"}
    return {"versions": protocol.versions("onnxruntime", "onnx"), "detail": detail}


if __name__ == "__main__":
    protocol.main(work)
