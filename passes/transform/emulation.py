"""Quantization emulated in floating point, to compare transformations by what they are for.

Round to nearest, symmetric: weights with a scale for each output channel, activations with one for each token, chosen
at run time; convolutions take one scale for the whole activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.numerics import quantized_rows
from graphopt.calibration import Batches
from graphopt.ir import Program, arguments, operator
from graphopt.passes.fold.affine import is_linear_operator

_BATCHES = 4  # how many batches a whole model is judged by


def output_error(
    program: Program, weights: Mapping[str, Tensor], weight_bits: int, activation_bits: int, batches: Batches
) -> float:
    """Return |y_quantized - y|² / |y|² over the outputs of the first batches, with some weights replaced."""
    quantized = Emulated(program, weights, weight_bits, activation_bits)
    wrong = total = 0.0
    with torch.no_grad():
        for flat in batches.first(_BATCHES):
            exact = [value for value in program.run(flat) if _counts(value)]
            made = [value for value in quantized.run_flat(flat) if _counts(value)]
            wrong += sum(float((a - b).square().sum()) for a, b in zip(made, exact, strict=True))
            total += sum(float(value.square().sum()) for value in exact)
    return wrong / total if total > 0 else 0.0


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class Emulated(fx.Interpreter):
    """Runs a program with some weights replaced and every linear operator quantized, the embedding left as it is."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor], weight_bits: int, activation_bits: int) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self._weights, self._activation_bits = weights, activation_bits
        self._program = program
        self._rounded: dict[str, Tensor] = {}
        self._weight_bits = weight_bits

    def run_flat(self, flat: list[Any]) -> list[Any]:
        found = self.run(*flat)
        return list(found) if isinstance(found, tuple | list) else [found]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._weights[target].to(value.dtype) if target in self._weights else value

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or not is_linear_operator(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        named = arguments(n)
        weight = named["weight"]
        if weight.op != "get_attr":
            return super().run_node(n)
        values = list(args)
        x = values[0]
        values[0] = quantized_rows(x, self._activation_bits) if operator(n) == "linear" else self._whole(x)
        values[1] = self._weight(str(weight.target), values[1])
        return n.target(*values, **kwargs)  # type: ignore[operator]

    def _whole(self, x: Tensor) -> Tensor:
        return quantized_rows(x.reshape(1, -1), self._activation_bits).reshape(x.shape)

    def _weight(self, name: str, value: Tensor) -> Tensor:
        if name not in self._rounded:
            self._rounded[name] = quantized_rows(value.flatten(1), self._weight_bits).reshape(value.shape)
        return self._rounded[name]
