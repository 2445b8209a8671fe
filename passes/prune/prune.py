"""Prune widths: channels, neurons, heads and their dimensions go, and what reads them is fitted to do without.

    y = W2 f(W1 x)      ->   y' = W2' f(W1[K] x),     W2' = argmin |W2' h'[K] - y|^2 over the calibration data

Any space whose coordinates can be deleted is a candidate (`graphopt.passes.prune.deletion` says what that means for
norms, groups and attention), save for residual streams. How many coordinates of each stay follows from a ratio
for all, or from a budget over all of them together; which ones, from a criterion. Then, layer after layer, each reader
is solved anew on what the pruned layers before it give, against what the original gave: where it is added to a residual
stream, against the original sum, so that it also takes back what the stream has drifted.

Lossy. The result is a smaller dense graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.analysis.spaces import Analysis, Space, analyze
from graphopt.calibration.stream import Change, Reading, Stream
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Rewriter, arguments, operator
from graphopt.passes.prune.allocation import Bound, admissible, allocate, bounds_of, told
from graphopt.passes.prune.candidates import Candidate, Costs, Reader, find_candidates
from graphopt.passes.prune.criteria import CRITERIA, Scored, taylor_terms
from graphopt.passes.prune.deletion import Deletion
from graphopt.passes.prune.elimination import Fit, Normal, eliminate
from graphopt.passes.prune.refit import check_rows, given_matrix, multiplied, new_arguments, outputs_of, rows_of, there
from graphopt.pipeline import Context, LossyPass, site_names

Name = Literal["reconstruction", "magnitude", "lamp", "distortion", "activation", "wanda", "fidelity", "taylor"]


@dataclass(frozen=True)
class Prune(LossyPass):
    """Prune widths.

    Attributes:
        ratio: the share of each space that goes; None: what the budget's macs_ratio, params_ratio and size_ratio ask
            for, shared out among the spaces by what it costs each.
        criterion: by which coordinates go. reconstruction: backward elimination, by the error that a reader fitted
            anew leaves. Others: see `graphopt.passes.prune.criteria`.
        resolve: whether readers are fitted anew; else they only lose what they read.
        floor: share of each space that stays at least.
        multiple: widths are multiples of it where that leaves a choice; 0: of what the target's kernels like.
        spill: keep activations in files between stages.
    """

    requires = ("canonicalize",)

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    criterion: Name = "reconstruction"
    resolve: bool = True
    floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    multiple: Annotated[int, Field(ge=0)] = 0
    spill: bool = False

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        analysis = analyze(program)
        candidates = self._candidates(program, analysis, rewriter)
        widths = self._widths(program, analysis, candidates, context)
        chosen = [each for each in candidates if widths[each.space] < each.space.size]
        if chosen:
            scores = {} if self.criterion == "reconstruction" else self._scores(program, chosen, context)
            ranked = [each for each in chosen if each.space in scores]
            kept = {each.space: _kept(each, scores[each.space], widths[each.space]) for each in ranked}
            values, errors = {}, {}
            if self.resolve or not kept:
                solver = _Solver(program, chosen, widths, kept, context, self.spill)
                kept, values, errors = solver.kept, solver.values, solver.errors
            Deletion(analysis, kept).apply(rewriter, values if self.resolve else {})
            for each in chosen:
                stay = f"{widths[each.space]} of {each.space.size} coordinates stay"
                rewriter.touch(each.where, f"{each.space.name}: {stay}")
            rewriter.note(widths={each.space.name: [each.space.size, widths[each.space]] for each in chosen})
            rewriter.note(relative_errors=errors, kept={space.name: each.tolist() for space, each in kept.items()})
        elif not candidates:
            rewriter.decline("program", "it has no width that can be pruned")
        return rewriter.finish()

    def _candidates(self, program: Program, analysis: Analysis, rewriter: Rewriter) -> list[Candidate]:
        def decline(space: Space, reason: str) -> None:
            rewriter.decline(space.members[0].weight, reason)

        found: list[Candidate] = []
        for each in find_candidates(program, analysis, decline):
            calls = dict.fromkeys(user for member in each.space.members for user in member.node.users)
            if reason := self.refusal_of([name for call in calls for name in site_names(program, call)]):
                decline(each.space, reason)
            elif each.others or not each.readers:
                decline(each.space, f"{each.space.name} has readers without weights to fit")
            elif shared := [r.site for r in each.readers if len(arguments(r.site)["weight"].users) > 1]:
                decline(each.space, f"{each.space.name} is read by {shared[0].name}, whose weight others read as well")
            elif along := [other.space.name for other in found if _along(each.space, other.space)]:
                decline(each.space, f"{each.space.name} may differ along {along[0]}, which loses coordinates itself")
            else:
                found.append(each)
        return found

    def _widths(
        self, program: Program, analysis: Analysis, candidates: Sequence[Candidate], context: Context
    ) -> dict[Space, int]:
        """Return the width of every candidate; GraphoptError where no widths meet the budget."""
        multiple = self.multiple or context.target.width_multiple
        allowed = self._allowed(candidates, multiple)
        if self.ratio is not None:
            wanted = {space: space.size * (1 - self.ratio) for space in allowed}
            return {space: min(each, key=lambda w: abs(w - wanted[space])) for space, each in allowed.items()}
        costs = Costs(program, analysis)
        bounds = bounds_of(context, program, costs.macs, costs.parameters, "prune(ratio=...)")
        if all(bound.of({}) <= bound.limit for bound in bounds):
            return {space: space.size for space in allowed}

        def missed() -> list[Bound]:
            least = {space: each[-1] for space, each in allowed.items()}
            return [bound for bound in bounds if bound.of(least) > bound.limit]

        while missed() and multiple > 1 and not self.multiple:
            multiple //= 2  # what is not reached with the widths that kernels like is reached with others
            allowed = self._allowed(candidates, multiple)
        least = {space: each[-1] for space, each in allowed.items()}
        if short := missed():
            raise GraphoptError(
                f"{self.name} cannot meet {told(short, least)} with the {len(candidates)} spaces that can lose width "
                f"and floor={self.floor:g}; give more, or a lower floor{self._held(program, analysis)}"
            )
        if self.criterion == "reconstruction":
            errors = _curves(program, candidates, allowed, context, self.spill)
        else:
            scores = self._scores(program, candidates, context)
            errors = {each.space: _lost(each, scores[each.space]) for each in candidates}
        by_width = {space: {space.size - gone: error for gone, error in enumerate(errors[space])} for space in allowed}
        return allocate(by_width, allowed, bounds)

    def _allowed(self, candidates: Sequence[Candidate], multiple: int) -> dict[Space, list[int]]:
        return {each.space: admissible(each, multiple, self.floor) for each in candidates}

    def _held(self, program: Program, analysis: Analysis) -> str:
        """Return what keeps the largest space whole that cannot lose anything, as the end of a sentence."""
        held: dict[Space, str] = {}
        find_candidates(program, analysis, held.__setitem__)
        if not held:
            return ""
        return f"; {held[max(held, key=lambda space: len(space.members) * space.size)]}"

    def _scores(self, program: Program, candidates: Sequence[Candidate], context: Context) -> dict[Space, Tensor]:
        """Return what every coordinate is worth, [fibres, size] by space."""
        criterion = CRITERIA[self.criterion]
        gradients = taylor_terms(program, candidates, context) if criterion.gradients else {}
        equations = _equations(program, candidates, context, self.spill) if criterion.inputs else {}
        found = {}
        for each in candidates:
            score = criterion.score(Scored(program, each, equations, gradients.get(each.space.name)))
            score = score if criterion.comparable else score / score.sum().clamp(min=1e-300)
            found[each.space] = score.view(each.fibres, each.space.size)
        return found


def _along(one: Space, other: Space) -> bool:
    """Return whether each of two spaces may lose other coordinates at every index of the other."""
    beside = [{atom.root for atom in space.sibling_atoms} for space in (one, other)]
    return other.atom in beside[0] and one.atom in beside[1]


def _kept(each: Candidate, scores: Tensor, width: int) -> Tensor:
    """Return the indices of the highest scores, as many in each fibre."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :width].sort(-1).values
    return best.view(*each.space.fibres, width)


def _lost(each: Candidate, scores: Tensor) -> list[float]:
    """Return what is lost when 0, 1, 2 ... of the lowest scores of every fibre are gone."""
    return [0.0, *scores.sort(-1).values.sum(0).cumsum(0).tolist()]


def _equations(
    program: Program, candidates: Sequence[Candidate], context: Context, spill: bool
) -> dict[fx.Node, list[Normal]]:
    """Return the normal equations of all readers in the program as it is."""
    equations: dict[fx.Node, list[Normal]] = {}

    def show(read: Reading) -> None:
        _update(program, equations, read.site, read.x, read.x, None)

    sites = dict.fromkeys(reader.site for each in candidates for reader in each.readers)
    batches = context.needed_calibration("prune")
    Stream(program, list(sites), batches, context.progress, spill=spill).run(show, lambda ready: {})
    return equations


def _curves(
    program: Program,
    candidates: Sequence[Candidate],
    allowed: Mapping[Space, Sequence[int]],
    context: Context,
    spill: bool,
) -> dict[Space, list[float]]:
    """Return by space the error for 0, 1, 2 ... coordinates gone of each fibre, each space pruned by itself."""
    readers = {reader.site: reader for each in candidates for reader in each.readers}
    equations: dict[fx.Node, list[Normal]] = {}
    errors: dict[Space, list[float]] = {}
    waiting = {each.space: {reader.site for reader in each.readers} for each in candidates}

    def show(read: Reading) -> None:
        _update(program, equations, read.site, read.x, read.x, None)

    def settle(sites: list[fx.Node]) -> dict[fx.Node, Change]:
        for each in candidates:
            left = waiting[each.space]
            left -= set(sites)
            if left or each.space in errors or not left.isdisjoint(sites):
                continue
            fits = [fit for reader in each.readers for fit in _fits(program, reader, equations[reader.site])]
            most = each.space.size - allowed[each.space][-1]
            _, found = eliminate(fits, each.coordinates, most * each.fibres, each.fibres)
            errors[each.space] = [0.0, *found[each.fibres - 1 :: each.fibres]]
        for site in sites:
            if all(site not in {r.site for r in each.readers} or each.space in errors for each in candidates):
                equations.pop(site)
        return {}

    Stream(program, list(readers), context.needed_calibration("prune"), context.progress, spill=spill).run(show, settle)
    return errors


class _Solver:
    """Chooses what stays, where that is not `kept` already, and fits the readers to it, layer after layer.

    Attributes:
        kept: by space, the indices that stay.
        values: new weights and biases, by the node that reads them, of the old size with zeros where nothing is read.
        errors: by reader, the squared error that the fit leaves, relative to what its target varies.
    """

    def __init__(
        self,
        program: Program,
        candidates: Sequence[Candidate],
        widths: Mapping[Space, int],
        kept: Mapping[Space, Tensor],
        context: Context,
        spill: bool,
    ) -> None:
        self.program = program
        self.kept = dict(kept)
        self.values: dict[fx.Node, Tensor] = {}
        self.errors: dict[str, float] = {}
        self._widths = widths
        self._of: dict[fx.Node, list[tuple[Candidate, Reader]]] = {}
        for each in candidates:
            for reader in each.readers:
                self._of.setdefault(reader.site, []).append((each, reader))
        self._equations: dict[fx.Node, list[Normal]] = {}
        beside = _joined(program, list(self._of))
        batches = context.needed_calibration("prune")
        Stream(program, list(self._of), batches, context.progress, True, spill, beside).run(self._show, self._settle)

    def _show(self, read: Reading) -> None:
        drift = None if read.beside is None or read.beside_exact is None else read.beside_exact - read.beside
        _update(self.program, self._equations, read.site, read.x, read.exact, drift)

    def _settle(self, sites: list[fx.Node]) -> dict[fx.Node, Change]:
        changed: dict[fx.Node, Change] = {}
        for site in sites:
            normals = self._equations.pop(site)
            gone = torch.zeros_like(self._of[site][0][1].labels, dtype=torch.bool)
            # What was chosen before counts when several spaces share the inputs, as heads and their dimensions do.
            for each, reader in sorted(self._of[site], key=lambda pair: pair[0].space not in self.kept):
                if each.space not in self.kept:
                    self._choose(each, _fits(self.program, reader, normals, gone))
                gone |= ~_stays(each, self.kept[each.space])[reader.labels] & (reader.labels >= 0)
            changed[site] = self._solve(site, normals, gone)
        return changed

    def _choose(self, each: Candidate, fits: Sequence[Fit]) -> None:
        width, size = self._widths[each.space], each.space.size
        gone, _ = eliminate(fits, each.coordinates, (size - width) * each.fibres, each.fibres)
        stays = torch.ones(each.coordinates, dtype=torch.bool)
        stays[torch.tensor(gone, dtype=torch.int64)] = False
        self.kept[each.space] = stays.view(each.fibres, size).nonzero()[:, 1].view(*each.space.fibres, width)

    def _solve(self, site: fx.Node, normals: Sequence[Normal], gone: Tensor) -> dict[str, Tensor]:
        named = arguments(site)
        check_rows("prune", site, normals[0].count, min(int((~out).sum()) for out in gone) + normals[0].constant)
        fits = _fits(self.program, Reader(site, torch.full(gone.shape, -1)), normals, gone)
        self.errors[site.name] = sum(fit.error() for fit in fits) / len(fits)
        changed = new_arguments(self.program, site, torch.stack([fit.weight for fit in fits]))
        self.values.update({named[name]: value for name, value in changed.items()})
        return changed


def _stays(each: Candidate, kept: Tensor) -> Tensor:
    """Return bool [coordinates], fibre after fibre."""
    stays = torch.zeros(each.fibres, each.space.size, dtype=torch.bool)
    return stays.scatter(1, kept.expand(*each.space.fibres, kept.shape[-1]).reshape(each.fibres, -1), True).flatten()


def _joined(program: Program, sites: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return what the output of a site is added to, where that is there by the time the site is reached."""
    found: dict[fx.Node, fx.Node] = {}
    for site in sites:
        users = list(site.users)
        if len(users) != 1 or operator(users[0]) != "add" or arguments(users[0]).get("alpha", 1) != 1:
            continue
        named = arguments(users[0])
        other = named["other"] if named["self"] is site else named["self"]
        same = isinstance(other, fx.Node) and other.op == "call_function" and other is not site
        if same and other.meta["val"].shape == site.meta["val"].shape and there(program, set(sites), other, site):
            found[site] = other
    return found


def _update(
    program: Program,
    equations: dict[fx.Node, list[Normal]],
    site: fx.Node,
    x: Tensor,
    exact: Tensor | None,
    drift: Tensor | None,
) -> None:
    """Add a batch to the equations of a site, one for each part: what it reads, and what it should give."""
    weight = program.weight(arguments(site)["weight"])
    matrix = given_matrix(program, site)
    rows = rows_of(site, x, weight)
    given = rows if exact is None or exact is x else rows_of(site, exact, weight)
    inputs = given.shape[2]
    target, constant = multiplied(given, matrix), matrix.shape[1] > inputs
    if drift is not None:
        target = target + outputs_of(site, drift, len(target)).to(target.dtype)
    if site not in equations:
        equations[site] = [Normal(inputs, target.shape[2], constant) for _ in target]
    for part, normal in enumerate(equations[site]):
        normal.update(rows[part], target[part])


def _fits(
    program: Program, reader: Reader, normals: Sequence[Normal], gone: Tensor | None = None
) -> list[Fit]:
    """Return a reader fitted, one for each part, without the inputs that are `gone` [P, K]."""
    away = int(reader.labels.max()) + 1
    labels = reader.labels if gone is None else torch.where(gone, away, reader.labels)
    parts = zip(normals, given_matrix(program, reader.site), labels, strict=True)
    fits = [Fit(normal, part, own) for normal, part, own in parts]
    for fit in fits:
        fit.remove([away])
    return fits
