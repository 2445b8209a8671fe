"""Kernels with random operands and what the specification makes of them: for every executor, a GPU among them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.backends.cuda import arithmetic, specification
from graphopt.backends.cuda.arithmetic import F32
from graphopt.backends.cuda.emit import emit
from graphopt.backends.cuda.operands import pack_int8, pack_linear, pack_signs
from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, Plan, RowPlan, is_vector

Arrays = dict[str, NDArray[Any]]
_POISON = {1: 0x5A, 2: 0x7FFD, 4: 0x7FFDEAD}


class Case:
    """A plan with random operands, the same ones for a seed.

    Attributes:
        kernel: of the plan. grid: of the launch. given: what the kernel reads, by the names of its parameters.
        wanted: what it shall write. scratch: sizes of its workspace, in words.
    """

    def __init__(self, plan: Plan, tokens: int = 1, seed: int = 0) -> None:
        self.plan, self.kernel = plan, emit(plan)
        self._random = np.random.default_rng(seed)
        self.given: dict[str, Any] = {}
        self.scratch: dict[str, int] = {}
        match plan:
            case LinearPlan():
                self._linear(plan, tokens)
            case Int8Plan():
                self._int8(plan, tokens)
            case RowPlan():
                self._row(plan, tokens)
            case DequantizePlan():
                self._dequantize(plan)

    def halves(self, *shape: int) -> NDArray[np.uint16]:
        return arithmetic.narrowed(self._random.normal(size=shape), self.plan.dtype)

    def _weights(self, plan: LinearPlan | DequantizePlan) -> tuple[Any, Any, Any]:
        groups = -(-plan.k // plan.group) if plan.group else 1
        codes = self._random.integers(0, 1 << plan.bits, (plan.n, plan.k))
        scale = self._random.uniform(0.01, 0.1, (plan.n, groups)).astype(plan.scale_dtype).astype(np.float32)
        zero = self._random.integers(0, 1 << plan.bits, (plan.n, groups)) if plan.zero_points else None
        self.given |= pack_linear(plan, codes, scale, zero)
        return codes, scale, zero

    def _operands(self, plan: LinearPlan | Int8Plan | RowPlan, tokens: int, width: int) -> Arrays:
        made = {name: self.halves(width) if is_vector(name) else self.halves(tokens, width) for name in plan.inputs}
        self.given |= made
        return made

    def _linear(self, plan: LinearPlan, tokens: int) -> None:
        self.codes, self.scale, self.zero = self._weights(plan)
        self.x = self.halves(tokens, plan.k)
        self.given |= {"x": self.x, "tokens": tokens}
        operands = self._operands(plan, tokens, plan.outputs)
        self._products(plan, tokens, specification.linear(plan, self.x, self.codes, self.scale, self.zero, operands))

    def _int8(self, plan: Int8Plan, tokens: int) -> None:
        codes = self._random.integers(-128, 128, (plan.n, plan.k)).astype(np.int8)
        scale = self._random.uniform(0.001, 0.01, plan.n).astype(np.float32)
        x = self._random.integers(0, 256, (tokens, plan.k)).astype(np.uint8)
        count = tokens if plan.by_token else 1
        x_scale = arithmetic.narrowed(self._random.uniform(0.001, 0.01, count), plan.dtype)
        zero = self._random.integers(0, 256, count).astype(np.uint8) if plan.zero_points else None
        self.given |= {**pack_int8(plan, codes, scale), "x": x, "x_scale": x_scale, "tokens": tokens}
        self.given |= {} if zero is None else {"x_zero_point": zero}
        operands = self._operands(plan, tokens, plan.n)
        self._products(plan, tokens, specification.int8(plan, x, x_scale, zero, codes, scale, operands))

    def _products(self, plan: LinearPlan | Int8Plan, tokens: int, y: NDArray[np.uint16]) -> None:
        self.grid, self.wanted = plan.grid(tokens), {"y": y}
        words, tickets = plan.workspace(tokens)
        if words:
            self.scratch = {"partial": words, "tickets": tickets}

    def _row(self, plan: RowPlan, tokens: int) -> None:
        operands = self._operands(plan, tokens, plan.n)
        if tokens > 3 and plan.prologue == "in0":  # nothing, and what is no number
            operands["in0"][0] = 0
            operands["in0"][1, 0] = 0x7FFF
            operands["in0"][2, -1] = 0x7C00 if plan.dtype == "float16" else 0x7F80
        signs = self._random.integers(0, 2, plan.n).astype(bool) if plan.signs else None
        if signs is not None:
            self.given["signs"] = pack_signs(signs)
        self.grid, self.wanted = (tokens, 1), specification.row(plan, operands, signs)

    def _dequantize(self, plan: DequantizePlan) -> None:
        self.grid, self.wanted = plan.grid(), {"y": specification.dequantize(plan, *self._weights(plan))}

    def arguments(self) -> tuple[dict[str, Any], Arrays]:
        """Return arguments for a launch, and the arrays among them that it shall write, poisoned."""
        outputs = {name: np.full_like(each, _POISON[each.dtype.itemsize]) for name, each in self.wanted.items()}
        scratch = {
            name: np.full(size, 0 if name == "tickets" else _POISON[4], np.uint32)
            for name, size in self.scratch.items()
        }
        return {**self.given, **outputs, **scratch}, outputs

    def differences(self, outputs: Arrays) -> dict[str, int]:
        """Return how many elements of each output are not as wanted, where there are any."""
        counts = {name: int((outputs[name] != each).sum()) for name, each in self.wanted.items()}
        return {name: count for name, count in counts.items() if count}

    def bound(self) -> F32 | None:
        """Return how far sums of a real tensor core may lie from `wanted`; None where they are exact.

        Behind an epilogue it is a guess: four times the largest bound, and what activations may add.
        """
        plan = self.plan
        if not isinstance(plan, LinearPlan):
            return None
        width = plan.group or plan.k
        shift: Any = 1 << (plan.bits - 1)
        if self.zero is not None:
            shift = np.repeat(self.zero, width, axis=1)[:, : plan.k]
        weight = ((self.codes - shift) * np.repeat(self.scale, width, axis=1)[:, : plan.k]).astype(np.float32)
        bound = specification.linear_bound(plan, self.x, weight)
        if plan.epilogue == "acc":
            return bound
        return np.full(self.wanted["y"].shape, 4 * float(bound.max()) + 1e-2, np.float32)
