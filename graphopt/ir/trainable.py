"""Make a quantized Program trainable: float masters and straight-through gradients in the place of integer codes.

    dequantize(quantize(x, s, z), s, z)              ->  fake_quantize(x, s, z)
    dequantize(codes, s, z)                          ->  fake_quantize(master, s, z)    master = dequantize(codes, s, z)
    dequantize(embedding(codes, i), embedding(s, i)) ->  embedding(fake_quantize(master, s), i)
    dequantize(int32 codes, s, z)                    ->  master      a bias: its grid is as fine as float32

Masters, and scales that are weights, become Parameters. The outputs stay the given program's. A dynamic scale is
computed from x as before and is a constant to the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir import dialect
from graphopt.ir.arguments import arguments, operator
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.quantization.grids import grid

_PARAMETERS = ("scale", "zero_point", "axis", "group_size", "format")


def trainable(program: Program) -> Program:
    """Return a program with the same outputs whose weights and scales are Parameters that gradients reach.

    Every floating Parameter, master and scale is a copy that requires gradients, so training leaves `program` as it is.
    Where codes come from neither a weight, a table nor a `quantize` with the same parameters, and where they are places
    in a codebook, they stay, and a note of the result says so.
    """
    restorer = _Restorer(program.clone())
    for node in [node for node in restorer.program.graph.nodes if operator(node) == "graphopt.dequantize"]:
        if not (restorer.activation(node) or restorer.weight(node)):
            restorer.program.notes.append(f"{node.name} stays as it is in training: {_why_not(node)}")
    restorer.rewriter.finish()
    learned = {str(node.target) for node in restorer.learned if not node._erased}
    return restorer.program.map_weights(lambda name, weight: _parameter(weight, name in learned))


def _parameter(weight: Tensor, learned: bool) -> Tensor:
    if not weight.is_floating_point() or not (learned or isinstance(weight, nn.Parameter)):
        return weight
    return nn.Parameter(weight.detach().clone(), requires_grad=True)


class _Restorer:
    """Replaces one `dequantize` after the other; equal ones share the replacement, tied ones the master."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.rewriter = Rewriter(program, "trainable")
        self.learned: dict[fx.Node, None] = {}
        self._masters: dict[fx.Node, list[fx.Node]] = {}
        self._fakes: dict[tuple[Any, ...], fx.Node] = {}

    def activation(self, node: fx.Node) -> bool:
        """Replace `node` where it undoes a `quantize` with its own parameters."""
        named, codes = arguments(node), arguments(node)["codes"]
        if operator(codes) != "graphopt.quantize":
            return False
        made = arguments(codes)
        if any(made[key] is not named[key] and made[key] != named[key] for key in _PARAMETERS):
            return False
        if (codes,) not in self._fakes:
            # `dequantize` gives the scale's dtype, `fake_quantize` that of x; between them no digit may be lost.
            types = made["x"].meta["val"].dtype, made["scale"].meta["val"].dtype
            x = self._cast(made["x"], torch.promote_types(*types), codes)
            parameters = [made[key] for key in _PARAMETERS]
            fake = self.rewriter.insert(dialect.fake_quantize, x, *parameters, before=codes)
            self._fakes[(codes,)] = self._cast(fake, types[1], codes)
            self._learn(made["scale"])
        self.rewriter.replace(node, self._fakes[(codes,)])
        return True

    def weight(self, node: fx.Node) -> bool:
        """Replace `node` where its codes are a weight, or rows of one."""
        named = arguments(node)
        if named["table"] is not None:
            return False
        look_up = operator(named["codes"]) == "embedding"
        parts = _tables(node) if look_up else [named["codes"], named["scale"], named["zero_point"]]
        if not all(part is None or part.op == "get_attr" for part in parts):
            return False
        axis = -1 if look_up else named["axis"]
        value = self._fake_weight(node, parts, axis, named["group_size"], named["format"])
        if look_up:
            given = arguments(named["codes"])
            rest = {key: given[key] for key in given if key not in ("weight", "indices")}
            table, indices = value, given["indices"]
            value = self.rewriter.insert(named["codes"].target, table, indices, before=node, **rest)
        self.rewriter.replace(node, value)
        return True

    def _fake_weight(self, node: fx.Node, parts: list[Any], axis: int, group_size: int, format: str) -> fx.Node:
        codes, scale, zero_point = parts
        key = (codes, scale, zero_point, axis, group_size, format)
        if key not in self._fakes:
            tensors = [None if part is None else self.program.weight(part).detach() for part in parts]
            master = self._master(codes, dialect.dequantize(*tensors, None, axis, group_size, format))
            self._fakes[key] = master
            if grid(format).bits <= 16:
                parameters = (scale, zero_point, axis, group_size, format)
                self._fakes[key] = self.rewriter.insert(
                    dialect.fake_quantize, master, *parameters, before=min(codes.users), origin=[node]
                )
                self._learn(scale)
        return self._fakes[key]

    def _master(self, codes: fx.Node, value: Tensor) -> fx.Node:
        known = self._masters.setdefault(codes, [])
        for master in known:
            stored = self.program.weight(master)
            if stored.dtype == value.dtype and torch.equal(stored, value):
                return master
        known.append(self.rewriter.weight(value, str(codes.target), value.dtype, codes))
        self._learn(known[-1])
        return known[-1]

    def _learn(self, weight: fx.Node) -> None:
        if weight.op == "get_attr":
            self.learned[weight] = None

    def _cast(self, node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        if node.meta["val"].dtype == dtype:
            return node
        return self.rewriter.insert(torch.ops.aten._to_copy.default, node, before=before, dtype=dtype)


def _why_not(node: fx.Node) -> str:
    named = arguments(node)
    if named["table"] is not None:
        return f"its codes are places in the codebook {named['table'].name}"
    return f"{named['codes'].name} is neither a weight nor a quantize like it"


def _tables(node: fx.Node) -> list[Any]:
    """Return the weights behind looked-up codes, scale and zero point, or [node], which is none, elsewhere.

    A table can be quantized before the look-up where each row's scale is looked up as the row is.
    """
    named = arguments(node)
    parts = [named["codes"], named["scale"], named["zero_point"]]
    calls = [arguments(part) for part in parts if operator(part) == "embedding"]
    by_row = named["group_size"] != 0 and named["axis"] in (-1, node.meta["val"].dim() - 1)
    same_rows = all(call["indices"] is calls[0]["indices"] for call in calls)
    if not by_row or not same_rows or any(part is not None and operator(part) != "embedding" for part in parts):
        return [node]
    return [None if part is None else arguments(part)["weight"] for part in parts]
