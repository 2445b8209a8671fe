"""Passes for tests of the pipeline: honest, lying and failing ones."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.export import Dim

from graphopt.capture import capture
from graphopt.ir import Program, Rewriter, operator
from graphopt.ir.dialect import fake_quantize
from graphopt.ir.rewriter import Changes
from graphopt.pipeline import Context, LossyPass, Pass
from graphopt.target import Target

TARGET = Target("made-up", "none")


class Net(nn.Module):
    """Two linears of 6 features around a relu; the second output is an integer tensor."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Linear(6, 6)
        self.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(self.body(x))
        return y, y.argmax(1) + 1


def net(dtype: torch.dtype = torch.float32, dynamic: bool = False) -> Program:
    """Return the captured Net with weights of its own; its example is x: [5, 6]."""
    return copy.deepcopy(_captured(dtype, dynamic))


@functools.cache
def _captured(dtype: torch.dtype, dynamic: bool) -> Program:
    torch.manual_seed(1)
    shapes = ({0: Dim("batch", min=2)},) if dynamic else None
    return capture(Net(dtype).eval(), (torch.randn(5, 6, dtype=dtype),), dynamic_shapes=shapes)


def context(**options: Any) -> Context:
    return Context(TARGET, **options)


def calls(program: Program, name: str) -> list[fx.Node]:
    return [node for node in program.nodes if node.op == "call_function" and operator(node) == name]


@dataclass(frozen=True)
class Options(LossyPass):
    """Has options of every kind, and does nothing."""

    requires: ClassVar[tuple[str, ...]] = ()

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    mode: Literal["one", "two"] = "one"
    flag: bool = False
    label: str | None = None
    levels: tuple[int, ...] = ()
    table: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def run(self, program: Program, context: Context) -> Changes:
        return Rewriter(program, self.name).finish()


@dataclass(frozen=True)
class Needy(Pass):
    """Has an option without a default."""

    bits: int


@dataclass(frozen=True)
class Exact(Pass):
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        self.edit(rewriter)
        return rewriter.finish()

    def edit(self, rewriter: Rewriter) -> None: ...


@dataclass(frozen=True)
class Nothing(Exact):
    """Looks, changes nothing and says why."""

    def edit(self, rewriter: Rewriter) -> None:
        rewriter.decline(calls(rewriter.program, "relu")[0], "it is good as it is")


def scale_weight(rewriter: Rewriter, factor: float, layer: int = 1) -> None:
    linear = calls(rewriter.program, "linear")[layer]
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    rewriter.rewire(linear, weight=rewriter.edit(weight, f"times {factor}", lambda w: w * factor))
    rewriter.touch(linear, "scaled")


@dataclass(frozen=True)
class MoveScale(Exact):
    """Scale the first linear by s and the second by 1 / s: exact, since relu is positively homogeneous."""

    factor: float = 3.0

    def edit(self, rewriter: Rewriter) -> None:
        first = calls(rewriter.program, "linear")[0]
        bias = first.args[2]
        assert isinstance(bias, fx.Node)
        rewriter.rewire(first, bias=rewriter.edit(bias, "scale", lambda b: b * self.factor))
        scale_weight(rewriter, self.factor, 0)
        scale_weight(rewriter, 1 / self.factor, 1)


@dataclass(frozen=True)
class DoubleRelu(Exact):
    """Apply relu to what relu gives: exact, whatever stands around it."""

    def edit(self, rewriter: Rewriter) -> None:
        relu = calls(rewriter.program, "relu")[0]
        rewriter.replace(relu, rewriter.insert(torch.ops.aten.relu.default, relu, before=relu.next))


@dataclass(frozen=True)
class LieByWeight(Exact):
    """Claims to be exact and scales a weight by 1 + 1e-6."""

    def edit(self, rewriter: Rewriter) -> None:
        scale_weight(rewriter, 1 + 1e-6)


@dataclass(frozen=True)
class LieByRelu(Exact):
    """Claims to be exact and drops a relu."""

    def edit(self, rewriter: Rewriter) -> None:
        relu = calls(rewriter.program, "relu")[0]
        source = relu.args[0]
        assert isinstance(source, fx.Node)
        rewriter.replace(relu, source)


@dataclass(frozen=True)
class LieByInteger(Exact):
    """Claims to be exact and adds 2 instead of 1 to an integer output."""

    def edit(self, rewriter: Rewriter) -> None:
        rewriter.rewire(calls(rewriter.program, "add")[0], other=2)


@dataclass(frozen=True)
class LieSilently(Exact):
    """Changes the graph behind the rewriter's back and reports nothing."""

    def run(self, program: Program, context: Context) -> Changes:
        calls(program, "add")[0].args = (calls(program, "argmax")[0], 2)
        program.graph_module.recompile()
        return Changes()


@dataclass(frozen=True)
class WriteInPlace(Exact):
    def run(self, program: Program, context: Context) -> Changes:
        with torch.no_grad():
            program.weight("head.weight").mul_(1 + 1e-6)
        return Changes()


@dataclass(frozen=True)
class BreakShapes(Exact):
    """Leaves a node whose abstract value is not what its operator gives."""

    def edit(self, rewriter: Rewriter) -> None:
        relu = calls(rewriter.program, "relu")[0]
        new = rewriter.insert(torch.ops.aten.relu.default, relu.args[0], before=relu)
        new.meta["val"] = new.meta["val"].new_empty(2, 2)
        rewriter.replace(relu, new)


@dataclass(frozen=True)
class Fail(Exact):
    def edit(self, rewriter: Rewriter) -> None:
        scale_weight(rewriter, 2.0)
        raise KeyError("nowhere")


@dataclass(frozen=True)
class FailLossy(Fail):
    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Interrupted(Exact):
    def edit(self, rewriter: Rewriter) -> None:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Coarse(LossyPass):
    """Round the input of every linear to a step of 1/8."""

    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        for linear in calls(program, "linear"):
            if reason := self.refusal(program, linear):
                rewriter.decline(linear, reason)
                continue
            scale = rewriter.weight(torch.tensor(0.125), "step", torch.float32, parameter=False)
            value = rewriter.insert(fake_quantize, linear.args[0], scale, None, 0, 0, "int8", before=linear)
            rewriter.rewire(linear, input=value)
            rewriter.touch(linear, "rounded")
        rewriter.note(step=0.125)
        return rewriter.finish()


@dataclass(frozen=True)
class Draw(LossyPass):
    """Add noise to a weight from the global generator."""

    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        linear = calls(program, "linear")[0]
        weight = linear.args[1]
        assert isinstance(weight, fx.Node)
        noisy = rewriter.edit(weight, "noise", lambda w: w + 0.1 * torch.randn(w.shape, dtype=w.dtype))
        rewriter.rewire(linear, weight=noisy)
        return rewriter.finish()
