#!/usr/bin/env python3
"""What equalization is worth: accuracy and speed in int8 of a depthwise CNN whose channel ranges are far apart.

    tools/bench/equalization.py            trains for some minutes, then prints the table
    tools/bench/equalization.py --epochs 1 a quick try

The network is trained on scikit-learn's scanned digits. Then each channel between two layers is scaled by 2^-5 to 2^5
and the next layer scales it back: the float function stays. Scales are one for each output channel of a weight and one
for each activation, as the runtime's integer kernels take them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.demo.data import digits
from graphopt.demo.task import calibration, evaluate
from graphopt.passes import Equalize, FoldBatchNorm, QuantizeStatic
from graphopt.pipeline import Pass

CHANNELS = (64, 128, 128, 256, 256)
EXPORTS = 3  # of each file; latency is the median


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


def train(epochs: int) -> DepthwiseCNN:
    """Train with a fixed seed."""
    data = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DepthwiseCNN()
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=1e-2)
        steps = epochs * (len(data.train_images) // 50)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
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


def row(name: str, model: nn.Module, passes: list[Pass], folder: Path) -> str:
    """Optimize, export and measure; returns a line of the table."""
    batches = calibration()
    result = graphopt.optimize(model, batches[0], recipe=passes, calibration=batches)
    reports = [result.export(folder / "model.onnx") for _ in range(EXPORTS)]
    timed = [(each.latency_ms, each.baseline_latency_ms) for each in reports]
    ratios = [one / other for one, other in timed if one and other]
    before, after = evaluate(model), evaluate(result)
    cells = [name, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}", str(len(reports[0].unfused))]
    cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    model = train(options.epochs)
    planted = unbalance(model)
    plain, equalized = [FoldBatchNorm(), QuantizeStatic()], [FoldBatchNorm(), Equalize(), QuantizeStatic()]
    print("| model | fp32 % | int8 % | points | unfused | int8 / fp32 latency |\n|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, of, passes in (
            ("as trained, int8", model, plain),
            ("as trained, equalized, int8", model, equalized),
            ("unbalanced, int8", planted, plain),
            ("unbalanced, equalized, int8", planted, equalized),
        ):
            print(row(name, of, passes, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
