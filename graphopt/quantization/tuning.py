"""Learn the scales and tables of quantized weights by gradient, codes staying as they are.

    s <- s exp(a)     a = 0 at the start, by Adam        scales, [P, n, R]
    t <- t + |t| b    b = 0 at the start, by Adam        tables, |t| the largest value of a channel

Rounding makes the most of one layer's inputs; what errors of different layers make of each other, only running them
together shows. Of each piece of the program (`graphopt.calibration.pieces`: a block, or all of it) what it gives is
brought towards what it gave: of values inside, by the squared error ("BRECQ: Pushing the Limit of Post-Training
Quantization by Block Reconstruction", there for codes); of outputs, by the squared error and by the divergence of the
distributions that they are over their last axis, if they are logits, each relative to what it is at the start. Over the
whole program that is the end-to-end step of "EfficientQAT: Efficient Quantization-Aware Training for Large Language
Models", with the unquantized model for a teacher.

A piece keeps its scales where the learned ones, rounded as they are stored, are no better over all of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.calibration.batches import Batches
from graphopt.calibration.judge import divergence
from graphopt.calibration.pieces import Piece, Pieces
from graphopt.ir.program import Program
from graphopt.progress import Progress
from graphopt.quantization.coding import Coding, stored_scale
from graphopt.quantization.grids import Grid
from graphopt.quantization.matrices import from_matrix
from graphopt.quantization.solve import Quantized

_BATCHES = 8  # that a step looks at
_RATE = 3e-3  # of Adam at the start; it falls to nothing
_SQUARES = 0.1  # what the squared error of an output counts beside its divergence: what is no logits must stay too


class _Learned:
    """The parameters of one weight; `rest` is what is added to its codes' values."""

    def __init__(self, quantized: Quantized) -> None:
        self.quantized = quantized
        self.rest = quantized.value() - quantized.coded()
        coding = quantized.coding
        shape = coding.scale if coding.table is None else coding.table
        self.parameter = torch.zeros_like(shape).requires_grad_()
        self._units = quantized.coded() / coding.of()[0]

    def value(self) -> Tensor:
        """Return W [P, K, R]; gradients reach the parameter."""
        coding = self.coding(stored=False)
        if coding.table is None:
            return self._units * coding.of()[0] + self.rest
        return replace(self.quantized, coding=coding).coded() + self.rest

    def coding(self, stored: bool = True) -> Coding:
        """Return the coding as learned; with `stored`, as the format can hold it."""
        old = self.quantized.coding
        if old.table is None:
            shared = self.parameter.mean() if self.quantized.single_scale else self.parameter
            scale = old.scale * shared.exp()
            return old.with_scale(stored_scale(scale, old.grid) if stored else scale)
        largest = old.table.abs().amax(-1, keepdim=True)
        table = old.table + largest * self.parameter
        if stored:
            table = table.half().to(table.dtype)
            ascending = (table.diff(dim=-1) >= 0).all(-1, keepdim=True)
            table = torch.where(ascending, table, old.table)
        return old.with_table(table)


@dataclass(frozen=True)
class _Terms:
    """What is minimised: terms by exit, each over what it was at the start."""

    outputs: frozenset[fx.Node]
    start: Mapping[str, float]

    def of(self, made: Mapping[fx.Node, Tensor], targets: Mapping[fx.Node, Tensor]) -> dict[str, Tensor]:
        """Return every term of a batch, as sums."""
        found = {}
        for node, target in targets.items():
            finite = target.isfinite()  # a masked place is no error
            error = torch.where(finite, made[node] - target, 0.0)
            found[f"error of {node.name}"] = error.square().sum()
            if node in self.outputs and target.dim() and target.shape[-1] > 1:
                found[f"divergence of {node.name}"] = divergence(made[node], target)
        return found

    def total(self, terms: Mapping[str, Any]) -> Any:
        """Return everything in one number, which is 0 where there is nothing to gain."""
        outputs = {f"error of {node.name}" for node in self.outputs}
        shares = {name: _SQUARES if name in outputs else 1.0 for name in terms}
        return sum(shares[name] * term / self.start[name] for name, term in terms.items() if self.start[name] > 0)


@dataclass
class Tuner:
    """Learns scales and tables.

    Attributes:
        program: with its weights as they were.
        weights: the weights in question, and the linears and convolutions that read each.
        made: what each has been rounded to; `run` gives them other scales.
        progress: shows the steps.
        whole: all of the program at once, else block by block.
        steps: of Adam, for each piece.
        seed: of the choice of batches.
        gains: of each piece, every term after over before.
    """

    program: Program
    weights: Mapping[fx.Node, Sequence[fx.Node]]
    made: dict[fx.Node, Quantized]
    progress: Progress
    whole: bool
    steps: int
    seed: int = 0
    gains: list[dict[str, float]] = field(default_factory=list, init=False)
    _settled: dict[fx.Node, Tensor] = field(default_factory=dict, init=False)
    _weight_of: dict[fx.Node, fx.Node] = field(init=False)
    _outputs: frozenset[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self._weight_of = {site: weight for weight, sites in self.weights.items() for site in sites}
        self._outputs = frozenset(node for node in self.program.outputs if isinstance(node, fx.Node))

    def run(self, batches: Batches, spill: bool = False) -> None:
        """Learn from the data, read once; `spill` as in `Stream`. Raises GraphoptError where there is no batch."""
        Pieces(self.program, list(self._weight_of), batches, self.progress, self.whole, spill).run(self._learn)

    def _learn(self, piece: Piece) -> Mapping[fx.Node, Tensor]:
        read = [self._weight_of[site] for site in piece.sites]
        new = {weight: self.made[weight] for weight in read if weight not in self._settled}
        self._settled |= {weight: self._shaped(weight, each.value()) for weight, each in new.items()}
        learned = {weight: _Learned(each) for weight, each in new.items() if _learns(each.coding.grid)}
        if learned:
            terms = _Terms(self._outputs, self._sums(piece, _Terms(self._outputs, {})))
            self._descend(piece, learned, terms)
            tried = {weight: replace(new[weight], coding=each.coding()) for weight, each in learned.items()}
            before = self._settled
            self._settled = before | {weight: self._shaped(weight, each.value()) for weight, each in tried.items()}
            after = self._sums(piece, terms)
            self.gains.append({name: after[name] / start for name, start in terms.start.items() if start > 0})
            if terms.total(after) < terms.total(terms.start):
                self.made |= tried
            else:
                self._settled = before
        return self._of(piece, self._settled)

    def _descend(self, piece: Piece, learned: Mapping[fx.Node, _Learned], terms: _Terms) -> None:
        optimizer = torch.optim.Adam([each.parameter for each in learned.values()])
        generator = torch.Generator().manual_seed(self.seed)
        with self.progress.stage("tune scales", self.steps) as stage:
            for step in range(self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = _RATE * (1 - step / self.steps)
                optimizer.zero_grad()
                with torch.enable_grad():
                    values = {weight: self._shaped(weight, each.value()) for weight, each in learned.items()}
                    # Batches add their gradients up at the weights; what leads to the scales is run through once.
                    leaves = {weight: value.detach().requires_grad_() for weight, value in values.items()}
                    changed = self._of(piece, self._settled | leaves)
                    for lane, targets in piece.batches(_drawn(piece.count, generator)):
                        loss = terms.total(terms.of(piece.outputs(lane, changed), targets))
                        if isinstance(loss, Tensor) and loss.requires_grad:
                            loss.backward()  # type: ignore[no-untyped-call]
                    reached = [weight for weight, leaf in leaves.items() if leaf.grad is not None]
                    torch.autograd.backward([values[w] for w in reached], [leaves[w].grad for w in reached])
                optimizer.step()
                stage.advance()

    @torch.no_grad()
    def _sums(self, piece: Piece, terms: _Terms) -> dict[str, float]:
        """Return every term over all batches, for the weights as they are settled."""
        total: dict[str, float] = {}
        changed = self._of(piece, self._settled)
        for lane, targets in piece.batches():
            for name, term in terms.of(piece.outputs(lane, changed), targets).items():
                total[name] = total.get(name, 0.0) + float(term)
        return total

    def _of(self, piece: Piece, values: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        return {site: values[self._weight_of[site]] for site in piece.sites}

    def _shaped(self, weight: fx.Node, value: Tensor) -> Tensor:
        return from_matrix(value, self.program.weight(weight))


def _learns(grid: Grid) -> bool:
    """Return whether scales are free to take any value: not where few digits or a common factor hold them."""
    return grid.scales_alone and not grid.scale_bits


def _drawn(count: int, generator: torch.Generator) -> list[int]:
    chosen: list[int] = torch.randperm(count, generator=generator)[:_BATCHES].tolist()
    return chosen
