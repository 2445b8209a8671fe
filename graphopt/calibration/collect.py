"""Collect statistics: run the program over the batches and show chosen values to observers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.calibration.batches import EMPTY, Batches
from graphopt.calibration.observers import Histogram
from graphopt.errors import GraphoptError, described
from graphopt.ir.program import Program
from graphopt.progress import Progress


def collect(
    program: Program, nodes: Collection[fx.Node], batches: Batches, progress: Progress
) -> dict[fx.Node, Histogram]:
    """Return a Histogram for each of `nodes` over all batches; one reading, memory independent of their number.

    Raises GraphoptError where there is no batch, or a batch does not run.
    """
    histograms = {node: Histogram() for node in nodes}
    observed = _observed(program, histograms)
    count = 0
    with progress.stage("calibrate", len(batches)) as stage, torch.no_grad():
        for flat in batches:
            try:
                observed(*flat)
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


def _observed(program: Program, histograms: Mapping[fx.Node, Histogram]) -> Callable[..., Any]:
    """Return the program as a function that shows the values of some nodes to their histograms on the way.

    Generated code runs each operator without an interpreter's overhead and drops each value after its last use.
    """
    twin = program.clone()
    names = {node.name: histogram for node, histogram in histograms.items()}
    for node in list(twin.graph.nodes):
        if node.name in names and isinstance(node.meta.get("val"), Tensor):
            behind = node.next
            while behind.op in ("placeholder", "get_attr"):
                behind = behind.next
            with twin.graph.inserting_before(behind):
                twin.graph.call_function(_Show(names[node.name], node.name), (node,))
    twin.graph_module.recompile()
    return twin.graph_module


class _Show:
    """A call in generated code: update one histogram."""

    def __init__(self, histogram: Histogram, name: str) -> None:
        self.histogram, self.name = histogram, name
        self.__name__, self.__module__ = "show", __name__

    def __call__(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.histogram.update(value, self.name)
