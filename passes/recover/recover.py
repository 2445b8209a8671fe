"""Train a changed program towards the original, on the calibration data.

    loss = KL(softmax teacher || softmax student)  +  features x mean over joins of |s - t|^2 / |t|^2
                                                   +  task x loss(student, batch)

The teacher is the captured program. Features are the values of residual streams at the joins that both still have, each
relative to the teacher's ("LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models";
"Progressive Knowledge Distillation of Stable Diffusion XL Using Layer Level Loss", of SSD-1B and Vega). The task is the
user's own loss. Adam with a rate that rises and falls; some batches are kept aside, and the weights are those of the
step that was best on them, which may be the first: training never makes worse what it is judged by.

Lossy. The same seed gives the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.analysis.blocks import find_blocks
from graphopt.calibration.batches import running
from graphopt.calibration.judge import divergence
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Rewriter, provenance, trainable
from graphopt.pipeline import Context, LossyPass

_CHECKS = 10  # evaluations on what is kept aside, over all steps
_PATIENCE = 5  # of them without a gain: what was fitted in closed form gets worse before it gets better
_WARM_UP = 0.1  # share of the steps in which the rate rises
_ASIDE = 8  # every so-many-th batch is kept aside


@dataclass(frozen=True)
class Recover(LossyPass):
    """Distil the original into the program.

    Attributes:
        steps: of Adam, a batch each.
        rate: its largest learning rate.
        outputs: what the divergence of the outputs counts.
        features: what the distance of the residual streams counts.
        task: what the user's loss counts; needs one.
        samples: batches of the calibration data that are used, at most; they are kept in memory.
    """

    steps: Annotated[int, Field(ge=1)] = 400
    rate: Annotated[float, Field(gt=0)] = 1e-4
    outputs: Annotated[float, Field(ge=0)] = 1.0
    features: Annotated[float, Field(ge=0)] = 1.0
    task: Annotated[float, Field(ge=0)] = 0.0
    samples: Annotated[int, Field(ge=2)] = 256

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        if self.task and context.loss is None:
            raise GraphoptError("recover(task=...) needs a loss; pass loss=, a function of the model and a batch")
        batches = context.needed_calibration(self.name).first(self.samples)
        if len(batches) < 2:
            raise GraphoptError("recover needs two batches of calibration data at least, one of them to judge by")
        teacher = context.original if context.original is not None else program
        student = trainable(program)
        frozen = [name for name in student.weights if (self.only or self.skip) and self._kept(student, name)]
        training = _Training(self, teacher, student, frozen, batches, context)
        before, after = training.run()
        rewriter.note(loss=[before, after], steps=training.done, features=[node.name for node in training.joins])
        if not after < before:
            rewriter.decline("program", f"training gained nothing over {before:.3g} on the batches kept aside")
            return rewriter.finish()
        nodes = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
        for name, value in training.best.items():
            if name in nodes and not torch.equal(value, program.weight(name)):
                rewriter.replace(nodes[name], rewriter.weight(value, name, value.dtype, nodes[name]))
        rewriter.touch("program", f"trained for {training.done} steps, loss {before:.3g} -> {after:.3g}")
        return rewriter.finish()

    def _kept(self, program: Program, name: str) -> bool:
        return bool(self.refusal_of([name, *[alias for alias, target in program.aliases.items() if target == name]]))


class _Training:
    """A student, its teacher and its optimizer.

    Attributes:
        joins: calls of the student whose values are compared. done: steps. best: weights by name.
    """

    def __init__(
        self,
        options: Recover,
        teacher: Program,
        student: Program,
        frozen: Sequence[str],
        batches: Sequence[list[Any]],
        context: Context,
    ) -> None:
        self.options, self.teacher, self.student, self.context = options, teacher, student, context
        self.done = 0
        self.joins = _shared_joins(teacher, student) if options.features else []
        self._aside = [index for index in range(len(batches)) if index % _ASIDE == _ASIDE - 1] or [len(batches) - 1]
        self._train = [index for index in range(len(batches)) if index not in self._aside]
        self._batches = batches
        self._learned: dict[str, Tensor] = {}
        for name, weight in student.weights.items():
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                weight.requires_grad_(name not in frozen)
                if weight.requires_grad:
                    self._learned[name] = weight
        self.best = self._copied()

    def run(self) -> tuple[float, float]:
        """Return the loss on what is kept aside before, and the least that was met."""
        options = self.options
        before = best = self._judged()
        optimizer = torch.optim.Adam(list(self._learned.values()), options.rate)
        generator = torch.Generator().manual_seed(self.context.seed)
        order: list[int] = []
        without_gain = 0
        with self.context.progress.stage("recover", options.steps) as stage:
            for step in range(options.steps):
                for group in optimizer.param_groups:
                    group["lr"] = options.rate * _schedule(step / options.steps)
                order = order or torch.randperm(len(self._train), generator=generator).tolist()
                with torch.enable_grad():
                    loss = self._loss(self._train[order.pop()])
                    if not bool(loss.isfinite()):
                        break  # what was best so far stays
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                self.done = step + 1
                stage.advance()
                if self.done % max(1, options.steps // _CHECKS) == 0 or self.done == options.steps:
                    now = self._judged()
                    without_gain = 0 if now < best else without_gain + 1
                    if now < best:
                        best, self.best = now, self._copied()
                    elif without_gain == _PATIENCE:
                        break
        return before, best

    def _copied(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self._learned.items()}

    @torch.no_grad()
    def _judged(self) -> float:
        return sum(float(self._loss(index)) for index in self._aside) / len(self._aside)

    def _loss(self, index: int) -> Tensor:
        flat, options = self._batches[index], self.options
        names = {node.name for node in self.joins}
        with torch.no_grad(), running(index):
            targets, wanted = _run(self.teacher, flat, names)
        with running(index):
            outputs, found = _run(self.student, flat, names)
        total = torch.zeros(())
        for made, target in zip(outputs, targets, strict=True):
            if not isinstance(target, Tensor) or not target.is_floating_point():
                continue
            if target.dim() and target.shape[-1] > 1:
                total = total + options.outputs * divergence(made, target) / target.shape[:-1].numel()
            else:
                total = total + options.outputs * _relative(made, target)
        for name in sorted(names):
            total = total + options.features / len(names) * _relative(found[name], wanted[name])
        if options.task:
            assert self.context.loss is not None
            args, kwargs = pytree.tree_unflatten(list(flat), self.student.signature.in_spec)
            total = total + options.task * self.context.loss(self.student.module(), kwargs or args)
        return total


def _schedule(done: float) -> float:
    """Return the rate, relative to its largest: it rises in a line and falls as a cosine."""
    if done < _WARM_UP:
        return (done + 1e-3) / (_WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def _relative(made: Tensor, target: Tensor) -> Tensor:
    finite = target.isfinite()
    error = torch.where(finite, made - target, 0.0).float().square().sum()
    return error / torch.where(finite, target, 0.0).float().square().sum().clamp(min=1e-30)


def _shared_joins(teacher: Program, student: Program) -> list[fx.Node]:
    """Return the joins of residual branches that were captured and that the teacher has in the same shape."""
    known = {node.name: node for node in teacher.graph.nodes if node.op == "call_function"}
    found = []
    for join in dict.fromkeys(branch.join for branch in find_blocks(student).branches):
        there = known.get(join.name)
        captured = not provenance(join)["by"]
        if captured and there is not None and there.target == join.target:
            ours, theirs = join.meta["val"], there.meta["val"]
            if tuple(ours.shape) == tuple(theirs.shape):
                found.append(join)
    return found


class _Watched(fx.Interpreter):
    """Runs a program and keeps some values."""

    def __init__(self, program: Program, names: set[str]) -> None:
        super().__init__(program.graph_module)
        self._names = names
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self.found[n.name] = value
        return value


def _run(program: Program, flat: Sequence[Any], names: set[str]) -> tuple[list[Any], Mapping[str, Tensor]]:
    watched = _Watched(program, names)
    return list(watched.run(*flat)), watched.found
