"""One operator for each move of elements.

    permute(permute(x, p), q)           ->  permute(x, p∘q)
    transpose(transpose(x, 1, 2), 1, 2) ->  x
    reshape(reshape(x, s), t)           ->  reshape(x, t)
    view(x, s)                          ->  reshape(x, s)

Exact. `view` asks for a memory layout that other rewrites do not keep; `reshape` does not.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir import Match, Program, Rewriter, arguments, operator, rule
from graphopt.passes.canonicalize.identities import stays_apart, who_reads_layout
from graphopt.passes.canonicalize.operators import permutation, reads_strides, tensor_of

_RESHAPES = {"view", "reshape", "_unsafe_view"}


def _identity(node: fx.Node) -> Match | None:
    found = permutation(node)
    return Match(node, {"x": found[0]}) if found is not None and found[1] == tuple(range(len(found[1]))) else None


@rule(match=_identity, needs=[stays_apart])
def drop_permutation(match: Match, rewriter: Rewriter) -> None:
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, f"{operator(match.root)} that moves nothing dropped")


def _permutation_twice(node: fx.Node) -> Match | None:
    outer = permutation(node)
    inner = permutation(outer[0]) if outer is not None else None
    if outer is None or inner is None:
        return None
    return Match(node, {"x": inner[0], "dims": tuple(inner[1][d] for d in outer[1])})


def apart_if_cancelled(match: Match, program: Program) -> str:
    """As `stays_apart`, where the two permutations cancel."""
    return stays_apart(match, program) if match["dims"] == tuple(range(len(match["dims"]))) else ""


@rule(match=_permutation_twice, needs=[apart_if_cancelled])
def merge_permutations(match: Match, rewriter: Rewriter) -> None:
    dims = match["dims"]
    new = match.node("x")
    if dims != tuple(range(len(dims))):
        new = rewriter.insert(torch.ops.aten.permute.default, new, list(dims), before=match.root)
    rewriter.replace(match.root, new)
    rewriter.touch(match.root, "permutations merged" if new is not match["x"] else "permutations that cancel dropped")


def _is_reshape(node: object) -> bool:
    return isinstance(node, fx.Node) and operator(node) in _RESHAPES and not reads_strides(node)


def _reshape(node: fx.Node) -> Match | None:
    """Match a view, or any reshape of a reshape."""
    if not _is_reshape(node) or tensor_of(node) is None:
        return None
    source = node.args[0]
    if operator(node) == "reshape" and not _is_reshape(source):
        return None
    while _is_reshape(source):
        source = source.args[0]  # type: ignore[union-attr]
    return Match(node, {"x": source, "shape": list(arguments(node).values())[1]})


def copy_is_free(match: Match, program: Program) -> str:
    """Nobody looks at the memory layout, where a reshape is left out that may copy."""
    return who_reads_layout(match.root, program) if match["x"] is not match.root.args[0] else ""


@rule(match=_reshape, needs=[copy_is_free])
def merge_reshapes(match: Match, rewriter: Rewriter) -> None:
    new = rewriter.insert(torch.ops.aten.reshape.default, match["x"], match["shape"], before=match.root)
    rewriter.replace(match.root, new)
    if match["x"] is not match.root.args[0]:
        rewriter.touch(match.root, "reshapes merged")


RULES = (drop_permutation, merge_permutations, merge_reshapes)
