"""The host executor: a kernel built by a C++ compiler and run on this processor, each thread a fiber.

See `dialect/host.h` for what it checks. Slow and exact: for tests, and for looking into a kernel without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.backends.cuda.cache import cached_file
from graphopt.backends.cuda.emit import Kernel
from graphopt.errors import GraphoptError

FORWARD, REVERSE = 0, 1  # orders of threads and blocks; any larger number is the seed of a shuffle
_MESSAGE = 400
_FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w")
_SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
# The executor keeps its state in one place: one launch at a time.
_ONE_AT_A_TIME = threading.Lock()


class KernelFault(GraphoptError):
    """A kernel did what the dialect forbids; the message names block, thread and line."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid_x", ctypes.c_int),
        ("grid_y", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("count", ctypes.c_int),
        ("args", ctypes.POINTER(ctypes.c_uint64)),
        ("bytes", ctypes.POINTER(ctypes.c_uint64)),
        ("writable", ctypes.c_uint64),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_int),
    )


def compiler() -> str | None:
    """Return the C++ compiler that the executor uses: $CXX, or g++, c++ or clang++; None where there is none."""
    found = (shutil.which(each) for each in (os.environ.get("CXX"), "g++", "c++", "clang++") if each)
    return next((each for each in found if each), None)


def build(kernel: Kernel, sanitize: bool = False) -> Path:
    """Return the shared library of a kernel, built now or before.

    `sanitize` builds it with address and undefined-behaviour sanitizers; the process must have their runtime loaded.
    Raises GraphoptError where there is no compiler, or the text is none that it takes.
    """
    program = compiler()
    if program is None:
        raise GraphoptError("the host executor needs a C++ compiler; install g++ or set CXX to one")
    flags = (*_FLAGS, *(_SANITIZED if sanitize else ()))
    source = kernel.host
    key = hashlib.sha256("\0".join([source, *flags, _version(program)]).encode()).hexdigest()
    return cached_file(f"{kernel.name}-{key[:32]}.so", lambda target: _compile(program, flags, source, target))


@functools.cache
def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout


def _compile(program: str, flags: Sequence[str], source: str, target: Path) -> None:
    made = subprocess.run(
        [program, *flags, "-x", "c++", "-", "-o", str(target)],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        first = next((line for line in made.stderr.splitlines() if "error" in line), made.stderr.strip()[:200])
        raise GraphoptError(f"{Path(program).name} does not take the kernel: {first}")


def run(
    kernel: Kernel,
    grid: tuple[int, int],
    arguments: Mapping[str, NDArray[Any] | int],
    order: int = FORWARD,
    library: Path | None = None,
) -> None:
    """Run a kernel on arrays, which it writes into, and numbers, given by the names of its parameters.

    Raises KernelFault where it does what the dialect forbids.
    """
    entry = _entry(library or build(kernel))
    args, sizes, writable = [], [], 0
    for i, parameter in enumerate(kernel.parameters):
        value = arguments[parameter.name]
        if isinstance(value, np.ndarray):
            assert value.flags.c_contiguous and parameter.pointer, parameter.name
            args.append(value.ctypes.data)
            sizes.append(value.nbytes)
            writable |= parameter.written << i
        else:
            args.append(value & (1 << 64) - 1)
            sizes.append(0)
    count = len(args)
    message = ctypes.create_string_buffer(_MESSAGE)
    array = ctypes.c_uint64 * count
    launch = _Launch(
        *grid,
        kernel.threads,
        order,
        count,
        array(*args),
        array(*sizes),
        writable,
        ctypes.cast(message, ctypes.c_char_p),
        _MESSAGE,
    )
    with _ONE_AT_A_TIME:
        failed = entry(ctypes.byref(launch))
    if failed:
        raise KernelFault(message.value.decode())


@functools.lru_cache(maxsize=256)
def _entry(library: Path) -> Any:
    entry = ctypes.CDLL(str(library)).go_entry
    entry.argtypes, entry.restype = [ctypes.c_void_p], ctypes.c_int
    return entry
