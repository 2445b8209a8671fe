"""A Program as text: one line a node, stable between runs, so that two texts can be compared line by line.

    program(x: f32[1, 3, 32, 32])
      stem.weight: f32[16, 3, 3, 3] #5c1f09ab
    {
      conv2d: f32[1, 16, 32, 32] = conv2d(x, @stem.weight, padding=[1, 1])                  # stem
      relu: f32[1, 16, 32, 32] = relu(conv2d)
      return relu
    }

Arguments that equal the operator's default are left out. A weight shows its shape, dtype and the first digits of a
digest of its bytes: it changes when and only when a value does.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from graphopt.ir.arguments import args_of, arguments, operator
from graphopt.ir.program import Program
from graphopt.ir.rewriter import module_path, provenance

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.uint16: "u16",
    torch.bool: "bool",
}  # fmt: skip
_DIGESTS: Any = WeakIdKeyDictionary()


def digest(tensor: Tensor) -> str:
    """Return eight hex digits of a hash of the tensor's bytes, in the order of its elements.

    Kept for the tensor until something is written to it in place, which training does and passes never do.
    """
    version = None if tensor.is_inference() else tensor._version
    written, known = _DIGESTS.get(tensor, (None, None))
    if known is None or written != version:
        data = tensor.detach().cpu().contiguous()
        raw = data.reshape(-1).view(torch.uint8) if data.numel() else data.to(torch.uint8)
        known = hashlib.blake2b(raw.numpy().data, digest_size=4).hexdigest()
        _DIGESTS[tensor] = version, known
    return str(known)


def type_text(value: Any) -> str:
    """Return `f32[1, s0, 8]` for a tensor, a tuple of these, or the plain value."""
    if isinstance(value, Tensor):
        shape = ", ".join(str(size) for size in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{shape}]"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(type_text(each) for each in value) + ")"
    return "none" if value is None else str(value)


def node_text(program: Program, node: fx.Node) -> str:
    """Return the line of one node."""
    if node.op == "placeholder":
        return f"{node.name}: {type_text(node.meta.get('val'))}"
    if node.op == "get_attr":
        try:
            return f"{node.target}: {type_text(program.weight(node))} #{digest(program.weight(node))}"
        except (AttributeError, TypeError):
            return f"{node.target}: missing"
    if node.op == "output":
        return "return " + ", ".join(_value(value) for value in node.args[0])  # type: ignore[union-attr]
    line = f"{node.name}: {type_text(node.meta.get('val'))} = {operator(node)}({_call(node)})"
    by = provenance(node)["by"]
    remark = " ".join(part for part in (module_path(node), f"[{by}]" if by else "") if part)
    return f"{line:<100}  # {remark}" if remark else line


def program_text(program: Program) -> str:
    """Return the whole program as text, ending in a newline."""
    lines = ["program(" + ", ".join(node_text(program, node) for node in program.placeholders) + ")"]
    weights = sorted((n for n in program.graph.nodes if n.op == "get_attr"), key=lambda n: _natural(str(n.target)))
    lines += ["  " + node_text(program, node) for node in weights]
    lines.append("{")
    lines += ["  " + node_text(program, n) for n in program.graph.nodes if n.op not in ("placeholder", "get_attr")]
    lines.append("}")
    return "\n".join(lines) + "\n"


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _call(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return ", ".join(_value(value) for value in node.args)
    named, parts, plain = arguments(node), [], True
    for argument in node.target._schema.arguments:
        if argument.name not in named:
            continue
        value = named[argument.name]
        if not _has_node(value) and argument.has_default_value() and value == argument.default_value:
            plain = False
            continue
        show_name = argument.kwarg_only or not plain or not (_has_node(value) or argument in args_of(node.target)[:2])
        parts.append(f"{argument.name}={_value(value)}" if show_name else _value(value))
    return ", ".join(parts)


def _has_node(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_node(each) for each in value)
    return isinstance(value, fx.Node)


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_value(each) for each in value) + "]"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)
