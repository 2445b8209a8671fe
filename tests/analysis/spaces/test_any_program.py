"""Programs of random operators, of which nothing is known beforehand: whatever the analysis calls free must be free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from freedom import assert_free
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import DrawFn, booleans, composite, integers, sampled_from
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.analysis.spaces import analyze
from graphopt.passes import Canonicalize
from graphopt.pipeline import Context
from graphopt.target import Target

CONTEXT = Context(Target(name="none", backend="none"))
LIMIT = 4000  # elements of a value
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Step:
    """value = call(*operands, *weights); `text` is what a failing example prints."""

    text: str
    call: Call
    operands: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...] = ()

    def __repr__(self) -> str:
        return f"{self.text}{self.operands}"


class Steps(nn.Module):
    """A linear layer, the steps, and linear layers that read whatever no step did."""

    def __init__(self, width: int, steps: tuple[Step, ...], flat: bool) -> None:
        super().__init__()
        self.steps, self.flat = steps, flat
        self.up = nn.Linear(6, width)
        self.weights = nn.ParameterDict(
            {f"{i}_{j}": torch.randn(shape) for i, step in enumerate(steps) for j, shape in enumerate(step.weights)}
        )
        values = self.values(torch.zeros(2, 4, 6))
        read = {operand for step in steps for operand in step.operands}
        self.ends = [index for index in range(len(values)) if index not in read]
        self.down = nn.ModuleList(nn.Linear(self.last(values[index]).shape[-1], 3) for index in self.ends)

    def values(self, x: Tensor) -> list[Tensor]:
        values = [self.up(x)]
        for i, step in enumerate(self.steps):
            weights = [self.weights[f"{i}_{j}"] for j in range(len(step.weights))]
            values.append(step.call(*(values[operand] for operand in step.operands), *weights))
        return values

    def last(self, value: Tensor) -> Tensor:
        value = value if value.dim() else value[None]
        return value.flatten(1) if self.flat and value.dim() > 1 else value

    def forward(self, x: Tensor) -> list[Tensor]:
        values = self.values(x)
        return [down(self.last(values[index])) for index, down in zip(self.ends, self.down, strict=True)]


POINTWISE: dict[str, Call] = {
    "relu": torch.relu, "gelu": functional.gelu, "tanh": torch.tanh, "neg": torch.neg, "abs": torch.abs,
    "half": lambda x: x * 0.5, "more": lambda x: x + 0.5, "square": lambda x: x * x, "clamp": lambda x: x.clamp(min=0),
    "masked": lambda x: x.masked_fill(x > 0.3, 0.0), "cast": lambda x: (x * 9).int().float(),
}  # fmt: skip
BINARY: dict[str, Call] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum,
    "div": lambda x, y: x / (1 + y.abs()), "where": lambda x, y: torch.where(x > y, x, y), "hadamard": lambda x, y:
    x * y.sigmoid(),
}  # fmt: skip
ALONG: dict[str, Callable[[int], Call]] = {
    "sum": lambda d: lambda x: x.sum(d), "mean": lambda d: lambda x: x - x.mean(d, keepdim=True),
    "amax": lambda d: lambda x: x.amax(d), "softmax": lambda d: lambda x: x.softmax(d),
    "cumsum": lambda d: lambda x: x.cumsum(d), "flip": lambda d: lambda x: x.flip(d),
    "roll": lambda d: lambda x: x.roll(1, d), "sort": lambda d: lambda x: x.sort(d)[0],
    "restack": lambda d: lambda x: torch.stack(x.unbind(d), d), "twice": lambda d: lambda x: torch.cat((x, x), d),
    "interleave": lambda d: lambda x: x.repeat_interleave(2, d), "first": lambda d: lambda x: x.select(d, 0),
    "reversed": lambda d: lambda x: x.index_select(d, torch.arange(x.shape[d] - 1, -1, -1)),
    "argmax": lambda d: lambda x: x.gather(d, x.argmax(d, keepdim=True)), "new": lambda d: lambda x: x.unsqueeze(d),
    "copies": lambda d: lambda x: x.unsqueeze(d).expand(*x.shape[:d], 2, *x.shape[d:]),
    "shift": lambda d: lambda x: functional.pad(x, (0, 0) * (x.dim() - 1 - d) + (1, -1)),
    "rms": lambda d: lambda x: functional.rms_norm(x, x.shape[d:]),
    "layer": lambda d: lambda x: functional.layer_norm(x, x.shape[d:]),
}  # fmt: skip


@composite
def _step(draw: DrawFn, values: list[Tensor]) -> Step:
    index = draw(integers(0, len(values) - 1))
    x = values[index]
    shape, rank = tuple(x.shape), x.dim()
    d = draw(integers(0, rank - 1))
    match draw(sampled_from(("pointwise", "binary", "along", "slice", "layout", "reshape", "weight", "matmul", "cat"))):
        case "pointwise":
            name = draw(sampled_from(tuple(POINTWISE)))
            return Step(name, POINTWISE[name], (index,))
        case "binary":
            others = [i for i, y in enumerate(values) if _broadcast(x, y)]
            name = draw(sampled_from(tuple(BINARY)))
            return Step(name, BINARY[name], (index, draw(sampled_from(others))))
        case "along":
            name = draw(sampled_from(tuple(ALONG)))
            return Step(f"{name} {d}", ALONG[name](d), (index,))
        case "slice":
            cut, step, side = draw(integers(0, shape[d])), draw(sampled_from((1, 1, 2))), draw(booleans())
            part = (slice(None),) * d + (slice(cut, None, step) if side else slice(0, cut, step),)
            return Step(f"slice {part[-1]} of {d}", lambda x: x[part], (index,))
        case "layout":
            e = draw(integers(0, rank - 1))
            return Step(f"transpose {d} {e}", lambda x: x.transpose(d, e), (index,))
        case "reshape":
            return Step(*_reshape(draw, shape, d), (index,))
        case "weight":
            return _weight(draw, index, shape, d)
        case "matmul":
            others = [i for i, y in enumerate(values) if _multiply(x, y.mT if y.dim() > 1 else y)] or [index]
            other = draw(sampled_from(others))
            return Step("x y^T", lambda x, y: x @ (y.mT if y.dim() > 1 else y), (index, other))
    others = [i for i, y in enumerate(values) if y.dim() == rank and _same_but(shape, tuple(y.shape), d)]
    return Step(f"cat {d}", lambda x, y: torch.cat((x, y), d), (index, draw(sampled_from(others))))


def _reshape(draw: DrawFn, shape: tuple[int, ...], d: int) -> tuple[str, Call]:
    if d + 1 < len(shape) and draw(booleans()):
        return f"merge {d}", lambda x: x.flatten(d, d + 1)
    outer = draw(sampled_from([n for n in range(1, shape[d] + 1) if shape[d] % n == 0] or [1]))
    return f"divide {d} by {outer}", lambda x: x.unflatten(d, (outer, shape[d] // outer)) if shape[d] else x


def _weight(draw: DrawFn, index: int, shape: tuple[int, ...], d: int) -> Step:
    tail = shape[d:]
    match draw(sampled_from(("scale", "bias", "linear", "rms", "layer", "along", "transposed"))):
        case "scale":
            return Step(f"scale {tail}", torch.mul, (index,), (tail,))
        case "bias":
            return Step(f"bias {tail}", torch.add, (index,), (tail,))
        case "rms":
            return Step(f"rms {tail}", lambda x, w: functional.rms_norm(x, tail, w), (index,), (tail,))
        case "layer":
            return Step(f"layer {tail}", lambda x, w, b: functional.layer_norm(x, tail, w, b), (index,), (tail, tail))
        case "along":
            one = (shape[d], *(1,) * (len(shape) - d - 1))
            return Step(f"scale {one}", torch.mul, (index,), (one,))
        case "transposed":
            size = (shape[-1], 8)
            return Step(f"matmul {size}", lambda x, w: (x @ w).relu() @ w.T, (index,), (size,))
    size = (draw(sampled_from((8, 12))), shape[-1])
    return Step(f"linear {size}", functional.linear, (index,), (size,))


def _broadcast(x: Tensor, y: Tensor) -> bool:
    return y.dim() <= x.dim() and all(a in (b, 1) for a, b in zip(y.shape[::-1], x.shape[::-1], strict=False))


def _multiply(x: Tensor, y: Tensor) -> bool:
    try:
        return (x @ y).numel() <= LIMIT
    except RuntimeError:
        return False


def _same_but(one: tuple[int, ...], other: tuple[int, ...], dim: int) -> bool:
    return all(a == b for i, (a, b) in enumerate(zip(one, other, strict=True)) if i != dim)


@composite
def programs(draw: DrawFn) -> Steps:
    """Up to ten steps on values that start as [2, 4, 8 or 12]; a step that fails or grows too large is left out."""
    width = draw(sampled_from((8, 12)))
    values, steps = [torch.randn(2, 4, width)], []
    for _ in range(draw(integers(1, 10))):
        step: Step = draw(_step(values))
        try:
            made = step.call(*(values[i] for i in step.operands), *(torch.ones(shape) for shape in step.weights))
        except RuntimeError:
            continue
        if 0 < made.numel() <= LIMIT and 0 < made.dim() <= 6:
            values.append(made)
            steps.append(step)
    torch.manual_seed(0)
    return Steps(width, tuple(steps), draw(booleans())).eval()


@given(programs())
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_whatever_is_called_free_is_free(module: Any) -> None:
    program = graphopt.capture(module, (torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)),))
    assert_free(program, analyze(program))
    Canonicalize().run(program, CONTEXT)
    assert_free(program, analyze(program))
