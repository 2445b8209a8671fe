"""Calibration data: an iterable of inputs, checked against the program and streamed.

Nothing is kept in memory. A one-shot iterable (a generator) is spooled to a temporary folder while it is read, so that a
second reader finds the same batches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.ir.printing import type_text
from graphopt.ir.program import Program, Signature


class Batches:
    """A re-readable stream of flat inputs for `program`.

    Each element of `source` has the form of the example inputs: a tuple of positional tensors, a dict of keyword tensors,
    or one tensor; numpy arrays are taken as tensors. Reading raises GraphoptError at the first batch that does not fit.
    """

    def __init__(self, source: Iterable[Any], program: Program) -> None:
        if isinstance(source, str | bytes) or not isinstance(source, Iterable):
            raise GraphoptError(f"calibration must be an iterable of inputs, not {type(source).__name__}")
        if isinstance(source, Tensor | np.ndarray | dict):
            raise GraphoptError(
                "calibration must be an iterable of batches, not one batch; put it in a list: calibration=[batch]"
            )
        self._signature: Signature = program.signature
        self._expected = [node.meta.get("val") for node in program.placeholders]
        self._one_shot = iter(source) is source
        self._source: Iterable[Any] = source
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        self._spooled = 0
        self._complete = False

    def __iter__(self) -> Iterator[list[Any]]:
        if not self._one_shot:
            for index, batch in enumerate(self._source):
                yield self._flat(batch, index)
            return
        for index in range(self._spooled):
            yield self._read(index)
        if self._complete:
            return
        for batch in self._source:
            flat = self._flat(batch, self._spooled)
            self._write(flat)
            yield flat
        self._complete = True

    def __len__(self) -> int:
        """The number of batches where the source knows it, else 0."""
        return len(self._source) if hasattr(self._source, "__len__") else (self._spooled if self._complete else 0)

    def first(self, count: int) -> list[list[Any]]:
        """Return up to `count` batches; GraphoptError where there is none."""
        found = []
        for flat in self:
            found.append(flat)
            if len(found) >= count:
                break
        if not found:
            raise GraphoptError("the calibration data is empty; give at least one batch in the form of the example inputs")
        return found

    def _write(self, flat: list[Any]) -> None:
        if self._spool is None:
            self._spool = tempfile.TemporaryDirectory(prefix="graphopt-calibration-")
        tensors = {str(i): value.contiguous() for i, value in enumerate(flat) if isinstance(value, Tensor)}
        save_file(tensors, Path(self._spool.name) / f"{self._spooled}.safetensors")
        self._spooled += 1

    def _read(self, index: int) -> list[Any]:
        assert self._spool is not None
        tensors = load_file(Path(self._spool.name) / f"{index}.safetensors")
        return [tensors.get(str(i), expected) for i, expected in enumerate(self._expected)]

    def _flat(self, batch: Any, index: int) -> list[Any]:
        args, kwargs = call_form(batch)
        if len(args) > len(self._signature.parameters) > 0:
            raise GraphoptError(
                f"calibration batch {index} has {len(args)} values, the model takes {len(self._signature.parameters)} "
                f"({', '.join(self._signature.parameters)}); leave out labels"
            )
        try:
            flat = self._signature.flatten(args, kwargs)
        except GraphoptError as error:
            raise GraphoptError(f"calibration batch {index}: {error}") from None
        check_inputs(flat, self._expected, self._signature.inputs, f"calibration batch {index}")
        return flat


def call_form(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `(args, kwargs)` of one batch or example: a tuple or list is positional, a mapping is keyword, a tensor alone."""

    def tensors(value: Any) -> Any:
        return torch.utils._pytree.tree_map(lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v, value)

    if isinstance(batch, Tensor | np.ndarray):
        return (tensors(batch),), {}
    if isinstance(batch, dict):
        return (), {str(key): tensors(value) for key, value in batch.items()}
    if hasattr(batch, "keys") and hasattr(batch, "__getitem__"):  # transformers' BatchEncoding and its like
        return (), {str(key): tensors(batch[key]) for key in batch.keys()}
    if isinstance(batch, tuple | list):
        return tuple(tensors(value) for value in batch), {}
    raise GraphoptError(f"inputs must be a tensor, a tuple or a dict of tensors, not {type(batch).__name__}")


def check_inputs(flat: list[Any], expected: list[Any], names: tuple[str, ...], what: str) -> None:
    """Check flat inputs against abstract values; GraphoptError names the input and says what to do."""
    for value, known, name in zip(flat, expected, names, strict=True):
        if not isinstance(known, Tensor):
            continue
        if not isinstance(value, Tensor):
            raise GraphoptError(f"{what}: {name} must be a tensor {type_text(known)}, not {type(value).__name__}")
        if value.dtype != known.dtype:
            raise GraphoptError(
                f"{what}: {name} is {value.dtype}, the model was captured with {known.dtype}; "
                f"convert it with .to({known.dtype})"
            )
        fits = value.dim() == known.dim() and all(
            not isinstance(size, int) or size == given for size, given in zip(known.shape, value.shape, strict=True)
        )
        if not fits:
            raise GraphoptError(
                f"{what}: {name} has shape {list(value.shape)}, the model was captured with {type_text(known)}; "
                "give batches of that shape, or capture with dynamic_shapes"
            )
        if value.numel() == 0:
            raise GraphoptError(f"{what}: {name} has no elements (shape {list(value.shape)})")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise GraphoptError(f"{what}: {name} holds NaN or infinity; remove such samples")
