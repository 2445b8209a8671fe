"""Retyping: the same program over another floating-point type.

Real semantics, the meaning an exact pass must keep, is approximated by float64: every floating weight, input, cast and
`dtype=` argument becomes float64, so that two programs which are equal over the reals agree to about 1e-15.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.arguments import arguments, positional
from graphopt.ir.program import Program

# Factories without a dtype argument make the default type; in a retyped program they must make the new one.
_FACTORIES = {"full", "zeros", "ones", "arange", "scalar_tensor", "rand", "randn", "empty", "linspace", "eye"}


def retype(program: Program, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None) -> Program:
    """Return `program` with every floating type replaced by `dtype`; `weights` overrides values by name.

    The result is for running: its abstract values still show the old types.
    """
    overrides = weights or {}
    twin = program.map_weights(lambda name, weight: retype_value(overrides.get(name, weight), dtype).detach())
    for node in twin.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = retyped_arguments(node, dtype)
    twin.graph_module.recompile()
    args, kwargs = program.example_inputs
    twin.example_inputs = retype_tree((args, kwargs), dtype)
    return twin


def retype_value(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating tensor in `dtype`, anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def retype_tree(tree: Any, dtype: torch.dtype) -> Any:
    """Apply `retype_value` to every leaf."""
    return torch.utils._pytree.tree_map(lambda value: retype_value(value, dtype), tree)


def retyped_arguments(node: fx.Node, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `(args, kwargs)` of a call with every floating `dtype=` argument, also an implied one, replaced by `dtype`."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args, dict(node.kwargs)
    named = arguments(node)
    changes: dict[str, Any] = {
        name: dtype for name, value in named.items() if isinstance(value, torch.dtype) and value.is_floating_point
    }
    value = node.meta.get("val")
    name = node.target._schema.name.removeprefix("aten::")
    if name in _FACTORIES and named.get("dtype") is None and isinstance(value, Tensor) and value.is_floating_point():
        changes["dtype"] = dtype
    return positional(node, changes) if changes else (node.args, dict(node.kwargs))
