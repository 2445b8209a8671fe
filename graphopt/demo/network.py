"""The demo's network: a residual CNN for 3x32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`.

    The shortcut is the identity, or a strided 1x1 projection where the shape changes.
    x: [batch, in_channels, height, width] -> [batch, out_channels, height / stride, width / stride].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class ResidualCNN(nn.Module):
    """A stem, one stage of residual blocks per entry of `channels`, global average pooling and a classifier.

    Every stage but the first halves height and width.
    x: [batch, 3, height, width] -> logits [batch, classes].
    """

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64), blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels[0])
        stages = []
        previous = channels[0]
        for index, width in enumerate(channels):
            first = ResidualBlock(previous, width, stride=1 if index == 0 else 2)
            rest = [ResidualBlock(width, width, stride=1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
            previous = width
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(previous, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.stages(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
