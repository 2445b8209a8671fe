"""The verifier: what every Program obeys, between any two passes.

Functional operators only, every node with the abstract value that its operator gives, weights as their nodes say, and
the inputs and outputs the model had. An error shows the node, its neighbours and the user's source line.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from graphopt.errors import first_line
from graphopt.ir.abstract import UNKNOWABLE, abstract_value, fake_mode, same_type
from graphopt.ir.exported import source_line
from graphopt.ir.printing import node_text, type_text
from graphopt.ir.program import Program

# Functions on symbolic sizes; everything on tensors is a torch operator.
_SCALAR_MODULES = ("_operator", "builtins", "math", "torch", "torch.fx.experimental.sym_node")


class VerificationError(AssertionError):
    """A pass broke the IR: a defect of the pass, not a mistake of the user."""


def verify(program: Program, reference: Program | None = None) -> None:
    """Check `program`, and with a `reference` that the inputs and outputs are still its.

    The abstract value of every call is derived again and compared; with a `reference` only where the call or one of its
    inputs differs from the reference's node of the same name. Raises VerificationError.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"the graph is malformed: {error}") from error
    mode = fake_mode(program.graph)
    before = {node.name: node for node in reference.graph.nodes} if reference is not None else {}
    read: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "call_function":
            _check_call(program, node)
            if not _unchanged(node, before.get(node.name)):
                _check_value(program, node, mode)
        elif node.op == "get_attr":
            if node.target in read:
                _fail(program, node, f"weight {node.target} is read by two nodes; weights have one node each")
            read.add(str(node.target))
            _check_weight(program, node)
        elif node.op not in ("placeholder", "output"):
            _fail(program, node, f"{node.op} has no place in a Program")
    _check_no_stray_weights(program, read)
    if reference is not None:
        _check_interface(program, reference)


def _check_call(program: Program, node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            _fail(program, node, f"{target} mutates its input")
    elif getattr(target, "__module__", None) not in _SCALAR_MODULES:
        _fail(program, node, f"{target} is no operator of a functional graph")
    if "val" not in node.meta:
        _fail(program, node, "it has no abstract value")
    for argument in node.all_input_nodes:
        if "val" not in argument.meta:
            _fail(program, node, f"its input {argument.name} has no abstract value")


def _unchanged(node: fx.Node, before: fx.Node | None) -> bool:
    """True where the reference has the same call on inputs of the same abstract values (clones share these objects)."""
    if before is None or node.target != before.target or node.meta["val"] is not before.meta.get("val"):
        return False
    names = [fx.map_arg((each.args, each.kwargs), lambda n: n.name) for each in (node, before)]
    if names[0] != names[1]:
        return False
    pairs = zip(node.all_input_nodes, before.all_input_nodes, strict=True)
    return all(new.meta["val"] is old.meta.get("val") for new, old in pairs)


def _check_value(program: Program, node: fx.Node, mode: Any) -> None:
    if node.meta.get("unbacked_bindings"):
        return
    try:
        derived = abstract_value(mode, node)
    except UNKNOWABLE:
        return
    except Exception as error:
        _fail(program, node, f"its operator refuses its inputs: {first_line(error)}")
    if not same_type(node.meta["val"], derived):
        _fail(program, node, f"its operator gives {type_text(derived)}, the node says {type_text(node.meta['val'])}")


def _check_weight(program: Program, node: fx.Node) -> None:
    try:
        weight = program.weight(node)
    except (AttributeError, TypeError):
        _fail(program, node, f"there is no weight called {node.target}")
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not same_type(value, weight):
        _fail(program, node, f"weight {node.target} is {type_text(weight)}, its node says {type_text(value)}")


def _check_no_stray_weights(program: Program, read: set[str]) -> None:
    root = program.graph_module
    for group in (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)):
        for name, _ in group:
            if name not in read:
                raise VerificationError(f"no node reads the weight {name}; Rewriter.finish removes such weights")


def _check_interface(program: Program, reference: Program) -> None:
    if program.signature != reference.signature:
        raise VerificationError("the signature changed; a pass keeps the model's calling convention")
    names = [node.name for node in program.placeholders]
    if names != [node.name for node in reference.placeholders]:
        raise VerificationError(f"the inputs changed: {names}")
    for old, new in zip(reference.placeholders, program.placeholders, strict=True):
        was, now = old.meta.get("val"), new.meta.get("val")
        if not same_type(was, now):
            raise VerificationError(f"input {new.name} is {type_text(now)}, it was {type_text(was)}")
    before, after = reference.outputs, program.outputs
    if len(before) != len(after):
        raise VerificationError(f"the program has {len(after)} outputs, it had {len(before)}")
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        was, now = _abstract(old), _abstract(new)
        if not same_type(was, now):
            text = f"output {index} is {type_text(now)}, it was {type_text(was)}"
            if isinstance(new, fx.Node):
                _fail(program, new, text)
            raise VerificationError(text)


def _abstract(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def _fail(program: Program, node: fx.Node, what: str) -> NoReturn:
    lines = [f"{node.name}: {what}"]
    nodes = list(program.graph.nodes)
    position = nodes.index(node)
    for neighbour in nodes[max(0, position - 2) : position + 3]:
        marker = "-> " if neighbour is node else "   "
        lines.append(marker + node_text(program, neighbour))
    if where := source_line(node):
        lines.append(f"   made by {where}")
    raise VerificationError("\n".join(lines))
