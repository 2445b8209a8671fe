"""Train the demo's network: momentum SGD, one warm-up and one decay, on shifted and turned images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.demo.data import Digits
from graphopt.demo.network import ResidualCNN

Progress = Callable[[int, int], None]
"""Called after every training step as `progress(steps_done, steps_in_all)`."""


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the trained weights, apart from the versions of graphopt and torch.

    shift_pixels, turn_degrees and zoom bound the random change of each training image; `peak_learning_rate`
    is reached after `warmup` (a fraction of the steps) and falls to zero along a cosine.
    """

    channels: tuple[int, ...] = (16, 32, 64)
    blocks: int = 3
    images: int = 1000
    epochs: int = 15
    batch_size: int = 50
    peak_learning_rate: float = 0.1
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    shift_pixels: float = 3.0
    turn_degrees: float = 8.0
    zoom: float = 0.1
    threads: int = 1
    seed: int = 0


def train(config: TrainingConfig, data: Digits, progress: Progress | None = None) -> ResidualCNN:
    """Return a network trained on the first `config.images` training images, in eval mode.

    Deterministic: equal configurations give equal weights on one machine. It leaves torch's global random
    state and number of threads as they were. Test images and labels are not read.
    """
    images, labels = data.train_images[: config.images], data.train_labels[: config.images]
    steps_per_epoch = math.ceil(len(images) / config.batch_size)
    steps = config.epochs * steps_per_epoch
    # The number of threads is fixed because the order of sums, and so the last bits of the weights, depends
    # on it. It is 1: two threads save 40 % of the time on idle cores and take ten times as long where others
    # compute too, as in a container or a test run, because each waits, spinning, for one that has no core.
    with _threads(config.threads), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ResidualCNN(config.channels, config.blocks)
        optimizer = _optimizer(model, config)
        generator = torch.Generator().manual_seed(config.seed)
        model.train()
        step = 0
        for _ in range(config.epochs):
            order = torch.randperm(len(images), generator=generator)
            for rows in torch.split(order, config.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = config.peak_learning_rate * _schedule(step / steps, config.warmup)
                logits = model(_augment(images[rows], config, generator))
                loss = functional.cross_entropy(logits, labels[rows], label_smoothing=config.label_smoothing)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                step += 1
                if progress is not None:
                    progress(step, steps)
    return model.eval()


def _optimizer(model: ResidualCNN, config: TrainingConfig) -> torch.optim.SGD:
    # Decay pulls weights only: decaying a norm's gain or a bias changes the function without regularising it.
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.peak_learning_rate, momentum=config.momentum, nesterov=True)


def _schedule(done: float, warmup: float) -> float:
    """Fraction of the peak learning rate after the fraction `done` of the steps."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _augment(images: Tensor, config: TrainingConfig, generator: torch.Generator) -> Tensor:
    """Shift, turn and zoom each image at random. images: [batch, 3, height, width] -> the same shape."""

    def uniform(bound: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * bound

    angle = uniform(math.radians(config.turn_degrees))
    scale = 1 + uniform(config.zoom)
    # affine_grid measures in half images, so a shift of one pixel is 2 / size.
    right = uniform(2 * config.shift_pixels / images.shape[3])
    down = uniform(2 * config.shift_pixels / images.shape[2])
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    affine = torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).reshape(-1, 2, 3)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
