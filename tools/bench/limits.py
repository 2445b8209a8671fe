"""What a task must reach: bounds on the figures of one run, checked by the table.

A bound is on a figure itself, or on its ratio to a peer's of the same run: the smallest one, a named peer's, or that of
the peer which is best at another figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OURS = "graphopt"
BASELINE = "fp32"
BEST = "best"


@dataclass(frozen=True)
class Limit:
    """`quantity` of our record, or its ratio to a peer's, is at most this.

    `against`: BEST, the smallest figure among the peers; the name of a peer; or the quantity whose smallest figure
    chooses the peer.
    """

    quantity: str
    at_most: float
    against: str = ""
    needs_vnni: bool = False

    def __str__(self) -> str:
        if not self.against:
            return f"{self.quantity} ≤ {self.at_most:g}"
        whose = "the best peer's" if self.against == BEST else self.against
        if self.against not in (BEST, "nncf"):
            whose = f"that of the peer with the least {self.against}"
        return f"{self.quantity} ÷ {whose} ≤ {self.at_most:g}"


@dataclass(frozen=True)
class Verdict:
    """`reached` is None where the limit could not be checked; `why` then says what was missing."""

    limit: Limit
    value: float | None
    reached: bool | None
    why: str = ""


def check(limit: Limit, records: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Check one limit on one run of one task, records by method. A missing figure is never a pass."""
    ours = records.get(OURS)
    if ours is None:
        return Verdict(limit, None, None, f"{OURS} was not measured")
    if limit.needs_vnni and not ours["machine"].get("vnni"):
        return Verdict(limit, None, None, "this CPU has no VNNI")
    value = ours["figures"].get(limit.quantity)
    if value is None:
        return Verdict(limit, None, False, f"{OURS} failed" if ours.get("error") else "no such figure")
    if not limit.against:
        return Verdict(limit, value, value <= limit.at_most)
    peer, why = _peer(limit, records)
    if peer is None:
        return Verdict(limit, None, None, why)
    other = records[peer]["figures"][limit.quantity]
    ratio = value / other if other else (1.0 if value == other else float("inf"))
    return Verdict(limit, ratio, ratio <= limit.at_most, f"{peer}: {other:.4g}")


def _peer(limit: Limit, records: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, str]:
    """Return the peer to compare with, or why there is none."""
    known = {
        name: record["figures"]
        for name, record in records.items()
        if name not in (OURS, BASELINE) and record["figures"].get(limit.quantity) is not None
    }
    if limit.against in records and limit.against not in known:
        return None, f"{limit.against} has no such figure"
    if limit.against in known:
        return limit.against, ""
    chooses = limit.quantity if limit.against == BEST else limit.against
    candidates = [name for name, figures in known.items() if figures.get(chooses) is not None]
    if not candidates:
        return None, "no peer was measured"
    return min(candidates, key=lambda name: known[name][chooses]), ""
