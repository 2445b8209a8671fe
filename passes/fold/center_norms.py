"""Move the mean subtraction of layer norms into what writes their input.

    layer_norm(x) = rms_norm(C x) · weight + bias          C x = x - mean(x)
    writer(W, b)  ->  writer(C W, C b)                     for every writer of x, then   layer_norm(x) -> rms_norm(x)

C commutes with sums and is idempotent, so it may be applied where x is written: in output axes of linears and their
biases, in embedding and position tables, in class tokens. It must be applied to all of them, and nobody but layer norms
may read x: they alone do not see the mean. Both are what the analysis says of the symmetry `center`.

Exact. Makes the norm rotation-invariant (with its affine folded): run `fold_norm_affine` first, and rotate after.
Source: Ashkboos et al., "Compress Large Language Models by Deleting Rows and Columns" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.analysis.spaces import Symmetry, analyze
from graphopt.ir import Changes, Program, Rewriter, arguments, operator
from graphopt.passes.transform.reparameterize import Reparameterization
from graphopt.pipeline import Context, Pass

aten = torch.ops.aten


def center_norms(rewriter: Rewriter) -> None:
    """Center the writers of every space that only layer norms read, and make these RMS norms."""
    edits = Reparameterization(rewriter)
    centered: list[fx.Node] = []
    unseen = {node: None for node in rewriter.graph.nodes if operator(node) == "layer_norm"}
    for space in analyze(rewriter.program).under(Symmetry.CENTER):
        norms = [node for node in space.norms if node in unseen]
        unseen = {node: None for node in unseen if node not in norms}
        if norms and space.free:
            edits.apply(space, None)
            centered += norms
        else:
            for norm in norms:
                rewriter.decline(norm, f"{space.name} cannot be centered where it is written: {space.pins[0]}")
    for norm in unseen:
        rewriter.decline(norm, "no weight writes what it normalizes")
    edits.commit()
    for norm in centered:
        _without_mean(norm, rewriter)


def _without_mean(norm: fx.Node, rewriter: Rewriter) -> None:
    named = arguments(norm)
    weight, bias = named.get("weight"), named.get("bias")
    new = rewriter.insert(
        aten.rms_norm.default, named["input"], named["normalized_shape"], weight, named["eps"], before=norm
    )
    if bias is not None:
        new = rewriter.insert(aten.add.Tensor, new, bias, before=norm)
    rewriter.replace(norm, new)
    rewriter.touch(norm, "became an RMS norm: its input is written without mean")


@dataclass(frozen=True)
class CenterNorms(Pass):
    """Make layer norms RMS norms by centering what writes their input."""

    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "fold_layer_scale", "fold_norm_affine")

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        center_norms(rewriter)
        rewriter.sweep()
        return rewriter.finish()
