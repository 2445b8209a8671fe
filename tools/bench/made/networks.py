"""The untrained networks, which need nothing of graphopt: peers build them in environments of their own."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional

CHANNELS = (64, 128, 128, 256, 256)
PATCH = 4


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
