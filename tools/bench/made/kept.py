"""Weights that take minutes to train, kept in the user's cache folder under what decides them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

Model = TypeVar("Model", bound=torch.nn.Module)


def cache_folder() -> Path:
    """The folder that `GRAPHOPT_CACHE` names, else `~/.cache/graphopt`."""
    return Path(os.environ.get("GRAPHOPT_CACHE") or "~/.cache/graphopt").expanduser()


def kept(
    name: str, decides: Mapping[str, Any], build: Callable[[], Model], train: Callable[[], Model], folder: Path
) -> Model:
    """Return `build()` with the weights kept under `name` and `decides`, else `train()`; its weights are then kept."""
    description = json.dumps({**decides, "torch": torch.__version__}, sort_keys=True, default=str)
    path = folder / f"{name}-{hashlib.sha256(description.encode()).hexdigest()[:16]}.safetensors"
    model = build()
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):  # not there, cut short, or of another form: train
        model = train()
        _write(path, model)
    return model.eval()


def _write(path: Path, model: torch.nn.Module) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    save_file({key: value.clone().contiguous() for key, value in model.state_dict().items()}, name)
    with open(name, "rb") as written:
        os.fsync(written.fileno())
    os.replace(name, path)
