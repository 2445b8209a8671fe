"""Kernels on a GPU: machine code loaded once, launched on torch's current stream.

Sizes and devices are checked before (`operators.py`). A launch allocates its result by torch's allocator and nothing
else, and waits for nothing, so that it can be captured in a CUDA graph; machine code and workspaces of a plan are made
at its first call, which must come before the capture.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from graphopt.backends.cuda import nvrtc, reference
from graphopt.backends.cuda.emit import emit
from graphopt.backends.cuda.operands import Bytes
from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, Plan, RowPlan, is_vector
from graphopt.backends.cuda.schedule import MOST_TOKENS, chosen, gpu_of, prefers_library
from graphopt.errors import GraphoptError, first_line

_LEAST = (8, 0)  # products of bfloat16s and asynchronous fences
_ALIGNED = 16  # bytes of the widest load
_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@functools.cache
def unsupported(index: int) -> str:
    """Return why kernels cannot run on a GPU, or an empty string; the smallest kernel is built and run to know."""
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; "
            f"the kernels need {_LEAST[0]}.{_LEAST[1]}"
        )
    x = torch.arange(8, dtype=torch.float16, device=f"cuda:{index}").reshape(1, 8)
    try:
        (y,) = rows(RowPlan(8, prologue="add(in0, in0)"), [x], None)
        same = bool((y == 2 * x).all())
    except GraphoptError as error:
        return str(error)
    except Exception as error:  # of the driver, in whatever type cuda.core gives it
        return f"the GPU's driver does not run kernels of this NVRTC: {first_line(error)}; update the driver"
    return "" if same else "the smallest kernel gives something else on this GPU than it should"


@dataclass(frozen=True)
class _Loaded:
    """A kernel in a GPU's memory."""

    kernel: Any
    threads: int
    parameters: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _loaded(plan: Plan, index: int) -> _Loaded:
    core = _core()
    kernel = emit(plan)
    device = core.Device(index)
    device.set_current()
    code = core.ObjectCode.from_cubin(nvrtc.cubin(kernel, _architecture(index)).cubin)
    return _Loaded(code.get_kernel(kernel.name), kernel.threads, tuple(each.name for each in kernel.parameters))


@functools.cache
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{major}{minor}"


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _core() -> Any:
    try:
        import cuda.core as core
    except ImportError as error:
        raise GraphoptError(
            "kernels are launched by cuda-core, which is not installed; pip install 'graphopt[cuda]'"
        ) from error
    return core


@functools.lru_cache(maxsize=4096)
def _config(grid: tuple[int, int], threads: int) -> Any:
    return _core().LaunchConfig(grid=grid, block=threads)


@functools.lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    core = _core()
    return core.Stream.from_handle(handle) if handle else core.LEGACY_DEFAULT_STREAM


def launch(plan: Plan, grid: tuple[int, int], arguments: dict[str, Tensor | int], device: torch.device) -> None:
    """Launch a plan's kernel on the current stream of a device, with arguments by the names of its parameters."""
    index = _index(device)
    with torch.cuda.device(index):
        loaded = _loaded(plan, index)
        values = [
            ctypes.c_int(value) if isinstance(value, int) else value.data_ptr()
            for value in (arguments[name] for name in loaded.parameters)
        ]
        stream = _stream(torch.cuda.current_stream(index).cuda_stream)
        _core().launch(stream, _config(grid, loaded.threads), loaded.kernel, *values)


def _ready(x: Tensor, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor as kernels read it: dense, aligned; GraphoptError where its type is another."""
    if dtype is not None and x.dtype != dtype:
        raise GraphoptError(f"{what} is {x.dtype}; the kernel was generated for {dtype}")
    dense = x.contiguous()
    return dense if dense.data_ptr() % _ALIGNED == 0 else dense.clone()


@functools.cache
def _workspace(words: int, blocks: int, index: int, stream: int) -> tuple[Tensor, Tensor]:
    """Return `partial` and `tickets` for launches of one stream, which come one after the other.

    They are never freed: a captured graph goes on writing there.
    """
    device = f"cuda:{index}"
    partial = torch.empty(words, dtype=torch.int32, device=device)
    return partial, torch.zeros(blocks, dtype=torch.int32, device=device)


def _with_workspace(plan: LinearPlan | Int8Plan, tokens: int, device: torch.device) -> dict[str, Tensor]:
    words, blocks = plan.workspace(tokens)
    if not words:
        return {}
    index = _index(device)
    partial, tickets = _workspace(words, blocks, index, torch.cuda.current_stream(index).cuda_stream)
    return {"partial": partial, "tickets": tickets}


def _operands(plan: LinearPlan | Int8Plan | RowPlan, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what expressions read, dense."""
    return {name: _ready(value, name, _TYPES[plan.dtype]) for name, value in zip(plan.inputs, inputs, strict=True)}


def linear(
    plan: LinearPlan, x: Tensor, weights: Tensor, scales: Tensor, zeros: Tensor | None, inputs: Sequence[Tensor]
) -> Tensor:
    """Return y [..., outputs] for x [..., k]; the schedule is chosen for the number of tokens."""
    shape = [*x.shape[:-1], plan.outputs]
    tokens = x.numel() // plan.k
    if tokens == 0:
        return x.new_empty(shape)
    dense = _ready(x, "x", _TYPES[plan.dtype])
    if tokens > MOST_TOKENS:
        return _by_library(plan, dense.reshape(tokens, plan.k), weights, scales, zeros, inputs).reshape(shape)
    best = chosen(plan, tokens, gpu_of(_index(x.device)), _architecture(_index(x.device)))
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    arguments: dict[str, Tensor | int] = {"weights": weights, "scales": scales, "x": dense, "y": y, "tokens": tokens}
    if zeros is not None:
        arguments["zeros"] = zeros
    arguments |= _operands(plan, inputs) | _with_workspace(best, tokens, x.device)
    launch(best, best.grid(tokens), arguments, x.device)
    return y


def _by_library(
    plan: LinearPlan, x: Tensor, weights: Tensor, scales: Tensor, zeros: Tensor | None, inputs: Sequence[Tensor]
) -> Tensor:
    """Dequantize the weights once, multiply by the library, and compute the epilogue by torch."""
    matrix = torch.empty(plan.n, plan.k, dtype=x.dtype, device=x.device)
    arguments: dict[str, Tensor | int] = {"weights": weights, "scales": scales, "y": matrix}
    if zeros is not None:
        arguments["zeros"] = zeros
    own = DequantizePlan.of(plan)
    launch(own, own.grid(), arguments, x.device)
    product = functional.linear(x, matrix)
    if plan.epilogue == "acc":
        return product
    sums = product.float()
    both = sums.chunk(2, dim=-1) if plan.paired else (sums,)
    named = dict(zip(("acc", "acc2"), both, strict=False))
    return reference.finished(plan, named, _by_row(plan, inputs, len(x)), x.dtype)


def int8(plan: Int8Plan, given: Bytes, inputs: Sequence[Tensor]) -> Tensor:
    """Return y [..., n] for codes x [..., k]."""
    x, index = given.x, _index(given.x.device)
    tokens = x.numel() // plan.k
    y = torch.empty([*x.shape[:-1], plan.n], dtype=given.x_scale.dtype, device=x.device)
    if tokens == 0:
        return y
    dense = _ready(x, "x", torch.int8 if plan.signed else torch.uint8)
    if prefers_library(plan, tokens, gpu_of(index)):
        return int8_by_library(plan, given._replace(x=dense), inputs)
    best = chosen(plan, tokens, gpu_of(index), _architecture(index))
    arguments: dict[str, Tensor | int] = {
        "weights": given.weights, "scales": given.scales, "x": dense,
        "x_scale": _ready(given.x_scale, "x_scale", _TYPES[plan.dtype]), "y": y, "tokens": tokens,
    }  # fmt: skip
    if given.x_zero_point is not None and given.row_sums is not None:
        arguments |= {"x_zero_point": _ready(given.x_zero_point, "x_zero_point"), "row_sums": given.row_sums}
    arguments |= _operands(plan, inputs) | _with_workspace(best, tokens, x.device)
    launch(best, best.grid(tokens), arguments, x.device)
    return y


_MATRICES: Any = WeakIdKeyDictionary()  # packed weights of bytes -> as the library reads them


def int8_by_library(plan: Int8Plan, given: Bytes, inputs: Sequence[Tensor]) -> Tensor:
    """Multiply bytes by the library, and dequantize its sums by torch; the unpacked weights are kept."""
    if given.weights not in _MATRICES:
        parts = given.weights.view(torch.int8).reshape(plan.layout.tiles, plan.layout.chunks, 2, 8, 4, 2, 2, 4)
        rows_of = parts.permute(0, 6, 3, 1, 4, 2, 5, 7).reshape(-1, plan.layout.padded_k)
        _MATRICES[given.weights] = rows_of[: plan.n, : plan.k].contiguous()
    flat = given.x.reshape(-1, plan.k)
    signed = flat if plan.signed else (flat ^ 128).view(torch.int8)
    total = torch._int_mm(signed, _MATRICES[given.weights].T)
    if given.x_zero_point is not None and given.row_sums is not None:
        zero = given.x_zero_point.reshape(-1, 1).int() - (0 if plan.signed else 128)
        total = total - zero * given.row_sums
    acc = total.float() * given.x_scale.reshape(-1, 1).float() * given.scales.view(torch.float32)
    y = reference.finished(plan, {"acc": acc}, _by_row(plan, inputs, len(flat)), given.x_scale.dtype)
    return y.reshape(*given.x.shape[:-1], plan.n)


def _by_row(plan: LinearPlan | Int8Plan, inputs: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Return what the epilogue reads with tokens along one axis."""
    return [v if is_vector(name) else v.reshape(tokens, -1) for name, v in zip(plan.inputs, inputs, strict=True)]


def rows(plan: RowPlan, inputs: Sequence[Tensor], signs: Tensor | None) -> list[Tensor]:
    """Return what the kernel writes, in the order of its parameters."""
    x = inputs[0]
    tokens = x.numel() // plan.n
    arguments: dict[str, Tensor | int] = {**_operands(plan, inputs)}
    if signs is not None:
        arguments["signs"] = signs
    written = _results(plan, x)
    if tokens:
        launch(plan, (tokens, 1), {**arguments, **written}, x.device)
    return list(written.values())


def _results(plan: RowPlan, x: Tensor) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    if plan.keep:
        made["kept"] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if plan.output == "half":
        return {**made, "y": torch.empty(x.shape, dtype=x.dtype, device=x.device)}
    storage = torch.int8 if plan.output == "int8" else torch.uint8
    made["codes"] = torch.empty(x.shape, dtype=storage, device=x.device)
    made["scale"] = torch.empty([*x.shape[:-1], 1], dtype=x.dtype, device=x.device)
    if plan.zero_points:
        made["zero_point"] = torch.empty([*x.shape[:-1], 1], dtype=storage, device=x.device)
    return made
