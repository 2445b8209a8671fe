"""Store embedding tables as int8, a scale a row.

    y = embedding(w, i)   ->   y' = dequantize(embedding(w_int8, i), embedding(scale, i))       w ~ w_int8 * scale[row]

Only the rows that are looked up are dequantized. A head tied to the table shares its codes when it is quantized per
output channel, which are the same rows.

Lossy. Runs before the linears are quantized, so that a tied table still carries its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphopt.ir import Changes, Program, Rewriter, arguments, is_floating, operator
from graphopt.pipeline import Context, LossyPass
from graphopt.quantization.grids import integer_grid
from graphopt.quantization.weights import pair_scale, quantize_weight, unfit
from graphopt.quantization.writing import look_up


@dataclass(frozen=True)
class QuantizeEmbedding(LossyPass):
    """Quantize embedding tables to int8 with one scale a row."""

    quantizes: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        for node in [node for node in program.graph.nodes if operator(node) == "embedding"]:
            table = arguments(node)["weight"]
            if any(operator(user) == "graphopt.dequantize" for user in node.users):
                continue  # the codes or scales of a table that is quantized already
            if reason := self.refusal(program, node) or _unfit(program, table):
                rewriter.decline(node, reason)
                continue
            self._quantize(node, table, rewriter, context)
        return rewriter.finish()

    def _quantize(self, node: fx.Node, table: fx.Node, rewriter: Rewriter, context: Context) -> None:
        rows = integer_grid(context.target.weight_format)
        dtype = node.meta["val"].dtype
        # A head tied to the table reads the same codes, so they are made to suit both.
        heads = [user for user in table.users if operator(user) == "linear" and arguments(user)["weight"] is table]
        least_scale = pair_scale(rewriter.value(table), heads[0], rows, context.target) if heads else None
        weight = quantize_weight(rewriter, table, rows, 0, least_scale)
        column = rewriter.weight(weight.scales[:, None], f"{table.target}_row_scale", dtype)
        look_up(node, [weight.codes, column, None], 0, rows.name, rewriter)


def _unfit(program: Program, table: fx.Node) -> str:
    if not isinstance(table, fx.Node) or table.op != "get_attr" or not is_floating(table):
        return "its table is not a floating-point weight"
    return unfit(program, table, "its table")
