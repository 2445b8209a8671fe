"""What the canonicalizing rules ask of operators and values."""

from __future__ import annotations

import operator as python_operator
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.capture.randomness import draws
from graphopt.ir import arguments, is_floating, operator

# Their result depends on how their input lies in memory, not only on its values.
_STRIDE_READERS = {"as_strided", "as_strided_copy", "view_as_complex", "view_as_real", "_reshape_alias"}
_CASTS = {"_to_copy", "to", "_cast"}


def is_aten(node: fx.Node) -> bool:
    """True for a call of an ATen or prims operator; those of other libraries, the dialect's too, may do anything."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace in ("aten", "prims")
    return node.target is python_operator.getitem


def is_pure(node: fx.Node) -> bool:
    """True for an ATen call whose value follows from its arguments alone."""
    if not is_aten(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable:
            return False
        if operator(node).removeprefix("new_").startswith("empty"):
            return False  # whatever memory holds
    return not draws(node)


def tensor_of(value: object) -> Tensor | None:
    """Return the abstract tensor behind a node, or None."""
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return known if isinstance(known, Tensor) else None


def same_size(one: Any, other: Any) -> bool:
    """True where two sizes are equal for every input, without assuming anything of symbols."""
    if isinstance(one, torch.SymInt) or isinstance(other, torch.SymInt):
        if not (isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt)):
            return False
        return bool(one.node.expr == other.node.expr)
    return bool(one == other)


def same_sizes(one: Any, other: Any) -> bool:
    """True where two shapes are equal for every input."""
    return len(one) == len(other) and all(same_size(a, b) for a, b in zip(one, other, strict=True))


def same_type(one: object, other: object) -> bool:
    """True where two nodes are tensors of one dtype, device and shape, for every input."""
    a, b = tensor_of(one), tensor_of(other)
    if a is None or b is None:
        return False
    return a.dtype == b.dtype and a.device == b.device and same_sizes(a.shape, b.shape)


def reads_strides(node: fx.Node) -> bool:
    """True for an operator that looks at its input's memory layout."""
    name = operator(node)
    return name in _STRIDE_READERS or (name == "view" and getattr(node.target, "_overloadname", "") == "dtype")


def is_cast(node: object) -> bool:
    """True for a cast from one type to another that changes nothing else."""
    if not isinstance(node, fx.Node) or operator(node) not in _CASTS:
        return False
    source = tensor_of(node.args[0])
    value = tensor_of(node)
    return source is not None and value is not None and source.device == value.device


def uncast(value: object) -> object:
    """Return what stands before any casts between floating types: over the reals, the same value."""
    while is_cast(value) and is_floating(value) and is_floating(value.args[0]):  # type: ignore[attr-defined]
        value = value.args[0]  # type: ignore[attr-defined]
    return value


def permutation(node: object) -> tuple[fx.Node, tuple[int, ...]] | None:
    """Return `(x, dims)` where `node` permutes the axes of x (`permute`, `transpose`, `t`), else None."""
    if not isinstance(node, fx.Node) or operator(node) not in ("permute", "transpose", "t"):
        return None
    named = arguments(node)
    source = named.get("self")
    value = tensor_of(source)
    if value is None or not isinstance(source, fx.Node):
        return None
    rank = value.dim()
    dims = list(range(rank))
    if operator(node) == "permute":
        dims = [int(d) % rank for d in named["dims"]] if rank else []
    elif operator(node) == "transpose":
        if not isinstance(named["dim0"], int):
            return None
        if rank:
            first, second = named["dim0"] % rank, named["dim1"] % rank
            dims[first], dims[second] = dims[second], dims[first]
    elif rank == 2:
        dims = [1, 0]
    return source, tuple(dims)


def transposed_matrix(node: object) -> fx.Node | None:
    """Return w where `node` is the transpose of the matrix w, else None."""
    found = permutation(node)
    return found[0] if found is not None and found[1] == (1, 0) else None


def is_returned(node: fx.Node) -> bool:
    """True where the program returns the node itself."""
    return any(user.op == "output" for user in node.users)
