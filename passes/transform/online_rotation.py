"""Rotations at run time, where no weight before can carry them.

    hidden       linear(x, W)  ->  linear(hadamard(x), W Q)
    query, key   q kᵀ          ->  hadamard(q) hadamard(k)ᵀ

hadamard(x) = x Q takes n·log n operations a vector. Neither has random signs: those of a rotation that weights absorb
are free, these would cost a multiplication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.analysis import node_macs
from graphopt.analysis.spaces import Read, Space
from graphopt.analysis.spaces.flow import RULES
from graphopt.analysis.spaces.rules import pointwise
from graphopt.ir import Program, Rewriter, arguments, operator
from graphopt.ir.hadamard import factors, matrix_of, orthogonal
from graphopt.passes.canonicalize.operators import permutation

_KEEPS_SCORES = {"where", "masked_fill", "reshape", "expand"}  # besides what works score by score
_PRODUCTS = {"matmul", "bmm"}
_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}


@dataclass(frozen=True)
class Hidden:
    """An activation that a nonlinearity wrote, and where linears read it."""

    source: fx.Node
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class QueryKey:
    """The operator that multiplies queries by keys, and its two operands."""

    node: fx.Node
    query: fx.Node
    key: fx.Node


def hidden_sites(spaces: Iterable[Space], rewriter: Rewriter) -> list[Hidden]:
    """Return the activations of pinned spaces that an elementwise operator computes and linears read.

    Declined are those that a product by a computed weight reads, as that of an expert chosen at run time is.
    """
    elementwise = {node.name for node in rewriter.graph.nodes if _is_pointwise(node)}
    found: dict[fx.Node, dict[fx.Node, Read]] = {}
    for space in spaces:
        if space.free or space.norms:
            continue
        for read in space.reads:
            if operator(read.node) == "linear" and read.partner.op == "get_attr" and read.source.name in elementwise:
                found.setdefault(read.source, {}).setdefault(read.node, read)
        products = [read.node for read in space.reads if operator(read.node) in _PRODUCTS]
        weights = [member.weight for member in space.members if "reads" in member.role]
        if products and weights and all(pin.node in elementwise for pin in space.pins):
            reason = f"multiplies by a weight computed from {weights[0]}, not by the weight itself"
            rewriter.decline(products[0], reason)
    return [Hidden(source, tuple(reads.values())) for source, reads in found.items()]


def _is_pointwise(node: fx.Node) -> bool:
    return getattr(RULES.get(operator(node)), "__module__", "") == pointwise.__name__


def query_key_sites(program: Program, spaces: Iterable[Space]) -> list[QueryKey]:
    """Return the products of two activations that a softmax reads, save those whose whole space weights can rotate."""
    rotated: Counter[tuple[fx.Node, fx.Node]] = Counter()  # coordinates of each operand that weights can rotate
    for space in spaces:
        for read in space.reads if space.free else ():
            rotated[read.node, read.source] += space.size
    found = []
    for node in program.graph.nodes:
        if operator(node) == "scaled_dot_product_attention":
            named = arguments(node)
            query, key = named["query"], named["key"]
        elif operator(node) in _PRODUCTS and _is_scored(node):
            query, key, *_ = arguments(node).values()
        else:
            continue
        if "get_attr" not in (query.op, key.op) and rotated[node, query] < query.meta["val"].shape[-1]:
            found.append(QueryKey(node, query, key))
    return found


def _is_scored(product: fx.Node) -> bool:
    pending, seen = list(product.users), set()
    while pending:
        node = pending.pop()
        if operator(node) in _SOFTMAX:
            return True
        if node not in seen and (_is_pointwise(node) or operator(node) in _KEEPS_SCORES):
            seen.add(node)
            pending += node.users
    return False


def hidden_rotation(site: Hidden, block_size: int) -> torch.Tensor:
    """Return Q [n, n] by which an activation is multiplied; the identity where the blocks do not divide n."""
    size = int(site.source.meta["val"].shape[-1])
    block, small, reason = _fitting(size, block_size)
    return torch.eye(size, dtype=torch.float64) if reason else matrix_of(size, small, None, block)


def rotate_hidden(site: Hidden, block_size: int, rewriter: Rewriter) -> None:
    """Transform the activation and give each reader the transformed weight."""
    size = int(site.source.meta["val"].shape[-1])
    block, small, reason = _fitting(size, block_size)
    if reason:
        rewriter.decline(site.source, reason)
        return
    readers = [read.node for read in site.reads]
    new = _hadamard(site.source, small, block, min(readers), rewriter)
    matrix = matrix_of(size, small, None, block)
    for reader in readers:
        weight = arguments(reader)["weight"]
        rewriter.rewire(reader, input=new, weight=rewriter.edit(weight, "hadamard", lambda value: value @ matrix))
    names = ", ".join(node.name for node in readers)
    rewriter.touch(site.source, f"transformed online before {names}{_cost(new)}")


def rotate_query_key(site: QueryKey, block_size: int, rewriter: Rewriter) -> None:
    """Transform queries and keys alike."""
    size = int(site.query.meta["val"].shape[-1])
    block, small, reason = _fitting(size, block_size)
    if not reason and operator(site.node) != "scaled_dot_product_attention":
        reason = _untransposed(site)
    if reason:
        rewriter.decline(site.node, reason)
        return
    query = _hadamard(site.query, small, block, site.node, rewriter)
    if operator(site.node) == "scaled_dot_product_attention":
        key = _hadamard(site.key, small, block, site.node, rewriter)
    else:
        source, dims = _moved(site.key)
        key = _hadamard(source, small, block, site.node, rewriter)
        key = rewriter.insert(torch.ops.aten.permute.default, key, dims, before=site.node)
    rewriter.redirect(site.node, site.query, query)
    rewriter.redirect(site.node, site.key, key)
    rewriter.touch(site.node, f"queries and keys transformed online{_cost(query)} each")


def _moved(key: fx.Node) -> tuple[fx.Node, list[int]]:
    """Return what a transposed key is a permutation of, with the permutation."""
    source, dims = key, list(range(key.meta["val"].dim()))
    while (found := permutation(source)) is not None:
        source, dims = found[0], [found[1][dim] for dim in dims]
    return source, dims


def _untransposed(site: QueryKey) -> str:
    source, dims = _moved(site.key)
    rank = len(dims)
    if source.meta["val"].dim() != rank or dims[rank - 2] != rank - 1:
        return f"{site.key.name} does not hold the coordinates of a key along the last axis of {source.name}"
    return ""


def _fitting(size: int, block_size: int) -> tuple[int, torch.Tensor | None, str]:
    """Return the block and small matrix of the transform of an axis, or why there is none."""
    if block_size and size % block_size:
        return 0, None, f"blocks of {block_size} do not divide its {size} coordinates"
    _order, rest = factors(block_size or size)
    small = orthogonal(rest, 0, "orthogonal") if rest > 1 else None
    return block_size, small, ""


def _hadamard(
    x: fx.Node, small: torch.Tensor | None, block: int, before: fx.Node, rewriter: Rewriter
) -> fx.Node:
    target = torch.ops.graphopt.hadamard.default
    factor = None
    if small is not None:
        dtype, name = x.meta["val"].dtype, f"hadamard_{len(small)}"
        first, key = next(iter(rewriter.graph.nodes)), f"{name} {dtype}"  # all sites share it
        factor = rewriter.once(first, key, lambda: rewriter.weight(small, name, dtype, parameter=False))
    return rewriter.insert(target, x, factor, None, block, False, before=before)


def _cost(node: fx.Node) -> str:
    return f" ({node_macs(node):,} MACs)"
