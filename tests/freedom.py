"""Whether what the analysis calls free really is: every free space is changed at random and the outputs compared."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx

from graphopt.analysis.spaces import Analysis, Space, Symmetry
from graphopt.ir import Program
from graphopt.ir.precision import retype
from graphopt.pipeline.validation import relative_error, run_seeded

TOLERANCE = 1e-9


def draw(space: Space, random: torch.Generator) -> Tensor | None:
    """Return a change of the space's shape: another one for each index of its siblings."""
    shape = space.shape
    match space.symmetry:
        case Symmetry.CENTER:
            return None
        case Symmetry.PERMUTATION:
            return torch.rand(shape, generator=random).argsort(-1)
        case Symmetry.SIGN:
            return torch.randint(0, 2, shape, generator=random, dtype=torch.float64) * 2 - 1
        case Symmetry.DIAGONAL:
            return torch.rand(shape, generator=random, dtype=torch.float64) * 1.5 + 0.5
        case Symmetry.ORTHOGONAL:
            return torch.linalg.qr(torch.randn(shape, generator=random, dtype=torch.float64)).Q
    return torch.eye(space.size, dtype=torch.float64) + 0.3 * torch.randn(
        shape, generator=random, dtype=torch.float64
    ) / space.size**0.5


def applied(program: Program, spaces: list[Space], seed: int = 0) -> Program:
    """Return the float64 program with a random change of every one of the spaces."""
    random = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def value(node: fx.Node) -> Tensor:
        return weights.get(str(node.target), program.weight(node))

    for space in spaces:
        weights |= space.transform(draw(space, random), value)
    return retype(program, torch.float64, weights)


def assert_free(program: Program, analysis: Analysis, flat: list[object] | None = None) -> Counter[str]:
    """Change all free spaces of each symmetry together; a failure names the first space that is to blame.

    Returns how many spaces of each symmetry were changed.
    """
    flat = program.flat_example if flat is None else flat
    flat = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in flat]
    reference = run_seeded(retype(program, torch.float64), flat)
    counts: Counter[str] = Counter()
    for symmetry in Symmetry:
        free = [space for space in analysis.under(symmetry) if space.free]
        counts[str(symmetry)] = len(free)
        if not free:
            continue
        error = relative_error(run_seeded(applied(program, free), flat), reference)
        if error <= TOLERANCE:
            continue
        for space in free:
            alone = relative_error(run_seeded(applied(program, [space]), flat), reference)
            assert alone <= TOLERANCE, f"{symmetry} changes outputs by {alone:.1e} through\n{space}"
        raise AssertionError(f"{symmetry}: all together change outputs by {error:.1e}, none alone")
    return counts
