"""Where the error of a quantized program comes from.

A site is an operator that both programs have and that reads other values in one of them: quantized ones, or weights
that are no longer the same. For each:

    local        its output where only itself is quantized: inputs as in the reference, then rounded, weights rounded
    weights      the local error with the weights of the quantized program, but inputs as in the reference
    inputs       the local error with rounded inputs, but weights as in the reference
    propagated   its output in the quantized program, behind everything that went wrong before it
    effect       the model's outputs where this site alone is quantized

Each is a noise-to-signal ratio Σ (y' - y)² / Σ y² over everything seen, of the outputs the sum of theirs. The local
error finds what is badly quantized, the propagated one where errors grow, the effect what the user should care about.
Effects of different sites add up as long as they are small.

Both programs run side by side, node by node. An effect is measured, not estimated: what lies behind the site runs
again, which costs half a run of the model for each site on average. What became of the quantized program elsewhere, a
file in its runtime, is looked at in the same way, through an Observer (`graphopt.backend`).

Most sites lose what their format must lose. Where one loses far more, something is wrong, and it comes first: a scale
does not fit (`coarseness`), or the runtime computes something else than the program says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.numerics.fit import coarseness
from graphopt.backend import Observer, Rounds
from graphopt.ir.arguments import operator
from graphopt.ir.program import Program
from graphopt.progress import Progress, Silent

Values = dict[str, Any]
Visit = Callable[[fx.Node, Any, Mapping[str, Any]], Any]  # a node, its value, those it may read -> what others read
Show = Callable[[str, Any], None]  # a site and its value
MISFIT = 4.0  # times the noise, as an amplitude, that a format must leave: not a matter of clipping or of other data
_BINS = 32
_SAME = 1e-4  # packed products that round activations to eight bits by themselves differ by less
_SAMPLED = 1 << 16  # values that a histogram looks at


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


@dataclass(frozen=True)
class Spread:
    """How many of some values lie where between `low` and `high`, in bins of equal width, before and after."""

    low: float
    high: float
    before: list[int]
    after: list[int]

    @staticmethod
    def of(before: Tensor, after: Tensor) -> Spread | None:
        """Count two tensors in the same bins, large ones by a sample; None where there is nothing to count."""
        both = [_sample(each) for each in (before, after)]
        if not all(each.numel() for each in both):
            return None
        low, high = float(min(each.min() for each in both)), float(max(each.max() for each in both))
        if low == high:
            low, high = low - 0.5, high + 0.5
        old, new = (torch.histc(each, _BINS, low, high).int().tolist() for each in both)
        return Spread(low, high, old, new)


def _sample(values: Tensor) -> Tensor:
    flat = values.detach().flatten()
    flat = flat[:: max(flat.numel() // _SAMPLED, 1)].float()
    return flat[flat.isfinite()]


@dataclass
class Elsewhere:
    """What a site gives elsewhere than in torch.

    Attributes:
        local, propagated, effect: as in torch; the effect only where it differs from that in torch.
        expected: what the local error would be, were it as in torch: larger than there where values show rounded.
        apart: its local output beside the one in torch.
    """

    local: Noise = field(default_factory=Noise)
    expected: Noise = field(default_factory=Noise)
    apart: Noise = field(default_factory=Noise)
    propagated: Noise = field(default_factory=Noise)
    effect: Noise = field(default_factory=Noise)

    @property
    def differs(self) -> bool:
        """Whether it is much farther from torch than torch is from the exact value."""
        return self.apart.ratio > max(MISFIT * self.expected.ratio, _SAME)


@dataclass
class SiteError:
    """The error of one site.

    Attributes:
        node, kind: its name and its operator.
        local, weights, inputs, propagated, effect: see above; empty where not asked for.
        runtime: the same elsewhere; None where it was not seen there.
        coarse: by the reference's name of each rounded value how coarse its rounding is.
    """

    node: str
    kind: str
    local: Noise = field(default_factory=Noise)
    weights: Noise = field(default_factory=Noise)
    inputs: Noise = field(default_factory=Noise)
    propagated: Noise = field(default_factory=Noise)
    effect: Noise = field(default_factory=Noise)
    runtime: Elsewhere | None = None
    coarse: dict[str, float] = field(default_factory=dict)

    @property
    def misfits(self) -> dict[str, float]:
        """Coarseness of the roundings that do not fit what they round, by the reference's name of the value."""
        return {name: found for name, found in self.coarse.items() if found >= MISFIT}

    @property
    def differs(self) -> bool:
        """Whether it gives something else elsewhere than in torch."""
        return self.runtime is not None and self.runtime.differs

    @property
    def defective(self) -> bool:
        """Whether more is lost here than the format must lose."""
        return bool(self.misfits) or self.differs

    def rank(self, elsewhere: bool = False) -> tuple[bool, bool, float]:
        """Return what sorts sites: defects first, then the largest effect, then the largest local error."""
        moved = elsewhere and self.runtime is not None and self.runtime.effect.signal > 0
        effect = self.runtime.effect if moved and self.runtime is not None else self.effect
        known = effect.signal > 0
        return not self.defective, not known, -(effect if known else self.local).ratio

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
    effects: bool | int = True,
    only: Collection[str] | None = None,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> list[SiteError]:
    """Return the error of every site over flat input batches.

    First those that lose more than they must; among these, and among the others, the largest effect (else local error).

    Args:
        effects: whether to measure effects; a number: only those of so many sites, of the largest local errors.
        only: names of sites to look at.
        observer: shows what sites give elsewhere than in torch.

    Memory: the activations of one batch, twice.
    """
    lockstep = _Lockstep(reference, quantized)
    sites = [name for name in lockstep.sites if only is None or name in only]
    work = _Work(lockstep, {name: SiteError(name, operator(lockstep.nodes[name])) for name in sites})
    measured: list[SiteError] | None = None
    with torch.no_grad(), (progress or Silent()).stage("error analysis") as stage:
        for flat in batches:
            work.begin(lockstep.exact(flat))
            lockstep.local(flat, work.exact, work.found, work.locally)
            if observer is not None:
                observer.local(flat, work.exact, sites, work.elsewhere)
            if measured is None:
                measured = sorted(work.found.values(), key=lambda site: site.rank())
                measured = measured if effects is True else measured[: int(effects)]
            for site in measured:
                work.effect(site)
                stage.advance()
            work.begin(work.exact)
            lockstep.propagated(flat, work.found, work.behind)
            if observer is not None:
                observer.propagated(flat, work.exact, sites, work.behind_elsewhere)
    return sorted(work.found.values(), key=lambda site: site.rank())


@dataclass
class _Work:
    """What is seen of the sites on one batch, and what it comes to."""

    lockstep: _Lockstep
    found: dict[str, SiteError]
    exact: Values = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)  # in torch
    shown: dict[str, tuple[str, Any]] = field(default_factory=dict)  # elsewhere: where, and the value there

    def begin(self, exact: Values) -> None:
        self.exact, self.made, self.shown = exact, {}, {}

    def locally(self, site: str, value: Any) -> None:
        self.found[site].local.add(value, self.exact[site])
        self.made[site] = value

    def elsewhere(self, site: str, where: str, value: Any, rounds: Rounds | None) -> None:
        seen = self.found[site].runtime = self.found[site].runtime or Elsewhere()
        exact, here = self.exact[where], self.lockstep.follow(site, self.made[site], where, self.exact)
        wanted, alike = (rounds(each) for each in (exact, here)) if rounds else (exact, here)
        seen.local.add(value, wanted)
        seen.expected.add(alike, wanted)
        seen.apart.add(value, alike)
        self.shown[site] = where, (exact + (value - wanted)).to(exact.dtype)

    def effect(self, site: SiteError) -> None:
        if site.node in self.made:
            _add(site.effect, *self.lockstep.effect(site.node, self.made[site.node], self.exact))
        if site.runtime is not None and site.runtime.differs and site.node in self.shown:
            _add(site.runtime.effect, *self.lockstep.effect(*self.shown[site.node], self.exact))

    def behind(self, site: str, value: Any) -> None:
        self.found[site].propagated.add(value, self.exact[site])

    def behind_elsewhere(self, site: str, where: str, value: Any, rounds: Rounds | None) -> None:
        seen, exact = self.found[site].runtime, self.exact[where]
        if seen is not None:
            seen.propagated.add(value, rounds(exact) if rounds else exact)


def site_spreads(reference: Program, quantized: Program, flat: list[Any], sites: Collection[str]) -> dict[str, Any]:
    """Return for each site `{"weights": Spread, "output": Spread}`, where it has them, on one flat input batch."""
    lockstep = _Lockstep(reference, quantized)
    found: dict[str, dict[str, Spread]] = {name: {} for name in lockstep.sites if name in sites}

    def compare(node: fx.Node, value: Any, values: Mapping[str, Any]) -> Any:
        if node.name in found:
            pairs = {"output": (exact[node.name], value)}
            for old, new in lockstep.arguments(node):
                if lockstep.constant(new) and isinstance(exact[old.name], Tensor) and exact[old.name].dim() > 1:
                    pairs["weights"] = exact[old.name], values[new.name]
            for what, (before, after) in pairs.items():
                if all(isinstance(each, Tensor) and each.is_floating_point() for each in (before, after)):
                    spread = Spread.of(before, after)
                    if spread is not None:
                        found[node.name][what] = spread
        return value

    with torch.no_grad():
        exact = lockstep.exact(flat)
        _run(quantized, flat, compare)
    return found


def _add(noise: Noise, made: list[Any], exact: list[Any]) -> None:
    for new, old in zip(made, exact, strict=True):
        noise.add(new, old)


class _Lockstep:
    """Two programs, run node by node; nodes of the same name, operator and shape are the same place."""

    def __init__(self, reference: Program, quantized: Program) -> None:
        self.reference, self.quantized = reference, quantized
        self.nodes = {node.name: node for node in reference.graph.nodes if node.op == "call_function"}
        self.shared = {
            node.name
            for node in quantized.graph.nodes
            if node.op == "call_function" and node.name in self.nodes and _same_place(node, self.nodes[node.name])
        }
        self._constant: set[fx.Node] = set()
        changed: set[fx.Node] = set()
        self.sites: list[str] = []
        known = {str(node.target): node for node in reference.graph.nodes if node.op == "get_attr"}
        for node in quantized.graph.nodes:
            sources = node.all_input_nodes
            if node.op == "get_attr" or (node.op == "call_function" and all(s in self._constant for s in sources)):
                self._constant.add(node)
            if node.op == "get_attr":
                if str(node.target) in known and not _same_weight(self.reference, self.quantized, str(node.target)):
                    changed.add(node)
            elif node.name in self.shared:
                if any(source in changed for source in sources):
                    self.sites.append(node.name)
            elif operator(node).startswith("graphopt.") or any(source in changed for source in sources):
                changed.add(node)
        self._order = {node: index for index, node in enumerate(reference.graph.nodes)}

    def constant(self, node: fx.Node) -> bool:
        """Return whether a node of the quantized program follows from weights alone."""
        return node in self._constant

    def arguments(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Return what a site reads in the reference, and in its place in the quantized program; empty if unlike."""
        old, new = (_sources(each) for each in (self.nodes[node.name], node))
        return list(zip(old, new, strict=True)) if len(old) == len(new) else []

    def exact(self, flat: list[Any]) -> Values:
        """Run the reference and return the value of every node."""
        values: Values = {}

        def keep(node: fx.Node, value: Any, _: Mapping[str, Any]) -> Any:
            values[node.name] = value
            return value

        _run(self.reference, flat, keep)
        return values

    def local(self, flat: list[Any], exact: Values, found: Mapping[str, SiteError], see: Show) -> None:
        """Run the quantized program with every shared node reset to its exact value, and show what the sites made."""

        def reset(node: fx.Node, value: Any, values: Mapping[str, Any]) -> Any:
            if node.op == "placeholder" or node.name not in self.shared:
                return value
            if node.name in found:
                see(node.name, value)
                self._parts(found[node.name], node, exact, values)
            return exact[node.name]

        _run(self.quantized, flat, reset)

    def _parts(self, site: SiteError, node: fx.Node, exact: Values, values: Mapping[str, Any]) -> None:
        """Measure what the weights alone, and the inputs alone, do to a site."""
        pairs = self.arguments(node)
        for old, new in pairs:
            before, after = exact[old.name], values[new.name]
            if new.name not in self.shared and isinstance(before, Tensor) and isinstance(after, Tensor):
                found = coarseness(new, before, after)
                if found is not None:
                    site.coarse[old.name] = max(found, site.coarse.get(old.name, 0.0))
        for noise, weights in ((site.weights, True), (site.inputs, False)):
            taken = [
                values[new.name] if self.constant(new) is weights else exact[old.name] for old, new in pairs
            ]
            if pairs and all(_fits(each, exact[old.name]) for each, (old, _) in zip(taken, pairs, strict=True)):
                given = iter(taken)
                noise.add(_call(self.nodes[node.name], lambda _, given=given: next(given)), exact[node.name])

    def propagated(self, flat: list[Any], found: Mapping[str, SiteError], see: Show) -> None:
        """Run the quantized program as it is and show what the sites made."""

        def compare(node: fx.Node, value: Any, _: Mapping[str, Any]) -> Any:
            if node.name in found:
                see(node.name, value)
            return value

        _run(self.quantized, flat, compare)

    def effect(self, where: str, made: Any, exact: Values) -> tuple[list[Any], list[Any]]:
        """Return the outputs with one value replaced, and the exact ones; only what lies behind runs again."""
        changed = self._behind(where, made, exact)
        outputs = self.reference.outputs
        read = [value for value in outputs if isinstance(value, fx.Node)]
        return [changed.get(value.name, exact[value.name]) for value in read], [exact[value.name] for value in read]

    def follow(self, where: str, made: Any, until: str, exact: Values) -> Any:
        """Return what a replaced value becomes at a node behind it."""
        return made if where == until else self._behind(where, made, exact, until)[until]

    def _behind(self, where: str, made: Any, exact: Values, until: str = "") -> Values:
        changed: Values = {where: made}
        for node in list(self.reference.graph.nodes)[self._order[self.nodes[where]] + 1 :]:
            if node.op == "call_function" and any(source.name in changed for source in node.all_input_nodes):
                changed[node.name] = _call(node, lambda each: changed.get(each.name, exact[each.name]))
            if node.name == until:
                break
        return changed


def _same_place(node: fx.Node, other: fx.Node) -> bool:
    return node.target == other.target and _shape(node) == _shape(other)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _same_weight(reference: Program, quantized: Program, name: str) -> bool:
    old, new = reference.weight(name), quantized.weight(name)
    return old is new or (old.dtype == new.dtype and torch.equal(old, new))


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a call reads, in order, one as often as it is read."""
    found: list[fx.Node] = []

    def note(each: fx.Node) -> fx.Node:
        found.append(each)
        return each

    fx.node.map_arg((node.args, node.kwargs), note)
    return found


def _fits(value: Any, like: Any) -> bool:
    return not isinstance(like, Tensor) or (isinstance(value, Tensor) and value.shape == like.shape)


def _run(program: Program, flat: list[Any], visit: Visit) -> None:
    """Run a program node by node; `visit` sees each value and returns the one that others are to read."""
    inputs = iter(flat)
    values: Values = {}
    last = {source: node for node in program.graph.nodes for source in node.all_input_nodes}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = visit(node, next(inputs), values)
        elif node.op == "get_attr":
            values[node.name] = visit(node, program.weight(node), values)
        elif node.op == "call_function":
            values[node.name] = visit(node, _call(node, lambda each: values[each.name]), values)
            for source in node.all_input_nodes:
                if last[source] is node:
                    del values[source.name]


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
