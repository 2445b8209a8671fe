"""The peer NNCF, post-training quantization of the ONNX file.

Job: fp32, calibration, output, options.preset, options.model_type.

Runs in the peer's environment.
"""

from __future__ import annotations

import nncf
import numpy as np
import onnx
import protocol


def work(job: protocol.Job, clock: protocol.Clock) -> protocol.Result:
    model_type = nncf.ModelType.TRANSFORMER if job["options"].get("model_type") == "transformer" else None
    preset = {"mixed": nncf.QuantizationPreset.MIXED, None: None}[job["options"].get("preset")]
    with clock.running():
        with np.load(job["calibration"], allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        count = len(next(iter(arrays.values())))
        samples = [{name: array[index] for name, array in arrays.items()} for index in range(count)]
        model = onnx.load(job["fp32"])
        quantized = nncf.quantize(model, nncf.Dataset(samples), preset=preset, subset_size=count, model_type=model_type)
        onnx.save(quantized, job["output"])
    return {"versions": protocol.versions("nncf", "onnx", "onnxruntime")}


if __name__ == "__main__":
    protocol.main(work)
