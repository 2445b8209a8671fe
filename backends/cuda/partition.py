"""Which parts of a program become kernels: regions, each around one heavy operator, with the pointwise work about it.

    linear     linear(x, dequantize(codes, …))                  -> LinearPlan
               linear(dequantize(q, s, z), dequantize(…))       -> Int8Plan, where both are int8 and scales fit
               behind it: bias, activations, residual add; `act(linear(x)) * linear(x)` is one paired product
               beside it: linears that read the same x are merged
    row        rms_norm | layer_norm | hadamard | quantize by token, in this order, and the pointwise work before

A region that a kernel's plan refuses stays as it is, with the reason; so does everything else. The result computes what
the program did, up to roundings between the operators of a region, which are left out.
"""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphopt.analysis.cost import size_hint
from graphopt.backends.cuda import operators
from graphopt.backends.cuda.arithmetic import Float16
from graphopt.backends.cuda.expressions import renamed
from graphopt.backends.cuda.layouts import BITS, chunk_for
from graphopt.backends.cuda.operands import pack_int8, pack_linear, pack_signs, paired_rows
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, RowPlan, is_vector, plan_text, read_plan
from graphopt.ir import Changes, Program, Rewriter, arguments, is_floating, operator
from graphopt.quantization.grids import IntegerGrid, grid

_UNARY = {"relu", "sigmoid", "silu", "tanh", "neg", "abs", "exp", "sqrt", "erf"}
_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "maximum": "max", "minimum": "min"}
_NORMS = {"rms_norm": "rms", "layer_norm": "layer"}
_MOST_OPERANDS = 6  # of an expression
_SYMMETRIC_RATIO = 255 / 127  # of the largest magnitude, spread over all codes, to one side of them


def partition(program: Program, dtype: Float16) -> Changes:
    """Replace regions of `program` by kernels for activations in `dtype`; return what was done, what not, and why."""
    rewriter = Rewriter(program, "cuda")
    _Linears(rewriter, dtype).rewrite()
    _Rows(rewriter, dtype).rewrite()
    return rewriter.finish()


def products(program: Program) -> Iterator[tuple[LinearPlan | Int8Plan, int]]:
    """Yield (plan, tokens of the example) of each product that is a kernel."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in (operators.LINEAR, operators.INT8_LINEAR):
            shape = node.args[0].meta["val"].shape
            yield (
                cast(LinearPlan | Int8Plan, read_plan(node.args[-1])),
                math.prod(size_hint(each) for each in shape[:-1]),
            )


# Weights --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A weight [n, k] of few bits.

    Attributes:
        codes: [n, k], from 0. bits: 2, 3, 4 or 8. group: inputs that share a scale; 0: all.
        scale: [n, groups]. zero_point: [n, groups], or None where the middle code stands for zero.
        source: names of the tensors that it was read from.
    """

    codes: NDArray[np.uint8]
    bits: Literal[2, 3, 4, 8]
    group: int
    scale: NDArray[np.float32]
    zero_point: NDArray[np.uint8] | None
    source: tuple[str, ...] = ()

    @property
    def form(self) -> tuple[Any, ...]:
        """What weights must share to be multiplied by one kernel."""
        return self.codes.shape[1], self.bits, self.group, self.zero_point is None, self.half_scales

    @property
    def half_scales(self) -> bool:
        with np.errstate(over="ignore"):
            return bool((self.scale.astype(np.float16).astype(np.float32) == self.scale).all())

    @property
    def bytes(self) -> bool:
        """Whether it is int8 with a scale for each row, and no zero points."""
        return self.bits == 8 and self.group == 0 and self.zero_point is None


def quantized_weight(program: Program, node: object) -> Weight | str:
    """Return what a node gives as a weight of few bits, or why it is none."""
    if operator(node) != "graphopt.dequantize":
        return "its weight is not quantized"
    assert isinstance(node, fx.Node)
    named = arguments(node)
    parts = [named["codes"], named["scale"], named["zero_point"]]
    if any(isinstance(each, fx.Node) and each.op != "get_attr" for each in parts):
        return "its weight is computed"
    form = grid(named["format"])
    if not isinstance(form, IntegerGrid) or form.bits > 8:
        return f"there is no kernel for weights in {form.name} yet"
    codes = program.weight(parts[0])
    if codes.dim() != 2 or not codes.numel():
        return f"its weight has the shape {list(codes.shape)}"
    group, axis = int(named["group_size"]), int(named["axis"]) % 2
    scale, zero = program.weight(parts[1]).detach().float(), parts[2]
    by_row = _by_row(scale, codes, axis, group)
    if by_row is None:
        return f"its scales {list(scale.shape)} lie along its outputs"
    bits = cast(Literal[2, 3, 4, 8], next(width for width in BITS if width >= form.bits))
    offset = 1 << (bits - 1) if form.code_min < 0 else 0
    shift = np.full_like(by_row, offset)
    if zero is not None:
        found = _by_row(program.weight(zero).float(), codes, axis, group)
        assert found is not None
        shift = shift + found
    if (shift < 0).any() or (shift >= 1 << bits).any():
        return "a zero point is none of its codes"
    whole = codes.numpy(force=True).astype(np.int64) + offset
    group = 0 if by_row.shape[1] == 1 else group
    if not chunk_for(bits, group):
        return f"groups of {group} inputs fit no fragment of the tensor cores"
    middle = bool((shift == 1 << (bits - 1)).all())
    source = tuple(str(each.target) for each in parts if each is not None)
    return Weight(whole.astype(np.uint8), bits, group, by_row, None if middle else shift.astype(np.uint8), source)


def _by_row(values: Tensor, codes: Tensor, axis: int, group: int) -> NDArray[np.float32] | None:
    """Return scales or zero points as [n, groups], or None where they are no such thing."""
    n = codes.shape[0]
    if group == 0:
        if values.dim() == 0:
            return np.full((n, 1), float(values), np.float32)
        return values.numpy(force=True)[:, None] if axis == 0 else None
    if axis == 0:
        return None
    return np.ascontiguousarray(values.expand(n, -1).numpy(force=True))


# Pointwise expressions ------------------------------------------------------------------------------------------------


@dataclass
class Pointwise:
    """An expression, and the nodes that its names stand for: v0, … vectors, in0, … tensors of the whole shape."""

    text: str
    operands: dict[str, fx.Node] = field(default_factory=dict)

    def operand(self, value: object, shape: Any) -> str | None:
        """Return the text for something that an operator reads, or None where a kernel cannot read it so."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return repr(float(value)) if np.isfinite(value) else None
        if not is_floating(value):
            return None
        assert isinstance(value, fx.Node)
        own = value.meta["val"].shape
        if _same(own, shape):
            kind = "in"
        elif len(own) == 1 and _same(own, shape[-1:]):
            kind = "v"
        else:
            return None
        for name, node in self.operands.items():
            if node is value and name.startswith(kind):
                return name
        name = f"{kind}{sum(each.startswith(kind) for each in self.operands)}"
        self.operands[name] = value
        return name


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        isinstance(x, int) == isinstance(y, int) and str(x) == str(y) for x, y in zip(a, b, strict=True)
    )


def pointwise(node: fx.Node) -> tuple[str, list[Any]] | None:
    """Return (function, operands) of a pointwise operator that expressions know, or None.

    The function is a format: `silu({0})`, `add({0}, {1})`.
    """
    name = operator(node)
    if not is_floating(node):
        return None
    named = arguments(node)
    if name in _UNARY:
        return f"{name}({{0}})", [named["self"]]
    if name == "gelu":
        return ("gelu_tanh({0})" if named["approximate"] == "tanh" else "gelu({0})"), [named["self"]]
    if name in _BINARY:
        if named.get("alpha", 1) != 1 or named.get("rounding_mode") is not None:
            return None
        return f"{_BINARY[name]}({{0}}, {{1}})", [named["self"], named["other"]]
    if name in ("clamp", "hardtanh", "relu6"):
        low, high = (
            (0, 6)
            if name == "relu6"
            else (named[k] for k in (("min", "max") if name == "clamp" else ("min_val", "max_val")))
        )
        text = "{0}"
        text = text if low is None else f"max({text}, {float(low)!r})"
        return (text if high is None else f"min({text}, {float(high)!r})"), [named["self"]]
    return None


# Linears --------------------------------------------------------------------------------------------------------------


@dataclass
class _Linear:
    """A linear that a kernel can compute, with what it takes along.

    Attributes:
        node: the linear. weight: its weight. x: what it reads; for bytes the codes, with scale and zero_point.
        tail: what is computed of its sums; last: the node that gives the result.
        other: the linear whose sums are `acc2`.
    """

    node: fx.Node
    weight: Weight
    x: fx.Node
    tail: Pointwise
    last: fx.Node
    scale: fx.Node | None = None
    zero_point: fx.Node | None = None
    signed: bool = True
    other: _Linear | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What linears must share to be one product."""
        return self.x, self.scale, self.zero_point, self.weight.form


class _Linears:
    def __init__(self, rewriter: Rewriter, dtype: Float16) -> None:
        self.rewriter, self.dtype = rewriter, dtype
        self.program = rewriter.program
        self._taken: set[fx.Node] = set()  # pointwise operators that a linear takes along
        self._now: dict[fx.Node, fx.Node] = {}  # what a replaced node became
        self._packs: dict[tuple[Any, ...], dict[str, fx.Node]] = {}

    def rewrite(self) -> None:
        found: dict[fx.Node, _Linear] = {}
        for node in self.program.graph.nodes:
            if operator(node).startswith("conv"):
                self.rewriter.decline(node, "there is no kernel for convolutions yet")
            if operator(node) != "linear":
                continue
            made = self._candidate(node)
            if isinstance(made, str):
                self.rewriter.decline(node, made)
            else:
                found[node] = made
        for each in found.values():
            self._absorb(each)
        self._pair(found)
        for together in self._merged(found.values()):
            self._write(together)

    def _candidate(self, node: fx.Node) -> _Linear | str:
        named = arguments(node)
        x, bias = named["input"], named["bias"]
        weight = quantized_weight(self.program, named["weight"])
        if isinstance(weight, str):
            return weight
        if not is_floating(x) or not is_floating(node):
            return "it does not compute on floating-point numbers"
        if bias is not None and not is_floating(bias):
            return "its bias is not floating-point"
        tail = Pointwise("acc", {} if bias is None else {"v0": bias})
        if bias is not None:
            tail.text = "add(acc, v0)"
        made = _Linear(node, weight, x, tail, node)
        codes = _codes_by_token(x)
        if codes is not None and weight.bytes and weight.codes.shape[1] < 1 << 16:
            made.x, made.scale, made.zero_point, made.signed = codes
        return made

    def _absorb(self, linear: _Linear) -> None:
        """Take along the pointwise operators that are the only reader of what there is so far."""
        shape = linear.node.meta["val"].shape
        while len(linear.last.users) == 1:
            (user,) = linear.last.users
            form = pointwise(user)
            if form is None or user in self._taken or not _same(user.meta["val"].shape, shape):
                return
            taken = Pointwise("", dict(linear.tail.operands))
            texts = [linear.tail.text if each is linear.last else taken.operand(each, shape) for each in form[1]]
            if any(text is None for text in texts) or len(taken.operands) > _MOST_OPERANDS:
                return
            taken.text = form[0].format(*texts)
            linear.tail, linear.last = taken, user
            self._taken.add(user)

    def _pair(self, found: dict[fx.Node, _Linear]) -> None:
        """Make one product of two whose results meet in a pointwise operator, where nobody else reads the second's."""
        by_last = {each.last: each for each in found.values()}
        for first in list(found.values()):
            for name, node in list(first.tail.operands.items()):
                second = by_last.get(node)
                if second is None or second is first or first.other or second.other or second.node not in found:
                    continue
                fits = first.scale is None and first.key == second.key and len(first.weight.codes) % 8 == 0
                if not fits or len(node.users) > 1 or not name.startswith("in"):
                    continue
                if len(first.weight.codes) != len(second.weight.codes):
                    continue
                self._join(first, name, second)
                del found[second.node]

    @staticmethod
    def _join(first: _Linear, name: str, second: _Linear) -> None:
        """Let `first` compute what `second` does, in the place of its operand `name`."""
        left = {key: node for key, node in first.tail.operands.items() if key != name}
        operands: dict[str, fx.Node] = {}
        texts = []
        for tail, given, acc in ((first.tail, left, "acc"), (second.tail, second.tail.operands, "acc2")):
            new = {"acc": acc}
            for key, node in given.items():
                kind = "v" if is_vector(key) else "in"
                new[key] = f"{kind}{sum(each.startswith(kind) for each in operands)}"
                operands[new[key]] = node
            texts.append((tail.text, new))
        inner = renamed(texts[1][0], texts[1][1])
        text = renamed(texts[0][0], {**texts[0][1], name: inner})
        first.tail, first.other = Pointwise(text, operands), second

    def _merged(self, linears: Iterable[_Linear]) -> list[list[_Linear]]:
        """Return linears in groups that read the same x by weights of the same form and end in the same expression."""
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        groups: dict[Any, list[_Linear]] = {}
        for each in linears:
            alone = each.other is not None or any(not is_vector(name) for name in each.tail.operands)
            constant = all(node.op == "get_attr" for node in each.tail.operands.values())
            key = each.node if alone or not constant else (*each.key, each.tail.text)
            groups.setdefault(key, []).append(each)
        return [sorted(group, key=lambda each: order[each.node]) for group in groups.values()]

    def _write(self, together: list[_Linear]) -> None:
        first = together[0]
        weight = _stacked([each.weight for each in together])
        if first.other is not None:
            both = [first.weight, first.other.weight]
            weight = Weight(
                paired_rows(both[0].codes, both[1].codes), weight.bits, weight.group,
                paired_rows(both[0].scale, both[1].scale),
                None if both[0].zero_point is None or both[1].zero_point is None
                else paired_rows(both[0].zero_point, both[1].zero_point),
                ("paired", *both[0].source, *both[1].source),
            )  # fmt: skip
        n, k = weight.codes.shape
        try:
            if first.scale is not None:
                plan: Any = Int8Plan(
                    n, k, self.dtype, first.signed, first.zero_point is not None,
                    first.scale.meta["val"].dim() > 0, epilogue=first.tail.text,
                )  # fmt: skip
            else:
                plan = LinearPlan(
                    n, k, weight.bits, weight.group, weight.zero_point is not None, self.dtype,
                    "float16" if weight.half_scales else "float32", paired=first.other is not None,
                    epilogue=first.tail.text,
                )  # fmt: skip
        except ValueError as error:
            for each in together:
                self.rewriter.decline(each.node, str(error))
            return
        operands = self._operands(together, plan.inputs)
        result = self._insert(first, plan, weight, operands, before=first.node if len(together) > 1 else first.last)
        if len(together) == 1:
            self._replace(first.last, result)
        else:
            self._split(together, result)
        self._tell(together, plan)

    def _operands(self, together: list[_Linear], wanted: list[str]) -> list[fx.Node]:
        first = together[0]
        if len(together) == 1:
            operands = (first.tail.operands[name] for name in wanted)
            return [self._now.get(node, node) for node in operands]
        made = []
        for name in wanted:
            values = [self.program.weight(each.tail.operands[name]).detach() for each in together]
            made.append(self.rewriter.weight(torch.cat(values), f"{first.node.name}_{name}", values[0].dtype))
        return made

    def _insert(self, first: _Linear, plan: Any, weight: Weight, operands: list[fx.Node], before: fx.Node) -> fx.Node:
        name, origin, x = str(first.node.name), [first.node], self._now.get(first.x, first.x)
        if isinstance(plan, Int8Plan):
            codes = (weight.codes.astype(np.int16) - 128).astype(np.int8)
            packed = self._packed(
                name, ("bytes", plan.zero_points, *weight.source), lambda: pack_int8(plan, codes, weight.scale[:, 0])
            )
            return self.rewriter.insert(
                operators.INT8_LINEAR, x, first.scale, first.zero_point, packed["weights"], packed["scales"],
                packed.get("row_sums"), operands, plan_text(plan), before=before, origin=origin,
            )  # fmt: skip
        packed = self._packed(
            name, weight.source, lambda: pack_linear(plan, weight.codes, weight.scale, weight.zero_point)
        )
        return self.rewriter.insert(
            operators.LINEAR, x, packed["weights"], packed["scales"], packed.get("zeros"), operands,
            plan_text(plan), before=before, origin=origin,
        )  # fmt: skip

    def _packed(
        self, name: str, key: tuple[Any, ...], pack: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> dict[str, fx.Node]:
        """Return nodes of packed arrays, one set for all linears of the same weights."""
        if key not in self._packs:
            nodes = {}
            for part, array in pack().items():
                # torch computes on signed integers; the kernels read bits.
                words = torch.from_numpy(array.view(np.int32 if array.dtype.itemsize == 4 else np.int16))
                nodes[part] = self.rewriter.weight(words, f"{name}_{part}", words.dtype)
            self._packs[key] = nodes
        return self._packs[key]

    def _split(self, together: list[_Linear], result: fx.Node) -> None:
        sizes = [len(each.weight.codes) for each in together]
        first = together[0].node
        parts = self.rewriter.insert(torch.ops.aten.split_with_sizes.default, result, sizes, -1, before=first)
        for i, each in enumerate(together):
            part = self.rewriter.insert(python_operator.getitem, parts, i, before=first, origin=[each.node])
            self._replace(each.last, part)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        self.rewriter.replace(old, new)
        self._now[old] = new

    def _tell(self, together: list[_Linear], plan: LinearPlan | Int8Plan) -> None:
        kind = "W8A8" if isinstance(plan, Int8Plan) else f"W{plan.bits}A16"
        for each in together:
            parts = [each] if each.other is None else [each, each.other]
            for part in parts:
                others = [x.node.name for x in together if x is not each] + [
                    x.node.name for x in parts if x is not part
                ]
                with_what = f", one product with {', '.join(others)}" if others else ""
                tail = "" if plan.epilogue == "acc" else f", then {plan.epilogue}"
                self.rewriter.touch(part.node, f"{kind} kernel{with_what}{tail}")


def _stacked(weights: list[Weight]) -> Weight:
    if len(weights) == 1:
        return weights[0]
    zeros = [each.zero_point for each in weights]
    return replace(
        weights[0],
        source=tuple(name for each in weights for name in each.source),
        codes=np.concatenate([each.codes for each in weights]),
        scale=np.concatenate([each.scale for each in weights]),
        zero_point=None if any(each is None for each in zeros) else np.concatenate(zeros),  # type: ignore[arg-type]
    )


def _codes_by_token(x: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """Return (codes, scale, zero point, signed) where x stands for bytes with a scale for each token, or for all."""
    if operator(x) != "graphopt.dequantize":
        return None
    named = arguments(x)
    codes, scale, zero = named["codes"], named["scale"], named["zero_point"]
    if named["format"] not in ("int8", "uint8") or codes.op == "get_attr":
        return None
    shape = scale.meta["val"].shape
    by_token = named["group_size"] == -1 and named["axis"] in (-1, len(shape) - 1)
    if not (by_token or (named["group_size"] == 0 and len(shape) == 0)):
        return None
    signed = named["format"] == "int8"
    return None if zero is None and not signed else (codes, scale, zero, signed)


# Rows -----------------------------------------------------------------------------------------------------------------


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


class _Rows:
    def __init__(self, rewriter: Rewriter, dtype: Float16) -> None:
        self.rewriter, self.dtype = rewriter, dtype
        self.program = rewriter.program

    def rewrite(self) -> None:
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
        # Without one, rms_norm takes that of its type, which is to be halves.
        own = torch.finfo(torch.float16 if self._fields["dtype"] == "float16" else torch.bfloat16).eps
        eps = own if named["eps"] is None else float(named["eps"])
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
        if form is None or not _same(node.meta["val"].shape, shape):
            return None
        before = dict(self._tail.operands)
        texts = []
        for each in form[1]:
            inner = isinstance(each, fx.Node) and all(user is node for user in each.users)
            text = self._expression(each, shape) if inner else None
            text = self._tail.operand(each, shape) if text is None else text
            if text is None or len(self._tail.operands) > _MOST_OPERANDS:
                self._tail.operands = before
                return None
            texts.append(text)
        return form[0].format(*texts)


def _per_thread(n: int, block: int) -> list[int]:
    """Return how many elements a thread may hold, the first choice first."""
    if block:
        first = 16 if block <= 1 << 10 else 32 if block <= 1 << 12 else 64
        return [first, *(each for each in (8, 16, 32, 64) if each != first)]
    width = np.gcd(n, 8)
    # As many threads as loads, up to eight warps; then more loads each.
    return [
        int(width) * repeats for repeats in (1, 2, 4, 8) if n <= width * repeats * (256 if repeats < 8 else 1024)
    ] or [64]


def _told(plan: RowPlan) -> str:
    steps = [
        "" if plan.prologue == "in0" else plan.prologue,
        "" if plan.norm == "none" else f"{plan.norm} norm",
        "" if plan.affine == "x" else plan.affine,
        f"rotation by {plan.block}" if plan.block else "",
        "" if plan.output == "half" else f"{plan.output} by token",
    ]
    return f"row kernel: {', '.join(step for step in steps if step)}"
