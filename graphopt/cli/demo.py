"""`graphopt demo`: a model trained on real data, through the whole pipeline, with the figures that matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from graphopt import demo
from graphopt.api import optimize
from graphopt.cli import console
from graphopt.files import check_replaceable
from graphopt.pipeline import backend
from graphopt.progress import Progress, Stage, default_progress
from graphopt.report import Change
from graphopt.report.text import bullet, export_parts, passes, section, size_text
from graphopt.result import Result
from graphopt.rundir import MARKER, RUN_FILES

LARGEST_GAP = 0.3  # points between the file in its runtime and its emulation in torch


def run(output: Path) -> None:
    """Train or load the model, optimize it to int8, write the run directory and print what came of it."""
    check_replaceable(output, MARKER, RUN_FILES)
    progress = default_progress()
    with _training(progress) as steps:
        model, inputs = demo.model(steps)
    result = optimize(
        model,
        inputs,
        recipe="int8",
        calibration=demo.calibration(),
        evaluate=demo.evaluate,
        dynamic_shapes=demo.dynamic_shapes,
        run_dir=output,
        progress=progress,
    )
    with progress.stage("evaluate the file in its runtime"):
        accuracy = runtime_accuracy(result, output / "model.onnx")
    console.show(*_parts(result, accuracy))
    console.paths(output)
    if result.metric is None or abs(accuracy - result.metric) > LARGEST_GAP:
        raise RuntimeError(f"model.onnx reaches {accuracy:.2f} % in its runtime, its emulation {result.metric:.2f} %")


def runtime_accuracy(result: Result, path: Path) -> float:
    """Return the accuracy, in percent, of the written file run in its runtime on the 797 test images."""
    runtime = backend(result.target.backend)

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(runtime.run(path, [images])[0])

    return demo.evaluate(call)


@contextmanager
def _training(progress: Progress) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that opens a stage at its first call: a cached model is not trained."""
    with ExitStack() as stack:
        opened: list[Stage] = []
        done = 0

        def steps(count: int, total: int) -> None:
            nonlocal done
            if not opened:
                opened.append(stack.enter_context(progress.stage("train", total)))
            opened[0].advance(count - done)
            done = count

        yield steps


def _parts(result: Result, accuracy: float) -> list[RenderableType]:
    report = result.report
    table = Table()
    table.add_column("")
    for heading in ("fp32", "int8", "int8 / fp32"):
        table.add_column(heading, justify="right")
    before = report.metric.before or 0.0
    table.add_row("accuracy", f"{before:.2f} %", f"{accuracy:.2f} %", f"{accuracy - before:+.2f} points")
    table.add_row("file", *_cells(report.size_bytes, size_text))
    table.add_row("latency", *_cells(report.latency_ms, lambda value: f"{value:.2f} ms"))
    parts: list[RenderableType] = [
        Text("A residual CNN on 797 test images of scikit-learn's digits", "bold"),
        table,
        Text("accuracy: fp32 in torch, int8 the file in its runtime; latency: one thread, interleaved medians", "dim"),
        section("passes"),
        passes(report.passes),
        *export_parts(report),
    ]
    return parts + [bullet(note) for note in report.notes]


def _cells(change: Change, show: Callable[[float], str]) -> tuple[str, str, str]:
    before, after = ("not measured" if each is None else show(each) for each in (change.before, change.after))
    return before, after, "" if change.ratio is None else f"{change.ratio:.2f}×"
