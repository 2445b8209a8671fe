"""Try transformations and keep those that quantization is better off with.

    program  ->  the alternative T with the least |Q(T(program))(x) - program(x)|² over the outputs, or as it was

Every alternative is exact, so nothing changes but how much a quantizer loses. Each starts from the program, takes its
statistics from the first calibration batches, is quantized by `judge` with ranges from them, and judged by the outputs
on them. A later alternative has to be clearly better than an earlier one: they are listed from the simplest to the one
that changes most. Where quantization already costs no more than it must, none is tried. The one chosen is made again
from all the data.

Exact. Runs before anything that quantizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt

from graphopt.analysis.numerics import Noise
from graphopt.ir import Changes, Program
from graphopt.memory import release_freed
from graphopt.pipeline import Branch, Composite, Context, Pass, parse_pass


@dataclass(frozen=True)
class BestOf(Composite):
    """Keep the alternative after which quantization harms the outputs least.

    Attributes:
        alternatives: lists of passes, each as `str(pass)` writes it.
        judge: the pass that quantizes, or several.
        batches: calibration batches to transform and judge by.
        gain: share of the noise that an alternative has to remove to be preferred to an earlier one.
        enough: noise-to-signal ratio of the outputs that leaves nothing to gain. Rounding a normal variable once to 8
            bits leaves 1e-4.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    alternatives: tuple[tuple[str, ...], ...] = ()
    judge: str | tuple[str, ...] = "quantize_static"
    batches: PositiveInt = 4
    gain: Annotated[float, Field(ge=0, lt=1)] = 0.2
    enough: Annotated[float, Field(ge=0)] = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in (*self._judges, *(each for alternative in self.alternatives for each in alternative)):
            parse_pass(text)

    @property
    def _judges(self) -> tuple[str, ...]:
        return (self.judge,) if isinstance(self.judge, str) else self.judge

    def compose(
        self, program: Program, branch: Callable[[Sequence[Pass], Context], Branch], context: Context
    ) -> tuple[Branch | None, Changes]:
        everything = context.needed_calibration(self.name)
        head = everything.head(self.batches)
        few = dataclasses.replace(context, calibration=head)
        changes = Changes()
        with torch.no_grad():
            exact = [program.run(flat) for flat in head]
        best, chosen = self._noise(program, exact, few), None
        noise, tried_before = {"nothing": best}, set()
        with context.progress.stage("compare transformations", len(self.alternatives)) as stage:
            for alternative in self.alternatives:
                if best <= self.enough:
                    break
                passes, what = [parse_pass(each) for each in alternative], " + ".join(alternative)
                tried = branch(passes, few)
                stage.advance()
                did = tuple((record.name, str(record.options)) for record in tried.records if record.changed)
                if not did or did in tried_before:
                    continue  # nothing found to do, or nothing beyond what an earlier alternative did
                tried_before.add(did)
                noise[what] = self._noise(tried.program, exact, few)
                if noise[what] < (1 - self.gain) * best:
                    best, chosen = noise[what], passes
        changes.facts["output_noise"] = {what: float(f"{each:.4g}") for what, each in noise.items()}
        if chosen is None:
            return None, changes
        return branch(chosen, few if 0 < len(everything) <= self.batches else context), changes

    def _noise(self, program: Program, exact: list[list[Any]], context: Context) -> float:
        """Return the noise-to-signal ratio of the outputs of `program`, quantized, for each batch."""
        quantized = program.clone()
        for text in self._judges:
            parse_pass(text).run(quantized, context)
        noise = Noise()
        with torch.no_grad():
            for flat, outputs in zip(context.needed_calibration(self.name), exact, strict=True):
                for made, wanted in zip(quantized.run(flat), outputs, strict=True):
                    noise.add(made, wanted)
        del quantized
        release_freed()
        return noise.ratio
