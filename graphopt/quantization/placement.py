"""Placement: where quantize and dequantize stand, so that the target runs whole regions on integers.

The unit of decision is the operator. Anchors (convolution, linear) gain by themselves. Followers (add, pool, concat)
and transparent operators (reshape, transpose, max-pool) are worth it only between integer operators: start with all of
them integer and drop whatever reads a float or is read by nobody on integers, until nothing changes: the largest
consistent set. A clamp from zero upwards right after an integer operator is absorbed: the zero point of the quantize
behind it does its work.

The unit of quantization is the value. Each value that an integer operator reads or must write gets one quantize and a
dequantize for each reader. Values tied by transparent operators share scale and zero point. What carries only masks or
indices is never reached, because nothing on its way is an anchor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.analysis.cost import size_hint
from graphopt.ir.arguments import arguments, operator
from graphopt.ir.program import Program, is_tensor
from graphopt.quantization.weights import unfit
from graphopt.target import IntegerOperator, Target

_SPLITS = {"split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"}


@dataclass
class Value:
    """A tensor that becomes integer codes.

    Attributes:
        node: who computes it.
        readers: nodes that must read it through a dequantize.
        group: values with the same group share scale and zero point.
        starts_at_zero: an absorbed clamp needs the smallest code to mean zero.
        upper: no code may mean more than this, where an absorbed clamp has an upper bound.
        observed: its distribution counts for the range (a transparent copy's does not).
    """

    node: fx.Node
    readers: list[fx.Node]
    group: fx.Node
    starts_at_zero: bool
    upper: float
    observed: bool


@dataclass
class Placement:
    """The decision for a whole program.

    Attributes:
        anchors: convolutions and linears on integers. integer: every operator on integers, anchors included.
        values: tensors that become codes, in graph order.
        declined: places left float, with reasons.
    """

    anchors: list[fx.Node] = field(default_factory=list)
    integer: set[fx.Node] = field(default_factory=set)
    values: list[Value] = field(default_factory=list)
    declined: list[tuple[fx.Node, str]] = field(default_factory=list)


def kind(node: fx.Node) -> str:
    """Return the operator's name; the parts of a split count as the split."""
    name = operator(node)
    if name == "getitem" and isinstance(node.args[0], fx.Node) and operator(node.args[0]) in _SPLITS:
        return operator(node.args[0])
    return name


def activations(node: fx.Node, spec: IntegerOperator) -> list[fx.Node]:
    """Return the values that an operator computes with, weights and sizes left out."""
    source = node.args[0] if operator(node) == "getitem" else node
    assert isinstance(source, fx.Node)
    named = arguments(source)
    names = spec.inputs or (next(iter(named)),)
    found: list[fx.Node] = []
    for name in names:
        part = named[name]
        for each in part if isinstance(part, list | tuple) else [part]:
            if isinstance(each, fx.Node):
                found.append(each)
    return found


def place(program: Program, target: Target, refusal: Callable[[fx.Node], str]) -> Placement:
    """Decide for every operator and value; `refusal(node)` says why the user keeps an anchor float, or nothing."""
    return _Placer(program, target, refusal).run()


def nothing_to_quantize(target: Target) -> str:
    """Return the sentence for a program without a single anchor."""
    anchors = ", ".join(sorted(name for name, spec in target.operators.items() if spec.role == "anchor"))
    return f"it has no operator with float32 weights that {target.name} runs on integers ({anchors})"


class _Placer:
    def __init__(self, program: Program, target: Target, refusal: Callable[[fx.Node], str]) -> None:
        self.program, self.target, self.refusal = program, target, refusal
        self.result = Placement()
        self.integer = self.result.integer

    def run(self) -> Placement:
        dropped: dict[fx.Node, str] = {}
        for node in self.program.graph.nodes:
            spec = self.spec(node)
            if spec is None or operator(node) in _SPLITS:
                continue
            if reason := self.unfit(node, spec):
                dropped[node] = reason
            else:
                self.integer.add(node)
        dropped |= self.shrink()
        self.result.anchors = [
            node for node in self.program.graph.nodes if node in self.integer and self.role(node) == "anchor"
        ]
        self.values()
        self.explain(dropped)
        return self.result

    def spec(self, node: fx.Node) -> IntegerOperator | None:
        return self.target.operators.get(kind(node)) if node.op == "call_function" else None

    def role(self, node: fx.Node) -> str:
        spec = self.spec(node)
        return spec.role if spec is not None else ""

    def unfit(self, node: fx.Node, spec: IntegerOperator) -> str:
        """Return why the node cannot be integer whatever its neighbours are, or an empty string."""
        inputs = activations(node, spec)
        for each in [node, *inputs]:
            if not is_tensor(each) or each.meta["val"].dtype is not torch.float32:
                return f"{each.name} is not a float32 tensor"
        if any(each.op == "get_attr" for each in inputs):
            return "one of its inputs is a weight"
        if len(inputs) < len(spec.inputs) and kind(node) != "cat":
            return "one of its inputs is a number"
        if spec.role == "anchor":
            return self.refusal(node) or self._unfit_anchor(node)
        if spec.role == "absorbed" and not _clamps_from_zero(node):
            return "it does not clamp from zero upwards"
        return _unfit_attributes(node) or (self.refusal(node) if spec.role == "follower" else "")

    def _unfit_anchor(self, node: fx.Node) -> str:
        named = arguments(node)
        for name in ("weight", "bias"):
            part = named.get(name)
            if isinstance(part, fx.Node):
                if part.op != "get_attr":
                    return f"its {name} is computed by {part.name}"
                if reason := unfit(self.program, part, f"its {name}"):
                    return reason
        if isinstance(named.get("padding"), str):
            return "its padding is given by name"
        if operator(node) == "linear" and node.meta["val"].dim() < 2:
            return "its input has a single axis"
        return ""

    def readers(self, value: fx.Node) -> Iterator[fx.Node]:
        """Yield the operators that read a value; a split stands for its parts."""
        for user in value.users:
            if operator(user) in _SPLITS:
                yield from user.users
            else:
                yield user

    def reads_integer(self, value: fx.Node) -> bool:
        return any(self._reads(user, value) for user in self.readers(value))

    def _reads(self, user: fx.Node, value: fx.Node) -> bool:
        spec = self.spec(user)
        return user in self.integer and spec is not None and value in activations(user, spec)

    def shrink(self) -> dict[fx.Node, str]:
        """Drop what is not consistent until nothing changes; return why each went."""
        dropped: dict[fx.Node, str] = {}
        changed = True
        while changed:
            changed = False
            for node in [node for node in self.program.graph.nodes if node in self.integer]:
                if reason := self.inconsistent(node):
                    self.integer.discard(node)
                    dropped[node] = reason
                    changed = True
        return dropped

    def inconsistent(self, node: fx.Node) -> str:
        spec = self.spec(node)
        assert spec is not None
        if spec.role == "anchor":
            return ""
        inputs = activations(node, spec)
        floats = [each for each in inputs if each not in self.integer]
        # Quantizing the parts of a concatenation costs what quantizing the whole would: one integer part is enough.
        if floats and not (kind(node) == "cat" and len(floats) < len(inputs)):
            return f"its input {floats[0].name} ({operator(floats[0]) or floats[0].op}) is float"
        if spec.role == "absorbed":
            (producer,) = activations(node, spec)
            if self.role(producer) not in ("anchor", "follower") or len(producer.users) > 1:
                return f"{producer.name} has other readers, or is no operator that can absorb it"
            producer_spec = self.spec(producer)
            assert producer_spec is not None
            if producer_spec.role == "anchor" and producer_spec.requires_output:
                return ""
        if operator(node) == "getitem" and (reason := self._other_parts(node)):
            return reason
        if not self.reads_integer(node) and not (spec.role == "follower" and _shrinks(node, inputs[0])):
            return "nobody reads it on integers"
        return ""

    def _other_parts(self, part: fx.Node) -> str:
        """Return why a part of a split cannot be integer on its own: the kernel writes all parts."""
        split = part.args[0]
        assert isinstance(split, fx.Node)
        if any(other not in self.integer for other in split.users):
            return "another part of the split is float"
        if len({other.args[1] for other in split.users}) < len(split.meta["val"]):
            return "another part of the split is not used"
        return ""

    def values(self) -> None:
        groups = _Groups()
        for node in self.program.graph.nodes:
            if node in self.integer and self.role(node) == "transparent":
                for each in activations(node, self._spec(node)):
                    groups.unite(each, node)
        bounds = {groups.find(node): _upper_bound(node) for node in self.integer if self.role(node) == "absorbed"}
        for node in self.program.graph.nodes:
            if node in self.integer and kind(node) == "cat":
                members = [groups.find(each) for each in (node, *activations(node, self._spec(node)))]
                # A branch that is clamped needs its own parameters, unless all branches are clamped alike.
                if len({bounds.get(member) for member in members[1:]}) == 1:
                    for member in members[1:]:
                        groups.unite(members[0], member)
                    bounds = {groups.find(member): bound for member, bound in bounds.items()}
        for node in self.program.graph.nodes:
            readers = self._quantized_readers(node)
            if readers:
                group = groups.find(node)
                copy = node in self.integer and self.role(node) == "transparent"
                upper = bounds.get(group, math.inf)
                self.result.values.append(Value(node, readers, group, group in bounds, upper, not copy))

    def _spec(self, node: fx.Node) -> IntegerOperator:
        spec = self.spec(node)
        assert spec is not None
        return spec

    def _quantized_readers(self, node: fx.Node) -> list[fx.Node]:
        """Return who reads `node` through a dequantize; empty where it stays float."""
        if not is_tensor(node) or node.op == "get_attr":
            return []
        wanted = self.reads_integer(node)
        if node in self.integer:
            absorbed = [user for user in node.users if user in self.integer and self.role(user) == "absorbed"]
            if absorbed:
                return []
            role = self.role(node)
            spec = self._spec(node)
            if role == "absorbed":
                spec = self._spec(activations(node, spec)[0])
            if wanted or spec.requires_output or role in ("follower", "transparent"):
                return list(node.users)
            return []
        if not wanted:
            return []
        return [
            user
            for user in node.users
            if self._reads(user, node)
            or (operator(user) in _SPLITS and any(part in self.integer for part in user.users))
        ]

    def explain(self, dropped: dict[fx.Node, str]) -> None:
        """Record why anchors, and operators beside integer ones, are float; elsewhere nobody expects integers."""
        for node, reason in dropped.items():
            beside = any(each in self.integer for each in node.all_input_nodes)
            if self.role(node) == "anchor" or (self.role(node) == "follower" and beside):
                self.result.declined.append((node, reason))
        for node in self.program.graph.nodes:
            if node.op != "call_function" or self.spec(node) is not None or not is_tensor(node):
                continue
            between = any(each in self.integer for each in node.all_input_nodes) and self.reads_integer(node)
            if between or operator(node) in self.target.reasons:
                default = f"{self.target.name} has no integer kernel for {operator(node)}"
                self.result.declined.append((node, self.target.reasons.get(operator(node), default)))


class _Groups:
    """Union-find over nodes; the earliest member stands for the group."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}

    def find(self, node: fx.Node) -> fx.Node:
        while node in self._parent:
            node = self._parent[node]
        return node

    def unite(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self.find(a), self.find(b)
        if a is not b:
            first, second = (a, b) if a < b else (b, a)
            self._parent[second] = first


def _upper_bound(node: fx.Node) -> float:
    """Return the upper bound of a clamp from zero; infinite for a ReLU."""
    named, name = arguments(node), operator(node)
    if name == "relu6":
        return 6.0
    high = named.get("max_val") if name == "hardtanh" else named.get("max")
    return math.inf if high is None else float(high)


def _clamps_from_zero(node: fx.Node) -> bool:
    named = arguments(node)
    name = operator(node)
    if name in ("relu", "relu6"):
        return True
    low = named.get("min_val") if name == "hardtanh" else named.get("min")
    return isinstance(low, int | float) and low == 0


def _unfit_attributes(node: fx.Node) -> str:
    """Return which attribute of a follower or transparent operator the integer kernel lacks, or an empty string."""
    named = arguments(node.args[0] if operator(node) == "getitem" else node)  # type: ignore[arg-type]
    name = kind(node)
    if name == "add" and named.get("alpha", 1) != 1:
        return "it scales its second input"
    if name.startswith("adaptive_avg_pool") and any(size != 1 for size in named["output_size"]):
        return "only pooling to one position has an integer kernel"
    if name in ("pad", "constant_pad_nd"):
        return _unfit_padding(node, named)
    if name.startswith("max_pool") and any(size != 1 for size in named.get("dilation") or ()):
        return "it is dilated"
    return ""


def _unfit_padding(node: fx.Node, named: dict[str, Any]) -> str:
    """Zero is a code of every grid; and only a convolution takes a padding over (an integer one of its own is slow)."""
    if named.get("mode", "constant") != "constant" or named.get("value") not in (None, 0):
        return "it pads with something else than zeros"
    if any(not isinstance(width, int) or width < 0 for width in named["pad"]):
        return "its width is not fixed, or it cuts"
    if not all(operator(user).startswith("conv") and arguments(user)["input"] is node for user in node.users):
        return "others than convolutions read it"
    return ""


def _shrinks(node: fx.Node, source: fx.Node) -> bool:
    """True where computing on integers leaves fewer values to convert back."""
    after, before = (math.prod(size_hint(size) for size in each.meta["val"].shape) for each in (node, source))
    return after < before
