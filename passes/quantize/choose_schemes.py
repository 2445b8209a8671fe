"""Decide for every site by which scheme it is quantized, from measured time and error.

    each convolution and linear   ->   marked: static scales | dynamic, computed at run time | float

Three candidates are lowered and timed in turns: float, all static, all dynamic. A site takes its fastest scheme; what
is clearly faster in float stays float. A little of the latency is then spent where another quantized scheme removes
most error at the outputs. The result is timed against the candidates: a slower one is dropped for the fastest of them.
With a metric and `budget.metric_drop`, the sites that harm the outputs most go back to float until the budget holds.

Nothing is computed otherwise yet: `quantize_static` and `quantize_dynamic`, which come next, keep to the marks. Runs
after the exact passes. Without a backend that can time programs for the target everything is static.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt
from torch import fx

from graphopt.analysis.numerics import SiteError, explain_sites, site_errors
from graphopt.backend import Profile
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Site, arguments, operator
from graphopt.memory import release_freed
from graphopt.metric import rated
from graphopt.passes.quantize.dynamic import QuantizeDynamic
from graphopt.passes.quantize.static import QuantizeStatic
from graphopt.pipeline import Context, LossyPass
from graphopt.quantization.marks import DYNAMIC, FLOAT, STATIC, mark
from graphopt.quantization.schemes import Choice, Option, averaged, choose
from graphopt.quantization.timing import CONVERSIONS, region_of, site_times
from graphopt.search import bisect

# Two timings of one file differ by so much: a share, and for the smallest models a time.
_CLEAR_SHARE, _CLEAR_FILE_MS = 0.03, 0.1


@dataclass(frozen=True)
class ChooseSchemes(LossyPass):
    """Choose static, dynamic or no quantization for each site, by measured time and error.

    Attributes:
        slack: share of the latency that may be spent on schemes with less error.
        batches: calibration batches on which errors are measured.
    """

    quantizes: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "retype_floats")

    slack: Annotated[float, Field(ge=0, le=1)] = 0.03
    batches: PositiveInt = 1

    def run(self, program: Program, context: Context) -> Changes:
        context.needed_calibration(self.name)
        return _Work(self, program, context).run()


@dataclass
class _Work:
    """One run of the pass: the candidates made, and what was learned of the sites."""

    options: ChooseSchemes
    program: Program
    context: Context
    measuring_seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        only, skip = self.options.only, self.options.skip
        self.static, self.dynamic = QuantizeStatic(only=only, skip=skip), QuantizeDynamic(only=only, skip=skip)

    def run(self) -> Changes:
        candidates = {FLOAT: self.program.clone(), STATIC: self.program.clone(), DYNAMIC: self.program.clone()}
        static = _touched(self.static.apply(candidates[STATIC], self.context, {}))
        dynamic = _touched(self.dynamic.apply(candidates[DYNAMIC], self.context, {}))
        release_freed()
        sites = {name: self._node(name) for name in dict.fromkeys([*static, *dynamic])}
        candidates = {scheme: made for scheme, made in candidates.items() if scheme != DYNAMIC or dynamic}
        reasons: dict[str, str] = {}
        if sites:
            errors = self._errors(candidates, sites)
            chosen = self._choose(sites, candidates, errors, reasons)
            chosen = self._within_budget(chosen, reasons, errors)
            self.facts["schemes"] = {scheme: list(chosen.values()).count(scheme) for scheme in (STATIC, DYNAMIC, FLOAT)}
            worst = errors[STATIC].values() if STATIC in errors else errors[DYNAMIC].values()
            self.facts["site_errors"] = {site.node: site.plain for site in worst}
            self.facts["worst_sites"] = explain_sites(worst)
            for name, scheme in chosen.items():
                mark(sites[name], scheme, reasons.get(name, ""))
        self.facts["measuring_seconds"] = round(self.measuring_seconds, 3)
        changes = Changes(facts=self.facts)
        for name, node in sites.items():
            scheme, reason = chosen[name], reasons.get(name, "")
            if scheme == FLOAT:
                changes.skipped.append(Site(node.name, f"float is best: {reason}" if reason else "float is best"))
            else:
                changes.touched.append(Site(node.name, f"to be {scheme}"))
        return changes

    def _node(self, name: str) -> fx.Node:
        found: fx.Node = next(node for node in self.program.graph.nodes if node.name == name)
        return found

    def _apply(self, chosen: Mapping[str, str]) -> Program:
        """Return the program quantized as chosen."""
        program = self.program.clone()
        self.static.apply(program, self.context, {name: each for name, each in chosen.items() if each != STATIC})
        if DYNAMIC in chosen.values():
            self.dynamic.apply(program, self.context, {name: each for name, each in chosen.items() if each != DYNAMIC})
        release_freed()
        return program

    def _measure(self, programs: Mapping[str, Program]) -> dict[str, Profile]:
        """Time programs; nothing where that is not possible, with the reason among the facts."""
        if self.context.measure is None:
            self.facts["not_measured"] = f"nothing can be timed here for {self.context.target.name}"
            return {}
        started = time.perf_counter()
        try:
            with self.context.progress.stage("measure"):
                return self.context.timed(programs)
        except GraphoptError as error:
            self.facts["not_measured"] = str(error)
            return {}
        finally:
            self.measuring_seconds += time.perf_counter() - started

    def _errors(
        self, candidates: Mapping[str, Program], sites: Mapping[str, fx.Node]
    ) -> dict[str, dict[str, SiteError]]:
        """Return the errors of every site by scheme and name, the worst first.

        How the outputs take an error is measured once, for static scales, and scaled by the local error of others.
        """
        batches = self.context.needed_calibration(self.options.name).first(self.options.batches)
        found = {}
        for scheme, candidate in candidates.items():
            if scheme != FLOAT:
                effects = scheme == STATIC
                each = site_errors(candidates[FLOAT], candidate, batches, effects, sites, self.context.progress)
                found[scheme] = {site.node: site for site in each}
        return found

    def _choose(
        self,
        sites: Mapping[str, fx.Node],
        candidates: Mapping[str, Program],
        errors: Mapping[str, Mapping[str, SiteError]],
        reasons: dict[str, str],
    ) -> dict[str, str]:
        """Return the scheme of each site and fill in the reasons."""
        preferred = {name: STATIC if name in errors.get(STATIC, {}) else DYNAMIC for name in sites}
        profiles = self._measure(candidates)
        if not profiles:
            return preferred
        regions = {name: region_of(node, profiles[FLOAT], sites) for name, node in sites.items()}
        times = {scheme: site_times(candidates[scheme], profiles[scheme], regions) for scheme in profiles}
        choices = []
        for name, node in sites.items():
            choice = Choice(name, _alike(node))
            for scheme in profiles:
                # A time of zero: the runtime merged the operator into one of another name, and nothing is known.
                if times[scheme][name] > 0 and (scheme == FLOAT or name in errors[scheme]):
                    noise = 0.0 if scheme == FLOAT else _noise(errors, scheme, name)
                    choice.options[scheme] = Option(scheme, times[scheme][name], noise)
            choices.append(choice)
        choices = averaged(choice for choice in choices if set(choice.options) - {FLOAT})
        fastest = min(profile.latency_ms for profile in profiles.values())
        chosen = preferred | choose(choices, self.options.slack * fastest, STATIC)
        reasons |= {choice.site: _reason(choice) for choice in choices}
        self.facts["site_times"] = reasons.copy()
        self.facts["latency_ms"] = {scheme: round(profile.latency_ms, 4) for scheme, profile in profiles.items()}
        return self._gate(chosen, reasons, candidates, profiles)

    def _gate(
        self,
        chosen: dict[str, str],
        reasons: dict[str, str],
        candidates: Mapping[str, Program],
        profiles: Mapping[str, Profile],
    ) -> dict[str, str]:
        """Return the choice, or the fastest candidate where the choice is clearly slower; float is the last resort."""
        uniform = {scheme: _uniform(scheme, chosen, candidates) for scheme in candidates}
        times = {scheme: profile.latency_ms for scheme, profile in profiles.items()}
        best = min((scheme for scheme in times if scheme != FLOAT), key=lambda scheme: times[scheme])
        own = next((scheme for scheme, each in uniform.items() if each == chosen), "")
        if not own:
            own = "mixed"
            measured = {best: candidates[best], FLOAT: candidates[FLOAT], own: self._apply(chosen)}
            beside = self._measure(measured)
            times |= {scheme: profile.latency_ms for scheme, profile in beside.items()}
            self.facts["latency_ms"] |= {scheme: round(spent, 4) for scheme, spent in times.items()}
        for scheme, bound in ((best, 1 + self.options.slack), (FLOAT, 1.0)):
            if _clearly_slower(times.get(own, times[best]), bound * times[scheme]):
                self.facts["gate"] = (
                    f"{own} takes {times[own]:.3f} ms, all {scheme} {times[scheme]:.3f} ms: {scheme} was taken"
                )
                reasons |= dict.fromkeys(uniform[scheme], self.facts["gate"])
                chosen, own = uniform[scheme], scheme
        return chosen

    def _within_budget(
        self, chosen: dict[str, str], reasons: dict[str, str], errors: Mapping[str, Mapping[str, SiteError]]
    ) -> dict[str, str]:
        """Return the choice with as few of the worst sites back in float as the metric needs.

        Bisection over the sites by their effect on the outputs, with true evaluations.
        """
        allowed, evaluate = self.context.budget.metric_drop, self.context.evaluate
        ranked = [name for name in errors.get(STATIC, {}) if chosen.get(name, FLOAT) != FLOAT]
        if allowed is None or evaluate is None or not ranked:
            return chosen
        wanted = rated(evaluate, self.program, "the program", self.context.seed) - allowed

        def with_float(count: int) -> dict[str, str]:
            return chosen | dict.fromkeys(ranked[:count], FLOAT)

        def holds(count: int) -> bool:
            return rated(evaluate, self._apply(with_float(count)), "a candidate", self.context.seed) >= wanted

        with self.context.progress.stage("search sites to keep in float"):
            # All but one: float everywhere holds.
            short = bisect(lambda count: not holds(count), len(ranked) - 1)
            if short < 0:
                return chosen
            high = short + 1
        for name in ranked[:high]:
            reasons[name] = f"kept float for budget.metric_drop = {allowed:g}: among the {high} worst at the outputs"
        self.facts["kept_for_metric"] = ranked[:high]
        return with_float(high)


def _clearly_slower(milliseconds: float, other: float) -> bool:
    return milliseconds - other > max(_CLEAR_FILE_MS, _CLEAR_SHARE * other)


def _touched(changes: Changes) -> list[str]:
    return [site.node for site in changes.touched]


def _uniform(scheme: str, chosen: Mapping[str, str], candidates: Mapping[str, Program]) -> dict[str, str]:
    """Return the choice that the candidate of one scheme stands for."""
    quantized = {
        node.name
        for node in candidates[scheme].graph.nodes
        if node.op == "call_function" and any(operator(source) in CONVERSIONS for source in node.all_input_nodes)
    }
    return {name: scheme if name in quantized else FLOAT for name in chosen}


def _noise(errors: Mapping[str, Mapping[str, SiteError]], scheme: str, name: str) -> float:
    """Return the noise at the outputs of a site alone; where it was measured for another scheme only, in proportion."""
    own, measured = errors[scheme][name], errors.get(STATIC, {}).get(name)
    if measured is None or scheme == STATIC or measured.local.ratio == 0:
        return own.effect.ratio or own.local.ratio
    return measured.effect.ratio * own.local.ratio / measured.local.ratio


def _alike(node: fx.Node) -> tuple[Any, ...]:
    """Return what decides how long an operator takes."""
    named = arguments(node)
    shapes = tuple(
        str(tuple(value.meta["val"].shape)) for value in (named["input"], named["weight"]) if isinstance(value, fx.Node)
    )
    plain = tuple(f"{key}={value}" for key, value in named.items() if not isinstance(value, fx.Node))
    return (operator(node), *shapes, *plain)


def _reason(choice: Choice) -> str:
    return ", ".join(f"{option.scheme} {option.milliseconds:.3f} ms" for option in choice.options.values())
