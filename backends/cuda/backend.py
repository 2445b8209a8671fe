"""The CUDA backend: programs whose heavy parts run as kernels that graphopt generates, the rest as torch runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphopt.backend import Timing
from graphopt.backends.cuda.compiled import Compiled
from graphopt.backends.cuda.halves import in_halves
from graphopt.backends.cuda.partition import kernel_share, partition, products
from graphopt.errors import GraphoptError
from graphopt.ir import Program, Site
from graphopt.progress import Progress, default_progress
from graphopt.target import Target

_WORTH = 0.5  # of the multiply-accumulates of linears and convolutions
_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class CudaBackend:
    """Kernels for NVIDIA GPUs of compute capability 8.0 and later."""

    name: ClassVar[str] = "cuda"
    targets: ClassVar[Sequence[Target]] = ()
    file: ClassVar[str] = "model.pt2"

    def compile(
        self,
        program: Program,
        dtype: Literal["float16", "bfloat16"] | None = None,
        device: str | None = None,
        graphs: bool = False,
        tune: bool = False,
        progress: Progress | None = None,
    ) -> Compiled:
        """Return a callable that runs `program`, left as it is, with its regions as kernels.

        Args:
            program: any. Where kernels would compute less than half of what multiplies by weights, it runs as it is,
                in its own types.
            dtype: of activations around kernels; by default bfloat16 for a program in it, else float16.
            device: where it runs; by default the current GPU, and the CPU where there is none: by torch, to look at it.
            graphs: capture each shape of inputs in a CUDA graph at its first call.
            tune: measure the schedules of every product for the example's number of tokens; they are remembered, and
                used by every later run on such a GPU. A few seconds a shape.
            progress: shows tuning; by default bars where a person is watching.

        Raises GraphoptError for a dtype or device that there is not, and where the GPU's memory does not suffice.
        """
        half = dtype or ("bfloat16" if _mostly(program) is torch.bfloat16 else "float16")
        if half not in _TYPES:
            raise GraphoptError(f"kernels compute in float16 or bfloat16, not {half}")
        place, notes = self._device(device)
        if reason := self._unsupported(place):
            made = _Made(program.clone(), note=f"nothing became a kernel: {reason}")
        else:
            made = _with_kernels(program, half)
        notes += [made.note] if made.note else []
        types = tuple(_dtype(node) for node in program.outputs)
        try:
            twin = _moved(made.program, place)
        except torch.OutOfMemoryError as error:
            size = sum(weight.nbytes for weight in made.program.weights.values())
            raise GraphoptError(f"the weights take {size / 1e9:.1f} GB, which {place} does not have free") from error
        if tune and made.dtype is not None and place.type == "cuda":
            from graphopt.backends.cuda.tuning import tune_products

            count = tune_products(products(twin), place, progress or default_progress())
            notes.append(f"schedules of {count} products were measured")
        return Compiled(twin, place, made.dtype, made.regions, made.kept, notes, graphs, types)

    def measure(self, paths: Mapping[str, Path], threads: int) -> dict[str, Timing]:
        """Compile programs (`.pt2`) that take the same inputs and time them in turns; see `timing.measure`.

        Raises GraphoptError where there is no GPU that runs kernels, or inputs differ.
        """
        if not torch.cuda.is_available():
            raise GraphoptError("there is no GPU here to measure on; run this on the machine that has it")
        from graphopt.backends.cuda.timing import measure

        compiled = {label: self.compile(Program.load(path), graphs=True) for label, path in paths.items()}
        if refused := next((note for each in compiled.values() for note in each.notes if "kernel:" in note), ""):
            raise GraphoptError(refused)
        return measure(compiled)

    @staticmethod
    def _device(name: str | None) -> tuple[torch.device, list[str]]:
        try:
            place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise GraphoptError(f"there is no device called {name!r}; take 'cuda', 'cuda:1' or 'cpu'") from error
        if place.type not in ("cuda", "cpu"):
            raise GraphoptError(f"this backend runs on cuda, or on cpu to look at it, not on {place.type}")
        if place.type == "cuda":
            count = torch.cuda.device_count()
            if (place.index or 0) >= count:
                raise GraphoptError(f"there is no GPU {place}: torch sees {count}")
            return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index), []
        return place, [] if name else ["there is no GPU here: what the kernels compute, torch computes on the CPU"]

    @staticmethod
    def _unsupported(place: torch.device) -> str:
        if place.type != "cuda":
            return ""
        from graphopt.backends.cuda.launch import unsupported

        return unsupported(place.index or 0)


@dataclass
class _Made:
    """A program with kernels, or as it was; see `Compiled` for the attributes."""

    program: Program
    dtype: torch.dtype | None = None
    regions: list[Site] = field(default_factory=list)
    kept: list[Site] = field(default_factory=list)
    note: str = ""


def _with_kernels(program: Program, half: Literal["float16", "bfloat16"]) -> _Made:
    """Make kernels of what can be and compute in halves about them, where that is most of what weights multiply."""
    twin = program.clone()
    changes = partition(twin, half)
    if not changes.touched:
        note = "nothing in this program becomes a kernel: torch runs all of it"
        return _Made(program.clone(), kept=changes.skipped, note=note)
    share = kernel_share(program, twin)
    if share < _WORTH:
        note = (
            f"kernels would compute {share:.0%} of what multiplies by weights: torch runs all of it, in its own types"
        )
        return _Made(program.clone(), kept=changes.skipped, note=note)
    return _Made(in_halves(twin, _TYPES[half]), _TYPES[half], changes.touched, changes.skipped)


def _mostly(program: Program) -> torch.dtype | None:
    """Return the floating type that most operators give."""
    seen: dict[torch.dtype, int] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            seen[value.dtype] = seen.get(value.dtype, 0) + 1
    return max(seen, key=lambda each: seen[each], default=None)


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) and value.is_floating_point() else None


def _moved(program: Program, place: torch.device) -> Program:
    """Return the program with weights, and what it makes anew, on a device."""
    if place.type == "cpu":
        return program
    moved = program.map_weights(lambda name, weight: weight.detach().to(place))
    for node in moved.graph.nodes:
        change = fx.node.map_aggregate
        node.args = change(node.args, lambda each: place if isinstance(each, torch.device) else each)
        node.kwargs = change(node.kwargs, lambda each: place if isinstance(each, torch.device) else each)
    moved.graph_module.recompile()
    return moved
