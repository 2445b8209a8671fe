"""Prune widths: channels, neurons, heads and their dimensions, the residual stream; what reads them is fitted anew.

    y = W2 f(W1 x)      ->   y' = W2' f(W1[K] x),     W2' = argmin |W2' h'[K] - y|^2 over the calibration data

Any space whose coordinates can be deleted is a candidate (`graphopt.passes.prune.deletion` says what that means for
norms, groups and attention). How many coordinates of each stay follows from a ratio for all, or from a budget over all
of them together; which ones, from a criterion. When they are gone, each reader is solved anew, layer after layer, on
what the pruned layers before it give, against what the original gave: where it is added to a residual stream, against
the original sum, so that it also takes back what the stream has drifted.

Lossy. The result is a smaller dense graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.analysis import macs, parameters
from graphopt.analysis.spaces import Analysis, Space, analyze
from graphopt.analysis.spaces.axes import axis_size
from graphopt.errors import GraphoptError, nearest
from graphopt.ir import Changes, Program, Rewriter
from graphopt.passes.prune.allocation import Bound, admissible, allocate, bounds_of, told
from graphopt.passes.prune.candidates import Candidate, Costs, find_candidates
from graphopt.passes.prune.deletion import Deletion
from graphopt.passes.prune.latency import LatencyTable, latency_of
from graphopt.passes.prune.offers import width_offers
from graphopt.passes.prune.ranking import by_criterion, by_reconstruction
from graphopt.passes.prune.refit import fittable, in_order, joined, output_dim, refit
from graphopt.passes.prune.rotation import spread, turn
from graphopt.pipeline import Context, LossyPass, site_names
from graphopt.search import Choosing, Offer, Store

_ORDER = "prune(ratio=...)"
_TRIES = 6  # widths whose latency is measured
_NEARER = 0.98  # of what the table has to tell for the next try

Name = Literal[
    "reconstruction", "variance", "magnitude", "lamp", "distortion", "activation", "wanda", "fidelity", "taylor"
]


@dataclass(frozen=True)
class Prune(LossyPass, Choosing):
    """Prune widths.

    Attributes:
        ratio: the share of each space that goes; None: what the budget's macs_ratio, params_ratio, size_ratio and
            latency_ratio ask for, shared out among the spaces by what it costs each.
        criterion: by which coordinates go. reconstruction: backward elimination, by the error that a reader fitted
            anew leaves. Others: see `graphopt.passes.prune.criteria`.
        turn: whether spaces that are free to are turned to their principal coordinates before, so that few of them hold
            most of what is there; see `graphopt.passes.prune.rotation`.
        streams: whether residual streams lose coordinates, too: the hidden width.
        resolve: whether readers are fitted anew; else they only lose what they read.
        floor: share of each space that stays at least.
        multiple: widths are multiples of it where that leaves a choice; 0: of what the target's kernels like.
        spill: keep activations in files between stages.
        widths: of single spaces, as `space=width`; others stay whole (`allocate` chooses so).
        shares: of each space that a search may let stay.
    """

    # The last three let residual streams be turned.
    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "fold_layer_scale", "fold_norm_affine", "center_norms")

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    criterion: Name = "reconstruction"
    turn: bool = True
    streams: bool = True
    resolve: bool = True
    floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    multiple: Annotated[int, Field(ge=0)] = 0
    spill: bool = False
    widths: tuple[str, ...] = ()
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        analysis = analyze(program)
        candidates = self._candidates(
            program, analysis, lambda space, reason: rewriter.decline(space.members[0].weight, reason)
        )
        if not candidates:
            rewriter.decline("program", "it has no width that can be pruned")
            return rewriter.finish()
        if self.widths:
            named = self._named(candidates)
            candidates = [each for each in candidates if each.space.name in named]
        elif not self._goes(program, candidates, context):
            return rewriter.finish()
        turned = set()
        if self.turn and not self.widths and context.calibration is not None:
            turned = turn(rewriter, analysis, candidates, context)
            analysis = analyze(program)
            candidates = self._candidates(program, analysis, lambda *_: None)
        kept = self._kept(program, analysis, candidates, context)
        chosen = [each for each in candidates if each.space in kept]
        before = program.clone()
        deletion = Deletion(analysis, kept)
        sites, left = _to_fit(program, analysis, deletion, chosen) if self.resolve else ({}, {})
        deletion.apply(rewriter)
        widths = {each.space.name: [each.space.size, kept[each.space].shape[-1]] for each in chosen}
        for each in chosen:
            size, width = widths[each.space.name]
            rewriter.touch(each.where, f"{each.space.name}: {width} of {size} coordinates stay")
        rewriter.note(widths=widths, kept={space.name: each.tolist() for space, each in kept.items()})
        rewriter.note(readers={each.space.name: [reader.site.name for reader in each.readers] for each in chosen})
        if sites:
            batches = context.needed_calibration(self.name)
            aims = in_order(program, sites, alone=True)
            how = (batches, context.progress, self.name, self.spill, left)
            values, errors = refit(before, program, aims, *how, leave=True)
            if not errors:
                refit(before, program, aims, *how)  # says which has too few rows of data
            for site in (site for site in aims if site.name not in errors):
                rewriter.decline(site, "calibration data gives too few rows for its inputs; it is not fitted anew")
            for node, value in values.items():
                rewriter.replace(node, rewriter.weight(value, str(node.target), value.dtype, node))
            rewriter.note(relative_errors=errors)
        if turned:
            spread(rewriter, turned, context.seed)
        return rewriter.finish()

    def offers(self, program: Program, context: Context, store: Store) -> list[Offer]:
        """Return widths to choose from for spaces inside of blocks."""
        if not self.shares:
            raise GraphoptError(f"{self.name} has no levels to choose from; give shares=[0.75, 0.5]")
        analysis = analyze(program)
        candidates = replace(self, streams=False)._candidates(program, analysis, lambda *_: None)
        allowed = self._allowed(candidates, self.multiple or context.target.width_multiple)
        widths = {space: _nearest(each, self.shares) for space, each in allowed.items()}
        candidates = [each for each in candidates if widths[each.space]]
        return width_offers(program, analysis, candidates, widths, context, store, self.spill)

    def chosen(self, levels: Mapping[str, str]) -> Prune | None:
        widths = tuple(f"{name}={level.removeprefix('width ')}" for name, level in levels.items())
        return replace(self, widths=widths, shares=(), ratio=None, streams=False) if widths else None

    def _named(self, candidates: Sequence[Candidate]) -> dict[str, int]:
        """Return the widths that are given by name."""
        sizes = {each.space.name: each.space.size for each in candidates}
        found = {}
        for each in self.widths:
            name, _, width = each.rpartition("=")
            if name not in sizes:
                near = nearest(name, sizes)
                raise GraphoptError(f"{self.name}: there is no space {name!r} that can lose width{near}")
            if not width.isdigit() or not 0 < int(width) <= sizes[name]:
                raise GraphoptError(f"{self.name}: {name} cannot have the width {width!r}; it has {sizes[name]}")
            found[name] = int(width)
        return found

    def _candidates(
        self, program: Program, analysis: Analysis, decline: Callable[[Space, str], Any]
    ) -> list[Candidate]:
        found: list[Candidate] = []
        for each in find_candidates(program, analysis, decline):
            if reason := self._left_out(program, each):
                decline(each.space, reason)
            elif each.stream and not self.streams:
                decline(each.space, f"{each.space.name} is a residual stream, which every block reads: see streams")
            elif along := [other.space.name for other in found if _along(each.space, other.space)]:
                decline(each.space, f"{each.space.name} may differ along {along[0]}, which loses coordinates itself")
            else:
                found.append(each)
        return found

    def _left_out(self, program: Program, each: Candidate) -> str:
        """Return why `only` or `skip` keep a space; a stream must be theirs wherever it goes."""
        calls = dict.fromkeys(user for member in each.space.members for user in member.node.users)
        names = [list(site_names(program, call)) for call in calls]
        asked = names if each.stream else [[name for of_call in names for name in of_call]]
        return next((reason for of_calls in asked if (reason := self.refusal_of(of_calls))), "")

    def _goes(self, program: Program, candidates: Sequence[Candidate], context: Context) -> bool:
        """Return whether anything goes."""
        if self.ratio is not None:
            allowed = self._allowed(candidates, self.multiple or context.target.width_multiple)
            return any(self._by_ratio(each) < each[0] for each in allowed.values())
        bounds = bounds_of(context, program, macs, parameters, _ORDER, lambda: latency_of(context, program, self.name))
        return any(bound.of(program) > bound.limit for bound in bounds)

    def _kept(
        self, program: Program, analysis: Analysis, candidates: Sequence[Candidate], context: Context
    ) -> dict[Space, Tensor]:
        """Return which coordinates stay, of the spaces that lose any; GraphoptError where no widths meet the budget."""
        if self.widths:
            named = self._named(candidates)
            widths = least = {each.space: named[each.space.name] for each in candidates}
        elif self.ratio is not None:
            allowed = self._allowed(candidates, self.multiple or context.target.width_multiple)
            widths = least = {space: self._by_ratio(each) for space, each in allowed.items()}
        else:
            allowed, bounds = self._limits(program, analysis, candidates, context)
            least = {space: each[-1] for space, each in allowed.items()}
        if self.criterion == "reconstruction":
            orders = by_reconstruction(program, candidates, least, context, self.spill)
        else:
            orders = by_criterion(program, candidates, self.criterion, context, self.spill)
        if self.ratio is None and not self.widths:
            errors = {s: {width: orders[s].errors[s.size - width] for width in each} for s, each in allowed.items()}
            widths = self._timed(lambda now: allocate(errors, allowed, now), bounds)
        return {space: orders[space].kept(space, width) for space, width in widths.items() if width < space.size}

    def _timed(
        self, widths_for: Callable[[Sequence[Bound]], dict[Space, int]], bounds: list[Bound]
    ) -> dict[Space, int]:
        """Return widths whose latency, where that is bounded, has been measured: a table only comes near it."""
        table = next((bound.of for bound in bounds if isinstance(bound.of, LatencyTable)), None)
        if table is None:
            return widths_for(bounds)
        asked, now = next(bound.ratio for bound in bounds if bound.of is table), 1.0
        tried = []
        for _ in range(_TRIES):
            widths = widths_for([replace(b, ratio=b.ratio * now) if b.of is table else b for b in bounds])
            tried.append(table.measured(widths))
            if tried[-1] <= asked:
                return widths
            now *= _NEARER * asked / tried[-1]
        raise GraphoptError(
            f"{self.name} cannot meet budget.latency_ratio ≤ {asked:g}: what was measured gets down to {min(tried):.3g}"
        )

    def _by_ratio(self, allowed: Sequence[int]) -> int:
        assert self.ratio is not None
        wanted = allowed[0] * (1 - self.ratio)
        return min(allowed, key=lambda width: abs(width - wanted))

    def _limits(
        self, program: Program, analysis: Analysis, candidates: Sequence[Candidate], context: Context
    ) -> tuple[dict[Space, list[int]], list[Bound]]:
        """Return the widths that each space may have, and what they must hold."""
        costs = Costs(program, analysis)
        multiple = self.multiple or context.target.width_multiple
        while True:
            allowed = self._allowed(candidates, multiple)
            table = functools.partial(LatencyTable, program, costs, allowed, context, self.name)
            bounds = bounds_of(context, program, costs.macs, costs.parameters, _ORDER, table)
            least = {space: each[-1] for space, each in allowed.items()}
            short = [bound for bound in bounds if bound.of(least) > bound.limit]
            if not short:
                return allowed, bounds
            if multiple == 1 or self.multiple:
                raise GraphoptError(
                    f"{self.name} cannot meet {told(short, least)} with the {len(candidates)} spaces that can lose "
                    f"width and floor={self.floor:g}; give more, or a lower floor{self._held(program, analysis)}"
                )
            multiple //= 2  # what is not reached with the widths that kernels like is reached with others

    def _allowed(self, candidates: Sequence[Candidate], multiple: int) -> dict[Space, list[int]]:
        return {each.space: admissible(each, multiple, self.floor) for each in candidates}

    def _held(self, program: Program, analysis: Analysis) -> str:
        """Return what keeps the largest space whole that cannot lose anything, as the end of a sentence."""
        held: dict[Space, str] = {}
        self._candidates(program, analysis, held.__setitem__)
        if not held:
            return ""
        return f"; {held[max(held, key=lambda space: len(space.members) * space.size)]}"


def _nearest(allowed: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Return the admissible widths nearest to shares of the first, which is the whole, descending, without that."""
    found = {min(allowed, key=lambda width: (abs(width - share * allowed[0]), width)) for share in shares}
    return sorted(found - {allowed[0]}, reverse=True)


def _along(one: Space, other: Space) -> bool:
    """Return whether each of two spaces may lose other coordinates at every index of the other."""
    beside = [{atom.root for atom in space.sibling_atoms} for space in (one, other)]
    return other.atom in beside[0] and one.atom in beside[1]


def _to_fit(
    program: Program, analysis: Analysis, deletion: Deletion, chosen: Sequence[Candidate]
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, Tensor]]:
    """Return what is fitted anew, and the outputs that are left of those that have lost some.

    These are the readers of what has gone, and what is added to a residual stream behind it. Each comes with the
    addition, where there is one, else with itself.
    """
    readers = {reader.site for each in chosen for reader in each.readers if reader.fitted}
    sites: dict[fx.Node, fx.Node] = {}
    left: dict[fx.Node, Tensor] = {}
    changed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        axes = deletion.axes(node)
        if any(each in changed for each in node.all_input_nodes) or any(map(deletion.touches, axes)):
            changed.add(node)
        inputs = [each for each in node.all_input_nodes if each.op != "get_attr"]
        join = joined(node)
        behind = join is not None and fittable(program, node) and inputs[0] in changed
        if node not in readers and not behind:
            continue
        dim = output_dim(program, node)
        if any(deletion.touches(axis) for place, axis in enumerate(axes) if place - len(axes) != dim):
            continue
        sites[node] = node if join is None else join
        if deletion.touches(axes[dim]):
            left[node] = deletion.selection.take([axes[dim]], torch.arange(axis_size(axes[dim])[0]))
    return sites, left
