"""Bring the program into the one form that all other passes read.

    1 + w, arange(8) < 4            ->  a weight                          (constants)
    dropout(x), to(x, same type)    ->  x                                 (identities)
    f(x); f(x)                      ->  f(x)                              (duplicates)
    view, permute∘permute           ->  reshape, permute                  (layout)
    native_batch_norm(x)[0]         ->  batch_norm(x)                     (composites)
    addmm(b, x, wᵀ)                 ->  linear(x, w, b)                   (linear)
    x * rsqrt(mean(x²) + eps) * w   ->  rms_norm(x, w, eps)               (rms_norm)
    rms_norm(x - mean(x)) * w + b   ->  layer_norm(x, w, b)               (layer_norm)
    x/2 * (1 + erf(x / sqrt(2)))    ->  gelu(x)                           (gelu)
    mean(x, [2, 3])                 ->  adaptive_avg_pool2d(x, 1)         (pool)

Exact. Every module of this folder holds the rules of one line; they are repeated until nothing changes, as each
makes work for the others. Dead code goes at the end. Runs before everything else; running it twice changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from graphopt.ir import Changes, Program, Rewriter, Rule, apply_rules
from graphopt.passes.canonicalize import (
    composites,
    gelu,
    identities,
    layer_norm,
    layout,
    linear,
    padding,
    pool,
    rms_norm,
)
from graphopt.passes.canonicalize.constants import evaluate_constants
from graphopt.passes.canonicalize.duplicates import share_duplicates
from graphopt.pipeline import Context, Pass


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Evaluate constants, drop what does nothing, and write each thing in one form.

    Attributes:
        max_bytes: largest constant to store, unless it replaces weights as large.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = (
        *identities.RULES,
        *composites.RULES,
        *layout.RULES,
        *linear.RULES,
        *rms_norm.RULES,
        *layer_norm.RULES,
        *gelu.RULES,
        *pool.RULES,
        *padding.RULES,
    )

    max_bytes: Annotated[int, Field(ge=0)] = 1 << 20

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        done = -1
        while done < len(rewriter.changes.edits):
            done = len(rewriter.changes.edits)
            # Rules come first: a transposed weight that becomes a linear's needs no copy.
            apply_rules(self.rules, rewriter)
            rewriter.rule = "share_duplicates"
            share_duplicates(rewriter)
            rewriter.rule = "evaluate_constants"
            evaluate_constants(rewriter, self.max_bytes)
        return rewriter.finish()
