"""The one way to change a Program.

A Rewriter changes nodes and weights together and records every edit; `finish` sweeps what died and returns the record.
Weights are computed in float64 and rounded once to their dtype; the unrounded values travel in the record, so that
translation validation can check the algebra apart from the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.ir.arguments import operator, positional
from graphopt.ir.program import Program, assign_weight, remove_weight


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
    unrounded: dict[str, Tensor] = field(default_factory=dict)
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
        self._keyed: dict[tuple[str, str], fx.Node] = {}
        self._source: dict[str, str] = {}
        self._mode = _fake_mode(program)

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph

    def value(self, node: fx.Node) -> Tensor:
        """Return a weight's value in float64 where it is floating (unrounded where this pass made it), else as it is."""
        name = str(node.target)
        if name in self.changes.unrounded:
            return self.changes.unrounded[name]
        tensor = self.program.weight(node).detach()
        return tensor.to(torch.float64) if tensor.is_floating_point() else tensor

    def insert(self, target: Any, *args: Any, before: fx.Node, origin: Iterable[fx.Node] = (), **kwargs: Any) -> fx.Node:
        """Insert a call before a node; `origin` names the nodes it stands for (default: `before`)."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        self._describe(node, list(origin) or [before])
        self.changes.edits.append(Edit("inserted", node.name, operator(node), self.rule))
        return node

    def weight(self, value: Tensor, name: str, dtype: torch.dtype, source: fx.Node | None = None) -> fx.Node:
        """Add a tensor and return the node that reads it.

        `value` is rounded to `dtype` once; `source` is the weight it replaces, whose name it takes when that dies.
        """
        unique = self._free_name(name)
        stored = value.detach().to(dtype).contiguous()
        if dtype.is_floating_point and (source is None or isinstance(self.program.weight(source), nn.Parameter)):
            stored = nn.Parameter(stored, requires_grad=False)
        assign_weight(self.program.graph_module, unique, stored)
        with self.graph.inserting_before(self._first_call()):
            node = self.graph.create_node("get_attr", unique, name=unique.replace(".", "_"))
        node.meta["val"] = self._mode.from_tensor(stored, static_shapes=True)
        if value.is_floating_point() and dtype.is_floating_point:
            self.changes.unrounded[unique] = value.detach().to(torch.float64)
        if source is not None:
            self._source[unique] = str(source.target)
        shape = list(stored.shape)
        self.changes.edits.append(Edit("weight", unique, f"{str(dtype).removeprefix('torch.')}{shape}", self.rule))
        return node

    def edit(self, source: fx.Node, key: str, change: Callable[[Tensor], Tensor]) -> fx.Node:
        """Return the node of the weight `change(source)`; users of a tied weight that ask for the same edit share it."""
        known = self._keyed.get((str(source.target), key))
        if known is None:
            dtype = self.program.weight(source).dtype
            known = self.weight(change(self.value(source)), str(source.target), dtype, source)
            self._keyed[(str(source.target), key)] = known
        return known

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Make every user of `old` read `new`."""
        old.replace_all_uses_with(new, propagate_meta=False)
        self.changes.edits.append(Edit("replaced", old.name, f"by {new.name}", self.rule))

    def rewire(self, node: fx.Node, **arguments: Any) -> None:
        """Set arguments of a call by their schema names."""
        args, kwargs = positional(node, arguments)
        if args == node.args and kwargs == node.kwargs:
            return
        node.args, node.kwargs = args, kwargs
        self._stamp(node)
        self.changes.edits.append(Edit("rewired", node.name, ", ".join(arguments), self.rule))

    def redirect(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Make one user read `new` where it read `old`."""
        user.replace_input_with(old, new)
        self.changes.edits.append(Edit("rewired", user.name, f"{old.name} -> {new.name}", self.rule))

    def touch(self, node: fx.Node | str, what: str) -> None:
        """Record a place this pass rewrote."""
        self.changes.touched.append(Site(node if isinstance(node, str) else node.name, what, self.rule))

    def decline(self, node: fx.Node | str, reason: str) -> None:
        """Record a place this pass looked at and left, with the reason; the same refusal is recorded once."""
        site = Site(node if isinstance(node, str) else node.name, reason, self.rule)
        if site not in self.changes.skipped:
            self.changes.skipped.append(site)

    def note(self, **facts: Any) -> None:
        """Record figures for the trace."""
        self.changes.facts.update(facts)

    def finish(self) -> Changes:
        """Remove dead calls and unused weights, give replacements the names of what they replaced, and return the record."""
        self.rule = ""
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.graph.erase_node(node)
                if node.op == "call_function":
                    self.changes.edits.append(Edit("removed", node.name, "dead"))
        self._sweep_weights()
        self.graph.lint()
        self.program.graph_module.recompile()
        touched_rules = {(site.node, site.rule) for site in self.changes.touched}
        self.changes.skipped = [s for s in self.changes.skipped if (s.node, s.rule) not in touched_rules]
        return self.changes

    def _sweep_weights(self) -> None:
        used = {str(node.target): node for node in self.graph.nodes if node.op == "get_attr"}
        root = self.program.graph_module
        names = [*dict(root.named_parameters(remove_duplicate=False)), *dict(root.named_buffers(remove_duplicate=False))]
        for name in names:
            if name not in used:
                remove_weight(root, name)
                self.changes.unrounded.pop(name, None)
        for name, source in self._source.items():
            # A chain of edits in one pass leaves `w`, `w_1`, `w_2`: the survivor is called after the first.
            while source in self._source:
                source = self._source[source]
            if name in used and source not in used:
                self._rename(used.pop(name), source)
                used[source] = next(n for n in self.graph.nodes if n.op == "get_attr" and n.target == source)
        self.program.aliases = {k: v for k, v in self.program.aliases.items() if v in used}

    def _rename(self, node: fx.Node, name: str) -> None:
        old = str(node.target)
        value = self.program.weight(old)
        remove_weight(self.program.graph_module, old)
        assign_weight(self.program.graph_module, name, value)
        node.target = name
        node.name = self.graph._graph_namespace.create_name(name.replace(".", "_"), None)
        if old in self.changes.unrounded:
            self.changes.unrounded[name] = self.changes.unrounded.pop(old)

    def _first_call(self) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr"))

    def _free_name(self, name: str) -> str:
        root, candidate, count = self.program.graph_module, name, 0
        while _has(root, candidate):
            count += 1
            candidate = f"{name}_{count}"
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
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self._mode:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _stamp(self, node: fx.Node) -> None:
        custom = dict(node.meta.get("custom") or {})
        custom["graphopt"] = {"by": self.author, "rule": self.rule, "from": provenance(node)["from"] or [node.name]}
        node.meta["custom"] = custom


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


def _has(root: nn.Module, name: str) -> bool:
    value: Any = root
    for atom in name.split("."):
        value = getattr(value, atom, None)
        if value is None:
            return False
    return True


def _fake_mode(program: Program) -> FakeTensorMode:
    values = [node.meta.get("val") for node in program.graph.nodes]
    mode = torch._guards.detect_fake_mode([v for v in values if isinstance(v, Tensor)])
    return mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)
