"""Calibration data: an iterable of inputs, checked against the program and streamed.

Nothing is kept in memory. A one-shot iterator (a generator) is spooled to a temporary folder while it is read, so that
a second reader finds the same batches.
"""

from __future__ import annotations

import contextlib
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphoptError, described, first_line
from graphopt.ir.printing import type_text
from graphopt.ir.program import Program, Signature

EMPTY = "the calibration data is empty; give at least one batch in the form of the example inputs"


class Batches:
    """A re-readable stream of flat inputs for `program`.

    Each element of `source` has the form of the example inputs: a tuple of positional tensors, a dict of keyword
    tensors, or one tensor; numpy arrays are taken as tensors. Reading raises GraphoptError at the first batch that does
    not fit.
    """

    def __init__(self, source: Iterable[Any], program: Program) -> None:
        check_source(source)
        self._signature: Signature = program.signature
        self._expected = [node.meta.get("val") for node in program.placeholders]
        self._one_shot = isinstance(source, Iterator)
        self._source: Iterable[Any] = source
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        self._spooled = 0
        self._complete = False
        self._seen = 0  # batches of a first complete reading of a source that can be read again

    def __iter__(self) -> Iterator[list[Any]]:
        return self._spooling() if self._one_shot else self._reading()

    def _reading(self) -> Iterator[list[Any]]:
        count = 0
        stream = iter(self._source)
        while (batch := _next(stream, count)) is not _END:
            yield self._flat(batch, count)
            count += 1
        if count < self._seen:
            raise GraphoptError(
                f"the calibration data gave {self._seen} batches at first and {count} when read again; "
                "give a list, a DataLoader or a generator"
            )
        self._seen = count

    def _spooling(self) -> Iterator[list[Any]]:
        index = 0
        while True:
            if index < self._spooled:
                yield self._read(index)
            elif self._complete:
                return
            else:
                batch = _next(self._source, self._spooled)
                if batch is _END:
                    self._complete = True
                    return
                flat = self._flat(batch, self._spooled)
                self._write(flat)
                del batch  # the reader may keep what it is given, the stream does not
                yield flat
                del flat
            index += 1

    def head(self, count: int) -> Batches:
        """Return the first `count` batches as batches of their own, which are kept in memory."""
        return _Head(self, self.first(count))

    def __len__(self) -> int:
        """The number of batches where the source knows it, else 0."""
        if self._one_shot:
            return self._spooled if self._complete else 0
        try:
            return len(self._source)  # type: ignore[arg-type]
        except TypeError:  # a DataLoader over a stream has a length that it does not know
            return 0

    def first(self, count: int) -> list[list[Any]]:
        """Return up to `count` batches; GraphoptError where there is none."""
        found = []
        for flat in self:
            found.append(flat)
            if len(found) >= count:
                break
        if not found:
            raise GraphoptError(EMPTY)
        return found

    def _write(self, flat: list[Any]) -> None:
        # A copy: of a view, torch.save would write the whole tensor behind it.
        own = [value.detach().clone() if isinstance(value, Tensor) else value for value in flat]
        try:
            if self._spool is None:
                self._spool = tempfile.TemporaryDirectory(prefix="graphopt-calibration-")
            torch.save(own, Path(self._spool.name) / f"{self._spooled}.pt")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = getattr(error, "strerror", None) or first_line(error)
            raise GraphoptError(
                f"cannot keep the calibration data in {tempfile.gettempdir()} ({reason}); point TMPDIR to a folder "
                "with room, or pass a list or a DataLoader instead of a generator"
            ) from error
        self._spooled += 1

    def _read(self, index: int) -> list[Any]:
        assert self._spool is not None
        try:
            return list(torch.load(Path(self._spool.name) / f"{index}.pt", weights_only=True))
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise GraphoptError(f"calibration batch {index} is gone from {self._spool.name}; run again") from error

    def _flat(self, batch: Any, index: int) -> list[Any]:
        what = f"calibration batch {index}"
        try:
            args, kwargs = call_form(batch)
        except GraphoptError as error:
            raise GraphoptError(f"{what}: {error}") from None
        if len(args) > len(self._signature.parameters) > 0:
            raise GraphoptError(
                f"{what} has {len(args)} values, the model takes {len(self._signature.parameters)} "
                f"({', '.join(self._signature.parameters)}); leave out labels"
            )
        try:
            flat = self._signature.flatten(args, kwargs)
        except GraphoptError as error:
            raise GraphoptError(f"{what}: {error}") from None
        check_inputs(flat, self._expected, self._signature.inputs, what)
        return flat


_END = object()


def _next(stream: Any, index: int) -> Any:
    """Return the next batch or _END; what the user's own code raises is the user's to know."""
    try:
        return next(stream, _END)
    except GraphoptError:
        raise
    except Exception as error:
        raise GraphoptError(f"reading calibration batch {index} failed: {described(error)}") from error


class _Head(Batches):
    """The first few of some batches, read and checked before."""

    def __init__(self, whole: Batches, flat: list[list[Any]]) -> None:
        self._kept = flat

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


@contextlib.contextmanager
def running(batch: int) -> Iterator[None]:
    """Turn what goes wrong while a program runs on a batch into one sentence that names it.

    Raises GraphoptError; one that is raised within, and MemoryError, go through.
    """
    try:
        yield
    except (GraphoptError, MemoryError):
        raise
    except Exception as error:  # an index beyond a table, sizes of inputs that do not go together
        raise GraphoptError(
            f"the model does not run on calibration batch {batch} ({described(error)}); "
            "give batches like the example inputs"
        ) from error


def check_source(source: Any) -> None:
    """Refuse what is no iterable of batches, before any work is done."""
    if isinstance(source, Tensor | np.ndarray | Mapping) or hasattr(source, "keys"):
        raise GraphoptError(
            "calibration must be an iterable of batches, not one batch; put it in a list: calibration=[batch]"
        )
    if isinstance(source, str | bytes) or not isinstance(source, Iterable):
        hint = "; wrap it in a DataLoader" if hasattr(source, "__getitem__") and hasattr(source, "__len__") else ""
        hint = "; call it" if callable(source) and not isinstance(source, Iterable) else hint
        raise GraphoptError(f"calibration must be an iterable of inputs, not {type(source).__name__}{hint}")


def call_form(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `(args, kwargs)` of one batch or example.

    A tuple or list is positional, a mapping is keyword, a tensor stands alone; numpy arrays become tensors.
    """

    def tensors(value: Any) -> Any:
        return torch.utils._pytree.tree_map(_tensor, value)

    if isinstance(batch, Tensor | np.ndarray):
        return (tensors(batch),), {}
    if isinstance(batch, dict):
        return (), {str(key): tensors(value) for key, value in batch.items()}
    if hasattr(batch, "keys") and hasattr(batch, "__getitem__"):  # transformers' BatchEncoding and its like
        return (), {str(key): tensors(batch[key]) for key in batch.keys()}  # noqa: SIM118 - iterating may give values
    if isinstance(batch, tuple | list):
        return tuple(tensors(value) for value in batch), {}
    raise GraphoptError(f"inputs must be a tensor, a tuple or a dict of tensors, not {type(batch).__name__}")


def _tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    try:
        # torch takes no negative strides and would write to what numpy says is read-only.
        plain = value if value.flags.writeable and min(value.strides, default=0) >= 0 else value.copy()
        return torch.from_numpy(plain)
    except (TypeError, ValueError):
        kind = "another byte order" if not value.dtype.isnative else f"dtype {value.dtype}"
        raise GraphoptError(f"an array of {kind} cannot become a tensor; convert it with .astype first") from None


def check_inputs(flat: list[Any], expected: list[Any], names: tuple[str, ...], what: str) -> None:
    """Check flat inputs against abstract values; GraphoptError names the input and says what to do."""
    for value, known, name in zip(flat, expected, names, strict=True):
        if isinstance(known, Tensor):
            _check_tensor(value, known, f"{what}: {name}")
        elif isinstance(known, bool | int | float | str) and repr(value) != repr(known):
            raise GraphoptError(
                f"{what}: {name} was captured as {known!r} and is fixed, so it cannot be {value!r}; "
                "leave such batches out, or capture the model again"
            )


def _check_tensor(value: Any, known: Tensor, where: str) -> None:
    if not isinstance(value, Tensor):
        raise GraphoptError(f"{where} must be a tensor {type_text(known)}, not {type(value).__name__}")
    if value.dtype != known.dtype:
        raise GraphoptError(
            f"{where} is {value.dtype}, the model was captured with {known.dtype}; convert it with .to({known.dtype})"
        )
    if value.device.type != known.device.type:
        raise GraphoptError(
            f"{where} is on {value.device}, the model on {known.device}; move it with .to('{known.device}')"
        )
    fits = value.dim() == known.dim() and all(
        not isinstance(size, int) or size == given for size, given in zip(known.shape, value.shape, strict=True)
    )
    if not fits:
        raise GraphoptError(
            f"{where} has shape {list(value.shape)}, the model was captured with {type_text(known)}; "
            "give batches of that shape, or capture with dynamic_shapes"
        )
    if value.numel() == 0:
        raise GraphoptError(f"{where} has no elements (shape {list(value.shape)})")
    # Minus infinity is what a mask hides places with; where it would decide a range, the observer refuses it.
    if value.is_floating_point() and not bool((value < torch.inf).all()):
        raise GraphoptError(f"{where} holds NaN or infinity; remove such samples")
