"""What calibration data says of the activations that contractions read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from graphopt.analysis.numerics import Summary
from graphopt.analysis.spaces import Read
from graphopt.calibration import Channels, observe
from graphopt.ir import Program, operator
from graphopt.pipeline import Context

Key = tuple[fx.Node, tuple[int, ...]]


def is_linear_read(read: Read) -> bool:
    """True where a linear layer multiplies the last axis of the activation by its weight."""
    rank = read.source.meta["val"].dim()
    return operator(read.node) == "linear" and read.partner.op == "get_attr" and read.dims == (rank - 1,)


def has_static_size(read: Read) -> bool:
    """True where every batch has the same coordinates: none of its axes holds the batch as well."""
    return all(isinstance(read.source.meta["val"].shape[dim], int) for dim in read.dims)


@dataclass(frozen=True)
class Statistics:
    """Largest magnitudes and some vectors of each activation, over the dimensions on which a space lies."""

    _channels: dict[Key, Channels]

    def of(self, read: Read) -> Channels:
        """Return the statistics of what an operator reads; KeyError where it was not asked for."""
        return self._channels[read.source, read.dims]

    def numbers(self, read: Read, change: Callable[[Tensor], Tensor], bits: int) -> dict[str, object]:
        """Return the summary of an activation's vectors before and after a change, as plain data."""
        rows = self.of(read).rows.double()
        before, after = (Summary.of(each.flatten(1), bits).plain for each in (rows, change(rows)))
        return {"before": before, "after": after}


def observe_reads(program: Program, reads: Iterable[Read], context: Context) -> Statistics:
    """Run the calibration batches once and return the statistics of every activation that is read.

    One whose size is not static has none.

    Raises GraphoptError where there is no calibration data, or it does not run.
    """
    channels: dict[Key, Channels] = {}
    for read in reads:
        if read.dims and has_static_size(read):
            channels.setdefault((read.source, read.dims), Channels(read.dims))
    observers: dict[fx.Node, _Several] = {}
    for (node, _), each in channels.items():
        observers.setdefault(node, _Several([])).all.append(each)
    if observers:
        observe(program, observers, context.needed_calibration("this pass"), context.progress)
    return Statistics(channels)


@dataclass(eq=False)
class _Several:
    """Shows a value to several observers."""

    all: list[Channels]

    def update(self, values: Tensor, name: str) -> None:
        for each in self.all:
            each.update(values, name)
