"""Retyping: the same program over another floating-point type.

Real semantics, the meaning an exact pass must keep, is approximated by float64: every floating weight, input, cast and
`dtype=` argument becomes float64 (every complex one complex128), so that two programs which are equal over the reals
agree to about 1e-15. Integers, codes and masks stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.ir.arguments import arguments, operator, positional
from graphopt.ir.program import Program

# Factories without a dtype argument make the default type; in a retyped program they must make the new one.
_FACTORIES = frozenset(
    {"full", "zeros", "ones", "arange", "scalar_tensor", "rand", "randn", "empty", "linspace", "eye"}
)
_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64, torch.float16: torch.complex32}


def retype(program: Program, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None) -> Program:
    """Return `program` with every floating type replaced by `dtype`; `weights` overrides values by name.

    The result is for running: its abstract values still show the old types.
    """
    overrides = weights or {}
    twin = program.map_weights(lambda name, weight: retype_value(overrides.get(name, weight), dtype).detach())
    _retype_calls(twin, dtype)
    args, kwargs = program.example_inputs
    twin.example_inputs = retype_tree((args, kwargs), dtype)
    return twin


class Retyped(fx.Interpreter):
    """Runs a program over another floating type, converting each weight when it is read and dropping it after use.

    Equal to running `retype(program, dtype, weights)`, in the memory of one layer instead of a second model.
    """

    def __init__(
        self, program: Program, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None, keep: bool = False
    ) -> None:
        twin = program.clone()
        _retype_calls(twin, dtype)
        _read_late(twin.graph)
        super().__init__(twin.graph_module, garbage_collect_values=not keep)
        self._dtype, self._overrides = dtype, weights or {}

    def outputs(self, flat_inputs: list[Any]) -> list[Any]:
        """Run without gradients on flat inputs, converted too, and return flat outputs."""
        with torch.no_grad():
            return list(self.run(*(retype_value(value, self._dtype) for value in flat_inputs)))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self._overrides.get(str(target))
        return retype_value(super().get_attr(target, args, kwargs) if value is None else value, self._dtype)


def _read_late(graph: fx.Graph) -> None:
    """Move the reading of each weight before its first reader; it usually stands where the graph begins."""
    for node in graph.find_nodes(op="get_attr"):
        if node.users:
            min(node.users).prepend(node)


def _retype_calls(twin: Program, dtype: torch.dtype) -> None:
    for node in list(twin.graph.nodes):
        if node.op == "call_function":
            node.args, node.kwargs = retyped_arguments(node, dtype)
            if _makes_default_type(node):
                _widen(node, dtype)
    twin.graph_module.recompile()


def retype_value(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating or complex tensor in `dtype` or its complex counterpart, anything else as it is."""
    return value.to(_counterpart(value.dtype, dtype)) if isinstance(value, Tensor) else value


def retype_tree(tree: Any, dtype: torch.dtype) -> Any:
    """Apply `retype_value` to every leaf."""
    return pytree.tree_map(lambda value: retype_value(value, dtype), tree)


def retyped_arguments(node: fx.Node, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `(args, kwargs)` of a call with each floating or complex `dtype=` argument, implied ones too, replaced."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args, dict(node.kwargs)
    named = arguments(node)
    changes: dict[str, Any] = {
        name: _counterpart(value, dtype) for name, value in named.items() if isinstance(value, torch.dtype)
    }
    if operator(node) in _FACTORIES and named.get("dtype") is None and _is_inexact(node):
        changes["dtype"] = _counterpart(node.meta["val"].dtype, dtype)
    if all(named.get(name) == value for name, value in changes.items()):
        return node.args, dict(node.kwargs)
    return positional(node, changes)


def _counterpart(old: torch.dtype, new: torch.dtype) -> torch.dtype:
    if old.is_complex:
        return _COMPLEX.get(new, torch.complex64)
    return new if old.is_floating_point else old


def _is_inexact(node: fx.Node) -> bool:
    value = node.meta.get("val")
    tensors = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex()) for each in tensors)


def _makes_default_type(node: fx.Node) -> bool:
    """True for an operator that turns integers into floats of torch's default type: `div`, `sqrt`, `mul` by 0.5."""
    if not isinstance(node.target, torch._ops.OpOverload) or operator(node) in _FACTORIES:
        return False
    if arguments(node).get("dtype") is not None or not isinstance(node.meta.get("val"), Tensor):
        return False
    return _is_inexact(node) and not any(_is_inexact(source) for source in node.all_input_nodes)


def _widen(node: fx.Node, dtype: torch.dtype) -> None:
    """Let an operator that makes the default type compute in `dtype`.

    Its operands are cast, or, where they may not be (`where(mask, 0.1, 0.0)`), its result, which then holds constants
    rounded to the default type; they are the same before and after any pass.
    """
    cast = torch.ops.aten._to_copy.default
    if operator(node) == "where":
        with node.graph.inserting_after(node):
            wide = node.graph.call_function(cast, (node,), {"dtype": dtype})
        wide.meta = dict(node.meta)
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
        return
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("val"), Tensor):
            with node.graph.inserting_before(node):
                wide = node.graph.call_function(cast, (source,), {"dtype": dtype})
            wide.meta = dict(source.meta) | {"val": source.meta["val"].to(dtype)}
            node.replace_input_with(source, wide)
