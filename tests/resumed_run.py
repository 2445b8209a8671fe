"""One run to a run directory that dies on request: `python resumed_run.py RUN_DIR MODEL DIES_AT SEED`.

DIES_AT: `-`, or `step K` (in front of step K) or `saved K` (right behind the K-th saved state) or `writing` (while the
run directory is written). Measurements are made up, since two real ones differ.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from models import MODELS

import graphopt
from graphopt.backend import Profile
from graphopt.backends.onnx.backend import OnnxBackend
from graphopt.ir import Program, operator
from graphopt.pipeline import manager
from graphopt.pipeline.unfinished import Unfinished
from graphopt.result import Result


def _made_up(self: Any, programs: Mapping[str, Program]) -> dict[str, Profile]:
    print("measured", flush=True)
    found = {}
    for label, program in programs.items():
        anchors = [node.name for node in program.graph.nodes if operator(node) in ("linear", "conv2d")]
        each = {"float": 3.0, "static": 1.0, "dynamic": 1.5}.get(label, 1.0)
        found[label] = Profile(each * len(anchors), dict.fromkeys(anchors, each))
    return found


def main(run_dir: str, name: str, dies_at: str, seed: int) -> None:
    counts = {"step": 0, "saved": 0}
    step, save, write = manager._Run.step, Unfinished.save, Result._write

    def counted(kind: str) -> None:
        counts[kind] += 1
        if dies_at == f"{kind} {counts[kind]}":
            os.kill(os.getpid(), 9)

    def stepping(self: Any, *arguments: Any) -> Any:
        counted("step")
        return step(self, *arguments)

    def saving(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        counted("saved")

    def writing(self: Any, *arguments: Any) -> None:
        write(self, *arguments)
        if dies_at == "writing":
            os.kill(os.getpid(), 9)

    manager._Run.step, Unfinished.save, Result._write = stepping, saving, writing  # type: ignore[method-assign]
    OnnxBackend.profile = _made_up  # type: ignore[method-assign]
    torch.set_num_threads(1)
    case = MODELS[name]()
    result = graphopt.optimize(
        case.module,
        case.example_inputs,
        recipe="int8",
        calibration=case.calibration,
        dynamic_shapes=case.dynamic_shapes,
        run_dir=run_dir,
        seed=seed,
    )
    print("steps", counts["step"], "saved", counts["saved"])
    print("\n".join(result.notes))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
