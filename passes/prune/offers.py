"""Widths as levels of a search: what readers become when a space has lost coordinates, the rest as it is.

    W' = argmin |W' h[K] - W h|^2, zero elsewhere        a level: the readers' weights, in the shape they had

Zeros in the readers are what deletion is, but for the size: a candidate is put together by swapping weights. A space
is offered where that holds (a norm that counts its coordinates would notice), where all its readers can be fitted, and
where no weight lies in two spaces that are: so that what widths save adds up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from graphopt.analysis.spaces import Analysis, Space, analyze
from graphopt.ir import Program, Rewriter, arguments
from graphopt.passes.prune.candidates import Candidate, Costs
from graphopt.passes.prune.deletion import Deletion
from graphopt.passes.prune.elimination import Fit, Normal, eliminate
from graphopt.passes.prune.ranking import Order, equations_of, fits_of
from graphopt.passes.prune.refit import new_arguments
from graphopt.pipeline import Context
from graphopt.search import Level, Offer, Store

_SAME = 1e-4  # relative: of outputs in float32


def width_offers(
    program: Program,
    analysis: Analysis,
    candidates: Sequence[Candidate],
    widths: Mapping[Space, Sequence[int]],
    context: Context,
    store: Store,
    spill: bool,
) -> list[Offer]:
    """Return an offer for each space, and put what its readers become at each width into the store."""
    apart = _apart(candidates)
    equations = equations_of(program, apart, context, spill)
    costs = Costs(program, analysis)
    found = []
    for each in apart:
        space, size, least = each.space, each.space.size, min(widths[each.space])
        made = _Readers(program, each, equations)
        show = {size - width: functools.partial(made.keep, width) for width in widths[space]}
        gone, errors = eliminate(made.fits, each.coordinates, size - least, each.fibres, show)
        kept = Order(gone.view(-1, *space.fibres), errors).kept(space, least)
        if not _is_deletion(program, space, kept, made.weights[least]):
            continue
        levels = [Level("whole", _spent(costs, space, size, least))]
        for width in widths[space]:
            store.put(space.name, f"width {width}", made.weights[width])
            levels.append(Level(f"width {width}", _spent(costs, space, width, least)))
        found.append(Offer(space.name, tuple(levels)))
    return found


class _Readers:
    """The readers of a space, and what they become.

    Attributes:
        fits: of all of them. weights: by width, the weights and biases by name.
    """

    def __init__(self, program: Program, each: Candidate, equations: Mapping[fx.Node, Sequence[Normal]]) -> None:
        self._program = program
        self._parts = {r.site: fits_of(program, r, equations[r.site]) for r in each.readers}
        self.fits = [fit for parts in self._parts.values() for fit in parts]
        self.weights: dict[int, dict[str, Tensor]] = {}

    def keep(self, width: int) -> None:
        """Remember the readers as they are now."""
        found = self.weights[width] = {}
        for site, parts in self._parts.items():
            solved = torch.stack([part.weight for part in parts if isinstance(part, Fit)])
            for name, value in new_arguments(self._program, site, solved).items():
                found[str(arguments(site)[name].target)] = value


def _apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates of which no two have a weight in common, and whose readers can all be fitted."""
    taken: set[str] = set()
    found = []
    for each in candidates:
        weights = {member.weight for member in each.space.members}
        if not each.products and each.readers and all(r.fitted for r in each.readers) and not weights & taken:
            taken |= weights
            found.append(each)
    return found


def _spent(costs: Costs, space: Space, width: int, least: int) -> dict[str, float]:
    """Return what a width costs beyond the least one, the other spaces whole."""
    now, base = {space: width}, {space: least}
    parameters = float(costs.parameters(now) - costs.parameters(base))
    return {"macs": float(costs.macs(now) - costs.macs(base)), "parameters": parameters}


def _is_deletion(program: Program, space: Space, kept: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """Return whether readers with zeros give what the program gives without these coordinates."""
    swapped = program.map_weights(lambda name, weight: weights.get(name, weight))
    twin = swapped.clone()
    analysis = analyze(twin)
    same = next((each for each in analysis.spaces if each.name == space.name), None)
    if same is None:
        return False
    rewriter = Rewriter(twin, "prune")
    Deletion(analysis, {same: kept}).apply(rewriter)
    rewriter.finish()
    flat = program.flat_example
    with torch.no_grad():
        for one, other in zip(swapped.run(flat), twin.run(flat), strict=True):
            floating = isinstance(one, Tensor) and one.is_floating_point()
            if floating and not float((one - other).abs().max()) <= _SAME * max(float(one.abs().max()), 1e-30):
                return False
    return True
