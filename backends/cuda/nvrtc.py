"""Kernels to machine code and PTX by NVRTC, without a GPU, a driver or a toolkit; the extra `[cuda]` brings it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from graphopt.backends.cuda.cache import cached_bytes
from graphopt.backends.cuda.emit import Kernel
from graphopt.errors import GraphoptError

# No contraction: a product and a sum are two roundings wherever the kernel says two. Denormals and division as IEEE has
# them is what NVRTC does unasked.
_OPTIONS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v", "--device-as-default-execution-space")
_REPORT = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel.

    Attributes:
        registers: of a thread. shared_bytes: of a block. spill_bytes: stored and loaded. stack_bytes: of a thread.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Binary:
    """Machine code for one architecture."""

    cubin: bytes
    usage: Usage


def ptx(kernel: Kernel, architecture: str = "90") -> str:
    """Return the PTX of a kernel; architecture as in `80`, `90`, `90a`. Raises GraphoptError as `cubin` does."""
    return _cached(kernel, f"compute_{architecture}", "ptx", _get_ptx).decode()


def cubin(kernel: Kernel, architecture: str = "90") -> Binary:
    """Return the machine code of a kernel.

    Raises GraphoptError where NVRTC is not installed, does not know the architecture or does not take the text.
    """
    whole = _cached(kernel, f"sm_{architecture}", "cubin", _get_cubin)
    head, _, code = whole.partition(b"\n")
    return Binary(code, Usage(**json.loads(head)))


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except Exception as error:  # the package, or the library that it looks for
        raise GraphoptError(
            "kernels are compiled by NVRTC, which is not installed here; pip install 'graphopt[cuda]'"
        ) from error
    return nvrtc


def available() -> bool:
    """Whether kernels can be compiled here."""
    try:
        _nvrtc()
    except GraphoptError:
        return False
    return True


def _cached(kernel: Kernel, architecture: str, kind: str, get: Any) -> bytes:
    nvrtc = _nvrtc()
    source = kernel.device
    version = ".".join(str(part) for part in nvrtc.nvrtcVersion()[1:])
    key = hashlib.sha256("\0".join([source, architecture, *_OPTIONS, version]).encode()).hexdigest()
    return cached_bytes(f"{kernel.name}-{key[:32]}.{kind}", lambda: _compiled(nvrtc, source, architecture, get))


def _compiled(nvrtc: Any, source: str, architecture: str, get: Any) -> bytes:
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    try:
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", *_OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _text(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if status == nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_OPTION:
            raise GraphoptError(f"the installed NVRTC cannot compile for {architecture}: {_first(log)}")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise GraphoptError(f"NVRTC does not take the kernel: {_first(log)}")
        made: bytes = get(nvrtc, program, log)
        return made
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _get_ptx(nvrtc: Any, program: Any, log: str) -> bytes:
    return _text(nvrtc, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)


def _get_cubin(nvrtc: Any, program: Any, log: str) -> bytes:
    code = _text(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program, text=False)
    found = _REPORT.search(log)
    assert found is not None, log
    usage = Usage(
        registers=int(found["registers"]),
        shared_bytes=int(found["shared"] or 0),
        spill_bytes=int(found["stores"]) + int(found["loads"]),
        stack_bytes=int(found["stack"]),
    )
    return json.dumps(asdict(usage)).encode() + b"\n" + code


def _text(nvrtc: Any, size: Any, get: Any, program: Any, text: bool = True) -> bytes:
    buffer = b" " * int(_checked(nvrtc, size(program)))
    _checked(nvrtc, get(program, buffer))
    return buffer.rstrip(b"\0 \n") if text else buffer


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    if answer[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise GraphoptError(f"NVRTC failed: {answer[0].name}")
    return answer[1] if len(answer) > 1 else None


def _first(log: str) -> str:
    return next((line.strip() for line in log.splitlines() if "error" in line), log.strip()[:200])
