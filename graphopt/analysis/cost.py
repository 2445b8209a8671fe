"""Cost of a program by counting: elements, bits and bytes of weights, and multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.arguments import arguments, operator
from graphopt.ir.hadamard import split, stages
from graphopt.ir.program import Program
from graphopt.quantization.grids import grid

# A tensor that only passes through these holds the same values afterwards.
_MOVES_DATA = frozenset(
    (
        "alias", "clone", "contiguous", "detach", "embedding", "expand", "flatten", "gather", "index", "index_select",
        "permute", "reshape", "select", "slice", "squeeze", "t", "transpose", "unflatten", "unsqueeze", "view",
    )
)  # fmt: skip
_DIALECT = frozenset(("graphopt.quantize", "graphopt.dequantize", "graphopt.fake_quantize"))


def parameter_bytes(program: Program) -> int:
    """Return the bytes of all weights, one storage element a value (codes are not packed here)."""
    return sum(weight.numel() * weight.element_size() for weight in program.weights.values())


def parameters(program: Program) -> int:
    """Return the number of weight elements; scales, zero points and tables of quantized tensors are not counted."""
    count = 0
    for node, weight in _weights(program):
        roles = {role for role, _ in _roles(node)}
        if not roles or not roles <= {"scale", "zero_point", "table"}:
            count += weight.numel()
    return count


def file_bytes(program: Program, code_bits: Sequence[int]) -> float:
    """Return the bytes of all weights in a file whose codes take one of some sizes in bits (`Target.code_bits`)."""
    total = 0.0
    for node, weight in _weights(program):
        roles, each = _roles(node), 8.0 * weight.element_size()
        if roles and all(role in ("codes", "zero_point") for role, _ in roles):
            needed = max(grid(name).bits for _, name in roles)
            each = min([each, *(bits for bits in code_bits if bits >= needed)])
        total += weight.numel() * each / 8
    return total


def resources(program: Program) -> dict[str, float]:
    """Return what a program costs of everything that is counted, by the name under which a search knows it."""
    return {
        "bits": weight_bits(program),
        "size_bytes": float(parameter_bytes(program)),
        "macs": float(macs(program)),
        "parameters": float(parameters(program)),
    }


def resources_of(program: Program, names: Collection[str]) -> dict[str, float]:
    """Return what some weights cost of `bits` and `size_bytes`, as `resources` counts them."""
    found = [(node, weight) for node, weight in _weights(program) if node.target in names]
    return {
        "bits": sum(weight.numel() * _bits_each(weight, _roles(node)) for node, weight in found),
        "size_bytes": float(sum(weight.numel() * weight.element_size() for _, weight in found)),
    }


def weight_bits(program: Program) -> float:
    """Return the bits of all weights once packed.

    Codes and zero points count the bits of their grid, whatever stores them here. A scale counts what its format has
    for one; other scales and tables count 16 bits where float16 holds every one of them exactly, like floats else those
    of their dtype.
    """
    return sum(weight.numel() * _bits_each(weight, _roles(node)) for node, weight in _weights(program))


def _bits_each(weight: Tensor, roles: list[tuple[str, str]]) -> float:
    stored = 8 * weight.element_size()
    if not roles or any(role not in ("codes", "zero_point", "scale", "table") for role, _ in roles):
        return stored
    fixed = [grid(name).scale_bits for role, name in roles if role == "scale" and grid(name).scale_bits]
    coded = [grid(name).bits for role, name in roles if role in ("codes", "zero_point")]
    if coded or fixed:
        return min(stored, max([*coded, *fixed]))
    return 16 if stored > 16 and torch.equal(weight.to(torch.float16).to(weight.dtype), weight) else stored


def _weights(program: Program) -> list[tuple[fx.Node, Tensor]]:
    found = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    return [(node, program.weight(node)) for node in found.values()]


def _roles(weight: fx.Node) -> list[tuple[str, str]]:
    """Return (argument, format) of every dialect operator that reads the weight, maybe after data movement.

    Any other reader gives two empty strings.
    """
    roles, seen, queue = [], {weight}, [weight]
    while queue:
        node = queue.pop()
        for user in node.users:
            name = operator(user)
            if name in _DIALECT:
                named = arguments(user)
                roles += [(key, str(named["format"])) for key, value in named.items() if value is node]
            elif name not in _MOVES_DATA:
                roles.append(("", ""))
            elif user not in seen:
                seen.add(user)
                queue.append(user)
    return roles


def macs(program: Program) -> int:
    """Return multiply-accumulates of convolutions and matrix products, rotations among them.

    Symbolic sizes count as in the example.
    """
    return sum(node_macs(node) for node in program.graph.nodes if node.op == "call_function")


Shape = Callable[[Any], list[int]]  # the sizes of a node


def node_macs(node: fx.Node, shape: Shape | None = None) -> int:
    """Return the multiply-accumulates of one call; zero for operators that are not products.

    `shape` gives the sizes of a value where they are to be others than the program's.
    """
    shape = shape or shape_of
    name = operator(node)
    if name.startswith("conv_transpose"):
        weight = shape(arguments(node)["weight"])  # [in, out / groups, *kernel]
        return math.prod(shape(arguments(node)["input"])) * math.prod(weight[1:])
    if name in ("conv1d", "conv2d", "conv3d", "convolution"):
        weight = shape(arguments(node)["weight"])  # [out, in / groups, *kernel]
        return math.prod(shape(node)) * math.prod(weight[1:])
    if name == "linear":
        return math.prod(shape(node)) * shape(arguments(node)["weight"])[-1]
    if name in ("mm", "bmm", "matmul"):
        return math.prod(shape(node)) * shape(node.args[0])[-1]
    if name in ("addmm", "baddbmm"):
        return math.prod(shape(node)) * shape(node.args[1])[-1]
    if name == "scaled_dot_product_attention":
        query, key, value = (shape(arguments(node)[key]) for key in ("query", "key", "value"))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if name == "graphopt.hadamard":
        return math.prod(shape(node)) * _hadamard_macs(node)
    return 0


def _hadamard_macs(node: fx.Node) -> int:
    """Return the multiply-accumulates for one coordinate: the orders of the dense matrices of all stages."""
    named = arguments(node)
    x, small, signs = (named[key] and named[key].meta["val"] for key in ("x", "small", "signs"))
    _block, order, k = split(x, small, signs, named["block"])
    return sum(math.prod(group) for group in stages(order, k)[:-1]) + math.prod(stages(order, k)[-1]) * k


def shape_of(node: Any) -> list[int]:
    """Return the sizes of a node's tensor, symbolic ones as the example had them."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return [size_hint(size) for size in value.shape]


def size_hint(size: int | torch.SymInt) -> int:
    """Return a dimension as the example had it."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1
