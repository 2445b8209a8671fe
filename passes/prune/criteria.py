"""What a coordinate is worth: one number for each coordinate of a space, the lowest go first.

With x_c what stands at coordinate c over the calibration data, W_c what its readers multiply it by, V_c what writes it,
and Y = sum_c x_c W_c what a reader gives:

    magnitude    |V_c|^2 + |W_c|^2
    lamp         |V_c|^2 / sum of |V_d|^2 over all d with |V_d| >= |V_c|, of each writer, comparable between layers
                 ("Layer-adaptive Sparsity for the Magnitude-based Pruning")
    distortion   |V_c|^2 |W_c|^2 / sum_d |V_d|^2 |W_d|^2: the share of the module's map that goes through c, no data
                 needed (after "Data-independent Module-aware Pruning for Hierarchical Vision Transformers")
    variance     mean |x_c|^2 |W_c|^2: what c adds to the output; of principal coordinates these numbers add up
    activation   mean |x_c|^2 ("2SSP: A Two-Stage Framework for Structured Pruning of LLMs")
    wanda        (mean |x_c|^2)^1/2 sum |W_c| ("A Simple and Effective Pruning Approach for Large Language Models")
    fidelity     <Y, x_c W_c>^2 / (|x_c W_c|^2 |Y|^2): the share of the output that c alone reconstructs
                 ("ModHiFi: Identifying High Fidelity Predictive Components for Model Modification")
    taylor       mean over samples of (x_c dL/dx_c)^2, what the loss changes when c goes, to first order
                 ("Importance Estimation for Neural Network Pruning")

Numbers of several readers add up. Of queries and keys, whose reader is their product, activation, wanda and fidelity
are what a coordinate adds to the scores, mean (q_c k_c)^2. A new criterion is one function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphopt.analysis.spaces import Read
from graphopt.calibration.gradients import read_gradients
from graphopt.ir import Program, arguments
from graphopt.passes.prune.candidates import Candidate
from graphopt.passes.prune.elimination import Normal, Unfitted
from graphopt.pipeline import Context
from graphopt.quantization.matrices import to_matrix


@dataclass(frozen=True)
class Scored:
    """What a criterion may look at.

    Attributes:
        program, candidate: the space and where it lies.
        equations: by reader, the normal equations of each of its parts; empty where the criterion needs none.
        products: what products of two activations lose; empty where the criterion needs none.
        gradients: mean squared x dL/dx [coordinates], where the criterion needs it.
    """

    program: Program
    candidate: Candidate
    equations: Mapping[fx.Node, Sequence[Normal]] = field(default_factory=dict)
    products: Sequence[Unfitted] = ()
    gradients: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """A way to score coordinates.

    Attributes:
        score: returns float64 [coordinates], fibre after fibre, none negative.
        inputs, gradients: whether it needs the readers' inputs, or gradients.
        comparable: whether scores of different spaces can be compared; else they are made shares of their sum.
    """

    score: Callable[[Scored], Tensor]
    inputs: bool = False
    gradients: bool = False
    comparable: bool = False


def _squares(given: Scored, role: str) -> list[Tensor]:
    """Return for each weight that plays a role the squared norm of what it has at every coordinate."""
    space = given.candidate.space
    return [
        space.gather(member, given.program.weight(member.node)).double().square().sum(0).flatten()
        for member in space.members
        if role in member.role
    ]


def _sum(parts: Sequence[Tensor], given: Scored) -> Tensor:
    return sum(parts, start=torch.zeros(given.candidate.coordinates, dtype=torch.float64))


def magnitude(given: Scored) -> Tensor:
    return _sum([*_squares(given, "writes"), *_squares(given, "reads")], given)


def lamp(given: Scored) -> Tensor:
    scores = []
    for squares in _squares(given, "writes"):
        ordered, order = squares.sort(descending=True, stable=True)
        score = torch.empty_like(squares)
        score[order] = ordered / ordered.cumsum(0).clamp(min=1e-300)
        scores.append(score)
    return _sum(scores, given) / max(len(scores), 1)


def distortion(given: Scored) -> Tensor:
    writes, reads = _squares(given, "writes"), _squares(given, "reads")
    if not reads:
        writes, reads = writes[:1], writes[1:]  # queries and keys read each other
    through = _sum(writes, given) * _sum(reads, given)
    return through / through.sum().clamp(min=1e-300)


def _by_reader(given: Scored, score: Callable[[Normal, Tensor, Tensor], Tensor]) -> Tensor:
    """Add up score(normal, W [K, R], one-hot [coordinates, K]) over the parts of all readers.

    Where there is none but products of two activations: what each coordinate adds to these.
    """
    total = torch.zeros(given.candidate.coordinates, dtype=torch.float64)
    for product in () if given.candidate.readers else given.products:
        total.index_add_(0, *product.costs())
    for reader in given.candidate.readers:
        matrix = to_matrix(given.program.weight(arguments(reader.site)["weight"]).detach(), reader.site).double()
        for normal, part, labels in zip(given.equations[reader.site], matrix, reader.labels, strict=True):
            held = labels == torch.arange(given.candidate.coordinates)[:, None]
            total += score(normal, part, held.double())
    return total


def _energies(normal: Normal, inputs: int) -> Tensor:
    return normal.gram.diagonal()[:inputs] / max(normal.count, 1)


def activation(given: Scored) -> Tensor:
    return _by_reader(given, lambda normal, weight, held: held @ _energies(normal, len(weight)))


def variance(given: Scored) -> Tensor:
    return _by_reader(
        given, lambda normal, weight, held: held @ (_energies(normal, len(weight)) * weight.square().sum(1))
    )


def wanda(given: Scored) -> Tensor:
    return _by_reader(
        given, lambda normal, weight, held: held @ (_energies(normal, len(weight)).sqrt() * weight.abs().sum(1))
    )


def fidelity(given: Scored) -> Tensor:
    def score(normal: Normal, weight: Tensor, held: Tensor) -> Tensor:
        gram = normal.gram[: len(weight), : len(weight)]
        with_all = held @ ((gram @ weight) * weight).sum(1)  # <Y, x_c W_c>
        alone = torch.stack([((gram @ (weight * own[:, None])) * (weight * own[:, None])).sum() for own in held])
        whole = with_all.sum().clamp(min=1e-300)
        return torch.where(alone > 0, with_all.square() / (alone * whole).clamp(min=1e-300), 0.0)

    return _by_reader(given, score)


def taylor(given: Scored) -> Tensor:
    assert given.gradients is not None
    return given.gradients


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude),
    "lamp": Criterion(lamp, comparable=True),
    "distortion": Criterion(distortion, comparable=True),
    "variance": Criterion(variance, inputs=True),
    "activation": Criterion(activation, inputs=True),
    "wanda": Criterion(wanda, inputs=True),
    "fidelity": Criterion(fidelity, inputs=True),
    "taylor": Criterion(taylor, gradients=True, comparable=True),
}


def taylor_terms(program: Program, candidates: Sequence[Candidate], context: Context) -> dict[str, Tensor]:
    """Return mean over samples of (x dL/dx)^2 [coordinates] by the name of the space; zeros where the loss ignores it.

    A sample is what a batch has at one place of the first axis of the readers' input.
    """
    reads: dict[fx.Node, list[tuple[Candidate, Read]]] = {}
    for each in candidates:
        for read in {read.source: read for read in each.space.reads}.values():  # once where several read it
            reads.setdefault(read.source, []).append((each, read))
    totals = {each.space.name: torch.zeros(each.coordinates, dtype=torch.float64) for each in candidates}
    samples = dict.fromkeys(totals, 0)

    def show(node: fx.Node, gradient: Tensor, value: Tensor | None, batch: int) -> None:
        assert value is not None
        product = value.double() * gradient
        for each, read in reads[node]:
            last = list(read.dims)
            order = [dim for dim in range(product.dim()) if dim not in last] + last
            for sample in [product] if 0 in last else product.split(1):  # type: ignore[no-untyped-call]
                term = each.space.gather_read(read, sample.permute(order)).flatten(1).sum(0)
                totals[each.space.name] += term.square()
                samples[each.space.name] += 1

    batches = context.needed_calibration("prune")
    read_gradients(program, list(reads), batches, context.progress, show, context.loss, context.seed, values=True)
    return {name: total / max(samples[name], 1) for name, total in totals.items()}
