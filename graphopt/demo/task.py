"""What the demo hands to `graphopt.optimize`: a model, its metric, calibration data and free dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim

from graphopt.demo.cache import trained
from graphopt.demo.data import digits
from graphopt.demo.training import Progress, TrainingConfig

BATCH_SIZE = 16
"""Images in the example batch and in every calibration and evaluation batch: small enough that one batch is a
fair measure of latency, large enough that evaluating a program node by node is not all overhead."""

CALIBRATION_BATCHES = 16

dynamic_shapes = ({0: Dim("batch")},)
"""The batch dimension is free, as `torch.export.export` takes it for `model()`'s one positional input."""


def model(progress: Progress | None = None) -> tuple[nn.Module, tuple[Tensor]]:
    """Return the trained residual CNN in eval mode and its example inputs: training images [16, 3, 32, 32].

    The first call on a machine trains for about a minute and keeps the weights (`GRAPHOPT_CACHE`); `progress`
    is then called as `progress(steps_done, steps_in_all)`. Raises GraphoptError where the extra [demo] is not
    installed.
    """
    # A clone: torch.save writes the whole storage behind a slice, here all training images.
    return trained(TrainingConfig(), progress), (digits().train_images[:BATCH_SIZE].clone(),)


def evaluate(model: Callable[[Tensor], Tensor]) -> float:
    """Return the model's accuracy on the 797 test images, in percent.

    Every call passes [16, 3, 32, 32], so a model captured without `dynamic_shapes` is evaluated as well; the
    last batch is filled up with images whose answers are not counted.
    """
    images, labels = digits().test_images, digits().test_labels
    filling = -len(images) % BATCH_SIZE
    batches = torch.split(torch.cat([images, images[:filling]]), BATCH_SIZE)
    with torch.no_grad():
        predicted = torch.cat([model(batch).argmax(1) for batch in batches])[: len(labels)]
    return 100 * int((predicted == labels).sum()) / len(labels)


def calibration() -> list[tuple[Tensor]]:
    """Return 16 batches [16, 3, 32, 32] of training images in the form of the example inputs."""
    images = digits().train_images[: BATCH_SIZE * CALIBRATION_BATCHES]
    return [(batch.clone(),) for batch in torch.split(images, BATCH_SIZE)]
