"""Which parts of a program become kernels: regions, each around one heavy operator, with the pointwise work about it.

    linear     linear(x, dequantize(codes, …))                  -> LinearPlan
               linear(dequantize(q, s, z), dequantize(…))       -> Int8Plan, where both are int8 and scales fit
               behind it: bias, activations, residual add; `act(linear(x)) * linear(x)` is one paired product
               beside it: linears that read the same x are merged
    row        rms_norm | layer_norm | hadamard | quantize by token, in this order, and the pointwise work before

A region that a kernel's plan refuses stays as it is, with the reason; so does everything else. The result computes what
the program did, up to roundings between the operators of a region, which are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

from graphopt.analysis.cost import node_macs, size_hint
from graphopt.backends.cuda import operators
from graphopt.backends.cuda.arithmetic import Float16
from graphopt.backends.cuda.partition.linears import Linears
from graphopt.backends.cuda.partition.rows import Rows
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, read_plan
from graphopt.ir import Changes, Program, Rewriter, operator


def partition(program: Program, dtype: Float16) -> Changes:
    """Replace regions of `program` by kernels for activations in `dtype`; return what was done, what not, and why."""
    rewriter = Rewriter(program, "cuda")
    Linears(rewriter, dtype).rewrite()
    Rows(rewriter, dtype).rewrite()
    return rewriter.finish()


def kernel_share(before: Program, after: Program) -> float:
    """Return the share that kernels compute of the multiply-accumulates of linears and convolutions."""
    whole, left = (
        sum(node_macs(node) for node in program.graph.nodes if operator(node) == "linear" or "conv" in operator(node))
        for program in (before, after)
    )
    return 1 - left / whole if whole else 1.0


def products(program: Program) -> Iterator[tuple[LinearPlan | Int8Plan, int]]:
    """Yield (plan, tokens of the example) of each product that is a kernel."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in (operators.LINEAR, operators.INT8_LINEAR):
            shape = node.args[0].meta["val"].shape
            yield (
                cast(LinearPlan | Int8Plan, read_plan(node.args[-1])),
                math.prod(size_hint(each) for each in shape[:-1]),
            )
