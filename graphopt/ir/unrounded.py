"""Weights before they were rounded to their dtype, held or computed again when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping

from torch import Tensor

Computed = Callable[[], Tensor]


class Unrounded(MutableMapping[str, Tensor]):
    """Float64 values of weights by name.

    A value given as a function is computed each time it is read: a pass that changes every weight of a large model
    then costs the memory of one of them, not that of the model in float64.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Tensor | Computed] = {}

    def entry(self, name: str) -> Tensor | Computed | None:
        """Return a value as it is held; None where there is none."""
        return self._entries.get(name)

    def put(self, name: str, entry: Tensor | Computed) -> None:
        self._entries[name] = entry

    def forget(self, name: str) -> None:
        """Drop a value, if there is one, without computing it."""
        self._entries.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """Move a value, if there is one, to another name."""
        if old in self._entries:
            self._entries[new] = self._entries.pop(old)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return entry if isinstance(entry, Tensor) else entry()

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
