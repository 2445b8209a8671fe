"""Budget: what must hold of the optimized model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from graphopt.errors import GraphoptError, nearest


@dataclass(frozen=True)
class Budget:
    """Bounds on the result; None leaves a quantity free.

    Attributes:
        metric_drop: largest fall of the metric, absolute, in the metric's own unit.
        size_ratio: exported file, new / float. latency_ratio: new / float on the target.
        macs_ratio: multiply-accumulates, new / captured. params_ratio: parameters, new / captured.
        average_bits: bits a weight, scales included.
    """

    metric_drop: float | None = None
    size_ratio: float | None = None
    latency_ratio: float | None = None
    macs_ratio: float | None = None
    params_ratio: float | None = None
    average_bits: float | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = dict(self.bounds())  # whatever the caller passed
        for name, bound in given.items():
            if isinstance(bound, bool) or not isinstance(bound, Real) or not math.isfinite(bound) or bound < 0:
                raise GraphoptError(f"budget.{name} must be a number, finite and not negative, not {bound!r}")
            object.__setattr__(self, name, float(bound))

    def bounds(self) -> dict[str, float]:
        """Return the bounds that were given."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}

    def with_bound(self, name: str, value: float) -> Budget:
        """Return the budget with one more bound; GraphoptError suggests the nearest name."""
        known = [field.name for field in dataclasses.fields(self)]
        if name not in known:
            raise GraphoptError(f"a budget has no field {name!r}{nearest(name, known)}; it has {', '.join(known)}")
        return dataclasses.replace(self, **{name: value})

    def exceeded(self, measured: Mapping[str, float | None]) -> list[str]:
        """Return a sentence for every bound that `measured` breaks or does not know."""
        sentences = []
        for name, bound in self.bounds().items():
            value = measured.get(name)
            if value is None:
                sentences.append(f"budget.{name} ≤ {bound:g} was not measured")
            elif not value <= bound:  # NaN holds no bound
                sentences.append(f"budget.{name} ≤ {bound:g} does not hold: it is {value:.4g}")
        return sentences
