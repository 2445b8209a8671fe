"""The dataflow graph that blocks are found in: what carries a model's activations, and its post-dominators.

Weights are no part of it, nor what is computed from them alone, nor whole numbers and truth values that come from the
inputs (token ids, positions, masks): these are arguments of the operators that read them. What is left are floating
tensors computed from an input, and whatever is computed from those (codes of a quantizer, parts of a split).

A node `j` post-dominates `v` when every path from `v` to an output passes `j`; the nodes that all paths from a stream's
start pass, its articulation points, are the start's post-dominators.
"""

from __future__ import annotations

from collections.abc import Iterable

import networkx
import torch
from torch import Tensor, fx

from graphopt.ir.arguments import operator
from graphopt.ir.program import Program

CONTRACTIONS = frozenset(
    (
        "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
        "conv_transpose3d", "convolution", "einsum", "linear", "matmul", "mm", "scaled_dot_product_attention",
    )
)  # fmt: skip
# Every element of the result is one of the input's, or a rounding of it.
_MOVES = frozenset(
    (
        "_to_copy", "alias", "cat", "chunk", "clone", "constant_pad_nd", "contiguous", "detach", "dropout", "expand",
        "flatten", "flip", "getitem", "index", "index_select", "narrow", "pad", "permute", "repeat",
        "repeat_interleave", "reshape", "roll", "select", "slice", "split", "split_with_sizes", "squeeze", "stack",
        "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
        "graphopt.dequantize", "graphopt.fake_quantize", "graphopt.quantize",
    )
)  # fmt: skip
# Linear in their one activation, together with contractions and moves: what a skip may pass and still be a skip.
_LINEAR = frozenset(
    (
        "add", "div", "mul", "neg", "sub", "batch_norm", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
        "pixel_shuffle", "pixel_unshuffle", "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d",
        "upsample_nearest2d", "upsample_nearest3d",
    )
)  # fmt: skip
_NORMS = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")


def is_contraction(node: fx.Node) -> bool:
    """True for a convolution, a product of matrices, attention; an outer product contracts nothing."""
    name = operator(node)
    if name in ("bmm", "matmul", "mm") and isinstance(node.args[0], fx.Node):
        left = node.args[0].meta.get("val")
        return not (isinstance(left, Tensor) and left.dim() > 0 and left.shape[-1] == 1)
    return name in CONTRACTIONS


def is_norm(node: fx.Node) -> bool:
    return any(norm in operator(node) for norm in _NORMS)


def is_move(node: fx.Node) -> bool:
    return operator(node) in _MOVES


def is_pointwise(node: fx.Node) -> bool:
    """True where each element of the result needs one element of each input."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise or operator(node) in ("hardswish", "prelu")  # torch does not tag these two


def is_linear(node: fx.Node) -> bool:
    return is_contraction(node) or is_move(node) or operator(node) in _LINEAR


def mixes(node: fx.Node) -> bool:
    """True where an element of the result depends on several elements of an input."""
    return not (is_move(node) or is_pointwise(node))


class Flow:
    """The dataflow graph of a program; nodes are numbers, in graph order, and `exit` is a node behind all outputs.

    Attributes:
        nodes: the fx node of each number; `number` is the inverse.
        order: place of every node of the program in its graph.
        inputs: the activations that each node reads.
        readers: who reads each.
        onward: `readers` without those that only hand the value to the caller, unless there are no others: a value that
            is returned as well (a cache, attention weights, hidden states) has not left its path.
        after: immediate post-dominator; `level` counts them up to the exit.
    """

    def __init__(self, program: Program) -> None:
        self.nodes = _activations(program)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}
        self.exit = len(self.nodes)
        self.inputs = [[self.number[a] for a in node.all_input_nodes if a in self.number] for node in self.nodes]
        self.readers = [[self.number[u] for u in node.users if u in self.number] for node in self.nodes]
        self.onward = self._onward()
        self.after, self.level = self._post_dominators()
        self._first, self._last = self._intervals()

    def _onward(self) -> list[list[int]]:
        returned_only = [False] * self.exit
        onward: list[list[int]] = [[]] * self.exit
        for i in reversed(range(self.exit)):
            node, readers = self.nodes[i], self.readers[i]
            returned_only[i] = (
                len(self.inputs[i]) <= 1 and not is_contraction(node) and all(returned_only[r] for r in readers)
            )
            leaves = [self.exit] if not readers or any(user.op == "output" for user in node.users) else []
            onward[i] = [r for r in readers if not returned_only[r]] or readers + leaves
        return onward

    def _post_dominators(self) -> tuple[list[int], list[int]]:
        """Dominators of the reversed graph, from the exit."""
        backwards = networkx.DiGraph()
        backwards.add_node(self.exit)
        backwards.add_edges_from((reader, i) for i, readers in enumerate(self.onward) for reader in readers)
        found = networkx.immediate_dominators(backwards, self.exit)
        after = [found[i] for i in range(self.exit)] + [self.exit]
        level = [0] * (self.exit + 1)
        for i in reversed(range(self.exit)):
            level[i] = level[after[i]] + 1
        return after, level

    def _intervals(self) -> tuple[list[int], list[int]]:
        """Number the post-dominator tree in preorder: below `j` are the nodes from `first[j]` up to `last[j]`."""
        size = [1] * (self.exit + 1)
        for i in range(self.exit):
            size[self.after[i]] += size[i]
        first, free = [0] * (self.exit + 1), [1] * (self.exit + 1)
        for i in reversed(range(self.exit)):
            parent = self.after[i]
            first[i], free[i] = free[parent], free[parent] + 1
            free[parent] += size[i]
        return first, [begin + count for begin, count in zip(first, size, strict=True)]

    def guards(self, j: int, v: int) -> bool:
        """True where every path from `v` to an output passes `j`."""
        return self._first[j] <= self._first[v] < self._last[j]

    def between(self, source: int, join: int) -> set[int]:
        """Return the nodes on paths from `source` to `join` from which there is no way around `join`.

        Costs what it returns and its readers: a node that leads elsewhere too is not followed.
        """
        found: set[int] = set()
        queue = [source]
        while queue:
            for v in self.onward[queue.pop()]:
                if v < join and v not in found and self.guards(join, v):
                    found.add(v)
                    queue.append(v)
        return found

    def leading_to(self, ends: Iterable[int], inside: set[int]) -> set[int]:
        """Return those of `inside` from which one of `ends` can be reached within it, the ends included."""
        queue = list(ends)
        found = set(queue)
        while queue:
            for v in self.inputs[queue.pop()]:
                if v in inside and v not in found:
                    found.add(v)
                    queue.append(v)
        return found

    def cuts(self) -> list[int]:
        """Return the nodes that all dataflow of a stream passes, in order; see `Blocks.cuts`."""
        products = [0] * self.exit  # contractions on the longest way here
        for i, node in enumerate(self.nodes):
            products[i] = max((products[v] for v in self.inputs[i]), default=0) + is_contraction(node)
        roots = sorted((i for i in range(self.exit) if not self.inputs[i]), key=lambda i: -self.level[i])
        found: set[int] = set()
        for root in roots:
            own = []
            while root != self.exit and root not in found:
                own.append(root)
                root = self.after[root]
            if not found or any(products[i] for i in own):
                found.update(own)
        return sorted(i for i in found if self.nodes[i].op != "placeholder")


def _activations(program: Program) -> list[fx.Node]:
    carried: set[fx.Node] = set()
    from_input: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function") or not (tensors := _tensors(node)):
            continue
        reads = [] if _reads_shape_only(node) else node.all_input_nodes
        if node.op == "placeholder" or any(each in from_input for each in reads):
            from_input.add(node)
            floating = all(each.is_floating_point() or each.is_complex() for each in tensors)
            if floating or any(each in carried for each in reads):
                carried.add(node)
    return [node for node in program.graph.nodes if node in carried]


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return [each for each in values if isinstance(each, Tensor)]


def _reads_shape_only(node: fx.Node) -> bool:
    name = operator(node)
    return name.endswith("_like") or name.startswith("new_")
