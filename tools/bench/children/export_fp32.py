"""Export the task's model as it is: the baseline, and the peers' start. Job: task, folder, output."""

from __future__ import annotations

import material
import protocol
import torch

ONE_FILE_BYTES = 1_500_000_000  # a protobuf holds at most 2 GB; below that one file is what every peer reads


def work(job: protocol.Job, clock: protocol.Clock) -> protocol.Result:
    model, inputs = material.model(job["folder"])
    weight_bytes = sum(value.nbytes for value in model.state_dict().values())
    with clock.running():
        torch.onnx.export(
            model,
            () if isinstance(inputs, dict) else inputs,
            job["output"],
            kwargs=inputs if isinstance(inputs, dict) else None,
            dynamo=True,
            dynamic_shapes=material.dynamic_shapes(job["task"]),
            opset_version=20,
            external_data=weight_bytes > ONE_FILE_BYTES,
            verbose=False,
        )
    return {"versions": protocol.versions("torch", "onnx", "onnxscript", "onnx-ir")}


if __name__ == "__main__":
    protocol.main(work)
