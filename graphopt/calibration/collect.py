"""Collect statistics: run the program over the batches and show chosen values to observers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.calibration.batches import EMPTY, Batches, running
from graphopt.calibration.observers import Histogram, Observer
from graphopt.errors import GraphoptError
from graphopt.ir.program import Program
from graphopt.memory import release_freed
from graphopt.progress import Progress

_TIDY = 16  # batches after which what observers dropped goes back to the system


def collect(
    program: Program, nodes: Collection[fx.Node], batches: Batches, progress: Progress
) -> dict[fx.Node, Histogram]:
    """Return a Histogram for each of `nodes` over all batches; one reading, memory independent of their number.

    Raises GraphoptError where there is no batch, or a batch does not run.
    """
    histograms = {node: Histogram() for node in nodes}
    observe(program, histograms, batches, progress)
    return histograms


def observe(
    program: Program, observers: Mapping[fx.Node, Observer], batches: Batches, progress: Progress
) -> None:
    """Show the values of nodes to their observers, batch by batch, in one reading.

    Raises GraphoptError where there is no batch, or a batch does not run.
    """
    observed = _observed(program, observers)
    count = 0
    with progress.stage("calibrate", len(batches)) as stage, torch.no_grad():
        for flat in batches:
            with running(count):
                observed(*flat)
            count += 1
            if count % _TIDY == 0:
                release_freed()
            stage.advance()
    release_freed()
    if count == 0:
        raise GraphoptError(EMPTY)


def _observed(program: Program, observers: Mapping[fx.Node, Observer]) -> Callable[..., Any]:
    """Return the program as a function that shows the values of some nodes to their observers on the way.

    Generated code runs each operator without an interpreter's overhead and drops each value after its last use.
    """
    twin = program.clone()
    names = {node.name: observer for node, observer in observers.items()}
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
    """A call in generated code: update one observer."""

    def __init__(self, observer: Observer, name: str) -> None:
        self.observer, self.name = observer, name
        self.__name__, self.__module__ = "show", __name__

    def __call__(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.observer.update(value, self.name)
