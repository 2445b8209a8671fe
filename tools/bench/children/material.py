"""Read back what prepare.py wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tasks import TASKS

if TYPE_CHECKING:
    from tasks import Inputs


def model(folder: str) -> tuple[torch.nn.Module, Inputs]:
    """The task's eval-mode model and its example inputs."""
    stored = torch.load(Path(folder) / "model.pt", weights_only=False)  # the runner's own file, minutes old
    return stored["model"].eval(), stored["example_inputs"]


def dynamic_shapes(task: str) -> Any:
    """The task's free dimensions as torch.export takes them, or None."""
    make = TASKS[task].dynamic_shapes
    return make() if make is not None else None


def batches(path: str, like: Inputs) -> list[Inputs]:
    """The batches of an npz, in the form of `like`: a tuple or a dictionary of tensors."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
    count = len(next(iter(arrays.values())))
    named = [{name: array[index] for name, array in arrays.items()} for index in range(count)]
    return list(named) if isinstance(like, dict) else [tuple(batch.values()) for batch in named]
