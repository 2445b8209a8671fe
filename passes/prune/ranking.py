"""In which order the coordinates of every space go, and what is lost with them, each space by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.analysis.spaces import Space
from graphopt.calibration.gradients import Watch, read_all
from graphopt.calibration.stream import Change, Reading, Stream
from graphopt.ir import Program, arguments
from graphopt.passes.prune.candidates import Candidate, Product, Reader
from graphopt.passes.prune.criteria import CRITERIA, Scored, taylor_terms
from graphopt.passes.prune.elimination import Fit, Normal, Unfitted, eliminate
from graphopt.passes.prune.refit import given_matrix, multiplied, rows_of
from graphopt.pipeline import Context


@dataclass(frozen=True)
class Order:
    """How a space loses coordinates.

    Attributes:
        gone: int64 [n, *fibres], which of each fibre goes first, second, ...
        errors: what is lost when 0, 1, 2 ... of each fibre are gone, in a measure that is comparable between spaces.
    """

    gone: Tensor
    errors: list[float]

    def kept(self, space: Space, width: int) -> Tensor:
        """Return the indices that stay, [*fibres, width], ascending."""
        stays = torch.ones(*space.fibres, space.size, dtype=torch.bool)
        stays.scatter_(-1, self.gone[: space.size - width].movedim(0, -1), False)
        return stays.nonzero()[:, -1].view(*space.fibres, width)


def by_score(space: Space, scores: Tensor) -> Order:
    """Return the order of ascending scores [fibres, size], whose sum is what is lost."""
    ascending = scores.sort(dim=-1, stable=True)
    gone = ascending.indices.mT.reshape(space.size, *space.fibres)
    return Order(gone, [0.0, *ascending.values.sum(0).cumsum(0).tolist()])


def by_criterion(
    program: Program, candidates: Sequence[Candidate], name: str, context: Context, spill: bool
) -> dict[Space, Order]:
    """Return orders by one of the criteria that give every coordinate a number."""
    criterion = CRITERIA[name]
    gradients = taylor_terms(program, candidates, context) if criterion.gradients else {}
    equations = equations_of(program, candidates, context, spill) if criterion.inputs else {}
    products = _products(program, candidates, context) if criterion.inputs else {}
    found = {}
    for each in candidates:
        given = Scored(program, each, equations, products.get(each.space, ()), gradients.get(each.space.name))
        score = criterion.score(given)
        score = score if criterion.comparable else score / score.sum().clamp(min=1e-300)
        found[each.space] = by_score(each.space, score.view(each.fibres, each.space.size))
    return found


def by_reconstruction(
    program: Program, candidates: Sequence[Candidate], least: Mapping[Space, int], context: Context, spill: bool
) -> dict[Space, Order]:
    """Return orders of backward elimination by the error that readers leave when they are fitted anew.

    `least`: the smallest width of each space, beyond which nothing needs to be known.
    """
    equations: dict[fx.Node, list[Normal]] = {}
    found: dict[Space, Order] = {}
    products = _products(program, candidates, context)
    waiting = {each.space: {reader.site for reader in each.readers} for each in candidates}

    def eliminated(each: Candidate) -> Order:
        fits: list[Fit | Unfitted] = list(products.get(each.space, ()))
        fits += [fit for reader in each.readers for fit in fits_of(program, reader, equations[reader.site])]
        size, fibres = each.space.size, each.fibres
        gone, errors = eliminate(fits, each.coordinates, size - least[each.space], fibres)
        return Order(gone.view(-1, *each.space.fibres), errors)

    def show(read: Reading) -> None:
        _update(program, equations, read)

    def settle(sites: list[fx.Node]) -> dict[fx.Node, Change]:
        for each in candidates:
            waiting[each.space] -= set(sites)
            if each.space not in found and not waiting[each.space]:
                found[each.space] = eliminated(each)
        needed = {reader.site for each in candidates if each.space not in found for reader in each.readers}
        for site in [site for site in equations if site not in needed]:
            del equations[site]
        return {}

    sites = dict.fromkeys(reader.site for each in candidates for reader in each.readers)
    batches = context.needed_calibration("prune")
    Stream(program, list(sites), batches, context.progress, spill=spill).run(show, settle)
    if not sites:
        settle([])
    return found


def equations_of(
    program: Program, candidates: Sequence[Candidate], context: Context, spill: bool
) -> dict[fx.Node, list[Normal]]:
    """Return the normal equations of all readers in the program as it is."""
    equations: dict[fx.Node, list[Normal]] = {}

    def show(read: Reading) -> None:
        _update(program, equations, read)

    sites = dict.fromkeys(reader.site for each in candidates for reader in each.readers)
    batches = context.needed_calibration("prune")
    Stream(program, list(sites), batches, context.progress, spill=spill).run(show, lambda ready: {})
    return equations


def _update(program: Program, equations: dict[fx.Node, list[Normal]], read: Reading) -> None:
    """Add a batch to the equations of a site, one for each part: what it reads, and what it gives."""
    matrix = given_matrix(program, read.site)
    rows = rows_of(read.site, read.x, program.weight(arguments(read.site)["weight"]))
    target = multiplied(rows, matrix)
    if read.site not in equations:
        inputs = rows.shape[2]
        equations[read.site] = [Normal(inputs, target.shape[2], matrix.shape[1] > inputs) for _ in target]
    for normal, own, wanted in zip(equations[read.site], rows, target, strict=True):
        normal.update(own, wanted)


def fits_of(program: Program, reader: Reader, normals: Sequence[Normal]) -> list[Fit | Unfitted]:
    """Return what is left of a reader, for each of its parts."""
    fits: list[Fit | Unfitted] = []
    for normal, matrix, labels in zip(normals, given_matrix(program, reader.site), reader.labels, strict=True):
        if reader.fitted:
            fits.append(Fit(normal, matrix, labels))
        else:
            weight, gram = matrix[: normal.inputs], normal.gram[: normal.inputs, : normal.inputs]
            fits.append(Unfitted(gram * (weight @ weight.mT), labels, normal.variance))
    return fits


def _products(
    program: Program, candidates: Sequence[Candidate], context: Context
) -> dict[Space, list[Unfitted]]:
    """Return what products of two activations lose of each space; one reading of the data if there are any."""
    asked = [(each, product) for each in candidates for product in each.products]
    watched: dict[fx.Node, list[_Terms]] = {}
    terms = [(each.space, _Terms(product, each.coordinates)) for each, product in asked]
    for _, term in terms:
        watched.setdefault(term.product.site, []).append(term)

    def show(node: fx.Node, values: Mapping[fx.Node, Tensor], result: Tensor) -> Tensor:
        for term in watched[node]:
            term.update(values[term.product.left], values[term.product.right])
        return result

    if asked:
        watch = Watch(program, list(watched), show)
        with torch.no_grad():
            read_all("scores", watch.run, context.needed_calibration("prune"), context.progress)
    found: dict[Space, list[Unfitted]] = {}
    for space, term in terms:
        found.setdefault(space, []).append(term.done())
    return found


@dataclass(eq=False)
class _Terms:
    """Sums up (X^T X) * (Y^T Y) of the operands X [T, E] and Y [S, E] of a product X Y^T, by coordinate."""

    product: Product
    coordinates: int

    def __post_init__(self) -> None:
        self._total = torch.zeros(self.coordinates, self.coordinates, dtype=torch.float64)
        self._varies = 0.0

    def update(self, left: Tensor, right: Tensor) -> None:
        right = right.mT if self.product.flipped else right
        if right.dim() > 2 and right.shape[-3] != left.shape[-3]:
            right = right.repeat_interleave(left.shape[-3] // right.shape[-3], -3)
        right = right.expand(*left.shape[:-2], *right.shape[-2:])
        terms = (left.mT.double() @ left.double()) * (right.mT.double() @ right.double())
        self._varies += float(terms.sum())
        labels = self.product.labels.expand(*left.shape[:-2], left.shape[-1]).flatten(0, -2)
        alike, of = torch.unique(labels, dim=0, return_inverse=True)
        sums = terms.new_zeros(len(alike), *terms.shape[-2:]).index_add_(0, of, terms.flatten(0, -3))
        for row, each in zip(alike, sums, strict=True):
            held = (row == torch.arange(self.coordinates)[:, None]).double()
            self._total += held @ each @ held.mT

    def done(self) -> Unfitted:
        return Unfitted(self._total, torch.arange(self.coordinates), self._varies)
