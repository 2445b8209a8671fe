"""Regions about rows: norms, rotations and quantization by token, with the pointwise work before them."""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphopt.backends.cuda import operators
from graphopt.backends.cuda.arithmetic import Float16
from graphopt.backends.cuda.operands import pack_signs
from graphopt.backends.cuda.partition.pointwise import MOST_OPERANDS, Pointwise, pointwise, same_shape
from graphopt.backends.cuda.plan import RowPlan, plan_text
from graphopt.ir import Program, Rewriter, arguments, operator

_NORMS = {"rms_norm": "rms", "layer_norm": "layer"}
_SYMMETRIC_RATIO = 255 / 127  # of the largest magnitude, spread over all codes, to one side of them


@dataclass(frozen=True)
class _Quantized:
    """A `quantize` by token whose scale is of what it quantizes.

    Attributes:
        x: what is quantized. nodes: what computes scale and zero point. scale, zero_point: the nodes that give them.
        format: int8 or uint8.
    """

    x: fx.Node
    nodes: tuple[fx.Node, ...]
    scale: fx.Node
    zero_point: fx.Node | None
    format: str


def _quantized_by_token(node: fx.Node) -> _Quantized | None:
    """Return what a `quantize` does where a row kernel can do it."""
    named = arguments(node)
    x, scale, zero = named["x"], named["scale"], named["zero_point"]
    if named["format"] not in ("int8", "uint8") or not _by_token(named, x):
        return None
    if zero is None:
        return _symmetric(x, scale, named["format"])
    source = scale.args[0] if operator(scale) == "getitem" else None
    if operator(source) != "graphopt.dynamic_scale" or operator(zero) != "getitem" or zero.args[0] is not source:
        return None
    own = arguments(source)
    if own["x"] is not x or own["format"] != named["format"] or not _by_token(own, x):
        return None
    return _Quantized(x, (source, scale, zero), scale, zero, named["format"])


def _symmetric(x: fx.Node, scale: fx.Node, format: str) -> _Quantized | None:
    """Match dynamic_scale(abs(x))[0] · 255/127, the scale of the largest magnitude."""
    named = arguments(scale) if operator(scale) == "mul" else {}
    part = named.get("self")
    ratio = named.get("other")
    if format != "int8" or not isinstance(ratio, float) or abs(ratio - _SYMMETRIC_RATIO) > 1e-9:
        return None
    source = part.args[0] if isinstance(part, fx.Node) and operator(part) == "getitem" else None
    if not isinstance(source, fx.Node) or operator(source) != "graphopt.dynamic_scale":
        return None
    if not _by_token(arguments(source), x):
        return None
    size = arguments(source)["x"]
    if operator(size) != "abs" or arguments(size)["self"] is not x or arguments(source)["format"] != format:
        return None
    return _Quantized(x, (size, source, cast(fx.Node, part), scale), scale, None, format)


def _by_token(named: Mapping[str, Any], x: fx.Node) -> bool:
    return named["group_size"] == -1 and named["axis"] in (-1, x.meta["val"].dim() - 1)


class Rows:
    """Finds the rows of a program that kernels compute, and replaces them."""

    def __init__(self, rewriter: Rewriter, dtype: Float16) -> None:
        self.rewriter, self.dtype = rewriter, dtype
        self.program = rewriter.program

    def rewrite(self) -> None:
        """Replace them all; what is left is declined with its reason."""
        # From the end: a region takes what stands before it.
        for node in reversed(list(self.program.graph.nodes)):
            if node._erased or node.op != "call_function" or not node.users:
                continue
            if operator(node) == "graphopt.quantize":
                if (quantized := _quantized_by_token(node)) is not None:
                    self._write(_Row(self.program, self.dtype, node, quantized))
            elif operator(node) == "graphopt.hadamard" or operator(node) in _NORMS:
                self._write(_Row(self.program, self.dtype, node, None))
            self.rewriter.sweep()

    def _write(self, row: _Row) -> None:
        plan = row.plan()
        if isinstance(plan, str):
            self.rewriter.decline(row.anchor, plan)
            return
        signs = None
        if row.minus is not None:
            packed = torch.from_numpy(pack_signs(np.tile(row.minus, plan.n // len(row.minus))))
            signs = self.rewriter.weight(packed, f"{row.anchor.name}_signs", torch.uint8)
        # Everything that the region reads stands before all of its nodes, and all that read it behind them.
        place = min(row.inside)
        operands = [row.operands[name] for name in plan.inputs]
        result = self.rewriter.insert(
            operators.ROWS, operands, signs, plan_text(plan), before=place, origin=[row.anchor]
        )
        for i, old in enumerate(row.results):
            new = self.rewriter.insert(python_operator.getitem, result, i, before=place, origin=[old])
            self.rewriter.replace(old, new)
        self.rewriter.touch(row.anchor, _told(plan))


class _Row:
    """A region that ends at `anchor`.

    Attributes:
        inside: its nodes. operands: what it reads, by name. minus: which signs of a rotation are minus.
        results: the nodes that it gives, in the order of the kernel's outputs.
    """

    def __init__(self, program: Program, dtype: Float16, anchor: fx.Node, quantized: _Quantized | None) -> None:
        self.program, self.anchor = program, anchor
        self.inside: set[fx.Node] = {anchor, *(quantized.nodes if quantized else ())}
        self.minus: NDArray[np.bool_] | None = None
        self.results = [anchor]
        self._fields: dict[str, Any] = {"dtype": dtype}
        self._tail, self._affine = Pointwise(""), Pointwise("x")
        current = anchor
        if quantized is not None:
            zeros = [] if quantized.zero_point is None else [quantized.zero_point]
            self.results += [quantized.scale, *zeros]
            self._fields |= {"output": quantized.format, "zero_points": bool(zeros)}
            current = quantized.x
        if operator(current) == "graphopt.hadamard" and self._free(current):
            current = self._rotation(current)
        if operator(current) in _NORMS and self._free(current):
            current = self._norm(current)
        self._refusal = ""
        if current is anchor:  # nothing of it can be done here
            rotation = operator(anchor) == "graphopt.hadamard"
            self._refusal = (
                "the order of its rotation is no power of two" if rotation else "it normalizes over several axes"
            )
        self._prologue(current)

    @property
    def operands(self) -> dict[str, fx.Node]:
        return self._tail.operands

    def plan(self) -> RowPlan | str:
        """Return the plan, or why there is none."""
        if self._refusal:
            return self._refusal
        val = self.operands["in0"].meta["val"]
        n = val.shape[-1] if val.dim() else None
        if not isinstance(n, int):
            return "the size of its rows is not known"
        reason = ""
        for per_thread in _per_thread(n, self._fields.get("block", 0)):
            try:
                return RowPlan(n, per_thread=per_thread, **self._fields)
            except ValueError as error:
                reason = str(error)
        return reason

    def _free(self, node: fx.Node) -> bool:
        """Whether nobody outside reads the node: it need not be written."""
        return node is self.anchor or all(user in self.inside for user in node.users)

    def _rotation(self, node: fx.Node) -> fx.Node:
        named = arguments(node)
        signs, block = named["signs"], named["block"] or node.meta["val"].shape[-1]
        fits = named["small"] is None and isinstance(block, int) and block & (block - 1) == 0
        if not fits or (signs is not None and signs.op != "get_attr"):
            return node
        self._fields |= {"block": block, "signs": signs is not None, "transpose": named["transpose"]}
        if signs is not None:
            self.minus = (self.program.weight(signs) < 0).numpy(force=True)
        self.inside.add(node)
        x: fx.Node = named["x"]
        return x

    def _norm(self, node: fx.Node) -> fx.Node:
        named, val = arguments(node), node.meta["val"]
        vectors = [named["weight"], named.get("bias")]
        if len(named["normalized_shape"]) != 1 or any(each is not None and each.op != "get_attr" for each in vectors):
            return node
        weight, bias = (None if each is None else self._affine.operand(each, val.shape) for each in vectors)
        if weight and bias:
            self._affine.text = f"fma(x, {weight}, {bias})"
        elif weight or bias:
            self._affine.text = f"mul(x, {weight})" if weight else f"add(x, {bias})"
        # Without one, rms_norm takes that of its type: as the program has it, not as the kernel reads it.
        eps = float(torch.finfo(val.dtype).eps if named["eps"] is None else named["eps"])
        self._fields |= {"norm": _NORMS[operator(node)], "eps": eps, "affine": self._affine.text}
        self.inside.add(node)
        x: fx.Node = named["input"]
        return x

    def _prologue(self, node: fx.Node) -> None:
        """Take along the pointwise operators that end in what the region reads."""
        self._tail = Pointwise("", dict(self._affine.operands))
        shape = node.meta["val"].shape
        text = self._expression(node, shape) if node is not self.anchor else None
        if text is None:
            name = self._tail.operand(node, shape)
            assert name is not None, node
            self._fields["prologue"] = name
        else:
            # What is read elsewhere too is computed here once, and rounded as it is stored.
            keep = not self._free(node)
            self.inside.add(node)
            self._fields |= {"prologue": f"round({text})" if keep else text, "keep": keep}
            if keep:
                self.results.insert(0, node)
        if "in0" not in self._tail.operands:  # an expression of vectors alone
            self._tail.operands["in0"] = node

    def _expression(self, node: fx.Node, shape: Any) -> str | None:
        """Return a pointwise node as text over operands, which are noted; None where it is no such thing."""
        form = pointwise(node)
        if form is None or not same_shape(node.meta["val"].shape, shape):
            return None
        before = dict(self._tail.operands)
        texts = []
        for each in form[1]:
            inner = isinstance(each, fx.Node) and all(user is node for user in each.users)
            text = self._expression(each, shape) if inner else None
            text = self._tail.operand(each, shape) if text is None else text
            if text is None or len(self._tail.operands) > MOST_OPERANDS:
                self._tail.operands = before
                return None
            texts.append(text)
        return form[0].format(*texts)


def _per_thread(n: int, block: int) -> list[int]:
    """Return how many elements a thread may hold, the first choice first."""
    if block:
        first = 16 if block <= 1 << 10 else 32 if block <= 1 << 12 else 64
        return [first, *(each for each in (8, 16, 32, 64) if each != first)]
    width = math.gcd(n, 8)
    # As many threads as loads, up to eight warps; then more loads each.
    return [width * repeats for repeats in (1, 2, 4, 8) if n <= width * repeats * (256 if repeats < 8 else 1024)] or [
        64
    ]


def _told(plan: RowPlan) -> str:
    steps = [
        "" if plan.prologue == "in0" else plan.prologue,
        "" if plan.norm == "none" else f"{plan.norm} norm",
        "" if plan.affine == "x" else plan.affine,
        f"rotation by {plan.block}" if plan.block else "",
        "" if plan.output == "half" else f"{plan.output} by token",
    ]
    return f"row kernel: {', '.join(step for step in steps if step)}"
