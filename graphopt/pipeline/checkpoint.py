"""Checkpoints: what long work inside of one pass has reached, so that an interrupted run goes on from there."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import GraphoptError
from graphopt.files import replacing


class Checkpoint:
    """One file beside the journal of a run; without a run directory nothing is kept.

    Args:
        folder: of the journal; None keeps nothing.
        key: digest of whatever decides the work: another one's file is not read.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._key = key
        self._path = None if folder is None else folder / f"checkpoint-{key[:32]}.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Keep tensors and plain data. A full disk costs the checkpoint, not the run."""
        if self._path is None:
            return
        try:
            with replacing(self._path) as temporary:
                torch.save({"key": self._key, "state": state}, temporary)
        except (GraphoptError, RuntimeError):
            self._path.unlink(missing_ok=True)

    def restore(self) -> dict[str, Any] | None:
        """Return what was kept; None where there is nothing, or it is damaged."""
        if self._path is None or not self._path.exists():
            return None
        try:
            found = torch.load(self._path, weights_only=True)
            return dict(found["state"]) if found["key"] == self._key else None
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
            return None

    def remove(self) -> None:
        """Drop what was kept: the work is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
