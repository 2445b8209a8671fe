"""Make a task's material once, so that every method gets the same weights and the same samples.

Job: task, folder. Writes model.pt (pickled by torch; read back only by our own children), calibration.npz and
heldout.npz (one array per input name, axis 0 = batches, then the batch's own axes).
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import protocol
import torch
from tasks import TASKS

if TYPE_CHECKING:
    from tasks import Inputs


def _named(model: torch.nn.Module, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs by the name that forward gives them, which is what the exporter names the graph's inputs."""
    if not isinstance(inputs, dict):
        names = inspect.signature(model.forward).parameters
        inputs = dict(zip(names, inputs, strict=False))
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def _save(path: Path, model: torch.nn.Module, batches: list[Inputs]) -> None:
    named = [_named(model, batch) for batch in batches]
    arrays: dict[str, Any] = {name: np.stack([batch[name] for batch in named]) for name in named[0]}
    np.savez(path, **arrays)


def work(job: protocol.Job, clock: protocol.Clock) -> protocol.Result:
    folder = Path(job["folder"])
    with clock.running():
        material = TASKS[job["task"]].make()
    torch.save({"model": material.model, "example_inputs": material.example_inputs}, folder / "model.pt")
    _save(folder / "calibration.npz", material.model, material.calibration)
    _save(folder / "heldout.npz", material.model, material.heldout)
    parameters = sum(parameter.numel() for parameter in material.model.parameters())
    return {"parameters": parameters, "calibration_batches": len(material.calibration)}


if __name__ == "__main__":
    protocol.main(work)
