"""The one way to change a Program.

A Rewriter changes nodes and weights together and records every edit; `finish` sweeps what died and returns the record.
Weights are computed in float64 and rounded once to their dtype; the unrounded values travel in the record, so that
translation validation can check the algebra apart from the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from graphopt.ir.abstract import abstract_value, fake_mode, fake_weight, refresh
from graphopt.ir.arguments import operator, positional
from graphopt.ir.program import Program, assign_weight, remove_weight
from graphopt.ir.unrounded import Computed, Unrounded

Made = TypeVar("Made")


@dataclass(frozen=True)
class Edit:
    """One change: `kind` is inserted, replaced, rewired, weight or removed; `rule` is who asked for it."""

    kind: str
    node: str
    detail: str
    rule: str = ""


@dataclass(frozen=True)
class Site:
    """A place that a pass looked at, by node name, with what was done there or why nothing was."""

    node: str
    reason: str
    rule: str = ""


@dataclass
class Changes:
    """What a pass did.

    Attributes:
        edits: every change, in order.
        touched: places rewritten; skipped: places declined, each with its reason.
        unrounded: float64 values of new weights, before rounding to their dtype.
        facts: figures a pass wants in the trace (plain data).
    """

    edits: list[Edit] = field(default_factory=list)
    touched: list[Site] = field(default_factory=list)
    skipped: list[Site] = field(default_factory=list)
    unrounded: Unrounded = field(default_factory=Unrounded)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return bool(self.edits)


class Rewriter:
    """Edits `program` in place on behalf of the pass called `author`."""

    def __init__(self, program: Program, author: str) -> None:
        self.program = program
        self.author = author
        self.rule = ""
        self.changes = Changes()
        self._keyed: dict[tuple[str, str], Any] = {}
        self._source: dict[str, str] = {}
        self._tied: dict[str, fx.Node] = {}
        self._replaced: list[fx.Node] = []
        self._rewired: dict[fx.Node, None] = {}
        self._declined: set[Site] = set()
        self._mode = fake_mode(program.graph)

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph

    def value(self, node: fx.Node) -> Tensor:
        """Return a weight's value in float64 where it is floating (unrounded where this pass made it), else as it is.

        The tensor is the caller's own: writing to it changes no weight.
        """
        return self.reader(node)().clone()

    def reader(self, node: fx.Node) -> Computed:
        """Return a function that gives what `value` does, also when the node is gone; not to be written to."""
        entry = self.changes.unrounded.entry(str(node.target))
        if isinstance(entry, Tensor):
            return lambda: entry
        if entry is not None:
            return entry
        tensor = self.program.weight(node).detach()
        return lambda: tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype)

    def insert(
        self, target: Any, *args: Any, before: fx.Node, origin: Iterable[fx.Node] = (), **kwargs: Any
    ) -> fx.Node:
        """Insert a call before a node; `origin` names the nodes it stands for (default: `before`)."""
        with self.graph.inserting_before(before):
            node = self.graph.create_node("call_function", target, args, kwargs, name=_call_name(target))
        self._describe(node, list(origin) or [before])
        self.changes.edits.append(Edit("inserted", node.name, operator(node), self.rule))
        return node

    def weight(
        self,
        given: Tensor | Computed,
        name: str,
        dtype: torch.dtype,
        source: fx.Node | None = None,
        parameter: bool | None = None,
    ) -> fx.Node:
        """Add a tensor and return the node that reads it.

        Args:
            given: a value, or a function that computes it, the same one each time, and is kept in the value's place;
                rounded to `dtype` once (floats that become integers are cut, so round codes before); copied.
            name: dotted; made unique, and `conv.weight.scale` becomes `conv.weight_scale` where `conv.weight` is a
                tensor.
            dtype: the type it is stored in.
            source: the weight it replaces, whose name it takes when nobody reads that any more.
            parameter: whether a floating tensor becomes a Parameter or a buffer; None: what its source is, or a
                Parameter.
        """
        value = given if isinstance(given, Tensor) else given()
        stored = value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        if source is not None and not dtype.is_floating_point and (known := self._equal_codes(stored)) is not None:
            first = self._source.setdefault(str(known.target), str(source.target))
            if first != str(source.target):
                self._tied[str(source.target)] = known
            return known
        unique = self._free_name(name)
        if parameter is None:
            parameter = source is None or isinstance(self.program.weight(source), nn.Parameter)
        if parameter and dtype.is_floating_point:
            stored = nn.Parameter(stored, requires_grad=False)
        assign_weight(self.program.graph_module, unique, stored)
        with self.graph.inserting_before(self._first_call()):
            node = self.graph.create_node("get_attr", unique, name=unique.replace(".", "_"))
        node.meta["val"] = fake_weight(self._mode, stored)
        if value.is_floating_point() and dtype.is_floating_point and value.dtype != dtype:
            wide = given.detach().to(torch.float64, copy=True) if isinstance(given, Tensor) else given
            self.changes.unrounded.put(unique, wide)
        if source is not None:
            self._source[unique] = str(source.target)
        shape = list(stored.shape)
        self.changes.edits.append(Edit("weight", unique, f"{str(dtype).removeprefix('torch.')}{shape}", self.rule))
        return node

    def _equal_codes(self, codes: Tensor) -> fx.Node | None:
        """Return the weight that holds the same integers: a table tied before quantization is stored once after."""
        node: fx.Node
        for node in self.graph.nodes:
            if node.op != "get_attr":
                continue
            # The abstract value first: walking to the tensor behind a dotted name is what costs.
            value = node.meta["val"]
            same_type = value.dtype == codes.dtype and value.shape == codes.shape
            if same_type and torch.equal(self.program.weight(node), codes):
                return node
        return None

    def once(self, source: fx.Node, key: str, make: Callable[[], Made]) -> Made:
        """Return `make()`, made once for each (source tensor, key), so that users of a tied weight share an edit."""
        place = (str(source.target), key)
        if place not in self._keyed:
            self._keyed[place] = make()
        return cast(Made, self._keyed[place])

    def edit(self, source: fx.Node, key: str, change: Callable[[Tensor], Tensor]) -> fx.Node:
        """Return the node of the weight `change(source)`, shared by all who ask for the edit called `key`."""
        dtype = self.program.weight(source).dtype
        return self.once(
            source, key, lambda: self.weight(change(self.value(source)), str(source.target), dtype, source)
        )

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Make every user of `old` read `new`, save for those that `new` itself is computed from."""
        if old is new:
            return
        feeding = _between(old, new)
        readers = [user for user in old.users if user not in feeding]
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in feeding, propagate_meta=False)
        self._rewired.update(dict.fromkeys(readers))
        self._replaced.append(old)
        self.changes.edits.append(Edit("replaced", old.name, f"by {new.name}", self.rule))

    def sweep(self) -> None:
        """Erase the calls that were replaced, and whatever only they read."""
        candidates, self._replaced = self._replaced, []
        while candidates:
            node = candidates.pop()
            if node.op == "call_function" and not node.users and not node._erased:
                candidates += node.all_input_nodes
                self._erase(node)

    def _erase(self, node: fx.Node) -> None:
        self.graph.erase_node(node)
        if node.op == "call_function":
            self.changes.edits.append(Edit("removed", node.name, "dead"))

    def rewire(self, node: fx.Node, /, **arguments: Any) -> None:
        """Set arguments of a call by their schema names; TypeError where the operator has no such argument."""
        args, kwargs = positional(node, arguments)
        if args == node.args and kwargs == node.kwargs:
            return
        node.args, node.kwargs = args, kwargs
        self._stamp(node)
        self._rewired[node] = None
        self.changes.edits.append(Edit("rewired", node.name, ", ".join(arguments), self.rule))

    def retarget(self, node: fx.Node, target: Any, *args: Any) -> None:
        """Make a call one of another operator; what it gives is derived again when the pass finishes."""
        before = operator(node)
        node.target, node.args, node.kwargs = target, args, {}
        self._stamp(node)
        self._rewired[node] = None
        self.changes.edits.append(Edit("rewired", node.name, f"{before} -> {operator(node)}", self.rule))

    def redirect(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Make one user read `new` wherever it read `old`; ValueError where it does not read `old`."""
        if old not in user.all_input_nodes:
            raise ValueError(f"{user.name} does not read {old.name}")
        if old is new:
            return
        user.replace_input_with(old, new)
        self._rewired[user] = None
        self.changes.edits.append(Edit("rewired", user.name, f"{old.name} -> {new.name}", self.rule))

    def touch(self, node: fx.Node | str, what: str) -> None:
        """Record a place this pass rewrote."""
        self.changes.touched.append(Site(node if isinstance(node, str) else node.name, what, self.rule))

    def decline(self, node: fx.Node | str, reason: str) -> None:
        """Record a place this pass looked at and left, with the reason; the same refusal is recorded once."""
        site = Site(node if isinstance(node, str) else node.name, reason, self.rule)
        if site not in self._declined:
            self._declined.add(site)
            self.changes.skipped.append(site)

    def note(self, **facts: Any) -> None:
        """Record figures for the trace."""
        self.changes.facts.update(facts)

    def finish(self) -> Changes:
        """Bring the program into order and return the record.

        Dead calls and unread weights go; a weight that replaced another takes its name where that is gone; the abstract
        values of rewired calls, and of all that follows from them, are derived again.
        """
        self.rule = ""
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self._erase(node)
        self._sweep_weights()
        self.graph.lint()
        refresh(self.graph, self._mode, [node for node in self._rewired if not node._erased])
        self.program.graph_module.recompile()
        # What was rewritten after all, or died with what read it, was not skipped.
        touched_rules = {(site.node, site.rule) for site in self.changes.touched}
        removed = {edit.node for edit in self.changes.edits if edit.kind == "removed"}
        self.changes.skipped = [
            s for s in self.changes.skipped if (s.node, s.rule) not in touched_rules and s.node not in removed
        ]
        return self.changes

    def _sweep_weights(self) -> None:
        used = {str(node.target): node for node in self.graph.nodes if node.op == "get_attr"}
        root = self.program.graph_module
        names = [
            *dict(root.named_parameters(remove_duplicate=False)),
            *dict(root.named_buffers(remove_duplicate=False)),
        ]
        for name in names:
            if name not in used:
                remove_weight(root, name)
                self.changes.unrounded.forget(name)
        for name, source in self._source.items():
            # A chain of edits in one pass leaves `w`, `w_1`, `w_2`: the survivor is called after the first.
            while source in self._source:
                source = self._source[source]
            if name in used and source not in used:
                self._rename(used.pop(name), source)
                used[source] = next(n for n in self.graph.nodes if n.op == "get_attr" and n.target == source)
        self.program.aliases |= {k: str(v.target) for k, v in self._tied.items() if k not in used and not v._erased}
        self.program.aliases = {k: v for k, v in self.program.aliases.items() if v in used}

    def _rename(self, node: fx.Node, name: str) -> None:
        old = str(node.target)
        value = self.program.weight(old)
        remove_weight(self.program.graph_module, old)
        assign_weight(self.program.graph_module, name, value)
        node.target = name
        node.name = self.graph._graph_namespace.create_name(name.replace(".", "_"), None)
        self.changes.unrounded.rename(old, name)

    def _first_call(self) -> fx.Node:
        first: fx.Node = next(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr"))
        return first

    def _free_name(self, name: str) -> str:
        """Return `name` such that it can be stored: below modules only, and used by nothing else."""
        root, path = self.program.graph_module, name.split(".")
        for depth in range(1, len(path)):
            inner = _attribute(root, path[:depth])
            if inner is not None and not isinstance(inner, nn.Module):
                path = [*path[: depth - 1], "_".join(path[depth - 1 :])]
                break
        base = candidate = ".".join(path)
        taken, count = set(self.program.aliases), 0
        while candidate in taken or _attribute(root, candidate.split(".")) is not None:
            count += 1
            candidate = f"{base}_{count}"
        return candidate

    def _describe(self, node: fx.Node, origin: list[fx.Node]) -> None:
        """Give a new node its abstract value and its provenance."""
        like = origin[0]
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        ancestors = dict.fromkeys(name for source in origin for name in provenance(source)["from"] or [source.name])
        node.meta["custom"] = dict(like.meta.get("custom") or {}) | {
            "graphopt": {"by": self.author, "rule": self.rule, "from": list(ancestors)}
        }
        node.meta["val"] = abstract_value(self._mode, node)

    def _stamp(self, node: fx.Node) -> None:
        custom = dict(node.meta.get("custom") or {})
        custom["graphopt"] = {"by": self.author, "rule": self.rule, "from": provenance(node)["from"] or [node.name]}
        node.meta["custom"] = custom


def _call_name(target: Any) -> str | None:
    """Return the operator's bare name, so that an inserted `quantize` is `quantize_3` here and in every export."""
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else None


def provenance(node: fx.Node) -> dict[str, Any]:
    """Return `{"by": pass, "rule": rule, "from": [names of captured nodes]}`; captured nodes have empty entries."""
    known = (node.meta.get("custom") or {}).get("graphopt") or {}
    return {"by": known.get("by", ""), "rule": known.get("rule", ""), "from": list(known.get("from", []))}


def module_path(node: fx.Node) -> str:
    """Return the user's dotted module path of a node (`encoder.layer.0.attention`), or an empty string."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return path.removeprefix("L['self'].").removeprefix("L['self']")


def _attribute(root: nn.Module, path: list[str]) -> Any:
    value: Any = root
    for atom in path:
        value = getattr(value, atom, None)
        if value is None:
            return None
    return value


def _between(old: fx.Node, new: fx.Node) -> set[fx.Node]:
    """Return `new` and every node that it is computed from and that stands after `old` in the graph."""
    found, stack = {new}, [new]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found and old < source:
                found.add(source)
                stack.append(source)
    return found
