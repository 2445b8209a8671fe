"""graphopt, through its public surface only. Job: task, folder, calibration, output, options.recipe."""

from __future__ import annotations

import time

import material
import protocol

import graphopt


def work(job: protocol.Job, clock: protocol.Clock) -> protocol.Result:
    model, inputs = material.model(job["folder"])
    batches = material.batches(job["calibration"], like=inputs)
    with clock.running():
        start = time.perf_counter()
        result = graphopt.optimize(
            model,
            inputs,
            recipe=job["options"]["recipe"],
            calibration=batches,
            dynamic_shapes=material.dynamic_shapes(job["task"]),
        )
        optimized = time.perf_counter()
        # The float file is exported too, as it is for the peers; timing the files is the runner's, for everybody.
        report = result.export(job["output"], measure=False)
        exported = time.perf_counter()
    return {
        "versions": protocol.versions("graphopt", "torch", "onnx", "onnxruntime", "onnxscript", "onnx-ir"),
        "detail": {
            "optimize_seconds": optimized - start,
            "export_seconds": exported - optimized,
            "measuring_seconds": sum(record.facts.get("measuring_seconds", 0.0) for record in result.trace),
            "reported_unfused": [list(entry) for entry in report.unfused],
        },
    }


if __name__ == "__main__":
    protocol.main(work)
