"""Networks trained on scikit-learn's scanned digits: depthwise-separable, unbalanced on purpose, and a transformer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt.demo.data import digits
from made.kept import kept

CHANNELS = (64, 128, 128, 256, 256)
PATCH = 4
Made = TypeVar("Made", bound=nn.Module)


class DepthwiseCNN(nn.Module):
    """A stem and depthwise-separable blocks with ReLU. x: [batch, 3, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_normed(nn.Conv2d(3, CHANNELS[0], 3, 2, 1, bias=False))]
        for index, (before, after) in enumerate(itertools.pairwise(CHANNELS)):
            layers += _normed(nn.Conv2d(before, before, 3, 1 + index % 2, 1, groups=before, bias=False))
            layers += _normed(nn.Conv2d(before, after, 1, bias=False))
        self.body, self.head = nn.Sequential(*layers), nn.Linear(CHANNELS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(functional.adaptive_avg_pool2d(self.body(x), 1).flatten(1))
        return y


def _normed(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]


class Logits(nn.Module):
    """A transformer's classifier as a function from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(pixel_values=x).logits
        return y


def vision_transformer() -> Logits:
    """An untrained transformer over 64 patches of 4 x 4 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768, image_size=32,
        patch_size=PATCH,
    )  # fmt: skip
    config.num_labels = 10
    return Logits(ViTForImageClassification(config))


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
