"""Changes of several spaces, each changed weight written once."""

from __future__ import annotations

import functools

from torch import Tensor, fx

from graphopt.analysis.spaces import Space
from graphopt.ir import Rewriter
from graphopt.ir.unrounded import Computed

Change = tuple[Space, fx.Node, Tensor | None]


class Reparameterization:
    """Collects changes of spaces; `commit` hands the weights that come of them to the rewriter.

    Changes of different spaces act on different axes of a weight, so they add up in any order. A weight is computed in
    float64 when it is asked for and when it is written, one at a time: the changes are small, the weights may be large.
    Every reader of a weight gets the new one: a tied weight stays tied.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self._rewriter = rewriter
        self._changes: dict[str, list[Change]] = {}

    def value(self, node: fx.Node) -> Tensor:
        """Return a weight's value in float64 with all changes so far. Not to be written."""
        return self._computed(node)()

    def apply(self, space: Space, change: Tensor | None) -> None:
        """Change a space; ValueError where it is pinned or the change has another shape (see `Space.transform`)."""
        change = space.checked(change)
        for node in dict.fromkeys(member.node for member in space.members):
            self._changes.setdefault(str(node.target), []).append((space, node, change))

    def commit(self) -> int:
        """Replace the changed weights and return how many there are. Analyses made before no longer hold."""
        for name, changes in self._changes.items():
            node = changes[0][1]
            dtype = self._rewriter.program.weight(node).dtype
            self._rewriter.replace(node, self._rewriter.weight(self._computed(node), name, dtype, source=node))
        count = len(self._changes)
        self._changes = {}
        return count

    def _computed(self, node: fx.Node) -> Computed:
        return functools.partial(_compute, self._rewriter.reader(node), tuple(self._changes.get(str(node.target), ())))


def _compute(before: Computed, changes: tuple[Change, ...]) -> Tensor:
    value = before()
    for space, node, change in changes:
        value = space.changed(node, value, change)
    return value
