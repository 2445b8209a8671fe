"""What could be done about a site: the quantized program with that one place changed, to be run before it is advised.

    keep float       the site reads what it reads in the reference, in floating point
    wider weights    its weights in eight bits by channel, where they have fewer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.numerics.fit import dequantize_of
from graphopt.analysis.numerics.sites import Noise
from graphopt.ir.arguments import arguments, operator
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.quantization.grids import grid, integer_grid
from graphopt.quantization.weights import dequantized, quantize_weight

_WIDE = "int8"
_PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d")


def with_float(reference: Program, quantized: Program, site: str) -> Program | None:
    """Return the program with one site as in the reference; None where what it reads there is not in the program."""
    program = quantized.clone()
    there, here = _named(reference, site), _named(program, site)
    rewriter = Rewriter(program, "keep_float")
    given = {node.name: node for node in program.graph.nodes if node.op in ("placeholder", "call_function")}
    mapped: dict[fx.Node, fx.Node] = {}
    for old in there.all_input_nodes:
        new = _weight_of(reference, old, rewriter) if old.op == "get_attr" else given.get(old.name)
        if new is None or (new.op == "call_function" and new.target != old.target):
            return None
        mapped[old] = new
    named = fx.node.map_arg(arguments(there), lambda each: mapped[each])
    rewriter.rewire(here, **named)
    rewriter.finish()
    return program


def with_wider_weights(reference: Program, quantized: Program, site: str) -> Program | None:
    """Return the program with the weights of one product in eight bits; None where they have these, or are float."""
    there, here = _named(reference, site), _named(quantized, site)
    if operator(here) not in _PRODUCTS:
        return None
    old, codes = arguments(there)["weight"], dequantize_of(arguments(here)["weight"])
    if old.op != "get_attr" or codes is None or grid(str(arguments(codes)["format"])).bits >= 8:
        return None
    program = quantized.clone()
    here = _named(program, site)
    rewriter = Rewriter(program, "wider_weights")
    source = _weight_of(reference, old, rewriter)
    wide = integer_grid(_WIDE)
    weight = quantize_weight(rewriter, source, wide, 0)
    rewriter.rewire(here, weight=dequantized(rewriter, weight, 0, wide, here))
    rewriter.finish()
    return program


def output_noise(program: Program, exact: list[list[Any]], batches: list[list[Any]]) -> Noise:
    """Return the noise of all floating outputs beside the reference's, one list of them for each batch."""
    noise = Noise()
    with torch.no_grad():
        for flat, wanted in zip(batches, exact, strict=True):
            for made, each in zip(program.run(flat), wanted, strict=True):
                noise.add(made, each)
    return noise


def _named(program: Program, name: str) -> fx.Node:
    found: fx.Node = next(node for node in program.graph.nodes if node.name == name)
    return found


def _weight_of(reference: Program, node: fx.Node, rewriter: Rewriter) -> fx.Node:
    """Return the node that reads a weight of the reference in the program that is rewritten."""
    name, value = str(node.target), reference.weight(node)
    for each in rewriter.graph.nodes:
        if each.op == "get_attr" and each.target == name and _equal(rewriter.program.weight(each), value):
            return each  # type: ignore[no-any-return]
    return rewriter.weight(value, name, value.dtype)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))
