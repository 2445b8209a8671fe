"""Keep the demo's trained weights between runs, so that only the first one trains."""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from graphopt.demo import data, network, training
from graphopt.demo.data import digits
from graphopt.demo.network import ResidualCNN
from graphopt.demo.training import Progress, TrainingConfig, train


def cache_folder() -> Path:
    """The folder that `GRAPHOPT_CACHE` names, else `~/.cache/graphopt`."""
    return Path(os.environ.get("GRAPHOPT_CACHE") or "~/.cache/graphopt").expanduser()


def weights_path(config: TrainingConfig, folder: Path | None = None) -> Path:
    """Where the weights that `config` trains are kept; the name changes with all that could change them.

    That is the configuration, torch's version, and the source of the network, the data and the training.
    """
    parts = [repr(sorted(asdict(config).items())), torch.__version__]
    parts += [inspect.getsource(module) for module in (network, data, training)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return (folder or cache_folder()) / f"demo-{digest}.safetensors"


def trained(config: TrainingConfig, progress: Progress | None = None, folder: Path | None = None) -> ResidualCNN:
    """Return the network of `config` in eval mode: from the cache, else trained and then kept there.

    A damaged file is trained anew and replaced. Where the cache cannot be written, a warning says so and the
    network is returned all the same. Raises GraphoptError where the extra [demo] is not installed.
    """
    path = weights_path(config, folder)
    model = ResidualCNN(config.channels, config.blocks).eval()
    weights = _read(path, model.state_dict())
    if weights is not None:
        model.load_state_dict(weights)
        return model
    model = train(config, digits(), progress)
    try:
        _write(path, model.state_dict())
    except OSError as error:
        warnings.warn(
            f"The demo's trained weights could not be kept in {path.parent} ({error.strerror or error}), "
            "so the next run trains again; set GRAPHOPT_CACHE to a folder that can be written.",
            stacklevel=2,
        )
    return model


def _read(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights in `path`, or None where it is absent, unreadable, damaged or of another network."""
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping, only keys())
            stated = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError, ValueError):
        return None
    # safetensors checks its header only; the digest also notices a changed byte among the weights.
    if stated != _digest(weights) or _signature(weights) != _signature(expected):
        return None
    return weights


def _write(path: Path, weights: dict[str, Tensor]) -> None:
    """Write the file whole or not at all: a reader, or a second run, never sees half of it."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    content = save(tensors, {"sha256": _digest(weights)})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _signature(weights: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
