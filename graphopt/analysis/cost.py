"""Cost of a program by counting: bytes of weights and multiply-accumulates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.arguments import arguments, operator
from graphopt.ir.program import Program


def parameter_bytes(program: Program) -> int:
    """Return the bytes of all weights, one storage element a value (codes are not packed here)."""
    return sum(weight.numel() * weight.element_size() for weight in program.weights.values())


def macs(program: Program) -> int:
    """Return multiply-accumulates of convolutions and matrix products; symbolic sizes count as in the example."""
    return sum(node_macs(node) for node in program.graph.nodes if node.op == "call_function")


def node_macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of one call; zero for operators that are not products."""
    name = operator(node)
    if name.startswith("conv_transpose"):
        weight = _shape(arguments(node)["weight"])  # [in, out / groups, *kernel]
        return math.prod(_shape(arguments(node)["input"])) * math.prod(weight[1:])
    if name in ("conv1d", "conv2d", "conv3d", "convolution"):
        weight = _shape(arguments(node)["weight"])  # [out, in / groups, *kernel]
        return math.prod(_shape(node)) * math.prod(weight[1:])
    if name == "linear":
        return math.prod(_shape(node)) * _shape(arguments(node)["weight"])[-1]
    if name in ("mm", "bmm", "matmul"):
        return math.prod(_shape(node)) * _shape(node.args[0])[-1]
    if name in ("addmm", "baddbmm"):
        return math.prod(_shape(node)) * _shape(node.args[1])[-1]
    if name == "scaled_dot_product_attention":
        query, key, value = (_shape(arguments(node)[key]) for key in ("query", "key", "value"))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def _shape(node: Any) -> list[int]:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return [size_hint(size) for size in value.shape]


def size_hint(size: int | torch.SymInt) -> int:
    """Return a dimension as the example had it."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1
