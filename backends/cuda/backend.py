"""The CUDA backend: programs whose heavy parts run as kernels that graphopt generates, the rest as torch runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphopt.backend import Timing
from graphopt.backends.cuda.compiled import Compiled
from graphopt.backends.cuda.partition import partition, products
from graphopt.errors import GraphoptError
from graphopt.ir import Program, retype
from graphopt.progress import Progress, default_progress
from graphopt.target import Target

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
            program: any. Where nothing in it becomes a kernel it runs as it is, in its own types.
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
        twin = program.clone()
        reason = self._unsupported(place)
        changes = None if reason else partition(twin, half)
        if reason:
            notes.append(f"nothing became a kernel: {reason}")
        regions, kept = ([], []) if changes is None else (changes.touched, changes.skipped)
        used = any(_is_kernel(node) for node in twin.graph.nodes)
        if not used and not reason:
            notes.append("nothing in this program becomes a kernel: torch runs all of it")
        if used:
            twin = retype(twin, _TYPES[half])
        elif changes is not None:
            twin = program.clone()
        types = tuple(_dtype(node) for node in program.outputs)
        try:
            twin = _moved(twin, place)
        except torch.OutOfMemoryError as error:
            size = sum(weight.nbytes for weight in twin.weights.values())
            raise GraphoptError(f"the weights take {size / 1e9:.1f} GB, which {place} does not have free") from error
        if tune and used and place.type == "cuda":
            from graphopt.backends.cuda.tuning import tune_products

            count = tune_products(products(twin), place, progress or default_progress())
            notes.append(f"schedules of {count} products were measured")
        return Compiled(twin, place, _TYPES[half] if used else None, regions, kept, notes, graphs, types)

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


def _is_kernel(node: fx.Node) -> bool:
    return node.op == "call_function" and "graphopt::cuda_" in str(getattr(node.target, "_schema", ""))


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
