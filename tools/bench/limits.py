"""What a task must reach: bounds on the figures of one run, checked by the table.

A bound is on a figure itself or on its ratio to the best (smallest) one among the peers of the same run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OURS = "graphopt"
BASELINE = "fp32"


@dataclass(frozen=True)
class Limit:
    """`quantity` of our record, or with `against_peers` its ratio to the smallest peer's, is at most this."""

    quantity: str
    at_most: float
    against_peers: bool = False
    needs_vnni: bool = False

    def __str__(self) -> str:
        what = f"{self.quantity} ÷ best peer's" if self.against_peers else self.quantity
        return f"{what} ≤ {self.at_most:g}"


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
    if limit.against_peers:
        peers = [
            record["figures"][limit.quantity]
            for name, record in records.items()
            if name not in (OURS, BASELINE) and record["figures"].get(limit.quantity) is not None
        ]
        if not peers:
            return Verdict(limit, None, None, "no peer was measured")
        value = value / min(peers)
    return Verdict(limit, value, value <= limit.at_most)
