"""Where the error of a quantized program comes from.

A site is an operator that both programs have and that reads quantized values in one of them. For each:

    local        its output where only itself is quantized: inputs as in the reference, then rounded, weights rounded
    propagated   its output in the quantized program, behind everything that went wrong before it
    effect       the model's outputs where this site alone is quantized

Each is a noise-to-signal ratio Σ (y' - y)² / Σ y² over everything seen, of the outputs the sum of theirs. The local
error finds what is badly quantized, the propagated one where errors grow, the effect what the user should care about.
Effects of different sites add up as long as they are small.

Both programs run side by side, node by node. An effect is measured, not estimated: what lies behind the site runs
again, which costs half a run of the model for each site on average.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.arguments import operator
from graphopt.ir.program import Program
from graphopt.progress import Progress, Silent

Values = dict[str, Any]


@dataclass
class Noise:
    """Noise and signal, summed over everything seen."""

    noise: float = 0.0
    signal: float = 0.0

    def add(self, made: Any, exact: Any) -> None:
        """Compare two values; whatever is no floating tensor, and elements that are not finite, do not count."""
        if not isinstance(exact, Tensor) or not exact.is_floating_point() or exact.numel() == 0:
            return
        wanted = exact.detach().double()
        counts = torch.isfinite(wanted)
        difference = torch.where(counts, made.detach().double() - wanted, 0.0)
        self.noise += float(difference.square().sum())
        self.signal += float(torch.where(counts, wanted, 0.0).square().sum())

    @property
    def ratio(self) -> float:
        """Noise over signal; 0 where there is no noise."""
        if self.noise == 0:
            return 0.0
        return self.noise / self.signal if self.signal > 0 else math.inf

    @property
    def sqnr_db(self) -> float | None:
        """Signal over noise in dB; None where there is no noise."""
        ratio = self.ratio
        return -10 * math.log10(ratio) if 0 < ratio < math.inf else None


@dataclass
class SiteError:
    """The error of one site. `effect` stays empty where it was not asked for."""

    node: str
    kind: str
    local: Noise = field(default_factory=Noise)
    propagated: Noise = field(default_factory=Noise)
    effect: Noise = field(default_factory=Noise)

    @property
    def plain(self) -> dict[str, float | str | None]:
        """The figures as plain data: signal over noise in dB, to two digits."""
        figures = {name: getattr(self, name).sqnr_db for name in ("local", "propagated", "effect")}
        rounded = {f"{name}_db": None if db is None else round(db, 2) for name, db in figures.items()}
        return {"operator": self.kind, **rounded}


def site_errors(
    reference: Program,
    quantized: Program,
    batches: Iterable[list[Any]],
    effects: bool = True,
    only: Collection[str] | None = None,
    progress: Progress | None = None,
) -> list[SiteError]:
    """Return the error of every site over flat input batches, the largest effect (else local error) first.

    `only`: names of sites to look at. Memory: the activations of one batch, once.
    """
    lockstep = _Lockstep(reference, quantized)
    sites = [name for name in lockstep.sites if only is None or name in only]
    found = {name: SiteError(name, operator(lockstep.nodes[name])) for name in sites}
    with torch.no_grad(), (progress or Silent()).stage("error analysis") as stage:
        for flat in batches:
            exact = lockstep.exact(flat)
            local = lockstep.local(flat, exact, found)
            for name, made in local.items():
                if effects:
                    found[name].effect = _more(found[name].effect, *lockstep.effect(name, made, exact))
                    stage.advance()
            del local
            lockstep.propagated(flat, exact, found)
    return sorted(found.values(), key=lambda site: -(site.effect.ratio if effects else site.local.ratio))


def _more(noise: Noise, made: list[Any], exact: list[Any]) -> Noise:
    for new, old in zip(made, exact, strict=True):
        noise.add(new, old)
    return noise


class _Lockstep:
    """Two programs, run node by node; nodes of the same name and operator are the same place."""

    def __init__(self, reference: Program, quantized: Program) -> None:
        self.reference, self.quantized = reference, quantized
        self.nodes = {node.name: node for node in reference.graph.nodes if node.op == "call_function"}
        self.shared = {
            node.name
            for node in quantized.graph.nodes
            if node.op == "call_function" and node.name in self.nodes and node.target == self.nodes[node.name].target
        }
        rounded: set[fx.Node] = set()
        self.sites: list[str] = []
        for node in quantized.graph.nodes:
            if node.name in self.shared:
                if any(source in rounded for source in node.all_input_nodes):
                    self.sites.append(node.name)
            elif operator(node).startswith("graphopt.") or any(source in rounded for source in node.all_input_nodes):
                rounded.add(node)
        self._order = {node: index for index, node in enumerate(reference.graph.nodes)}

    def exact(self, flat: list[Any]) -> Values:
        """Run the reference and return the value of every node."""
        return _run(self.reference, flat, {})

    def local(self, flat: list[Any], exact: Values, found: dict[str, SiteError]) -> Values:
        """Run the quantized program with every shared node reset to its exact value; return what the sites made."""
        made: Values = {}

        def reset(node: fx.Node, value: Any) -> Any:
            if node.name not in self.shared:
                return value
            if node.name in found:
                found[node.name].local.add(value, exact[node.name])
                made[node.name] = value
            return exact[node.name]

        _run(self.quantized, flat, {}, reset)
        return made

    def propagated(self, flat: list[Any], exact: Values, found: dict[str, SiteError]) -> None:
        def compare(node: fx.Node, value: Any) -> Any:
            if node.name in found:
                found[node.name].propagated.add(value, exact[node.name])
            return value

        _run(self.quantized, flat, {}, compare)

    def effect(self, name: str, made: Any, exact: Values) -> tuple[list[Any], list[Any]]:
        """Return the outputs with one value replaced, and the exact ones; only what lies behind runs again."""
        changed: Values = {name: made}
        for node in list(self.reference.graph.nodes)[self._order[self.nodes[name]] + 1 :]:
            if node.op == "call_function" and any(source.name in changed for source in node.all_input_nodes):
                changed[node.name] = _call(node, lambda each: changed.get(each.name, exact[each.name]))
        outputs = self.reference.outputs
        read = [value for value in outputs if isinstance(value, fx.Node)]
        return [changed.get(value.name, exact[value.name]) for value in read], [exact[value.name] for value in read]


def _run(program: Program, flat: list[Any], values: Values, after: Any = None) -> Values:
    """Run a program node by node, with `after(node, value)` in place of each value; without it keep all values."""
    inputs = iter(flat)
    last = {source: node for node in program.graph.nodes for source in node.all_input_nodes} if after else {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = next(inputs)
        elif node.op == "get_attr":
            values[node.name] = program.weight(node)
        elif node.op == "call_function":
            value = _call(node, lambda each: values[each.name])
            values[node.name] = after(node, value) if after else value
            if after:
                for source in node.all_input_nodes:
                    if last[source] is node:
                        del values[source.name]
    return values


def _call(node: fx.Node, value: Any) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def explain_sites(sites: Iterable[SiteError], count: int = 5) -> list[str]:
    """Return a sentence for each of the first `count` sites."""
    return [
        f"{site.node} ({site.kind}): own error {_db(site.local)}, with what came before {_db(site.propagated)}, "
        f"alone it leaves {_db(site.effect)} at the outputs"
        for site, _ in zip(sites, range(count), strict=False)
    ]


def _db(noise: Noise) -> str:
    db = noise.sqnr_db
    return "none" if db is None else f"{db:.1f} dB"
