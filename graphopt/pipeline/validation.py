"""Translation validation: does a program mean what it meant before?

Exact passes are checked under real semantics: both programs retyped to float64 (`graphopt.ir.precision`), new weights
unrounded. Compared is, per output, max|new - old| / max|old|, on the example inputs and on resampled ones: floats redrawn
with the example's mean and spread, integers drawn from the example's values, symbolic dimensions at a second size.
Rounding the weights to their dtype afterwards is measured as an error of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.cost import size_hint
from graphopt.ir.precision import retype, retype_value
from graphopt.ir.program import Program


class ValidationError(AssertionError):
    """An exact pass changed the function: a defect of the pass."""


def relative_error(new: Sequence[Any], old: Sequence[Any]) -> float:
    """Return the largest max|new - old| / max|old| over the outputs; NaN and infinity must stand in the same places."""
    worst = 0.0
    for after, before in zip(new, old, strict=True):
        if not isinstance(before, Tensor):
            continue
        if after.shape != before.shape:
            return float("inf")
        worst = max(worst, _tensor_error(after, before))
    return worst


def _tensor_error(after: Tensor, before: Tensor) -> float:
    if before.numel() == 0:
        return 0.0
    wide = torch.complex128 if before.is_complex() else torch.float64
    a, b = after.to(wide), before.to(wide)
    lawful = torch.isfinite(b)
    same_odd = torch.where(lawful, torch.isfinite(a), (a == b) | (torch.isnan(a) & torch.isnan(b)))
    if not bool(same_odd.all()):
        return float("inf")
    if not bool(lawful.any()):
        return 0.0
    difference = (a - b)[lawful].abs().max().item()
    scale = b[lawful].abs().max().item()
    return float(difference / scale) if scale > 0 else float(difference)


def sqnr_db(new: Sequence[Any], old: Sequence[Any]) -> float:
    """Return the smallest 10 log10(sum old^2 / sum (new - old)^2) over floating outputs; infinite where all are equal."""
    worst = float("inf")
    for after, before in zip(new, old, strict=True):
        if not isinstance(before, Tensor) or not before.is_floating_point() or before.numel() == 0:
            continue
        lawful = torch.isfinite(before)
        b = torch.where(lawful, before, 0).to(torch.float64)
        noise = torch.where(lawful, after.to(torch.float64) - b, 0).square().sum().item()
        signal = b.square().sum().item()
        if noise != noise:
            return float("-inf")
        if noise > 0:
            ratio = torch.tensor(signal / noise, dtype=torch.float64)
            worst = min(worst, float(10 * ratio.log10()) if signal > 0 else float("-inf"))
    return worst


def resample(program: Program, seed: int) -> list[Any]:
    """Return flat inputs like the example's with other values, symbolic dimensions one larger where they may be."""
    generator = torch.Generator().manual_seed(seed)
    sizes = _second_sizes(program)
    flat = []
    for node, value in zip(program.placeholders, program.flat_example, strict=True):
        known = node.meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(known, Tensor):
            flat.append(value)
            continue
        shape = [_resize(size, sizes) for size in known.shape]
        flat.append(_redraw(value, shape, generator))
    return flat


def _redraw(value: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    if value.is_floating_point():
        wide = value.to(torch.float64)
        spread = wide.std().item() if value.numel() > 1 else 0.0
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (drawn * (spread or 1.0) + wide.mean()).to(value.dtype)
    if value.is_complex() or value.numel() == 0:
        return value
    count = 1
    for size in shape:
        count *= size
    index = torch.randint(value.numel(), (count,), generator=generator)
    return value.reshape(-1)[index].reshape(shape)


def _second_sizes(program: Program) -> dict[Any, int]:
    """Choose for every free symbol its example size plus one, where its bounds allow that."""
    sizes: dict[Any, int] = {}
    for node in program.placeholders:
        known = node.meta.get("val")
        for size in known.shape if isinstance(known, Tensor) else ():
            if not isinstance(size, torch.SymInt):
                continue
            for symbol in size.node.expr.free_symbols:
                hint = _symbol_hint(size, symbol)
                bounds = program.range_constraints.get(symbol)
                largest = getattr(bounds, "upper", None)
                fits = bounds is None or largest is None or bool(hint + 1 <= largest)
                sizes[symbol] = hint + 1 if fits else hint
    return sizes


def _symbol_hint(size: torch.SymInt, symbol: Any) -> int:
    shape_env = size.node.shape_env
    known = (getattr(shape_env, "backed_var_to_val", None) or getattr(shape_env, "var_to_val", {})).get(symbol)
    return int(known) if known is not None else size_hint(size)


def _resize(size: int | torch.SymInt, sizes: Mapping[Any, int]) -> int:
    return int(size.node.expr.subs(sizes)) if isinstance(size, torch.SymInt) else int(size)


class Validator:
    """Holds the reference outputs of a pipeline in float64 and checks each exact pass against them.

    Outputs after one pass are the reference of the next, so a program is run once or twice a changing pass, never again.
    """

    def __init__(self, program: Program, seed: int) -> None:
        self._inputs = [program.flat_example]
        other = resample(program, seed)
        self._reference = [self._run(program, flat) for flat in self._inputs]
        try:
            self._reference.append(self._run(program, other))
            self._inputs.append(other)
        except Exception:  # the model asserts things about its inputs that resampling cannot know
            self.note = "the model does not run on resampled inputs; exact passes were checked on the example inputs only"
        else:
            self.note = ""

    def check(self, program: Program, unrounded: Mapping[str, Tensor]) -> tuple[float, float]:
        """Return (error of the algebra, error of rounding the new weights); the reference moves on to `program`."""
        algebra = [self._run(program, flat, unrounded) for flat in self._inputs]
        error = max(relative_error(new, old) for new, old in zip(algebra, self._reference, strict=True))
        self._pending = algebra
        rounding = 0.0
        if any(not _same_value(unrounded[name], program.weight(name)) for name in unrounded):
            self._pending = [self._run(program, flat) for flat in self._inputs]
            rounding = max(relative_error(new, old) for new, old in zip(self._pending, algebra, strict=True))
        return error, rounding

    def accept(self) -> None:
        """Make the outputs of the last check the reference."""
        self._reference = self._pending

    def rebase(self, program: Program) -> None:
        """Take `program` as the reference, after a lossy pass."""
        self._reference = [self._run(program, flat) for flat in self._inputs]

    def first_difference(self, old: Program, new: Program, unrounded: Mapping[str, Tensor], tolerance: float) -> str:
        """Return the first node, by name in both programs, whose value differs; empty where none does."""
        before, after = _Recorder(retype(old, torch.float64)), _Recorder(retype(new, torch.float64, unrounded))
        flat = [retype_value(value, torch.float64) for value in self._inputs[0]]
        with torch.no_grad():
            before.run(*flat)
            after.run(*flat)
        for name, value in after.values.items():
            if name in before.values and relative_error([value], [before.values[name]]) > tolerance:
                return name
        return ""

    @staticmethod
    def _run(program: Program, flat: list[Any], weights: Mapping[str, Tensor] | None = None) -> list[Any]:
        twin = retype(program, torch.float64, weights)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return twin.run([retype_value(value, torch.float64) for value in flat])


def _same_value(unrounded: Tensor, stored: Tensor) -> bool:
    return torch.equal(unrounded, stored.detach().to(torch.float64))


class _Recorder(fx.Interpreter):
    """Runs a program and keeps every tensor by node name."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            self.values[n.name] = value
        return value
