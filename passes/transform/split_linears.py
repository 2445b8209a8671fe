"""Split a linear whose output is cut into parts into one linear for each part.

    q, k, v = split(linear(x, W, b), [m, n, p], -1)     ->  q = linear(x, W[:m], b[:m]), k = ..., v = ...
    select(reshape(linear(x, W, b), [.., H, 3, D]), -2, i)
                                                        ->  reshape(linear(x, W[R], b[R]), [.., H, D])
    glu(linear(x, W, b))                                ->  linear(x, W[:n], b[:n]) * sigmoid(linear(x, W[n:], b[n:]))

R lists the rows of W that the part reads. It is found by sending the numbers 0, 1, ..., out - 1 through the operators
between the linear and the part, so that any chain of reshapes, permutations and cuts is followed: fused queries, keys
and values in every order of heads and parts, and the two halves of a gated layer. What a chain did to the axes behind
the cut becomes the order of R, a reshape and a permutation. Rows that nobody reads are dropped.

Exact. The analysis of spaces follows slices and concatenations, so a fused weight is often as free as its parts; where
a symmetry is lost on the way (rows of several parts dealt out by turns), or where each part shall be quantized by
itself (`always`), the split pays. `merge_linears` is the way back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.spaces import Symmetry, analyze
from graphopt.ir import (
    Changes,
    Match,
    Program,
    Rewriter,
    Rule,
    apply_rules,
    arguments,
    constant,
    floating,
    operator,
    rule,
)
from graphopt.passes.canonicalize.identities import who_reads_layout
from graphopt.passes.canonicalize.linear import bias_by_output
from graphopt.passes.canonicalize.operators import permutation, same_sizes, tensor_of
from graphopt.pipeline import Context, Pass

aten = torch.ops.aten
_ALONG_AN_AXIS = {"slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze"}
_LISTS = {"split", "split_with_sizes", "chunk", "unbind"}
_ARITHMETIC = {"add", "sub", "mul", "div", "neg"}
_JOINS = {"cat", "stack"}
_CARRIES = _ARITHMETIC | _ALONG_AN_AXIS | {"getitem", "reshape", "permute"}


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of the weight the elements of a value come from.

    Attributes:
        index: the row of each element, of the value's rank; every batch axis has size 1.
        axes: for each axis of the value the number of the batch axis that it is, None where rows lie along it.
        lead: sizes of the batch axes as the last reshape gave them; None before any.
    """

    index: Tensor
    axes: tuple[int | None, ...]
    lead: tuple[Any, ...] | None = None

    @property
    def features(self) -> list[int]:
        """The sizes of the axes along which rows lie, in order."""
        return [size for size, batch in zip(self.index.shape, self.axes, strict=True) if batch is None]

    @property
    def listed(self) -> tuple[int, ...]:
        """The rows in the order of the value's elements."""
        return tuple(self.index.flatten().tolist())

    @property
    def from_natural(self) -> list[int]:
        """The permutation that makes the value of one whose batch axes come first."""
        batch = len(self.axes) - len(self.features)
        rest = iter(range(batch, len(self.axes)))
        return [next(rest) if axis is None else axis for axis in self.axes]

    def through(self, node: fx.Node) -> list[Rows]:
        """Return the rows of each tensor that `node` makes of the value (of a GLU, its halves); [] if unknown."""
        name = operator(node)
        if name == "reshape":
            return self._reshaped(node)
        if (found := permutation(node)) is not None:
            dims = found[1]
            return [replace(self, index=self.index.permute(dims), axes=tuple(self.axes[d] for d in dims))]
        if name in ("index", "index_select"):
            return self._indexed(node)
        if name not in _ALONG_AN_AXIS | {"glu"} or len(node.all_input_nodes) > 1:
            return []
        dim = arguments(node).get("dim", 0)
        if not isinstance(dim, int):  # squeeze takes none or several
            return []
        axis = dim % (len(self.axes) + (name == "unsqueeze"))
        if name != "unsqueeze" and self.axes[axis] is not None:
            return []
        if name == "glu":
            return [replace(self, index=half) for half in self.index.chunk(2, axis)]
        made = node.target(self.index, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        axes = list(self.axes)
        if name == "unsqueeze":
            axes.insert(axis, None)
        elif name in ("select", "unbind") or (name == "squeeze" and self.index.shape[axis] == 1):
            del axes[axis]
        return [replace(self, index=each, axes=tuple(axes)) for each in (made if name in _LISTS else [made])]

    def _reshaped(self, node: fx.Node) -> list[Rows]:
        """A reshape that keeps batch axes and rows apart: the last axes of the result hold just the rows."""
        shape: Any = node.meta["val"].shape
        split, size = len(shape), 1
        while size < self.index.numel() and split > 0 and isinstance(shape[split - 1], int):
            split -= 1
            size *= shape[split]
        if size != self.index.numel() or self.from_natural != list(range(len(self.axes))):
            return []
        features = shape[split:]
        axes = (*range(split), *[None] * len(features))
        return [Rows(self.index.reshape([1] * split + list(features)), axes, tuple(arguments(node)["shape"][:split]))]

    def _indexed(self, node: fx.Node) -> list[Rows]:
        """`x[..., [2, 0], :]`: one axis is indexed, by a constant list."""
        named = arguments(node)
        if operator(node) == "index_select":
            indices = {named["dim"] % len(self.axes): named["index"]}
        else:
            indices = {axis: each for axis, each in enumerate(named["indices"]) if each is not None}
        ((axis, constant_node), *others) = indices.items()
        value = tensor_of(constant_node)
        if others or self.axes[axis] is not None or constant_node.op != "get_attr":
            return []
        if value is None or value.dim() != 1 or value.dtype not in (torch.int64, torch.int32):
            return []
        chosen = node.graph.owning_module.get_buffer(str(constant_node.target))  # type: ignore[union-attr]
        index = aten.index.Tensor(self.index, [None] * axis + [chosen.to("cpu", torch.int64)])
        return [replace(self, index=index)]


@dataclass(frozen=True, eq=False)
class Part:
    """A value computed from some rows: those of one tensor, or of the two that a GLU multiplies."""

    node: fx.Node
    rows: tuple[Rows, ...]


@dataclass(frozen=True, eq=False)
class Cut:
    """How the output of a linear is taken apart.

    Attributes:
        parts: the first values on each way that hold some of its rows only, in graph order.
        whole: who reads all rows in a way that cannot be followed to parts; empty where nobody does.
    """

    parts: tuple[Part, ...]
    whole: str

    @property
    def lists(self) -> dict[tuple[int, ...], fx.Node]:
        """The distinct lists of rows with the first part that reads each."""
        found: dict[tuple[int, ...], fx.Node] = {}
        for part in self.parts:
            for rows in part.rows:
                found.setdefault(rows.listed, part.node)
        return found


def cut_of(linear: fx.Node) -> Cut:
    """Follow the output of a linear to the values that hold parts of it."""
    count = int(arguments(linear)["weight"].meta["val"].shape[0])
    batch = linear.meta["val"].dim() - 1
    pending = [(linear, Rows(torch.arange(count).reshape([1] * batch + [count]), (*range(batch), None)))]
    parts, whole = [], ""
    while pending:
        value, rows = pending.pop()
        for reader in value.users:
            pieces = list(_pieces(rows, reader))
            for node, piece in pieces:
                if all(each.index.numel() == count for each in piece):
                    pending.append((node, piece[0]))
                else:
                    parts.append(Part(node, piece))
            if not pieces and reader.op == "output":
                whole = whole or f"the program returns {value.name} as a whole"
            elif not pieces:
                whole = whole or f"{value.name} is also read as a whole by {reader.name}"
    return Cut(tuple(sorted(parts, key=lambda part: part.node)), whole)


def _pieces(rows: Rows, reader: fx.Node) -> Iterator[tuple[fx.Node, tuple[Rows, ...]]]:
    """Yield the tensors that `reader` makes of a value, each with the rows that it holds."""
    made = rows.through(reader)
    if not made or operator(reader) not in _LISTS:
        yield from [(reader, tuple(made))] if made else []
        return
    for user in reader.users:
        if operator(user) == "getitem" and isinstance(user.args[1], int):
            yield user, (made[user.args[1]],)


def _linear(node: fx.Node) -> Match | None:
    if operator(node) != "linear":
        return None
    named = arguments(node)
    weight = tensor_of(named["weight"])
    if weight is None or weight.dim() != 2 or not isinstance(weight.shape[0], int):
        return None
    cut = cut_of(node)
    if not cut.parts:
        return None
    return Match(node, {"x": named["input"], "weight": named["weight"], "bias": named["bias"], "cut": cut})


def read_in_parts(match: Match, program: Program) -> str:
    """Nobody reads the output but through its parts; otherwise it would be computed twice."""
    return str(match["cut"].whole)


def plain_rows(match: Match, program: Program) -> str:
    """Every part holds some rows, each of them once, and two parts hold the same rows or have none in common."""
    owner: dict[int, fx.Node] = {}
    for listed, node in match["cut"].lists.items():
        if not listed:
            return f"{node.name} reads none of its rows"
        for row in listed:
            if (other := owner.get(row)) is not None:
                twice = f"{node.name} reads" if other is node else f"{other.name} and {node.name} both read"
                return f"{twice} row {row}" + (" twice" if other is node else "")
            owner[row] = node
    return ""


def split_alike(match: Match, program: Program) -> str:
    """Whoever else reads the weight is a linear that is cut into the same parts; else the weight would be kept too."""
    weight = match.node("weight")
    for user in weight.users:
        if operator(user) != "linear" or arguments(user)["weight"] is not weight:
            return f"weight {weight.target} is also read by {user.name}"
        cut = cut_of(user)
        if cut.whole or cut.lists.keys() != match["cut"].lists.keys():
            return f"weight {weight.target} is also read by {user.name}, whose output is not cut into the same parts"
    return ""


def layout_is_free(match: Match, program: Program) -> str:
    """Nobody looks at how the parts lie in memory."""
    return who_reads_layout(match.root, program)


def go_different_ways(match: Match, program: Program) -> str:
    """No two parts are put side by side again: the halves or quarters of a rotary embedding are one vector."""
    operands: dict[fx.Node, dict[int, fx.Node]] = {}
    for part in match["cut"].parts:
        for join, position in _joined(part.node):
            for other_position, other in operands.setdefault(join, {}).items():
                if other is not part.node and other_position != position:
                    return f"its parts {other.name} and {part.node.name} meet again in {join.name}"
        for join, position in _joined(part.node):
            operands[join].setdefault(position, part.node)
    return ""


def _joined(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Return where moves and arithmetic carry a value into a concatenation, and as which of its operands."""
    found, seen, pending = [], {node}, [node]
    while pending:
        value = pending.pop()
        for user in value.users:
            name = operator(user)
            if name in _JOINS:
                found += [(user, position) for position, each in enumerate(user.args[0]) if each is value]  # type: ignore[arg-type]
            elif user not in seen and (name in _CARRIES or permutation(user) is not None):
                seen.add(user)
                pending.append(user)
    return found


@rule(
    match=_linear,
    needs=[
        constant("weight", "bias"),
        floating("x", "weight"),
        bias_by_output,
        plain_rows,
        layout_is_free,
    ],
    worth=[read_in_parts, split_alike, go_different_ways],
)
def split_linear(match: Match, rewriter: Rewriter) -> None:
    cut: Cut = match["cut"]
    numbers = {listed: number for number, listed in enumerate(cut.lists)}
    made: dict[tuple[int, ...], fx.Node] = {}
    for part in cut.parts:
        pieces = []
        for rows in part.rows:
            listed = rows.listed
            if listed not in made:
                made[listed] = _linear_of(match, listed, numbers[listed], part.node, rewriter)
            pieces.append(_shaped(made[listed], rows, part.node, rewriter))
        new = pieces[0]
        if operator(part.node) == "glu":
            gate = rewriter.insert(aten.sigmoid.default, pieces[1], before=part.node)
            new = rewriter.insert(aten.mul.Tensor, new, gate, before=part.node)
        rewriter.replace(part.node, new)
    sizes = " + ".join(str(len(listed)) for listed in numbers)
    rewriter.touch(match.root, f"split into linears of {sizes} rows")


def _linear_of(match: Match, listed: tuple[int, ...], number: int, before: fx.Node, rewriter: Rewriter) -> fx.Node:
    """Insert the linear that computes the listed rows."""
    weight = _rows_of(match.node("weight"), listed, number, rewriter)
    bias = match["bias"] if match["bias"] is None else _rows_of(match["bias"], listed, number, rewriter)
    return rewriter.insert(aten.linear.default, match["x"], weight, bias, before=before, origin=[match.root])


def _rows_of(source: fx.Node, listed: tuple[int, ...], number: int, rewriter: Rewriter) -> fx.Node:
    """Return the listed rows of a weight or bias; `attn.qkv.weight` becomes `attn.qkv.part0.weight`."""
    module, _, leaf = str(source.target).rpartition(".")
    name = f"{module}.part{number}.{leaf}" if module else f"part{number}.{leaf}"

    def make() -> fx.Node:
        tensor = rewriter.program.weight(source)
        # A choice of rows rounds nothing, so it needs no float64.
        rows = tensor.detach()[torch.tensor(listed, device=tensor.device)]
        return rewriter.weight(rows, name, tensor.dtype, parameter=isinstance(tensor, nn.Parameter))

    return rewriter.once(source, f"rows {listed}", make)


def _shaped(linear: fx.Node, rows: Rows, part: fx.Node, rewriter: Rewriter) -> fx.Node:
    """Bring the output of a part's linear [..., rows] into the shape and order of axes that the part has."""
    new, features = linear, rows.features
    sizes = {batch: size for batch, size in zip(rows.axes, _sizes_before(part, rows), strict=True) if batch is not None}
    same_batch = same_sizes(linear.meta["val"].shape[:-1], [sizes[batch] for batch in range(len(sizes))])
    if not same_batch or len(features) > 1:
        assert rows.lead is not None, "axes come apart by reshapes only"
        new = rewriter.insert(aten.reshape.default, new, [*rows.lead, *features], before=part)
    elif not features:
        new = rewriter.insert(aten.squeeze.dim, new, -1, before=part)
    if rows.from_natural != list(range(len(rows.axes))):
        new = rewriter.insert(aten.permute.default, new, rows.from_natural, before=part)
    return new


def _sizes_before(part: fx.Node, rows: Rows) -> list[Any]:
    """The sizes of the part's axes; those of batch axes, which is what is asked of it, are the same behind a GLU."""
    return list(part.meta["val"].shape)


@dataclass(frozen=True)
class SplitLinears(Pass):
    """Give each part of a linear's output (query, key, value; gate, up) a linear of its own.

    Attributes:
        always: split also where the analysis finds the parts as free as they are.
    """

    rules: ClassVar[tuple[Rule, ...]] = (split_linear,)

    always: bool = False

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        freed = None if self.always else _freed(program, self.name)

        def refusal(node: fx.Node) -> str:
            if freed is None or arguments(node)["weight"].target in freed:
                return ""
            return "its parts are as free as they are: the analysis tells them apart"

        apply_rules(self.rules, rewriter, refusal)
        return rewriter.finish()


def _freed(program: Program, author: str) -> set[str]:
    """Split everything in a copy and return the weights whose parts lie in more free spaces than the whole did."""
    trial = program.clone()
    rewriter = Rewriter(trial, author)
    apply_rules((split_linear,), rewriter)
    rewriter.finish()
    before, after = _free_spaces(program), _free_spaces(trial)
    freed = set()
    for name in before.keys() - trial.weights.keys():
        parts = [after[part] for part in after.keys() - program.weights.keys() if _is_part(part, name)]
        counts = [Counter(symmetry for symmetry, _ in spaces) for spaces in (set().union(*parts), before[name])]
        if counts[0] - counts[1]:
            freed.add(name)
    return freed


def _is_part(part: str, whole: str) -> bool:
    return re.sub(r"(^|\.)part\d+\.", r"\1", part) == whole


def _free_spaces(program: Program) -> dict[str, set[tuple[str, int]]]:
    """Return for each weight the free spaces that its rows lie in, as (symmetry, number)."""
    found: dict[str, set[tuple[str, int]]] = {name: set() for name in program.weights}
    analysis = analyze(program)
    for symmetry in Symmetry:
        for number, space in enumerate(analysis.under(symmetry)):
            for member in space.members:
                if space.free and member.axis == 0:
                    found[member.weight].add((symmetry, number))
    return found
