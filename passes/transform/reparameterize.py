"""Changes of several spaces, each changed weight written once."""

from __future__ import annotations

from torch import Tensor, fx

from graphopt.analysis.spaces import Space
from graphopt.ir import Rewriter


class Reparameterization:
    """Collects changes of spaces; `commit` hands the weights that came of them to the rewriter.

    Changes of different spaces act on different axes of a weight, so they add up in any order. Everything is float64
    until it is committed, and every reader of a weight gets the new one: a tied weight stays tied.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self._rewriter = rewriter
        self._values: dict[str, Tensor] = {}
        self._nodes: dict[str, fx.Node] = {}

    def value(self, node: fx.Node) -> Tensor:
        """Return a weight's value in float64 with all changes so far. Not to be written."""
        name = str(node.target)
        return self._values[name] if name in self._values else self._rewriter.value(node)

    def apply(self, space: Space, change: Tensor | None) -> None:
        """Change a space; ValueError where it is pinned or the change has another shape (see `Space.transform`)."""
        self._values |= space.transform(change, self.value)
        self._nodes |= {str(member.node.target): member.node for member in space.members}

    def commit(self) -> int:
        """Replace the changed weights and return how many there are. Analyses made before no longer hold."""
        for name, value in self._values.items():
            node = self._nodes[name]
            dtype = self._rewriter.program.weight(node).dtype
            self._rewriter.replace(node, self._rewriter.weight(value, name, dtype, source=node))
        count = len(self._values)
        self._values, self._nodes = {}, {}
        return count
