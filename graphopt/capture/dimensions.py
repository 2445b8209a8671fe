"""The names that users give to symbolic dimensions: `Dim("batch")`, which torch.export turns into `s58`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import AdditionalInputs, Dim, ShapesCollection
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError, first_line
from graphopt.ir.program import Program, fake_value


def written_out(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], dynamic_shapes: Any) -> Any:
    """Return dynamic shapes as plain data; torch's collections hold on to the very tensors of the call."""
    if isinstance(dynamic_shapes, AdditionalInputs | ShapesCollection):
        try:
            return dynamic_shapes.dynamic_shapes(model, *call)  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever torch's own checks raise
            raise GraphoptError(f"dynamic_shapes does not fit the example inputs: {first_line(error)}") from error
    return dynamic_shapes


def dimension_names(program: Program, dynamic_shapes: Any) -> dict[str, str]:
    """Return `symbol -> name` for every dimension that `dynamic_shapes`, written out, gives by name.

    `Dim.AUTO` and dimensions derived from others have no name of their own, and what was traced as a constant has no
    symbol.
    """
    signature = program.signature
    args, kwargs = pytree.tree_unflatten([fake_value(node) for node in program.placeholders], signature.in_spec)
    given = dict(zip(signature.parameters, args, strict=False)) | kwargs
    names: dict[str, str] = {}
    for size, dim in _pairs(given, dynamic_shapes):
        if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
            names.setdefault(str(size.node.expr), dim.__name__)
    return names


def _pairs(value: Any, shapes: Any) -> Iterator[tuple[Any, Dim]]:
    """Walk values and their shapes side by side; yield each dimension that has a name."""
    if isinstance(value, Tensor):
        entries = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes or ())
        for axis, dim in entries:
            if isinstance(dim, Dim):
                yield value.shape[axis], dim
    elif isinstance(value, Mapping) and isinstance(shapes, Mapping):
        for key in value:
            yield from _pairs(value[key], shapes.get(key))
    elif shapes is not None and not pytree.tree_is_leaf(value):
        children = list(value.values()) if isinstance(value, Mapping) else _children(value)
        specs = list(shapes.values()) if isinstance(shapes, Mapping) else _children(shapes)
        for child, spec in zip(children, specs, strict=False):
            yield from _pairs(child, spec)


def _children(tree: Any) -> list[Any]:
    """Return what is one level below."""
    return list(pytree.tree_flatten(tree, is_leaf=lambda each: each is not tree)[0])
