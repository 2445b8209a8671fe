"""How many coordinates of each space stay, under a budget.

Every space has a curve: the error that each number of removed coordinates leaves, in a measure that is comparable
between spaces. Widths shrink one admissible step at a time, always where the next step costs least error for what it
saves, until the budget holds; what the last steps saved too much is given back where it takes most error away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from graphopt.analysis import macs, parameters
from graphopt.analysis.spaces.axes import axis_size
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.passes.prune.candidates import Candidate
from graphopt.pipeline import Context

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Bound:
    """Something that must not exceed a limit.

    Attributes:
        name: of the budget's field.
        ratio: to `whole`, what the original has.
        of: what it is for given widths, or of a program.
    """

    name: str
    ratio: float
    whole: float
    of: Callable[[Any], float]

    @property
    def limit(self) -> float:
        return self.ratio * self.whole


def bounds_of(
    context: Context,
    program: Program,
    macs_of: Callable[[Any], float],
    parameters_of: Callable[[Any], float],
    who: str,
    latency: Callable[[], Callable[[Any], float]] | None = None,
) -> list[Bound]:
    """Return what the budget bounds of multiply-accumulates, parameters (bytes of a float file are these), latency.

    `latency`: returns what tells the latency relative to the original; None: the pass bounds no latency.

    Raises GraphoptError where that is nothing; `who` names the pass with the option that could say it instead.
    """
    budget, original = context.budget, context.original or program
    bounds = []
    if budget.macs_ratio is not None:
        bounds.append(Bound("budget.macs_ratio", budget.macs_ratio, macs(original), macs_of))
    for name in ("params_ratio", "size_ratio"):
        if (ratio := getattr(budget, name)) is not None:
            bounds.append(Bound(f"budget.{name}", ratio, parameters(original), parameters_of))
    if budget.latency_ratio is not None and latency is not None:
        bounds.append(Bound("budget.latency_ratio", budget.latency_ratio, 1.0, latency()))
    if not bounds:
        fields = ["macs_ratio", "params_ratio", "size_ratio", *(["latency_ratio"] if latency else [])]
        raise GraphoptError(
            f"{who.partition('(')[0]} needs to know how much goes: give a budget with {', '.join(fields)}, or {who}"
        )
    return bounds


def told(bounds: Sequence[Bound], least: Any) -> str:
    """Return what bounds ask for and how far down it goes, for a message."""
    return ", ".join(f"{b.name} ≤ {b.ratio:g} (it gets down to {b.of(least) / b.whole:.3g})" for b in bounds)


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
    errors: Mapping[Key, Mapping[int, float]], widths: Mapping[Key, Sequence[int]], bounds: Sequence[Bound]
) -> dict[Key, int]:
    """Return widths under which the bounds hold, or as near to that as the widths allow.

    Args:
        errors: of everything that has a width, the error that each admissible width leaves.
        widths: the admissible ones, descending.
    """
    place = dict.fromkeys(widths, 0)

    def now(changed: Key | None = None, by: int = 1) -> dict[Key, int]:
        return {each: widths[each][at + by * (each is changed)] for each, at in place.items()}

    while broken := [bound for bound in bounds if bound.of(now()) > bound.limit]:
        best: tuple[float, Key] | None = None
        held = [bound.of(now()) for bound in broken]
        for each, at in place.items():
            if at + 1 >= len(widths[each]):
                continue
            after = now(each)
            # What is missing counts, whichever bound it is of.
            saved = sum((was - bound.of(after)) / bound.limit for was, bound in zip(held, broken, strict=True))
            if saved > 0:
                price = (errors[each][widths[each][at + 1]] - errors[each][widths[each][at]]) / saved
                if best is None or price < best[0]:
                    best = price, each
        if best is None:
            return now()
        place[best[1]] += 1
    while True:
        wider = [each for each, at in place.items() if at and all(b.of(now(each, -1)) <= b.limit for b in bounds)]
        gains = {each: errors[each][now()[each]] - errors[each][now(each, -1)[each]] for each in wider}
        if not gains:
            return now()
        place[max(gains, key=lambda each: gains[each])] -= 1
