"""The tasks: which model, which data, what must hold.

A task is a description and functions that make its model and data. These import what they need when they are
called, so that listing the tasks needs the standard library only. To add one, write the functions and a
`Task` below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from limits import BEST, Limit
from methods import CNN, TRANSFORMER

if TYPE_CHECKING:
    import torch

    Inputs = tuple[torch.Tensor, ...] | dict[str, torch.Tensor]
    Metric = Callable[[torch.nn.Module], float]


SAMPLES = 128  # to calibrate with, the same for every method


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

    `dynamic_shapes` returns what torch.export takes, where the files shall have free dimensions. `kind` decides which
    methods apply. `judged`: outputs are compared with the float model's by "kl" (as logits over the last axis), by
    "cosine" (as embeddings), or not.
    """

    name: str
    summary: str
    make: Callable[[], Material]
    dynamic_shapes: Callable[[], Any] | None = None
    metric: Callable[[], Metric] | None = None
    metric_unit: str = ""
    kind: str = CNN
    judged: str = ""
    limits: tuple[Limit, ...] = field(default=())


def _images(kind: str, **options: Any) -> Material:
    from made.large import image_network, textured_images

    calibration: list[Inputs] = [{"pixel_values": image} for image in textured_images(SAMPLES, 224, seed=1)]
    heldout: list[Inputs] = [{"pixel_values": image} for image in textured_images(16, 224, seed=2)]
    return Material(image_network(kind, **options), heldout[0], calibration, heldout)


def _bert_base() -> Material:
    from made.large import text_network, texts

    heldout: list[Inputs] = [*texts(16, 128, seed=2)]
    return Material(text_network(), heldout[0], [*texts(SAMPLES, 128, seed=1)], heldout)


def _digits(model: torch.nn.Module) -> Material:
    """Pieces of eight images: training images to calibrate with, test images to judge by."""
    from graphopt.demo.data import digits

    data, size = digits(), 8
    calibration: list[Inputs] = [(data.train_images[i : i + size],) for i in range(0, SAMPLES, size)]
    count = len(data.test_images) // size * size
    heldout: list[Inputs] = [(data.test_images[i : i + size],) for i in range(0, count, size)]
    return Material(model, calibration[0], calibration, heldout)


def _digits_cnn() -> Material:
    from graphopt import demo

    return _digits(demo.model()[0])


def _digits_depthwise() -> Material:
    from made.digits import trained_depthwise, unbalance
    from made.kept import cache_folder

    return _digits(unbalance(trained_depthwise(cache_folder())).eval())


def _digits_vit() -> Material:
    from made.digits import trained_transformer
    from made.kept import cache_folder

    return _digits(trained_transformer(cache_folder()))


def _digits_metric() -> Metric:
    """Percent of the test images, in pieces of eight."""

    def accuracy(model: torch.nn.Module) -> float:
        import torch

        from graphopt.demo.data import digits

        data, size = digits(), 8
        count = len(data.test_images) // size * size
        with torch.no_grad():
            found = [model(data.test_images[i : i + size]).argmax(-1) for i in range(0, count, size)]
        return 100 * float((torch.cat(found) == data.test_labels[:count]).float().mean())

    return accuracy


def deep_language() -> Material:
    """A decoder of 8 layers: what structure is removed from, layer by layer."""
    from language.model import Shape
    from language.training import Training

    return _language(False, Training(Shape(width=192, hidden=512, layers=8, heads=6, groups=3)))


def _language(planted: bool, training: Any = None) -> Material:
    from language import corpus
    from language.outliers import plant
    from language.training import Training, trained
    from made.kept import cache_folder

    library, training = corpus.read(), training or Training()
    length = training.shape.context
    samples = corpus.even_pieces(library.train, SAMPLES, length)
    model = trained(training, cache_folder())
    if planted:
        model = plant(model, samples[:8]).eval()
    calibration: list[Inputs] = [(piece,) for piece in samples.split(1)]  # type: ignore[no-untyped-call]
    pieces = corpus.even_pieces(library.held_out, 64, length)
    heldout: list[Inputs] = [(piece,) for piece in pieces.split(1)]  # type: ignore[no-untyped-call]
    return Material(model, heldout[0], calibration, heldout)


def _sentences() -> Material:
    import torch
    from made.kept import cache_folder
    from made.sentences import pairs, trained

    train, judge = pairs()
    calibration: list[Inputs] = [train.batch(torch.tensor([i]), i % 2) for i in range(SAMPLES)]
    heldout: list[Inputs] = [judge.batch(torch.tensor([i // 2]), i % 2) for i in range(SAMPLES)]
    return Material(trained(cache_folder()), heldout[0], calibration, heldout)


def _sentences_metric() -> Metric:
    from made.sentences import retrieval

    return retrieval


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


_EQUAL = 1.05  # times as long counts as equally fast
_SPEED = Limit("latency_ms", _EQUAL, against=BEST)
_COST = 1.5
_KL = (
    Limit("kl", 1.0, against=BEST),
    _SPEED,
    Limit("total_seconds", _COST, against="kl"),
    Limit("peak_bytes", _COST, against="kl"),
)
_RANDOM = (
    _SPEED,
    Limit("total_seconds", _COST, against="nncf"),
    Limit("peak_bytes", _COST, against="nncf"),
)

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
        Task("resnet50", "ResNet-50, 224×224, random weights", functools.partial(_images, "ResNet"), limits=_RANDOM),
        Task(
            "mobilenetv2",
            "MobileNetV2, 224×224, random weights",
            functools.partial(_images, "MobileNetV2"),
            limits=_RANDOM,
        ),
        Task("bert_base", "BERT-base, 128 tokens, random weights", _bert_base, kind=TRANSFORMER, limits=_RANDOM),
        Task(
            "vit_b16",
            "ViT-B/16, 224×224, random weights",
            functools.partial(_images, "ViT"),
            kind=TRANSFORMER,
            limits=_RANDOM,
        ),
        Task(
            "digits_cnn",
            "the demo's residual CNN on batches of 8 digits",
            _digits_cnn,
            metric=_digits_metric,
            metric_unit="%",
            judged="kl",
            limits=_KL,
        ),
        Task(
            "digits_depthwise",
            "a depthwise CNN trained on digits, its channels scaled by 2^-5 to 2^5, batches of 8",
            _digits_depthwise,
            metric=_digits_metric,
            metric_unit="%",
            judged="kl",
            limits=_KL,
        ),
        Task(
            "digits_vit",
            "a vision transformer of 6 layers trained on digits, batches of 8",
            _digits_vit,
            kind=TRANSFORMER,
            metric=_digits_metric,
            metric_unit="%",
            judged="kl",
            limits=_KL,
        ),
        Task(
            "language",
            "a decoder of 3.6 million weights over bytes, 128 tokens",
            functools.partial(_language, False),
            kind=TRANSFORMER,
            judged="kl",
            limits=_KL,
        ),
        Task(
            "language_outliers",
            "the same function with outlier channels planted",
            functools.partial(_language, True),
            kind=TRANSFORMER,
            judged="kl",
            limits=(*_KL, Limit("kl", 1e-3), Limit("latency_ratio", 0.5, needs_vnni=True)),
        ),
        Task(
            "sentences",
            "a sentence encoder of 6 layers, 64 tokens; metric: signatures whose docstring is the nearest of 256",
            _sentences,
            kind=TRANSFORMER,
            metric=_sentences_metric,
            metric_unit="%",
            judged="cosine",
            limits=(
                Limit("cosine_distance", 1.0, against=BEST),
                _SPEED,
                Limit("size_ratio", 0.27),
                Limit("total_seconds", _COST, against="cosine_distance"),
                Limit("peak_bytes", _COST, against="cosine_distance"),
            ),
        ),
    )
}
