"""How many coordinates of each space stay, under a budget.

Every space has a curve: the error that each number of removed coordinates leaves, in a measure that is comparable
between spaces. Widths shrink one admissible step at a time, always where the next step costs least error for what it
saves, until the budget holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graphopt.analysis.spaces import Space
from graphopt.analysis.spaces.axes import axis_size
from graphopt.passes.prune.candidates import Candidate

Widths = dict[Space, int]


@dataclass(frozen=True)
class Bound:
    """Something that must not exceed a limit.

    Attributes:
        name: of the budget's field.
        ratio: to `whole`, what the original has.
        of: what it is for given widths.
    """

    name: str
    ratio: float
    whole: float
    of: Callable[[Mapping[Space, int]], float]

    @property
    def limit(self) -> float:
        return self.ratio * self.whole


def admissible(candidate: Candidate, multiple: int, floor: float) -> list[int]:
    """Return the widths that a space may have, from the largest, which is its size.

    Below that, widths make the axes that hold the space multiples of `multiple`, where that leaves a choice, and are at
    least the share `floor` of its size.
    """
    size = candidate.space.size
    beside = 1
    for member in candidate.space.members:
        if "reads" in member.role:
            beside = max(beside, axis_size(member.whole)[0] // size)
    step = multiple // math.gcd(multiple, beside)
    while step > 1 and step * 2 > size:
        step //= 2
    least = max(1, math.ceil(floor * size))
    return [size, *(width for width in range(size - 1, least - 1, -1) if width % step == 0)]


def allocate(
    errors: Mapping[Space, Sequence[float]],
    widths: Mapping[Space, Sequence[int]],
    bounds: Sequence[Bound],
) -> Widths:
    """Return widths under which the bounds hold, or as near to that as the widths allow.

    Args:
        errors: by space, what is left as error when 0, 1, 2 ... coordinates of each fibre are gone.
        widths: by space, what it may have, descending.
    """
    place = dict.fromkeys(widths, 0)

    def now(changed: Space | None = None) -> Widths:
        return {space: widths[space][at + (space is changed)] for space, at in place.items()}

    def error(space: Space, at: int) -> float:
        return errors[space][space.size - widths[space][at]]

    while broken := [bound for bound in bounds if bound.of(now()) > bound.limit]:
        best: tuple[float, Space] | None = None
        held = [bound.of(now()) for bound in broken]
        for space, at in place.items():
            if at + 1 >= len(widths[space]):
                continue
            after = now(space)
            # What is missing counts, whichever bound it is of.
            saved = sum((was - bound.of(after)) / bound.limit for was, bound in zip(held, broken, strict=True))
            if saved > 0:
                price = (error(space, at + 1) - error(space, at)) / saved
                if best is None or price < best[0]:
                    best = price, space
        if best is None:
            break
        place[best[1]] += 1
    return now()
