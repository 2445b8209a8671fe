"""Translation validation: does a program mean what it meant before?

Exact passes are checked under real semantics: both programs retyped to float64 (`graphopt.ir.precision`), new weights
unrounded. Compared is, per output, max|new - old| / max|old|, on the example inputs and on resampled ones: floats
redrawn with the example's mean and spread, integers drawn from the example's values, symbolic dimensions at a second
size. Rounding the weights to their dtype afterwards is measured as an error of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import first_line
from graphopt.ir.precision import Retyped
from graphopt.ir.program import Program

_FEW = 4  # floating inputs of so few values are masks or flags, and are redrawn from these values


class ValidationError(AssertionError):
    """An exact pass changed the function: a defect of the pass."""


def relative_error(new: Sequence[Any], old: Sequence[Any]) -> float:
    """Return the largest max|new - old| / max|old| over the outputs, or max|new - old| where the old output is zero.

    NaN and infinity must stand in the same places, and outputs that are no tensors must be equal: else infinite.
    """
    return max((_error(after, before) for after, before in zip(new, old, strict=True)), default=0.0)


def _error(after: Any, before: Any) -> float:
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        odd = before != before and after != after  # NaN on both sides
        return 0.0 if odd or (type(after) is type(before) and after == before) else math.inf
    if after.shape != before.shape:
        return math.inf
    return _tensor_error(after, before) if before.numel() else 0.0


def _tensor_error(after: Tensor, before: Tensor) -> float:
    if not any(each.is_floating_point() or each.is_complex() for each in (after, before)):
        if torch.equal(after.to(torch.int64), before.to(torch.int64)):
            return 0.0
        # Integers beyond 2^53 may be one and the same in float64.
        return max(_wide_error(after.to(torch.float64), before.to(torch.float64)), 1e-6)
    wide = torch.complex128 if before.is_complex() or after.is_complex() else torch.float64
    return _wide_error(after.to(wide), before.to(wide))


def _wide_error(a: Tensor, b: Tensor) -> float:
    lawful = torch.isfinite(b)
    same_odd = torch.where(lawful, torch.isfinite(a), (a == b) | (torch.isnan(a) & torch.isnan(b)))
    if not bool(same_odd.all()):
        return math.inf
    if not bool(lawful.any()):
        return 0.0
    difference = (a - b)[lawful].abs().max().item()
    scale = b[lawful].abs().max().item()
    return float(difference / scale) if scale > 0 else float(difference)


def sqnr_db(new: Sequence[Any], old: Sequence[Any]) -> float:
    """Return the smallest 10 log10(sum old^2 / sum (new - old)^2) over floating outputs.

    Infinite where all are equal, minus infinity where an output is lost (NaN, or noise without a signal).
    """
    worst = math.inf
    for after, before in zip(new, old, strict=True):
        if not isinstance(before, Tensor) or not before.is_floating_point() or before.numel() == 0:
            continue
        lawful = torch.isfinite(before)
        b = torch.where(lawful, before, 0).to(torch.float64)
        noise = torch.where(lawful, after.to(torch.float64) - b, 0).square().sum().item()
        signal = b.square().sum().item()
        if not math.isfinite(noise) or (noise > 0 and signal == 0):
            return -math.inf
        if noise > 0:
            worst = min(worst, 10 * (math.log10(signal) - math.log10(noise)))
    return worst


def run_seeded(program: Program, flat: list[Any]) -> list[Any]:
    """Run without gradients and with a fixed seed, so that random operators draw the same twice."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return program.run(flat)


def resample(program: Program, seed: int, resize: bool = True) -> list[Any]:
    """Return flat inputs like the example's with other values, symbolic dimensions at another size if they may be."""
    generator = torch.Generator().manual_seed(seed)
    sizes = _second_sizes(program) if resize else {}
    flat = []
    for node, value in zip(program.placeholders, program.flat_example, strict=True):
        known = node.meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(known, Tensor):
            flat.append(value)
            continue
        shape = [_resize(size, actual, sizes) for size, actual in zip(known.shape, value.shape, strict=True)]
        flat.append(_redraw(value, shape, generator))
    return flat


def _redraw(value: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    if value.numel() == 0:
        return value.new_zeros(shape)
    if value.is_complex():
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(value.dtype)
    if not value.is_floating_point() or _has_few_values(value) or not bool(value.isfinite().all()):
        index = torch.randint(value.numel(), (math.prod(shape),), generator=generator)
        return value.reshape(-1)[index].reshape(shape)
    wide = value.to(torch.float64)
    spread = wide.std().item() if value.numel() > 1 else 0.0
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * (spread or 1.0) + wide.mean()
    if bool((wide >= 0).all()):
        drawn = drawn.abs()  # square roots and logarithms of a model that eats no negative numbers stay defined
    largest = torch.finfo(value.dtype).max
    return drawn.clamp(-largest, largest).to(value.dtype)


def _has_few_values(value: Tensor) -> bool:
    distinct: Tensor = torch.unique(value)
    return 1 < distinct.numel() <= _FEW < value.numel()


def _second_sizes(program: Program) -> dict[Any, int]:
    """Choose for every free symbol its example size plus one, or minus one where its bounds allow only that."""
    hints: dict[Any, int] = {}
    for node, value in zip(program.placeholders, program.flat_example, strict=True):
        known = node.meta.get("val")
        if not isinstance(known, Tensor) or not isinstance(value, Tensor):
            continue
        for size, actual in zip(_sizes(known), value.shape, strict=True):
            if not isinstance(size, torch.SymInt):
                continue
            expression = size.node.expr
            for symbol in expression.free_symbols:
                # A bare symbol is the example's size itself; in `2*s` the tracer knows what s was.
                hint = actual if expression == symbol else _traced_size(size, symbol)
                if hint is not None:
                    hints.setdefault(symbol, int(hint))
    return {symbol: _other_size(hint, program.range_constraints.get(symbol)) for symbol, hint in hints.items()}


def _sizes(known: Tensor) -> list[object]:
    return list(known.shape)


def _traced_size(size: torch.SymInt, symbol: Any) -> int | None:
    environment = size.node.shape_env
    for table in ("backed_var_to_val", "var_to_val"):
        if (known := (getattr(environment, table, None) or {}).get(symbol)) is not None:
            return int(known)
    return None


def _other_size(hint: int, bounds: Any) -> int:
    lower, upper = getattr(bounds, "lower", 1), getattr(bounds, "upper", math.inf)
    for other in (hint + 1, hint - 1):
        if other > 0 and bool(lower <= other) and bool(other <= upper):
            return other
    return hint


def _resize(size: object, actual: int, sizes: Mapping[Any, int]) -> int:
    if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols <= sizes.keys():
        return int(actual)
    return int(size.node.expr.subs(sizes))


class Validator:
    """Holds the reference outputs of a pipeline in float64 and checks each exact pass against them.

    Outputs after one pass are the reference of the next, so a program is run once or twice a changing pass and input.
    A program that does not run in float64 is checked in its own types, to what their rounding allows; one that does not
    run on resampled inputs on the example only. `note` says so.
    """

    def __init__(self, program: Program, seed: int) -> None:
        self.note = ""
        self._real = True
        example = program.flat_example
        try:
            twin = self._twin(program)
            self._reference = [_outputs(twin, example)]
        except Exception as error:  # an operator without a float64 kernel
            self._real = False
            twin = self._twin(program)
            self._reference = [_outputs(twin, example)]
            self.note = (
                f"the model does not run in float64 ({first_line(error)}); exact passes were checked in its own types"
            )
        self._inputs = [example]
        self._pending = self._reference
        self._rounding = 0.0 if self._real else _rounding(program)
        for other in _others(program, seed):
            try:
                self._reference.append(_outputs(twin, other))
            except Exception:  # the model asserts things about its inputs that resampling cannot know
                continue
            self._inputs.append(other)
            break
        else:
            blind = "the model does not run on resampled inputs; exact passes were checked on the example inputs only"
            self.note = f"{self.note}; {blind}" if self.note else blind

    def allowed(self, tolerance: float) -> float:
        """Return the error that is allowed to a pass that claims `tolerance` in float64."""
        return max(tolerance, self._rounding)

    def check(self, program: Program, unrounded: Mapping[str, Tensor]) -> tuple[float, float]:
        """Return (error of the algebra, error of rounding the new weights); `accept` makes `program` the reference."""
        twin = self._twin(program, unrounded)
        algebra = [_outputs(twin, flat) for flat in self._inputs]
        error = max(relative_error(new, old) for new, old in zip(algebra, self._reference, strict=True))
        self._pending = algebra
        rounding = 0.0
        if self._real and any(not _same_value(unrounded[name], program.weight(name)) for name in unrounded):
            twin = self._twin(program)
            self._pending = [_outputs(twin, flat) for flat in self._inputs]
            rounding = max(relative_error(new, old) for new, old in zip(self._pending, algebra, strict=True))
        return error, rounding

    def accept(self) -> None:
        """Make the outputs of the last check the reference."""
        self._reference = self._pending

    def first_difference(self, old: Program, new: Program, unrounded: Mapping[str, Tensor], tolerance: float) -> str:
        """Return the first node, by name in both programs, whose value differs, else the first output that does."""
        twins = self._twin(old, keep=True), self._twin(new, unrounded, keep=True)
        for flat in self._inputs:
            outputs = [_outputs(twin, flat) for twin in twins]
            before, after = (_values(twin) for twin in twins)
            for name, value in after.items():
                if name in before and not relative_error([value], [before[name]]) <= tolerance:
                    return name
            for index, (was, now) in enumerate(zip(*outputs, strict=True)):
                if not relative_error([now], [was]) <= tolerance:
                    return f"output {index}"
        return ""

    def _twin(
        self, program: Program, weights: Mapping[str, Tensor] | None = None, keep: bool = False
    ) -> fx.Interpreter:
        if self._real:
            return Retyped(program, torch.float64, weights, keep)
        return fx.Interpreter(program.graph_module, garbage_collect_values=not keep)


def _outputs(twin: fx.Interpreter, flat: list[Any]) -> list[Any]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return twin.outputs(flat) if isinstance(twin, Retyped) else list(twin.run(*flat))


def _values(twin: fx.Interpreter) -> dict[str, Any]:
    """Return the values of the last run's calls by node name, in order."""
    return {node.name: value for node, value in twin.env.items() if node.op == "call_function"}


def _others(program: Program, seed: int) -> Iterator[list[Any]]:
    """Yield resampled inputs: at another size first, then at the example's."""
    yield resample(program, seed)
    if _second_sizes(program):
        yield resample(program, seed, resize=False)


def _rounding(program: Program) -> float:
    """Return the relative error that the coarsest floating type of a program may show after a change of its algebra."""
    held = [*program.weights.values(), *(value for value in program.flat_example if isinstance(value, Tensor))]
    steps = [torch.finfo(each.dtype).eps for each in held if each.is_floating_point()]
    return math.sqrt(max(steps, default=torch.finfo(torch.float32).eps))


def _same_value(unrounded: Tensor, stored: Tensor) -> bool:
    return torch.equal(unrounded, stored.detach().to(torch.float64))
