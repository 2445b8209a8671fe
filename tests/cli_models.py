"""What the command line is given in tests: `cli_models:NAME`."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

BATCH = 4


class Small(nn.Module):
    """A convolution, pooling and a classifier: x [batch, 3, 8, 8] -> logits [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


def module() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def static() -> tuple[nn.Module, tuple[Tensor]]:
    return module(), (images(BATCH),)


def dynamic() -> tuple[nn.Module, tuple[Tensor], Any]:
    return module(), (images(BATCH),), ({0: Dim("batch", max=64)},)


def alone() -> nn.Module:
    """A module that says what it eats."""
    found = module()
    found.example_input_array = images(BATCH)  # type: ignore[assignment]
    return found


def metric(model: Any) -> float:
    """Agreement with the original on 16 images, in percent; one batch at a time."""
    batches = torch.split(images(16, seed=2), BATCH)
    with torch.no_grad():
        same = [model(batch).argmax(1) == module()(batch).argmax(1) for batch in batches]
    return 100 * float(torch.cat(same).float().mean())


class Pair(nn.Module):
    """Two inputs in a dict and a keyword: features.a [batch, 4], features.b [batch, 4], shift []."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, features: dict[str, Tensor], *, shift: Tensor) -> Tensor:
        return self.first(features["a"] + features["b"]) + shift  # type: ignore[no-any-return]


def pair() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    features = {"a": torch.randn(2, 4), "b": torch.randn(2, 4)}
    return Pair(), {"features": features, "shift": torch.tensor(0.5)}


def raising() -> nn.Module:
    raise ValueError("the weights\nare gone")


def leaving() -> nn.Module:
    raise SystemExit(0)


def nothing() -> None:
    return None


def many() -> tuple[int, ...]:
    return (1, 2, 3, 4)


number = 3


def nan_weights() -> tuple[nn.Module, tuple[Tensor]]:
    found = module()
    with torch.no_grad():
        found.conv.weight[0, 0, 0, 0] = float("nan")  # type: ignore[index, union-attr]
    return found, (images(BATCH),)


class Text(nn.Module):
    """Returns a tensor and an object that is none."""

    def forward(self, x: Tensor) -> Any:
        return x + 1, object()


def not_tensors() -> tuple[nn.Module, tuple[Tensor]]:
    return Text(), (images(BATCH),)


def failing_metric(model: Any) -> float:
    raise RuntimeError("no test set")


def nan_metric(model: Any) -> float:
    return float("nan")


def interrupting_metric(model: Any) -> float:
    """Ctrl-C in the middle of a run."""
    # From another thread, as from a terminal: at any moment, not at a call of ours.
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        module()(images(BATCH))
