"""Put a linear behind each norm that writes a residual, or whose affine others than linears read.

    x + norm(y; weight, bias)  ->  x + linear(norm(y), diag(weight), bias)
    return norm(x)             ->  return linear(norm(x), diag(weight), bias)

The linear writes and reads like any other, so the residual can be centered and rotated; what it costs at run time is
its product. Linears that read the norm's output keep doing so: they can take its affine in themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from graphopt.analysis.spaces import Symmetry, analyze
from graphopt.ir import Program, Rewriter, arguments, operator
from graphopt.ir.rewriter import module_path
from graphopt.passes.fold.affine import is_linear_operator
from graphopt.passes.fold.center_norms import center_norms
from graphopt.passes.fold.norm_affine import fold_norm_affine

aten = torch.ops.aten
_MOVES = {"reshape", "permute", "transpose", "slice", "select", "unsqueeze", "squeeze", "clone", "expand", "_to_copy"}


def put_linears_behind_norms(rewriter: Rewriter) -> None:
    """Give norms in the way of a rotation an identity linear for what is no linear itself; fold and center all norms.

    Only where the residual can be rotated then, which is tried on a copy. How many multiply-accumulates a token that
    takes goes into the trace.
    """
    found = _norms_in_the_way(rewriter.program)
    trial = Rewriter(rewriter.program.clone(), rewriter.author)
    nodes = {node.name: node for node in trial.graph.nodes}
    tried = {way: _put_linear(nodes[way.norm.name], way.why, trial) for way in found}
    _fold_and_center(trial)
    rotatable = {(member.node, member.axis) for space in analyze(trial.program).under(Symmetry.ORTHOGONAL)
                 if space.free and space.norms for member in space.members}  # fmt: skip
    put = []
    for way, linear in tried.items():
        if linear is not None and (arguments(linear)["weight"], way.axis) in rotatable:
            put.append(_put_linear(way.norm, way.why, rewriter))
    if put:
        _fold_and_center(rewriter)
        sizes = [int(linear.meta["val"].shape[-1]) ** 2 for linear in put if linear is not None]
        rewriter.note(explicit_linears=len(put), explicit_macs_per_token=sum(sizes))


class _Way(NamedTuple):
    """A norm in the way of a rotation, and the axis of its linear that is to be rotated."""

    norm: fx.Node
    axis: int
    why: str


def _norms_in_the_way(program: Program) -> list[_Way]:
    """Return the norms that write a space which norms read, and those whose affine alone was not folded.

    A space that one norm reads is no residual: a rotation of it would end at the norm's own linear.
    """
    spaces = [space for space in analyze(program).under(Symmetry.ORTHOGONAL) if space.norms]
    found = {
        norm: _Way(norm, 0, "writes the residual: now a linear does") for space in spaces for norm in space.norms_before
    }
    for norm in (norm for space in spaces if len(space.norms) > 1 for norm in space.norms):
        named = arguments(norm)
        if named.get("weight") is not None or named.get("bias") is not None:
            why = "has an affine that others than linears read: now a linear takes it"
            found.setdefault(norm, _Way(norm, 1, why))
    return list(found.values())


def _fold_and_center(rewriter: Rewriter) -> None:
    rewriter.sweep()
    fold_norm_affine(rewriter)
    center_norms(rewriter)
    rewriter.sweep()


def _put_linear(norm: fx.Node, why: str, rewriter: Rewriter) -> fx.Node | None:
    """Return the linear; None where none is needed."""
    readers = [user for user in norm.users if not _is_read_by_linears(user)]
    if not readers:
        return None
    value = norm.meta["val"]
    size = int(value.shape[-1])
    base = f"{module_path(norm) or norm.name}.rotation"
    identity = rewriter.weight(torch.eye(size, dtype=torch.float64), f"{base}.weight", value.dtype, parameter=True)
    linear = rewriter.insert(aten.linear.default, norm, identity, None, before=norm.next, origin=[norm])
    for reader in readers:
        rewriter.redirect(reader, norm, linear)
    rewriter.touch(norm, f"{why}, [{size}, {size}], {size * size:,} MACs a token")
    return linear


def _is_read_by_linears(reader: fx.Node) -> bool:
    """True where only linear operators see the value, after moves of its elements."""
    pending = [reader]
    while pending:
        node = pending.pop()
        if operator(node) in _MOVES:
            pending += node.users
        elif not is_linear_operator(node):
            return False
    return True
