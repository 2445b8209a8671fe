"""Which tiles a product gets: candidates, a model that ranks them, and measurements that have the last word.

A schedule is the part of a plan that does not change what is computed. Its time is estimated as

    fixed + max(bytes / bandwidth · starved, instructions / issue rate) · tail

`starved` where fewer bytes are on their way than bandwidth times latency, `tail` where the last wave of blocks leaves
processors idle. Measured times, by GPU, plan and number of tokens, lie in the cache's folder; `tune` makes them.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from graphopt.backends.cuda import cache, nvrtc
from graphopt.backends.cuda.emit import emit
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, plan_text
from graphopt.files import write_text

Product = TypeVar("Product", LinearPlan, Int8Plan)

MOST_TOKENS = 64  # beyond, weights are dequantized once and multiplied by the library
LIBRARY_TOKENS = 16  # the library's product of bytes takes more
_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LATENCY_S = 8e-7  # from asking for a line to having it, loaded
_FIXED_S = 2e-6
_TICKET_S = 1.5e-6  # until the last block has read what the others wrote
_INSTRUCTIONS = {2: 1.6, 3: 1.75, 4: 1.9, 8: 2.2}  # a weight, with one tile and up to eight tokens
_BYTE_PRODUCTS = 4096 * 0.6  # of a processor, a clock, as far as mma.sync reaches
_LIBRARY_PRODUCTS = 4096 * 0.8
_LIBRARY = "library"
_TRIED = 12  # schedules that are compiled in search of one without spills


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU.

    Attributes:
        name: as the driver says it. processors: streaming multiprocessors. bandwidth: of its memory, bytes a second.
        clock_hz: of its processors.
    """

    name: str
    processors: int
    bandwidth: float
    clock_hz: float


H200 = Gpu("NVIDIA H200", 132, 4.8e12, 1.75e9)
"""Stands in where there is no GPU to ask."""


@functools.cache
def gpu_of(index: int) -> Gpu:
    """Return the GPU with this index, as torch knows it."""
    import torch

    found = torch.cuda.get_device_properties(index)
    clock = getattr(found, "memory_clock_rate", 0) * 1e3
    width = getattr(found, "memory_bus_width", 0) / 8
    bandwidth = 2 * clock * width or H200.bandwidth
    return Gpu(
        found.name, found.multi_processor_count, bandwidth, getattr(found, "clock_rate", 0) * 1e3 or H200.clock_hz
    )


def bucket(tokens: int) -> int:
    """Return the number of tokens that stands for `tokens` in choosing."""
    return next((each for each in _BUCKETS if tokens <= each), _BUCKETS[-1])


def candidates(plan: Product, tokens: int) -> list[Product]:
    """Return all schedules of a plan for some tokens, those aside that no block could run."""
    whole = next((each for each in (1, 2, 4, 8) if 8 * each >= tokens), 8)
    fields: dict[str, Iterable[Any]] = {
        "columns": sorted({whole, min(whole, 4)}), "rows": (1, 2, 4), "row_warps": (1, 2, 4), "k_warps": (1, 2, 4, 8),
        "k_blocks": (1, 2, 4, 8), "depth": (1, 2, 4),
    }  # fmt: skip
    if isinstance(plan, Int8Plan):
        fields["column_warps"] = (1, 2, 4) if tokens > 64 else (1,)
    found = []
    for values in itertools.product(*fields.values()):
        try:
            each = replace(plan, token_blocks=True, **dict(zip(fields, values, strict=True)))
            each = replace(each, token_blocks=each.tokens_of_block < tokens)
        except ValueError:
            continue
        units = each.layout.padded_k // each.layout.unit
        if each.slices <= units and registers(each) <= min(255, 65536 // each.threads) and 64 <= each.threads <= 512:
            found.append(each)
    return found or [replace(plan, token_blocks=True)]


def registers(plan: LinearPlan | Int8Plan) -> int:
    """Return about how many registers a thread takes: a fit to what ptxas gave for 96 plans, to ±30."""
    ahead = plan.depth * plan.rows * plan.layout.words
    if isinstance(plan, Int8Plan):
        return 60 + plan.fragment + ahead + 4 * plan.columns
    zeros = 16 * plan.zero_points
    x = 0.6 * plan.columns * plan.layout.chunk / 8 + 4 * plan.depth * plan.columns
    return int(50 + 1.2 * plan.fragment + 2.2 * ahead + x + zeros)


def estimate(plan: LinearPlan | Int8Plan, tokens: int, gpu: Gpu = H200) -> float:
    """Return seconds that a launch takes, by the model."""
    blocks, k_blocks = plan.grid(tokens)
    warps = plan.threads // 32
    resident = max(min(65536 // (registers(plan) * plan.threads), 2048 // plan.threads), 1)
    total = blocks * k_blocks
    busy = min(total / gpu.processors, resident)
    waves = total / (gpu.processors * resident)
    tail = -(-total // gpu.processors) / (total / gpu.processors) if waves <= 1 else -(-waves // 1) / waves
    weights = plan.n * plan.layout.padded_k
    bits = 8 if isinstance(plan, Int8Plan) else plan.bits
    moved = weights * bits / 8 + tokens * (plan.k + plan.outputs) * 2
    words = plan.layout.words * 128 * plan.rows * plan.depth
    on_their_way = busy * warps * words
    starved = max(gpu.bandwidth / gpu.processors * _LATENCY_S / on_their_way, 1.0)
    each = 0.3 if isinstance(plan, Int8Plan) else _INSTRUCTIONS[plan.bits] - 0.4 + 0.4 / plan.rows
    each += (plan.columns - 1) * (0.2 + 0.25 / plan.rows)
    times = blocks / plan.blocks  # that weights are read
    issue = weights * each * times / (gpu.processors * 128 * gpu.clock_hz)
    if isinstance(plan, Int8Plan):
        issue = max(issue, weights * plan.tokens_of_block * times / (gpu.processors * _BYTE_PRODUCTS * gpu.clock_hz))
    return _FIXED_S + (_TICKET_S if k_blocks > 1 else 0) + max(moved / gpu.bandwidth * starved, issue) * tail


def ranked(plan: Product, tokens: int, gpu: Gpu = H200) -> list[Product]:
    """Return the candidates, the best by the model first."""
    return sorted(candidates(plan, tokens), key=lambda each: (estimate(each, tokens, gpu), plan_text(each)))


def library_estimate(plan: Int8Plan, tokens: int, gpu: Gpu = H200) -> float:
    """Return seconds that the library's product and a dequantization of its sums take, by the model."""
    multiply = plan.n * plan.k * tokens / (gpu.processors * _LIBRARY_PRODUCTS * gpu.clock_hz)
    read = (plan.n * plan.k + tokens * plan.k + 4 * tokens * plan.n) / gpu.bandwidth
    return 2 * _FIXED_S + max(multiply, read) + 6 * tokens * plan.n / gpu.bandwidth


def prefers_library(plan: Int8Plan, tokens: int, gpu: Gpu) -> bool:
    """Whether the library's product is faster than any kernel: as measured, else by the model.

    It takes more than 16 tokens, and sizes that are multiples of 8.
    """
    if tokens <= LIBRARY_TOKENS or plan.n % 8 or plan.k % 8:
        return False
    size = bucket(tokens)
    measured = dict(_measured(gpu).get(_key(plan, size), {}))
    theirs = measured.pop(_LIBRARY, None)
    if theirs is not None and measured:
        return theirs < min(measured.values())
    return library_estimate(plan, size, gpu) < estimate(ranked(plan, size, gpu)[0], size, gpu)


def fitting(options: Iterable[Product], architecture: str) -> Iterator[Product]:
    """Yield the schedules whose kernels keep everything in registers."""
    for each in options:
        usage = nvrtc.cubin(emit(each), architecture).usage
        if not usage.spill_bytes and usage.registers * each.threads <= 65536:
            yield each


def chosen(plan: Product, tokens: int, gpu: Gpu, architecture: str) -> Product:
    """Return the schedule to run a plan by: what was measured to be fastest on this GPU, else the model's choice."""
    found: Product = _chosen(plan, bucket(tokens), gpu, architecture)
    return found


@functools.lru_cache(maxsize=4096)
def _chosen(plan: Any, size: int, gpu: Gpu, architecture: str) -> Any:
    measured = _measured(gpu).get(_key(plan, size))
    options = ranked(plan, size, gpu)
    if measured:
        by_text = {plan_text(each): each for each in options}
        found = min((text for text in measured if text in by_text), key=lambda text: measured[text], default=None)
        if found is not None:
            return by_text[found]
    return next(fitting(options[:_TRIED], architecture), options[0])


def tune(
    plan: Product,
    tokens: int,
    gpu: Gpu,
    architecture: str,
    measure: Callable[[Product], float],
    most: int = 12,
    library: float | None = None,
) -> tuple[Product, float]:
    """Measure the model's best candidates, keep their times, and return the fastest with its seconds.

    `measure` gives seconds, or infinity for a plan that does not run; `library` the seconds of the library's product.
    """
    size = bucket(tokens)
    options = itertools.islice(fitting(ranked(plan, size, gpu)[: 2 * most], architecture), most)
    by_text = {plan_text(each): each for each in options}
    times = {text: measure(each) for text, each in by_text.items()}
    kept = {text: time for text, time in times.items() if time < float("inf")}
    if library is not None:
        kept[_LIBRARY] = library
    everything = _measured(gpu)
    everything[_key(plan, size)] = {**everything.get(_key(plan, size), {}), **kept}
    write_text(cache.folder() / _name(gpu), json.dumps(everything, indent=1, sort_keys=True))
    _measured.cache_clear()
    _chosen.cache_clear()
    best = min(times, key=lambda text: times[text])
    return by_text[best], times[best]


def _key(plan: LinearPlan | Int8Plan, size: int) -> str:
    """Return what does not depend on the schedule."""
    plain: dict[str, Any] = {"columns": 1, "rows": 1, "row_warps": 1, "k_warps": 4, "k_blocks": 1, "depth": 2}
    if isinstance(plan, Int8Plan):
        plain["column_warps"] = 1
    return f"{size} {plan_text(replace(plan, token_blocks=True, **plain))}"


def _name(gpu: Gpu) -> str:
    return f"tuned-{re.sub(r'[^A-Za-z0-9]+', '-', gpu.name)}.json"


@functools.cache
def _measured(gpu: Gpu) -> dict[str, dict[str, float]]:
    """Return the times kept for a GPU; none where the file is damaged."""
    try:
        found = json.loads((cache.folder() / _name(gpu)).read_text())
        return {str(key): {str(text): float(time) for text, time in times.items()} for key, times in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
