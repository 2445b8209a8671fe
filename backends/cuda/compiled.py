"""What `result.compile("cuda")` returns: a program whose regions are kernels, to be called as the model was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError
from graphopt.ir import Program, Site

_WARM = 2  # runs before a capture, at which kernels are loaded and workspaces made


@dataclass
class Compiled:
    """A program with kernels in it.

    Takes what the model took and gives what it gave, in the same types; tensors must be on `device`. In between it
    computes in `dtype` where there are kernels.

    Attributes:
        program: the graph with `graphopt::cuda_*` operators; its `module()` is an `nn.Module` for torch.export.
        device: where it runs. dtype: of activations, None where nothing became a kernel.
        regions: operators that became kernels, and with what. kept: those that did not, and why.
        notes: sentences about what was decided.
        graphs: whether calls are captured in CUDA graphs and replayed, by the shapes of their inputs.
    """

    program: Program
    device: torch.device
    dtype: torch.dtype | None
    regions: list[Site]
    kept: list[Site]
    notes: list[str] = field(default_factory=list)
    graphs: bool = False
    outputs: tuple[torch.dtype | None, ...] = ()
    _captured: dict[Any, _Graph] = field(default_factory=dict, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on inputs in the form of the model's; GraphoptError where a tensor lies elsewhere."""
        flat = [self._input(value) for value in self.program.flattened(args, kwargs)]
        with torch.no_grad():
            results = self._replayed(flat) if self.graphs and self.device.type == "cuda" else self.program.run(flat)
        outputs = [self._output(i, value) for i, value in enumerate(results)]
        return pytree.tree_unflatten(outputs, self.program.signature.out_spec)

    def captured(self, flat: list[Any]) -> Callable[[], object]:
        """Return the replay of a CUDA graph that runs on flat inputs, as they lie there; on a GPU only."""
        return _Graph(self.program.run, [self._input(value) for value in flat]).replay

    def _input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.device.type != self.device.type:
            raise GraphoptError(
                f"an input is on {value.device}; move it to {self.device}, where the model is compiled for"
            )
        return value.to(self.dtype) if self.dtype is not None and value.is_floating_point() else value

    def _output(self, i: int, value: Any) -> Any:
        wanted = self.outputs[i] if i < len(self.outputs) else None
        return value.to(wanted) if isinstance(value, Tensor) and wanted is not None else value

    def _replayed(self, flat: list[Any]) -> list[Any]:
        key = tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in flat)
        if key not in self._captured:
            self._captured[key] = _Graph(self.program.run, flat)
        return self._captured[key](flat)

    def __str__(self) -> str:
        lines = [f"{len(self.regions)} operators in kernels for {self.device}, {len(self.kept)} left to torch"]
        lines += [f"  {site.node}: {site.reason}" for site in self.regions]
        lines += [f"  {site.node} (torch): {site.reason}" for site in self.kept]
        return "\n".join(lines + self.notes)


class _Graph:
    """A captured run: inputs are copied to where the capture read them, results from where it wrote them."""

    def __init__(self, run: Callable[[list[Any]], list[Any]], flat: list[Any]) -> None:
        self._inputs = [value.clone() if isinstance(value, Tensor) else value for value in flat]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                run(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):
            self._results = run(self._inputs)

    def replay(self) -> None:
        self._graph.replay()

    def __call__(self, flat: list[Any]) -> list[Any]:
        for own, given in zip(self._inputs, flat, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self._graph.replay()
        return [value.clone() if isinstance(value, Tensor) else value for value in self._results]
