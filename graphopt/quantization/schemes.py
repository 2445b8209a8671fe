"""Schemes: for each site the way to compute it, chosen by what it costs and what it breaks.

    fastest    argmin over schemes of the site's time; float only where it gains more than timing can err
    slack      a share of the whole latency is then spent where it removes most error for its time

Sites of the same shape are timed together: one site's time in one run of a profiler is mostly noise.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from graphopt.quantization.marks import FLOAT

_CLEAR_SHARE = 0.05  # of a site's time: less is what two runs of the same file differ by
CLEAR_MS = 0.02  # and what the profiler itself costs


@dataclass(frozen=True)
class Option:
    """A scheme at a site: its time, and the noise that it alone puts on the outputs (ratio to the signal)."""

    scheme: str
    milliseconds: float
    noise: float


@dataclass
class Choice:
    """A site with its options. `alike`: sites with an equal key do the same work."""

    site: str
    alike: Hashable
    options: dict[str, Option] = field(default_factory=dict)


def averaged(choices: Iterable[Choice]) -> list[Choice]:
    """Give sites that do the same work the same times: the mean of theirs."""
    listed = list(choices)
    times: dict[tuple[Hashable, str], list[float]] = {}
    for choice in listed:
        for option in choice.options.values():
            times.setdefault((choice.alike, option.scheme), []).append(option.milliseconds)
    means = {key: sum(each) / len(each) for key, each in times.items()}
    return [
        Choice(
            choice.site,
            choice.alike,
            {
                name: Option(name, means[choice.alike, name], option.noise) for name, option in choice.options.items()
            },
        )
        for choice in listed
    ]


def choose(choices: Iterable[Choice], slack_ms: float, preferred: str) -> dict[str, str]:
    """Return the scheme of each site.

    Each starts from its fastest quantized scheme (`preferred` where another is not clearly faster), or from float where
    float is clearly faster. Then `slack_ms` is spent among quantized schemes, where a millisecond removes most noise;
    the largest removals that cost no time come first.
    """
    listed = list(choices)
    chosen = {choice.site: _fastest(choice, preferred) for choice in listed}
    steps = []
    for choice in listed:
        now = choice.options[chosen[choice.site]]
        for option in choice.options.values():
            gain, cost = now.noise - option.noise, max(option.milliseconds - now.milliseconds, 0.0)
            told = max(now.milliseconds, option.milliseconds) > CLEAR_MS  # else the clock's chance would decide
            if told and FLOAT not in (option.scheme, now.scheme) and gain > 0.2 * now.noise:
                steps.append((gain / (cost + CLEAR_MS / 10), gain, cost, choice.site, option.scheme))
    for _, _, cost, site, scheme in sorted(steps, reverse=True):
        if cost <= slack_ms:
            slack_ms -= cost
            chosen[site] = scheme
    return chosen


def _fastest(choice: Choice, preferred: str) -> str:
    options = choice.options
    quantized = [option for option in options.values() if option.scheme != FLOAT]
    if not quantized:
        return FLOAT
    best = min(quantized, key=lambda option: option.milliseconds)
    if preferred in options and not _clearly_faster(best.milliseconds, options[preferred].milliseconds):
        best = options[preferred]
    if FLOAT in options and _clearly_faster(options[FLOAT].milliseconds, best.milliseconds):
        return FLOAT
    return best.scheme


def _clearly_faster(milliseconds: float, other: float) -> bool:
    return other - milliseconds > max(_CLEAR_SHARE * other, CLEAR_MS)


def by_scheme(chosen: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the sites of each scheme."""
    found: dict[str, list[str]] = {}
    for site, scheme in chosen.items():
        found.setdefault(scheme, []).append(site)
    return found
