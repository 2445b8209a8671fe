"""Calibration data from a `.npz`: one array per input name, axis 0 = samples, streamed batch by batch.

The file is untrusted: pickled arrays are refused, headers are checked against the model before any data is
read, and no more than a batch is held in memory.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.analysis.cost import size_hint
from graphopt.errors import GraphoptError, first_line, nearest
from graphopt.ir import Program

_SENSIBLE_BATCH = 16  # where the model takes any number of samples and the example has few
_UNBOUNDED = 1 << 30
_READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    ValueError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class Header:
    """What a member of the archive says about its array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class SampleFile:
    """An npz file and the headers of its arrays, by name."""

    path: Path
    headers: dict[str, Header]

    @staticmethod
    def open(path: Path) -> SampleFile:
        """Read the headers; GraphoptError where the file is no npz, damaged, empty or pickled."""
        try:
            with zipfile.ZipFile(path) as archive:
                headers = {}
                for member in archive.namelist():
                    if not member.endswith(".npy"):
                        raise GraphoptError(f"{path} holds {member!r}, which is no array; write it with numpy.savez")
                    with archive.open(member) as stream:
                        headers[member.removesuffix(".npy")] = _header(stream)
        except FileNotFoundError:
            raise GraphoptError(f"there is no file {path}") from None
        except _READ_ERRORS as error:
            raise GraphoptError(
                f"{path} is no readable npz file ({first_line(error)}); write it with numpy.savez"
            ) from None
        if not headers:
            raise GraphoptError(f"{path} holds no arrays; give one per input of the model, axis 0 = samples")
        for name, header in headers.items():
            if header.dtype.hasobject:
                raise GraphoptError(
                    f"{path}: {name} holds pickled objects, which are not read; save a plain array of numbers"
                )
            if not header.shape or header.shape[0] == 0:
                raise GraphoptError(
                    f"{path}: {name} has no samples (shape {list(header.shape)}); axis 0 counts samples"
                )
        return SampleFile(path, headers)

    def batches(self, program: Program) -> SampleBatches:
        """Return the samples in batches for `program`; GraphoptError where names, shapes or dtypes differ."""
        inputs = {
            name: node.meta["val"]
            for name, node in zip(program.signature.inputs, program.placeholders, strict=True)
            if isinstance(node.meta.get("val"), Tensor)
        }
        self._check_names(list(inputs))
        for name, known in inputs.items():
            self._check_fit(name, known)
        # An input without axes takes one sample a batch.
        rows = {name: size_hint(known.shape[0]) if known.dim() else 1 for name, known in inputs.items()}
        if len({Fraction(self._samples(name), rows[name]) for name in rows}) > 1:
            given = ", ".join(f"{self._samples(name)} of {name}" for name in rows)
            raise GraphoptError(f"{self.path} holds different numbers of samples for the inputs: {given}")
        name, samples = next(iter(rows)), self._samples(next(iter(rows)))
        bounds = _free_batch(list(inputs.values()), program)
        if bounds is not None:
            lower, upper = bounds
            size = max(1, min(max(rows[name], _SENSIBLE_BATCH), upper, samples))
            rows = dict.fromkeys(rows, size)
            rest = samples % size if samples % size >= max(lower, 2) else 0
        else:
            rest = 0
        count = samples // rows[name]
        if count == 0:
            raise GraphoptError(
                f"{self.path} holds {samples} samples of {name}, fewer than a batch of {rows[name]}; "
                "give more, or let the factory return a smaller example or dynamic shapes"
            )
        left = samples - count * rows[name] - rest
        note = f"{left} of {samples} calibration samples do not fill a batch of {rows[name]} and are left out"
        sizes = [rows] * count + ([dict.fromkeys(rows, rest)] if rest else [])
        return SampleBatches(self, program, sizes, [note] if left else [])

    def _samples(self, name: str) -> int:
        return self.headers[name].shape[0]

    def _check_names(self, names: list[str]) -> None:
        hint = (
            "; name them: numpy.savez(path, " + ", ".join(f"{name}=..." for name in names if name.isidentifier()) + ")"
        )
        unnamed = all(key.startswith("arr_") for key in self.headers)
        for name in names:
            if name not in self.headers:
                raise GraphoptError(
                    f"{self.path} has no array for the input {name!r}{nearest(name, self.headers)}; it holds "
                    f"{', '.join(self.headers)}{hint if unnamed else ''}"
                )
        for key in self.headers:
            if key not in names:
                raise GraphoptError(
                    f"{self.path} holds {key!r}, which the model does not take; it takes {', '.join(names)}"
                )

    def _check_fit(self, name: str, known: Tensor) -> None:
        header = self.headers[name]
        expected = _numpy_dtype(known.dtype)
        if header.dtype.newbyteorder("=") != expected:
            raise GraphoptError(
                f"{self.path}: {name} is {header.dtype}, the model takes {expected}; save {name}.astype('{expected}')"
            )
        sample = header.shape[1:]
        fits = len(sample) == max(known.dim() - 1, 0) and all(
            not isinstance(size, int) or size == given for size, given in zip(known.shape[1:], sample, strict=True)
        )
        if not fits or math.prod(sample) == 0:
            wanted = ", ".join(str(size) for size in ("samples", *known.shape[1:]))
            raise GraphoptError(f"{self.path}: {name} has shape {list(header.shape)}, the model takes [{wanted}]")


def _free_batch(inputs: list[Tensor], program: Program) -> tuple[int, int] | None:
    """Return the bounds of the batch size where all inputs share one symbolic first dimension, else None."""
    # Any: mypy takes a shape's entries for int and what follows for unreachable.
    sizes: list[Any] = [known.shape[0] if known.dim() else 1 for known in inputs]
    if not all(isinstance(size, torch.SymInt) for size in sizes):
        return None
    expressions = {size.node.expr for size in sizes}
    symbol = next(iter(expressions))
    if len(expressions) > 1 or not symbol.is_Symbol:
        return None
    bounds = program.range_constraints.get(symbol)
    upper = getattr(bounds, "upper", None)
    bounded = upper is not None and bool(upper < _UNBOUNDED)
    return int(getattr(bounds, "lower", 1)), int(upper) if upper is not None and bounded else _UNBOUNDED


class SampleBatches:
    """Batches of a SampleFile in the form of the program's inputs; may be read any number of times.

    Attributes:
        notes: sentences about samples left out.
    """

    def __init__(self, file: SampleFile, program: Program, sizes: list[dict[str, int]], notes: list[str]) -> None:
        self.notes = notes
        self._file, self._sizes = file, sizes
        self._signature, self._example = program.signature, program.flat_example
        self._placeholders: list[fx.Node] = program.placeholders

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Any]:
        path = self._file.path
        try:
            with ExitStack() as stack:
                archive = stack.enter_context(zipfile.ZipFile(path))
                readers = {
                    name: _Reader(stack.enter_context(archive.open(f"{name}.npy")), name) for name in self._sizes[0]
                }
                for rows in self._sizes:
                    yield self._form({name: reader.read(rows[name]) for name, reader in readers.items()})
                for reader in readers.values():
                    reader.finish()
        except (*_READ_ERRORS, KeyError) as error:
            reason = first_line(error)
            raise GraphoptError(f"{path} cannot be read ({reason}); write it again with numpy.savez") from None

    def _form(self, values: dict[str, Tensor]) -> Any:
        """Put named values into the structure the model was captured with."""
        flat = []
        for name, node, example in zip(self._signature.inputs, self._placeholders, self._example, strict=True):
            known = node.meta.get("val")
            if not isinstance(known, Tensor):
                flat.append(example)
                continue
            value = values[name].to(known.dtype)
            flat.append(value.reshape(()) if known.dim() == 0 else value)
        args, kwargs = pytree.tree_unflatten(flat, self._signature.in_spec)
        return dict(zip(self._signature.parameters, args, strict=False)) | kwargs if kwargs else args


class _Reader:
    """Reads an array from a member of the archive, some rows at a time."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name = stream, name
        header = _header(stream)
        self._header = header
        self._row_bytes = header.dtype.itemsize * math.prod(header.shape[1:])
        self._whole: np.ndarray[Any, Any] | None = None
        self._next = 0
        if header.fortran and len(header.shape) > 1:  # samples do not lie one after the other
            data = self._exactly(self._row_bytes * header.shape[0])
            self._whole = np.frombuffer(data, header.dtype).reshape(header.shape, order="F")

    def read(self, rows: int) -> Tensor:
        if self._whole is not None:
            array = self._whole[self._next : self._next + rows]
        else:
            shape = (rows, *self._header.shape[1:])
            array = np.frombuffer(self._exactly(self._row_bytes * rows), self._header.dtype).reshape(shape)
        self._next += rows
        # A copy: torch wants memory of its own, in this machine's byte order.
        return torch.from_numpy(array.astype(self._header.dtype.newbyteorder("="), order="C", copy=True))

    def finish(self) -> None:
        """Read what is left over: the archive's checksum is compared at the end."""
        while self._stream.read(1 << 20):
            pass

    def _exactly(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise ValueError(f"{self._name} ends early")
        return data


def _header(stream: IO[bytes]) -> Header:
    version = npy.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(stream)
    else:
        raise ValueError(f"npy format {version[0]}.{version[1]}")
    return Header(tuple(shape), bool(fortran), dtype)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the dtype an array must have; numpy has no bfloat16, whose values float32 holds exactly."""
    return np.dtype(np.float32) if dtype is torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
