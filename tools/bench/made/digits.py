"""Networks trained on scikit-learn's scanned digits: depthwise-separable, unbalanced on purpose, and a transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

from graphopt.demo.data import digits
from made.kept import kept
from made.networks import CHANNELS, PATCH, DepthwiseCNN, Logits, vision_transformer

Made = TypeVar("Made", bound=nn.Module)


def fit(model: nn.Module, epochs: int, learning_rate: float, weight_decay: float) -> nn.Module:
    """Train on shifted images with a fixed seed; returns the model in eval mode."""
    data = digits()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
        steps = epochs * (len(data.train_images) // 50)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        model.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(data.train_images)).split(50):  # type: ignore[no-untyped-call]
                shifts = [int(shift) for shift in torch.randint(-2, 3, (2,))]
                images = data.train_images[rows].roll(shifts, (2, 3))
                loss = functional.cross_entropy(model(images), data.train_labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model.eval()


def trained_depthwise(folder: Path, epochs: int = 20) -> DepthwiseCNN:
    """The depthwise network, trained once."""

    def train() -> DepthwiseCNN:
        model = _seeded(DepthwiseCNN)
        fit(model, epochs, 5e-3, 1e-2)
        return model

    return kept("digits-depthwise", {"epochs": epochs, "channels": CHANNELS}, DepthwiseCNN, train, folder)


def trained_transformer(folder: Path, epochs: int = 30) -> Logits:
    """The vision transformer, trained once."""

    def train() -> Logits:
        model = _seeded(vision_transformer)
        fit(model, epochs, 1e-3, 5e-2)
        return model

    return kept("digits-vit", {"epochs": epochs, "patch": PATCH}, vision_transformer, train, folder)


def _seeded(build: Callable[[], Made]) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


@torch.no_grad()
def unbalance(model: DepthwiseCNN, seed: int = 0) -> DepthwiseCNN:
    """Return a copy that computes the same with channels scaled by 2^-5 to 2^5 between layers."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(seed)
    convolutions = [layer for layer in model.body if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in model.body if isinstance(layer, nn.BatchNorm2d)]
    readers: list[nn.Conv2d | nn.Linear] = [*convolutions[1:], model.head]
    for norm, reader in zip(norms, readers, strict=True):
        scale = 2 ** (10 * torch.rand(norm.num_features, generator=generator, dtype=torch.float64) - 5)
        norm.weight.mul_(scale)
        norm.bias.mul_(scale)
        grouped = isinstance(reader, nn.Conv2d) and reader.groups > 1
        shape = [-1, 1, 1, 1] if grouped else [1, -1, *[1] * (reader.weight.dim() - 2)]
        reader.weight.div_(scale.reshape(shape))
    return model.float()
