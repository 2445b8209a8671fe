"""Remedies: what could be done about the places where a result loses most, each tried before it is told.

    keep float       one place in floating point
    8-bit weights    where they have fewer bits
    smooth           the spread of activations moved into the weights before they are quantized, where nobody tried it

One place is changed in the quantized program and the others are left. Where that helps nowhere, since places were
rounded together to make up for each other, the worst is left in float and the others are quantized anew; that, like
smoothing, runs the quantizing passes again, and so only where they take seconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.analysis.cost import file_bytes
from graphopt.analysis.numerics import Noise, SiteError
from graphopt.analysis.numerics.changed import output_noise, with_float, with_wider_weights
from graphopt.calibration import Batches
from graphopt.ir.program import Program
from graphopt.pipeline import Composite, Context, Pass, Recipe, make_pass, pass_class, run_passes
from graphopt.pipeline.registry import UnknownPass

if TYPE_CHECKING:
    from graphopt.result import Result

_TRIED = 8  # sites for which remedies are tried: what helps most beside the others is not what costs most alone
_TOLD = 6
_SMOOTH = "smooth"
_AFFORDED_SECONDS = 10.0  # for quantizing again
_MORE = 0.02  # of the error
_HELPS = 0.98  # a remedy that leaves more of the error is not worth a sentence


@dataclass(frozen=True)
class Remedy:
    """A change that was tried, on the batches on which the errors were measured.

    Attributes:
        site, change: where, and what. how: how to ask for it.
        error_ratio: noise at the outputs, after over before. size_ratio: of the weights' bytes in the file.
    """

    site: str
    change: str
    how: str
    error_ratio: float
    size_ratio: float

    def __str__(self) -> str:
        error, size = (f"{100 * (each - 1):+.3g} %" for each in (self.error_ratio, self.size_ratio))
        return f"{self.site}: {self.change}: error {error}, size {size} ({self.how})"


@dataclass
class Trial:
    """Tries changes of a result and compares outputs on some batches.

    Attributes:
        reference: the result before anything was quantized. batches: flat inputs. exact: what it gives for each.
        calibration: what the passes were given.
    """

    reference: Program
    result: Result
    batches: list[list[Any]]
    exact: list[list[Any]]
    calibration: Batches | None = None

    @functools.cached_property
    def before(self) -> Noise:
        """The noise of the result as it is."""
        return output_noise(self.result.program, self.exact, self.batches)

    def remedies(self, sites: list[SiteError]) -> list[Remedy]:
        """Return what helps of what can be done about the first sites, the most helpful first."""
        if not sites or self.before.noise == 0:
            return []
        worst = sites[:_TRIED]
        tried: list[Remedy | None] = [each for site in worst for each in self._single(site.node)]
        if not tried:
            # Places that were rounded together make up for each other: changing one alone is worse than leaving all.
            tried.append(self._rounded_anew(worst[0].node))
        tried.append(self._smoothed(worst))
        found = [each for each in tried if each is not None]
        return sorted(found, key=lambda each: each.error_ratio)[:_TOLD]

    def _single(self, site: str) -> list[Remedy]:
        """Change one place and leave the others as they are."""
        before_it = f"quantize_weights with grid='int8' and only=['{site}'] before the other one"
        ways = (
            ("keep float", with_float, f"--keep-float {site}"),
            ("8-bit weights", with_wider_weights, before_it),
        )
        made = [(change, make(self.reference, self.result.program, site), how) for change, make, how in ways]
        tried = [self._judged(site, change, how, program) for change, program, how in made if program is not None]
        found = [each for each in tried if each is not None]
        # What costs more and hardly helps more is not worth a second sentence.
        return [
            each
            for each in found
            if not any(o.size_ratio < each.size_ratio and o.error_ratio < each.error_ratio + _MORE for o in found)
        ]

    def _passes(self) -> list[Pass]:
        """Return what quantized; nothing where it needs what is not at hand, or takes long."""
        records = list(self.result.trace)
        quantizing = [index for index, each in enumerate(records) if index and each.changed and quantizes(each.name)]
        if not quantizing:
            return []
        try:
            again = [each for each in records[quantizing[0] :] if not composite(each.name)]
            found = [make_pass(each.name, each.options) for each in again]
        except UnknownPass:  # it was given as an object
            return []
        given = {"calibration"} if self.calibration is not None else set()
        affordable = sum(each.seconds for each in again) <= _AFFORDED_SECONDS
        return found if affordable and not any(each.needs - given for each in found) else []

    def _smoothed(self, sites: list[SiteError]) -> Remedy | None:
        """Smooth first, where rounding activations costs most and nobody tried it."""
        worst = next((site for site in sites if site.inputs.noise > site.weights.noise > 0), None)
        known = any(each.name == _SMOOTH or _SMOOTH in str(each.options) for each in self.result.trace)
        if worst is None or known or self.calibration is None or not (passes := self._passes()):
            return None
        program, trace = run_passes(self.reference, [make_pass(_SMOOTH)], Context(self.result.target, self.calibration))
        if not any(each.name == _SMOOTH and each.changed for each in trace):
            return None
        how = f"{_SMOOTH} before {passes[0].name}"
        return self._judged(worst.node, "smooth what weights read", how, self._quantized(program, passes))

    def _rounded_anew(self, site: str) -> Remedy | None:
        """Leave one place in float, and let the others be rounded for that."""
        passes = list(Recipe("again", tuple(self._passes())).keeping_float([site]).passes)
        if not passes:
            return None
        return self._judged(site, "keep float", f"--keep-float {site}", self._quantized(self.reference, passes))

    def _quantized(self, program: Program, passes: list[Pass]) -> Program:
        return run_passes(program, passes, Context(self.result.target, self.calibration))[0]

    def _judged(self, site: str, change: str, how: str, program: Program) -> Remedy | None:
        error = output_noise(program, self.exact, self.batches).noise / self.before.noise
        bits = self.result.target.code_bits
        size = file_bytes(program, bits) / file_bytes(self.result.program, bits)
        return Remedy(site, change, how, error, size) if error < _HELPS else None


def quantizes(name: str) -> bool:
    """Return whether the pass of a name quantizes by itself; False of one that is not known here."""
    try:
        return pass_class(name).quantizes and not composite(name)
    except UnknownPass:  # one that was given as an object, or that is not installed here
        return False


def composite(name: str) -> bool:
    """Return whether the pass of a name only runs others."""
    return issubclass(pass_class(name), Composite)
