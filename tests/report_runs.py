"""A small run with made-up passes, for tests of what is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from graphopt.analysis.numerics import Spread
from graphopt.backend import ExportReport
from graphopt.budget import Budget
from graphopt.capture import capture
from graphopt.causes import Cause, Causes, Remedy
from graphopt.ir import Program
from graphopt.ir.dialect import dequantize
from graphopt.ir.rewriter import Changes, Rewriter
from graphopt.pipeline import Context, Pass, Recipe, run_passes
from graphopt.result import Result
from graphopt.target import Target

HOSTILE = "<script>alert(1)</script>"


class Two(nn.Module):
    """Two linear layers: 8 -> 16 -> 4, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Idle(Pass):
    """Look at everything and change nothing."""

    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        for node in program.nodes:
            if node.op == "call_function":
                rewriter.decline(node, HOSTILE)
        return rewriter.finish()


@dataclass(frozen=True)
class CodeWeights(Pass):
    """Store every matrix as codes of a grid of `bits` bits, one scale a tensor."""

    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()

    bits: int = 4

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        for node in [n for n in program.nodes if n.op == "get_attr" and program.weight(n).dim() == 2]:
            values = rewriter.value(node)
            limit = 2 ** (self.bits - 1) - 1
            scale = values.abs().max() / limit
            codes = rewriter.weight(
                (values / scale).round().to(torch.int8), f"{node.target}_codes", torch.int8
            )
            step = rewriter.weight(scale, f"{node.target}_scale", torch.float32)
            for user in list(node.users):
                new = rewriter.insert(
                    dequantize, codes, step, None, None, 0, 0, f"int{self.bits}", before=user
                )
                rewriter.redirect(user, node, new)
            rewriter.touch(node, f"in {self.bits} bits")
        rewriter.note(bits=self.bits)
        return rewriter.finish()


def result(passes: tuple[Pass, ...] = (Idle(), CodeWeights()), exported: bool = True) -> Result:
    """Run the passes over the small model; with a made-up export that is slower than its baseline."""
    torch.manual_seed(0)
    program = capture(Two(), (torch.randn(3, 8),))
    target = Target("made-up", "none")
    optimized, trace = run_passes(program, passes, Context(target))
    found = Result(optimized, program, trace, Recipe("made_up", passes), target)
    found.notes.append(f"a note about {HOSTILE}")
    found.original_metric, found.metric = 90.0, 89.5
    found.budget = Budget(metric_drop=0.25, size_ratio=0.5, latency_ratio=0.9)
    spread = Spread(-1.0, 1.0, [1, 5, 2], [0, 6, 2])
    worst = Cause(
        "linear", "linear", 7, HOSTILE, "code_weights", "int4", local_db=12.0, weights_db=12.0, effect_db=10.0,
        share=0.75, misfits={HOSTILE: 8.0}, spreads={"weights": spread, "output": spread},
    )  # fmt: skip
    other = Cause("linear_1", "linear", 9, by="code_weights", weights="int4", local_db=20.0, effect_db=15.0, share=0.25)
    advice = Remedy("linear", f"keep {HOSTILE}", f"--keep-float {HOSTILE}", 0.38, 1.011)
    found.causes = Causes([worst, other], remedies=[advice], sqnr_db=9.0, samples=3)
    if exported:
        found.exported = ExportReport(
            Path("run") / "model.onnx",
            size_bytes=400,
            opset=21,
            fused={"QGemm": 1},
            unfused=[(HOSTILE, "its output is no integer")],
            sqnr_db=float("inf"),
            max_steps=0.5,
            latency_ms=2.0,
            baseline_latency_ms=1.0,
            baseline_size_bytes=1000,
            slow_nodes=["node 'a' (Gemm): 1.9 ms (95%)"],
            notes=["made up"],
        )
    return found
