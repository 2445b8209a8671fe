"""Collect statistics: run the program over the batches and show chosen values to observers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.calibration.batches import EMPTY, Batches
from graphopt.calibration.observers import Histogram
from graphopt.errors import GraphoptError, described
from graphopt.ir.program import Program
from graphopt.progress import Progress


class _Observed(fx.Interpreter):
    def __init__(self, program: Program, histograms: dict[fx.Node, Histogram]) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False  # it would write the graph into the error's text
        self._histograms = histograms

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        histogram = self._histograms.get(n)
        if histogram is not None and isinstance(value, Tensor):
            histogram.update(value, n.name)
        return value


def collect(
    program: Program, nodes: Collection[fx.Node], batches: Batches, progress: Progress
) -> dict[fx.Node, Histogram]:
    """Return a Histogram for each of `nodes` over all batches; one reading, memory independent of their number.

    Raises GraphoptError where there is no batch, or a batch does not run.
    """
    histograms = {node: Histogram() for node in nodes}
    count = 0
    with progress.stage("calibrate", len(batches)) as stage, torch.no_grad():
        for flat in batches:
            try:
                _Observed(program, histograms).run(*flat)
            except (GraphoptError, MemoryError):
                raise
            except Exception as error:  # an index beyond a table, sizes of inputs that do not go together
                raise GraphoptError(
                    f"the model does not run on calibration batch {count} ({described(error)}); "
                    "give batches like the example inputs"
                ) from error
            count += 1
            stage.advance()
    if count == 0:
        raise GraphoptError(EMPTY)
    return histograms
