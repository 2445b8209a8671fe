"""Abstract values: what an operator makes of its inputs' shapes and dtypes, without computing anything.

`meta["val"]` of a node holds a FakeTensor, a symbolic number, a constant, or a tuple of these. Passes, backends and
printing all read it, so it must say what the operator does: the Rewriter refreshes it, the verifier derives it again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true

# Operators whose result depends on values: nothing can be said about them from shapes alone.
UNKNOWABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
)
# A FakeTensorMode keeps a stack of what it shadows; two threads inside one mode would take each other's.
_LOCK = threading.RLock()


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """Return the mode that the graph's abstract values belong to, or a new one for a graph without any."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def abstract_value(mode: FakeTensorMode, node: fx.Node) -> Any:
    """Return what the call `node` gives for its inputs' abstract values.

    Raises what the operator raises on inputs it does not take, and one of `UNKNOWABLE` where shapes do not tell.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    # An operator asks of an open size what holds for the example's (is it 2, as another size is?). A size that was
    # opened stays open: what is asked here binds nobody.
    unbound = contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    with _LOCK, mode, unbound, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def fake_weight(mode: FakeTensorMode, weight: Tensor) -> Tensor:
    """Return the abstract value of a weight."""
    with _LOCK:
        return mode.from_tensor(weight, static_shapes=True)


def same_type(was: Any, now: Any, strides: bool = False) -> bool:
    """True where two abstract values agree in kind, dtype and shape (and strides, if asked).

    Two symbolic sizes agree unless they are known to differ: one size has many spellings.
    """
    if isinstance(was, Tensor) or isinstance(now, Tensor):
        if not (isinstance(was, Tensor) and isinstance(now, Tensor)):
            return False
        if was.dtype != now.dtype or not _same_sizes(was.shape, now.shape):
            return False
        return not strides or _same_sizes(was.stride(), now.stride())
    if isinstance(was, tuple | list) or isinstance(now, tuple | list):
        both = isinstance(was, tuple | list) and isinstance(now, tuple | list) and len(was) == len(now)
        return both and all(same_type(a, b, strides) for a, b in zip(was, now, strict=True))
    return _same_number(was, now)


def _same_sizes(was: Iterable[Any], now: Iterable[Any]) -> bool:
    was, now = tuple(was), tuple(now)
    return len(was) == len(now) and all(_same_number(a, b) for a, b in zip(was, now, strict=True))


def _same_number(was: Any, now: Any) -> bool:
    symbolic = torch.SymInt | torch.SymFloat | torch.SymBool
    if not isinstance(was, symbolic) and not isinstance(now, symbolic):
        return bool(type(was) is type(now) and (was == now or was != was))  # NaN is itself here
    if isinstance(was, symbolic) and isinstance(now, symbolic):
        a, b = was.node, now.node
        if a.expr == b.expr:
            return True
        return bool(a.hint is None or b.hint is None or a.hint == b.hint)
    return statically_known_true(was == now)


def refresh(graph: fx.Graph, mode: FakeTensorMode, rewired: Iterable[fx.Node]) -> list[fx.Node]:
    """Derive the abstract values of `rewired` and of all that follows from them again; return the nodes that changed.

    An operator that refuses its new inputs keeps its old value: the verifier finds and explains that.
    """
    suspects, changed = set(rewired), dict[fx.Node, None]()
    if not suspects:
        return []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node not in suspects and not any(source in changed for source in node.all_input_nodes):
            continue
        value = _derived(mode, node)
        if not same_type(node.meta.get("val"), value, strides=True):
            node.meta["val"] = value
            node.meta.pop("tensor_meta", None)
            changed[node] = None
    return list(changed)


def _derived(mode: FakeTensorMode, node: fx.Node) -> Any:
    if node.meta.get("unbacked_bindings"):
        return node.meta.get("val")  # running it again would make a new symbol for the same unknown size
    try:
        return abstract_value(mode, node)
    except Exception:
        return node.meta.get("val")
