"""Is the captured graph the model? One run of each on the example inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.capture.randomness import draws
from graphopt.errors import GraphoptError
from graphopt.ir.program import Program

# Relative to the output's largest magnitude: what kernels of another summation order may differ by, with a wide margin;
# a wrong mode, a lost side effect or a stale constant differs by far more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_COARSE = 0.1


def is_random(program: Program) -> bool:
    """True where two runs of the program may differ."""
    return any(draws(node) for node in program.graph.nodes)


def check_same_function(program: Program, reference: Any) -> None:
    """Raise GraphoptError where the program returns something else than the module did on the example inputs."""
    with torch.no_grad():
        outputs = program(*program.example_inputs[0], **program.example_inputs[1])
    expected, expected_spec = pytree.tree_flatten_with_path(reference)
    found, found_spec = pytree.tree_flatten(outputs)
    if expected_spec != found_spec:
        raise GraphoptError(
            "the model returns another structure when traced than when run; its output must not depend on Python state"
        )
    compare_values = not is_random(program)
    for (path, was), now in zip(expected, found, strict=True):
        if difference := _difference(was, now, compare_values):
            name = f"output{pytree.keystr(path)}" if path else "output"
            raise GraphoptError(
                "the captured graph computes something else than the model on the example inputs "
                f"({name}: {difference}); forward must depend on its inputs and weights only, not on Python state, "
                "files or Python's random numbers"
            )


def _difference(was: Any, now: Any, compare_values: bool) -> str:
    if not isinstance(was, Tensor) or not isinstance(now, Tensor):
        return "" if not isinstance(was, Tensor) and was == now else f"{now} instead of {was}"
    if was.shape != now.shape or was.dtype != now.dtype:
        return f"{now.dtype}{list(now.shape)} instead of {was.dtype}{list(was.shape)}"
    if not compare_values or not was.is_floating_point() or not was.numel():
        return ""  # whole numbers may follow from a tie in an argmax or a sort
    was, now = was.detach(), now.detach()  # a model may return a parameter
    both = torch.isfinite(was) & torch.isfinite(now)
    if not bool(both.any()):
        return ""
    error = (was.double() - now.double())[both].abs().max()
    scale = was.double()[both].abs().max()
    ratio = float(error / scale) if scale > 0 else float(error)
    return f"relative error {ratio:.2g}" if ratio > _TOLERANCE.get(was.dtype, _COARSE) else ""
