"""Write linears and convolutions as two smaller ones, where the data uses few directions of their outputs.

    y = W x + b      ->      y = B (A x) + b        A [r, K], B [R, r],  r (K + R) < K R

A convolution becomes one with r channels and a 1 x 1 behind it. The map of rank r that is nearest over the calibration
data is that of the r largest eigenvectors V of what the fitted outputs vary,

    M = W* C W*^T,      A = V^T W*,      B = V        W*: least squares, C: the covariance of the inputs

and its squared error is the sum of the eigenvalues left out ("The multivariate linear model in small samples", reduced
rank regression; for W* = W the activation-aware SVD of "ASVD: Activation-aware Singular Value Decomposition for
Compressing Large Language Models" without its approximation of C by a diagonal). Layer after layer is fitted on what
the factorized ones before it give, against what the original gave.

The ranks are what the data uses ("utilised rank": all but a share of the variance), or follow from a budget. A layer is
left where two products would cost as much as one.

Lossy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.analysis import macs, node_macs, parameters
from graphopt.calibration.stream import Change, Reading, Stream
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Rewriter, arguments, operator
from graphopt.passes.prune.allocation import allocate, bounds_of, told
from graphopt.passes.prune.elimination import Fit, Normal
from graphopt.passes.prune.refit import fittable, given_matrix, multiplied, rows_of
from graphopt.pipeline import Context, LossyPass

aten = torch.ops.aten


@dataclass(frozen=True)
class _Spectrum:
    """A site fitted to its target, and the directions of its outputs.

    Attributes:
        weight: W* [K, R]. constant: b* [R]; None without a bias. mean: of the inputs [K].
        vectors: eigenvectors of M [R, R], the largest first. left: by rank, the share of the variance left out.
    """

    weight: Tensor
    constant: Tensor | None
    mean: Tensor
    vectors: Tensor
    left: list[float]

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return A [K, r], B [r, R] and the bias [R]."""
        basis = self.vectors[:, :rank]
        a = self.weight @ basis
        if self.constant is None:
            return a, basis.mT, None
        # What the directions left out have on average goes into the bias.
        return a, basis.mT, self.constant + self.mean @ (self.weight - a @ basis.mT)


@dataclass(frozen=True)
class Factorize(LossyPass):
    """Low-rank factorization.

    Attributes:
        lost: share of what a layer's outputs vary that may be lost; None: ranks follow from the budget's
            macs_ratio, params_ratio and size_ratio.
        floor: share of the full rank that stays at least.
        multiple: ranks are multiples of it; 0: of what the target's kernels like.
        spill: keep activations in files between stages.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    lost: Annotated[float, Field(ge=0, lt=1)] | None = None
    floor: Annotated[float, Field(gt=0, le=1)] = 0.05
    multiple: Annotated[int, Field(ge=0)] = 0
    spill: bool = False

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        sites = self._sites(program, rewriter, self.multiple or context.target.width_multiple)
        if not sites:
            rewriter.decline("program", "it has no layer that two smaller ones could stand for")
            return rewriter.finish()
        ranks = self._ranks(program, sites, context)
        chosen = {site: rank for site, rank in ranks.items() if rank < _full(site)}
        for site in sites:
            if site not in ranks:
                rewriter.decline(site, "the calibration data has fewer rows than it has inputs: give more samples")
            elif site not in chosen:
                rewriter.decline(site, "its data uses too many directions for two products to be cheaper than one")
        if chosen:
            found = self._spectra(program, list(chosen), context, chosen)
            for site, rank in chosen.items():
                _put(rewriter, site, found[site].factors(rank))
                lost = found[site].left[rank]
                rewriter.touch(site, f"rank {rank} of {_full(site)}, {lost:.2%} of what its outputs vary is lost")
            rewriter.note(ranks={site.name: [_full(site), rank] for site, rank in chosen.items()})
        return rewriter.finish()

    def _sites(self, program: Program, rewriter: Rewriter, multiple: int) -> dict[fx.Node, list[int]]:
        """Return what can be factorized, with the ranks that it may have, descending from the full one."""
        found = {}
        for node in program.graph.nodes:
            if not fittable(program, node):
                continue
            if reason := self.refusal(program, node):
                rewriter.decline(node, reason)
                continue
            if int(arguments(node).get("groups", 1)) != 1:
                rewriter.decline(node, "its channels are in groups")
                continue
            weight = program.weight(arguments(node)["weight"])
            inputs, outputs = weight[0].numel(), weight.shape[0]
            full = min(inputs, outputs)
            most = (inputs * outputs - 1) // (inputs + outputs)
            step = multiple
            while step > 1 and step * 2 > most:
                step //= 2
            least = max(1, int(self.floor * full))
            found[node] = [full, *(rank for rank in range(most, least - 1, -1) if rank % step == 0)]
            if len(found[node]) == 1:
                del found[node]
        return found

    def _ranks(
        self, program: Program, sites: Mapping[fx.Node, Sequence[int]], context: Context
    ) -> dict[fx.Node, int]:
        if self.lost is not None:
            spectra, allowed = self._spectra(program, list(sites), context), self.lost
            return {s: min(r for r in sites[s] if each.left[r] <= allowed) for s, each in spectra.items()}
        costs = {site: _Cost(program, site) for site in sites}

        def saved(what: str, ranks: Mapping[fx.Node, int]) -> float:
            return sum(float(getattr(costs[site], what)(rank)) for site, rank in ranks.items())

        now, held = macs(program), parameters(program)
        bounds = bounds_of(
            context, program, lambda ranks: now - saved("macs", ranks), lambda ranks: held - saved("parameters", ranks),
            "factorize(lost=...)",
        )  # fmt: skip
        least = {site: ranks[-1] for site, ranks in sites.items()}
        if short := [bound for bound in bounds if bound.of(least) > bound.limit]:
            raise GraphoptError(
                f"factorize cannot meet {told(short, least)} with {len(sites)} layers and floor={self.floor:g}; give "
                "more, or a lower floor"
            )
        if all(bound.of({}) <= bound.limit for bound in bounds):
            return {site: ranks[0] for site, ranks in sites.items()}
        spectra = self._spectra(program, list(sites), context)
        errors = {site: {rank: each.left[rank] for rank in sites[site]} for site, each in spectra.items()}
        return allocate(errors, {site: sites[site] for site in spectra}, bounds)

    def _spectra(
        self,
        program: Program,
        sites: Sequence[fx.Node],
        context: Context,
        ranks: Mapping[fx.Node, int] | None = None,
    ) -> dict[fx.Node, _Spectrum]:
        """Return the spectrum of every site with enough data; with `ranks`, on what the sites before it give then."""
        equations: dict[fx.Node, Normal] = {}
        found: dict[fx.Node, _Spectrum] = {}

        def show(read: Reading) -> None:
            site = read.site
            weight = program.weight(arguments(site)["weight"])
            rows = rows_of(site, read.x, weight)
            given = rows if read.exact is None else rows_of(site, read.exact, weight)
            (target,) = multiplied(given, given_matrix(program, site))
            if site not in equations:
                constant = arguments(site).get("bias") is not None
                equations[site] = Normal(given.shape[2], target.shape[1], constant)
            equations[site].update(rows[0], target)

        def settle(ready: list[fx.Node]) -> dict[fx.Node, Change]:
            changed: dict[fx.Node, Change] = {}
            for site in ready:
                normal = equations.pop(site)
                if normal.count < len(normal.gram):
                    continue  # any map would do
                found[site] = spectrum = _spectrum(normal, given_matrix(program, site)[0])
                if ranks is not None:
                    a, b, constant = spectrum.factors(ranks[site])
                    like = program.weight(arguments(site)["weight"])
                    changed[site] = new = {"weight": (a @ b).mT.reshape(like.shape).to(like.dtype)}
                    if constant is not None:
                        new["bias"] = constant.to(like.dtype)
            return changed

        batches = context.needed_calibration(self.name)
        Stream(program, sites, batches, context.progress, ranks is not None, self.spill).run(show, settle)
        return found


def _full(site: fx.Node) -> int:
    weight = arguments(site)["weight"].meta["val"]
    return int(min(weight[0].numel(), weight.shape[0]))


class _Cost:
    """What a site saves at each rank; nothing at the full one, where it is left as it is."""

    def __init__(self, program: Program, site: fx.Node) -> None:
        weight = program.weight(arguments(site)["weight"])
        self._inputs, self._outputs, self._full = weight[0].numel(), weight.shape[0], _full(site)
        self._rows = node_macs(site) // (self._inputs * self._outputs)

    def parameters(self, rank: int) -> int:
        if rank == self._full:
            return 0
        return self._inputs * self._outputs - rank * (self._inputs + self._outputs)

    def macs(self, rank: int) -> int:
        return self._rows * self.parameters(rank)


def _spectrum(normal: Normal, weight: Tensor) -> _Spectrum:
    fit = Fit(normal, weight, torch.full((normal.inputs,), -1))
    inputs = normal.inputs
    solved, gram = fit.weight[:inputs], normal.gram[:inputs, :inputs]
    mean = torch.zeros(inputs, dtype=gram.dtype)
    constant = None
    if normal.constant:
        mean, constant = normal.gram[-1, :inputs] / normal.count, fit.weight[-1]
        gram = gram - normal.count * torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(solved.mT @ gram @ solved)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    whole = normal.variance if normal.constant else max(normal.squares, 1e-300)
    kept = torch.cat([torch.zeros(1, dtype=values.dtype), values.cumsum(0)])
    left = ((values.sum() - kept) / whole).clamp(min=0).tolist()
    return _Spectrum(solved, constant, mean, vectors, left)


def _put(rewriter: Rewriter, site: fx.Node, factors: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Write a site as two."""
    a, b, constant = factors
    named = arguments(site)
    source = named["weight"]
    like, name = rewriter.program.weight(source), str(source.target)
    rank, ones = a.shape[1], [1] * (like.dim() - 2)
    inner = rewriter.weight(a.mT.reshape(rank, *like.shape[1:]), f"{name}_in", like.dtype)
    outer = rewriter.weight(b.mT.reshape(like.shape[0], rank, *ones), f"{name}_out", like.dtype)
    bias = None
    if constant is not None:
        bias = rewriter.weight(constant, str(named["bias"].target), like.dtype, named["bias"])
    target, x = site.target, named["input"]
    if operator(site) == "linear":
        first = rewriter.insert(target, x, inner, before=site, origin=[site])
        second = rewriter.insert(target, first, outer, bias, before=site, origin=[site])
    else:
        moves = [named[key] for key in ("stride", "padding", "dilation")]
        first = rewriter.insert(target, x, inner, None, *moves, before=site, origin=[site])
        second = rewriter.insert(target, first, outer, bias, before=site, origin=[site])
    rewriter.replace(site, second)
