"""What is remembered of an activation channel by channel: the largest magnitudes, and some of its vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.errors import GraphoptError

ROWS = 256  # vectors kept for one activation, over all batches


@dataclass(eq=False)
class Channels:
    """Statistics over the dimensions `dims` of a tensor; all others only count how many vectors there are.

    Attributes:
        dims: the dimensions kept, in order.
        largest: the largest magnitude at each place [*sizes of dims] over everything seen; None before anything was.
        parts: vectors [n, *sizes of dims], drawn evenly over what was seen, no more than `limit` in all.
    """

    dims: Sequence[int]
    limit: int = ROWS
    largest: Tensor | None = None
    parts: list[Tensor] = field(default_factory=list)
    _seen: int = 0
    _share: int = 0

    @property
    def rows(self) -> Tensor:
        """The vectors kept [n, *sizes of dims]."""
        return torch.cat(self.parts)

    def update(self, values: Tensor, name: str) -> None:
        """Add a tensor; GraphoptError where it holds NaN or infinity."""
        if values.numel() == 0:
            return
        kept = list(self.dims)
        rows = values.detach().movedim(kept, list(range(-len(kept), 0))).flatten(0, -len(kept) - 1)
        largest = rows.abs().amax(0).float()
        if not bool(torch.isfinite(largest).all()):
            raise GraphoptError(f"calibration met NaN or infinity at {name}; check the calibration data")
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self._keep(rows)

    def _keep(self, rows: Tensor) -> None:
        """Hold a share of `limit` for each batch seen: as more come, every one of them is thinned alike."""
        self._seen += 1
        share = max(self.limit // self._seen, 1)
        if self._seen <= self.limit:
            if share < self._share:
                self.parts = [_spread(part, share) for part in self.parts]
            self.parts.append(_spread(rows, share).float().clone())
            self._share = share


def _spread(rows: Tensor, count: int) -> Tensor:
    """Return at most `count` rows at even distances."""
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]
