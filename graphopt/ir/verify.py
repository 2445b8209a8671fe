"""The verifier: what every Program obeys, between any two passes.

Functional operators only, every node with an abstract value that its operator confirms, weights as their nodes say, and
the outputs the model had. An error shows the node, its neighbours and the user's source line.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.exported import source_line
from graphopt.ir.printing import node_text
from graphopt.ir.program import Program


class VerificationError(AssertionError):
    """A pass broke the IR: a defect of the pass, not a mistake of the user."""


def verify(program: Program, reference: Program | None = None) -> None:
    """Check `program`; with a `reference` also that inputs and outputs kept their number, shapes and dtypes."""
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"the graph is malformed: {error}") from error
    seen: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "call_function":
            _check_call(program, node)
        elif node.op == "get_attr":
            if node.target in seen:
                _fail(program, node, f"weight {node.target} is read by two nodes; weights have one node each")
            seen.add(str(node.target))
            _check_weight(program, node)
        elif node.op not in ("placeholder", "output"):
            _fail(program, node, f"{node.op} has no place in a Program")
    if reference is not None:
        _check_interface(program, reference)


def _check_call(program: Program, node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            _fail(program, node, f"{target} mutates its input")
    elif isinstance(target, torch._ops.HigherOrderOperator) or not callable(target):
        _fail(program, node, f"{target} is no operator of a functional graph")
    if "val" not in node.meta:
        _fail(program, node, "it has no abstract value")
    for argument in node.all_input_nodes:
        if argument.op != "placeholder" and "val" not in argument.meta:
            _fail(program, node, f"its input {argument.name} has no abstract value")


def _check_weight(program: Program, node: fx.Node) -> None:
    try:
        weight = program.weight(node)
    except (AttributeError, TypeError):
        _fail(program, node, f"there is no weight called {node.target}")
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(weight.shape) or value.dtype != weight.dtype:
        _fail(program, node, f"weight {node.target} is {weight.dtype}{list(weight.shape)}, its node says {value}")


def _check_interface(program: Program, reference: Program) -> None:
    names = [node.name for node in program.placeholders]
    if names != [node.name for node in reference.placeholders]:
        raise VerificationError(f"the inputs changed: {names}")
    before, after = reference.outputs, program.outputs
    if len(before) != len(after):
        raise VerificationError(f"the program has {len(after)} outputs, it had {len(before)}")
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        was, now = _abstract(old), _abstract(new)
        if isinstance(was, Tensor) != isinstance(now, Tensor):
            raise VerificationError(f"output {index} is {now}, it was {was}")
        if isinstance(was, Tensor) and (was.dtype != now.dtype or was.dim() != now.dim() or not _same(was, now)):
            raise VerificationError(
                f"output {index} is {now.dtype}{list(now.shape)}, it was {was.dtype}{list(was.shape)}"
            )


def _same(was: Tensor, now: Tensor) -> bool:
    pairs = zip(was.shape, now.shape, strict=True)
    return all(not (isinstance(a, int) and isinstance(b, int)) or a == b for a, b in pairs)


def _abstract(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def _fail(program: Program, node: fx.Node, what: str) -> None:
    lines = [f"{node.name}: {what}"]
    nodes = list(program.graph.nodes)
    position = nodes.index(node)
    for neighbour in nodes[max(0, position - 2) : position + 3]:
        marker = "-> " if neighbour is node else "   "
        lines.append(marker + node_text(program, neighbour))
    if where := source_line(node):
        lines.append(f"   made by {where}")
    raise VerificationError("\n".join(lines))
