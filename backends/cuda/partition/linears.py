"""Regions about linears: which of them a kernel computes, with what behind them, beside which others."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphopt.backends.cuda import operators
from graphopt.backends.cuda.arithmetic import Float16
from graphopt.backends.cuda.expressions import renamed
from graphopt.backends.cuda.operands import pack_int8, pack_linear
from graphopt.backends.cuda.partition.pointwise import MOST_OPERANDS, Pointwise, pointwise, same_shape
from graphopt.backends.cuda.partition.weights import Weight, paired, quantized_weight, stacked
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, is_vector, plan_text
from graphopt.ir import Rewriter, arguments, is_floating, operator


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


class Linears:
    """Finds the linears of a program that kernels compute, and what goes with them, and replaces them."""

    def __init__(self, rewriter: Rewriter, dtype: Float16) -> None:
        self.rewriter, self.dtype = rewriter, dtype
        self.program = rewriter.program
        self._taken: set[fx.Node] = set()  # pointwise operators that a linear takes along
        self._now: dict[fx.Node, fx.Node] = {}  # what a replaced node became
        self._packs: dict[tuple[Any, ...], dict[str, fx.Node]] = {}

    def rewrite(self) -> None:
        """Replace them all; what is left is declined with its reason."""
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
            if form is None or user in self._taken or not same_shape(user.meta["val"].shape, shape):
                return
            taken = Pointwise("", dict(linear.tail.operands))
            texts = [linear.tail.text if each is linear.last else taken.operand(each, shape) for each in form[1]]
            if any(text is None for text in texts) or len(taken.operands) > MOST_OPERANDS:
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
        weight = stacked([each.weight for each in together])
        if first.other is not None:
            weight = paired(first.weight, first.other.weight)
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
