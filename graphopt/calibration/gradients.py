"""Gradients of the loss at chosen values, over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from graphopt.calibration.batches import EMPTY, Batches, running
from graphopt.calibration.stream import unquantized
from graphopt.errors import GraphoptError
from graphopt.ir.program import Program
from graphopt.progress import Progress

Loss = Callable[[nn.Module, Any], Tensor]
ShowGradient = Callable[[fx.Node, Tensor, Tensor | None, int], None]  # node, gradient, value if wanted, batch


def read_gradients(
    program: Program,
    nodes: Collection[fx.Node],
    batches: Batches,
    progress: Progress,
    show: ShowGradient,
    loss: Loss | None = None,
    seed: int = 0,
    values: bool = False,
) -> int:
    """Show every batch's gradient at the values of `nodes` as soon as it is there, so that none has to be kept.

    A node on which the loss does not depend is not shown. One reading of the data, forward and backward; returns the
    number of batches. `loss`: of the module and a batch; None: the program's own where an output is a single number,
    else minus the logarithm of the probability of labels drawn from its own predictions (the last axis is the classes),
    whose mean squared gradient is the Fisher information. `values`: whether to show values beside gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = 0

    def watch(node: fx.Node, _: Mapping[fx.Node, Any], result: Any) -> Any:
        if not result.requires_grad:
            result = result.requires_grad_()
        value = result.detach() if values else None  # held until then
        result.register_hook(lambda gradient: show(node, gradient, value, batch))
        return result

    watched = Watch(program, nodes, watch, through=True)

    def run(*flat: Any) -> None:
        nonlocal batch
        with torch.enable_grad():
            if loss is not None:
                args, kwargs = pytree.tree_unflatten(list(flat), program.signature.in_spec)
                value = loss(_Module(program, watched), kwargs or args)
            else:
                value = own_loss(watched.run(*flat), generator)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise GraphoptError("loss must return a single number as a tensor that gradients flow through")
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
        batch += 1

    read_all("gradients", run, batches, progress)
    return batch


class Watch(fx.Interpreter):
    """Runs a program and shows chosen calls with their arguments and results.

    With `through`, dequantize(quantize(x)) is x: codes have no gradient.
    """

    def __init__(
        self, program: Program, watched: Collection[fx.Node], show: Callable[..., Any], through: bool = False
    ) -> None:
        super().__init__(program.graph_module)
        self._watched, self._show = set(watched), show
        found = {node: unquantized(node) for node in program.graph.nodes} if through else {}
        self._plain = {node: plain for node, plain in found.items() if plain is not None}
        last = {value: user for user, values in self.user_to_last_uses.items() for value in values}
        last.update((plain, node) for node, plain in self._plain.items() if last[plain] < node)
        self.user_to_last_uses = {}
        for value, user in last.items():
            self.user_to_last_uses.setdefault(user, []).append(value)

    def run_node(self, n: fx.Node) -> Any:
        result = self.env[self._plain[n]] if n in self._plain else super().run_node(n)
        if n in self._watched:
            return self._show(n, self.env, result)
        return result


def own_loss(outputs: Sequence[Any], generator: torch.Generator) -> Tensor:
    """Return what a model's outputs say of a loss: see `read_gradients`; GraphoptError where they have no gradient."""
    floating = [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
    for each in floating:
        if each.dim() == 0:
            return each
    if not floating:
        raise GraphoptError("no output of the model has gradients; pass loss=, a function of the model and a batch")
    logits = floating[0].reshape(-1, floating[0].shape[-1])
    if logits.shape[-1] == 1:
        drawn = logits.detach() + torch.randn(logits.shape, generator=generator)
        return 0.5 * (logits - drawn).square().sum()
    labels = torch.multinomial(functional.softmax(logits.detach().float(), -1), 1, generator=generator)[:, 0]
    return functional.cross_entropy(logits, labels, reduction="sum")


class _Module(nn.Module):
    """A program as its user knows it, run by a watching interpreter."""

    def __init__(self, program: Program, watch: fx.Interpreter) -> None:
        super().__init__()
        self._program, self._watch = program, watch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._program.signature.flatten(args, kwargs)
        return pytree.tree_unflatten(list(self._watch.run(*flat)), self._program.signature.out_spec)


def read_all(name: str, run: Callable[..., Any], batches: Batches, progress: Progress) -> None:
    count = 0
    with progress.stage(name, len(batches)) as stage:
        for flat in batches:
            with running(count):
                run(*flat)
            count += 1
            stage.advance()
    if count == 0:
        raise GraphoptError(EMPTY)
