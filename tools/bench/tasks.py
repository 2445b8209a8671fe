"""The tasks: which model, which data, what must hold.

A task is a description and functions that make its model and data. These import what they need when they are
called, so that listing the tasks needs the standard library only. To add one, write the functions and a
`Task` below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from limits import Limit

if TYPE_CHECKING:
    import torch

    Inputs = tuple[torch.Tensor, ...] | dict[str, torch.Tensor]
    Metric = Callable[[torch.nn.Module], float]


@dataclass(frozen=True)
class Material:
    """What a task is made of. Calibration and held-out inputs are batches in the form of `example_inputs`."""

    model: torch.nn.Module
    example_inputs: Inputs
    calibration: list[Inputs]
    heldout: list[Inputs]


@dataclass(frozen=True)
class Task:
    """`make` builds the material; `metric`, where there is one, returns a rating of models (higher is
    better).

    `dynamic_shapes` returns what torch.export takes, where the files shall have free dimensions.
    """

    name: str
    summary: str
    make: Callable[[], Material]
    dynamic_shapes: Callable[[], Any] | None = None
    metric: Callable[[], Metric] | None = None
    metric_unit: str = ""
    limits: tuple[Limit, ...] = field(default=())


def _textured_images(count: int, size: int, seed: int) -> list[torch.Tensor]:
    """`count` images [1, 3, size, size]: noise summed over octaves, most of it, as in photographs, coarse."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        image = torch.zeros(1, 3, size, size)
        cells = 4
        while cells <= size:
            noise = torch.randn(1, 3, cells, cells, generator=generator)
            octave = torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear")
            image += octave * (4 / cells) ** 0.5
            cells *= 2
        images.append((image - image.mean()) / image.std())
    return images


def _settle_batch_norms(model: torch.nn.Module, batches: list[Any]) -> None:
    """Replace the initial running statistics (0 and 1) by averages over `batches`, as after training."""
    import torch

    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _cnn50() -> Material:
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig()
    config.num_labels = 1000
    model = ResNetForImageClassification(config)
    _settle_batch_norms(model, [torch.cat(_textured_images(16, 224, seed)) for seed in range(100, 104)])
    calibration: list[Inputs] = [{"pixel_values": image} for image in _textured_images(64, 224, seed=1)]
    heldout: list[Inputs] = [{"pixel_values": image} for image in _textured_images(16, 224, seed=2)]
    return Material(model, heldout[0], calibration, heldout)


def _demo() -> Material:
    from graphopt import demo

    model, example_inputs = demo.model()
    calibration: list[Inputs] = list(demo.calibration())
    size = len(example_inputs[0])
    images = demo.digits().test_images
    heldout: list[Inputs] = [(images[i : i + size],) for i in range(0, len(images) - size + 1, size)]
    return Material(model, example_inputs, calibration, heldout)


def _demo_metric() -> Metric:
    from graphopt import demo

    return demo.evaluate


def _demo_dynamic_shapes() -> Any:
    from graphopt import demo

    return demo.dynamic_shapes


TASKS = {
    task.name: task
    for task in (
        Task(
            "demo",
            "the demo's residual CNN, 3×32×32, trained on digits; metric: accuracy on 797 test images",
            _demo,
            dynamic_shapes=_demo_dynamic_shapes,
            metric=_demo_metric,
            metric_unit="%",
            limits=(
                Limit("metric_drop", 0.3),
                Limit("size_ratio", 0.29),
                Limit("unfused", 0),
                Limit("latency_ratio", 0.48, needs_vnni=True),
            ),
        ),
        Task(
            "cnn50",
            "50-layer residual CNN, 224×224, random weights, 64 calibration samples",
            _cnn50,
            limits=(
                Limit("latency_ms", 1.05, against_peers=True),
                Limit("total_seconds", 1.5, against_peers=True),
                Limit("peak_bytes", 1.5, against_peers=True),
            ),
        ),
    )
}
