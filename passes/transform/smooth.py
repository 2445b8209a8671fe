"""Move the spread of activation channels into the weights that read them.

    x_j -> x_j / s_j          W_:j -> W_:j s_j          s_j = max|x_j|^α / max|W_:j|^(1 - α)

The division is absorbed by what writes x: the affine of a norm, the up-projection of a gated MLP, the value projection
before the output projection, the other one of query and key. These are the spaces that the analysis finds free under
the symmetry `diagonal`. Where nothing can absorb it, a multiplication is inserted, but only if asked for.

Exact. Needs calibration data for max|x|. Sources: "SmoothQuant: Accurate and Efficient Post-Training Quantization for
Large Language Models" (the formula), "SmoothQuant+: Accurate and Efficient 4-bit Post-Training Weight Quantization for
LLM" (one α for the model, by its output error), "AWQ: Activation-aware Weight Quantization for On-Device LLM
Compression and Acceleration" (an α for each place, by the error of what is computed there).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.analysis.numerics import quantized_rows
from graphopt.analysis.spaces import Read, Space, Symmetry, analyze
from graphopt.ir import Changes, Program, Rewriter, arguments, operator
from graphopt.passes.transform.emulation import output_error
from graphopt.passes.transform.reparameterize import Reparameterization
from graphopt.passes.transform.site_statistics import Statistics, has_static_size, is_linear_read, observe_reads
from graphopt.pipeline import Context, Pass

_GRID = [step / 10 for step in range(11)]
_BOUND = 1e4  # of a scale either way: beyond, a channel is dead rather than unbalanced


def smoothing_scale(largest: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return s = largest^α / weights^(1 - α) in float64; 1 where either is 0, so that dead channels stay."""
    scale = largest.double() ** alpha / weights.double() ** (1 - alpha)
    usable = (largest > 0) & (weights > 0) & torch.isfinite(scale)
    return torch.where(usable, scale, 1.0).clamp(1 / _BOUND, _BOUND)


@dataclass(frozen=True)
class Place:
    """A space to smooth.

    Attributes:
        reads: where weights read it (or, of queries and keys, where they read each other).
        largest: max|x_j| [*fibres, n]. weights: max|W_:j|, or that of the other activation.
        divides: whether the activations undergo the inverse of the space's change.
    """

    space: Space
    reads: tuple[Read, ...]
    largest: Tensor
    weights: Tensor
    divides: bool

    def change(self, alpha: float) -> Tensor:
        """Return T [*fibres, n] that divides the activations by s."""
        scale = smoothing_scale(self.largest, self.weights, alpha)
        return scale if self.divides else 1 / scale

    def factors(self, read: Read, change: Tensor) -> Tensor:
        """Return by what each coordinate of the read activation [*sizes of its dims] is multiplied."""
        sizes = [read.source.meta["val"].shape[dim] for dim in read.dims]
        return self.space.transform_read(read, torch.ones(sizes, dtype=torch.float64), change)


@dataclass(frozen=True)
class Smooth(Pass):
    """Balance activation channels against the weights that read them.

    Attributes:
        alpha: how much of the spread moves: 0 none of the activation's, 1 all of it.
        search: "none": take `alpha`; "space": the best of 0, 0.1, ..., 1 and no change for each space, by the error of
            the products there; "model": the best for all spaces together, by the error of the model's outputs.
        weight_bits, activation_bits: the quantization that a search looks at: weights by output channel, activations by
            token.
        explicit: where nothing absorbs the scale, multiply the activation at run time.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    search: Literal["none", "space", "model"] = "none"
    weight_bits: Annotated[int, Field(ge=2, le=16)] = 8
    activation_bits: Annotated[int, Field(ge=2, le=16)] = 8
    explicit: bool = False

    def run(self, program: Program, context: Context) -> Changes:
        context.needed_calibration(self.name)
        rewriter = Rewriter(program, self.name)
        spaces = analyze(program).under(Symmetry.DIAGONAL)
        pinned = _pinned_reads(spaces)
        free = []
        for space in spaces:
            if space.free and all(map(has_static_size, space.reads)):
                free.append(space)
            elif space.free and space.reads:
                rewriter.decline(space.reads[0].node, f"{space.name} shares an axis with the batch where it is read")
        wanted = [read for space in free for read in space.reads]
        statistics = observe_reads(program, [*wanted, *(pinned if self.explicit else ())], context)
        places = [place for space in free for place in _places(space, statistics)]
        chosen = self._choose(places, program, statistics, context)
        edits = Reparameterization(rewriter)
        for place, alpha in zip(places, chosen, strict=True):
            change = torch.ones(place.space.shape) if alpha is None else place.change(alpha)
            if bool((change == 1).all()):
                rewriter.decline(place.reads[0].node, f"{place.space.name} is best as it is")
                continue
            edits.apply(place.space, change)
            readers = ", ".join(dict.fromkeys(read.node.name for read in place.reads))
            rewriter.touch(place.reads[0].node, f"smoothed {place.space.name} before {readers}, α = {alpha}")
        rewriter.note(alphas={place.space.name: alpha for place, alpha in zip(places, chosen, strict=True)})
        rewriter.note(sites=_numbers(places, chosen, statistics, self.activation_bits))
        edits.commit()
        for read, reason in pinned.items():
            if self.explicit:
                self._multiply(read, statistics, rewriter)
            else:
                rewriter.decline(read.node, f"nothing absorbs a scale of what it reads: {reason}")
        return rewriter.finish()

    def _choose(
        self, places: list[Place], program: Program, statistics: Statistics, context: Context
    ) -> list[float | None]:
        """Return α for each place; None leaves it as it is."""
        if self.search == "none" or not places:
            return [self.alpha] * len(places)
        if self.search == "space":
            with context.progress.stage("search α", len(places)) as stage:
                found = []
                for place in places:
                    found.append(self._best_for(place, program, statistics))
                    stage.advance()
            return found
        errors: dict[float | None, float] = {}
        with context.progress.stage("search α", len(_GRID) + 1) as stage:
            for alpha in [None, *_GRID]:
                weights = {} if alpha is None else _transformed(places, alpha, program)
                errors[alpha] = output_error(
                    program, weights, self.weight_bits, self.activation_bits, context.needed_calibration(self.name)
                )
                stage.advance()
        best = min(errors, key=lambda alpha: errors[alpha])
        return [best] * len(places)

    def _best_for(self, place: Place, program: Program, statistics: Statistics) -> float | None:
        reads = [read for read in place.reads if is_linear_read(read)]
        if not reads:
            return self.alpha

        def error(change: Tensor | None) -> float:
            return sum(self._error(place, read, change, program, statistics) for read in reads)

        options: dict[float | None, float] = {None: error(None)}
        for alpha in _GRID:
            options[alpha] = error(place.change(alpha))
        return min(options, key=lambda alpha: options[alpha])

    def _error(
        self, place: Place, read: Read, change: Tensor | None, program: Program, statistics: Statistics
    ) -> float:
        """Return |Q(x f) Q(W / f)ᵀ - x Wᵀ|² over the vectors that were kept."""
        rows, weight = statistics.of(read).rows.double(), program.weight(read.partner).detach().double()
        exact = rows @ weight.mT
        if change is not None:
            factors = place.factors(read, change)
            rows, weight = rows * factors, weight / factors
        made = quantized_rows(rows, self.activation_bits) @ quantized_rows(weight, self.weight_bits).mT
        return float((made - exact).square().sum())

    def _multiply(self, read: Read, statistics: Statistics, rewriter: Rewriter) -> None:
        """Insert x / s before the linears that read x, once for all of them."""
        source = read.source
        readers = [
            user
            for user in source.users
            if operator(user) == "linear"
            and arguments(user)["input"] is source
            and arguments(user)["weight"].op == "get_attr"
        ]
        ranges = [rewriter.value(arguments(user)["weight"]).abs().amax(0) for user in readers]
        largest = statistics.of(read).largest
        if not readers or largest is None:
            return
        weights = torch.stack(ranges).amax(0)
        scale = smoothing_scale(largest, weights, self.alpha)
        vector = rewriter.weight(1 / scale, f"{source.name}.smooth", source.meta["val"].dtype, parameter=False)
        smoothed = rewriter.insert(torch.ops.aten.mul.Tensor, source, vector, before=min(readers), origin=[source])
        for user in readers:
            weight = rewriter.edit(arguments(user)["weight"], f"smooth {source.name}", lambda value: value * scale)
            rewriter.rewire(user, input=smoothed, weight=weight)
        rewriter.touch(read.node, f"{source.name} is multiplied at run time ({len(scale)} multiplications a token)")


def _pinned_reads(spaces: Iterable[Space]) -> dict[Read, str]:
    """Return one read by a linear for each activation that nothing can scale, with the reason."""
    found: dict[fx.Node, tuple[Read, str]] = {}
    for space in spaces:
        if not space.free:
            for read in filter(is_linear_read, space.reads):
                found.setdefault(read.source, (read, str(space.pins[0])))
    return dict(found.values())


def _places(space: Space, statistics: Statistics) -> list[Place]:
    """Return the space with its ranges; nothing where no data came by."""
    by_weights = [read for read in space.reads if read.partner.op == "get_attr"]
    reads = by_weights or list(space.reads)
    if not reads:
        return []
    divides = reads[0].dual
    ours = [read for read in reads if read.dual is divides]
    activations = _largest(space, ours, statistics)
    if by_weights:
        readers = [member for member in space.members if "reads" in member.role and member.dual is not divides]
        others = [space.gather(member).abs().amax(0) for member in readers]
    else:
        others = _largest(space, [read for read in reads if read.dual is not divides], statistics)
    if not activations or not others:
        return []
    return [Place(space, tuple(ours), torch.stack(activations).amax(0), torch.stack(others).float().amax(0), divides)]


def _largest(space: Space, reads: list[Read], statistics: Statistics) -> list[Tensor]:
    seen = [(read, statistics.of(read).largest) for read in reads]
    return [space.gather_read(read, largest).amax(0) for read, largest in seen if largest is not None]


def _transformed(places: list[Place], alpha: float, program: Program) -> Mapping[str, Tensor]:
    weights: dict[str, Tensor] = {}

    def value(node: fx.Node) -> Tensor:
        return weights.get(str(node.target), program.weight(node))

    for place in places:
        weights |= place.space.transform(place.change(alpha), value)
    return weights


def _numbers(
    places: Iterable[Place], chosen: list[float | None], statistics: Statistics, bits: int
) -> dict[str, dict[str, object]]:
    """Return for each linear that reads a smoothed activation what quantization thinks of it before and after."""
    factors: dict[fx.Node, Tensor] = {}
    reads: dict[fx.Node, Read] = {}
    for place, alpha in zip(places, chosen, strict=True):
        if alpha is None:
            continue
        for read in filter(is_linear_read, place.reads):
            # Several spaces may lie side by side on one axis: each scales its own part of it.
            scaled = place.factors(read, place.change(alpha))
            factors[read.node] = factors[read.node] * scaled if read.node in factors else scaled
            reads[read.node] = read
    return {node.name: statistics.numbers(read, factors[node].mul, bits) for node, read in reads.items()}
