"""Bring a changed program nearer to the original, on the calibration data.

    distillation    loss = KL(softmax teacher || softmax student)  +  features x mean over joins of |s - t|^2 / |t|^2
                                                                   +  task x loss(student, batch)
    blocks          the second term alone, and no gradient passes a join: each block learns for itself
    closed_form     every linear and convolution in turn is solved for what the teacher has there, or at the join that
                    it is added to (`graphopt.passes.prune.refit`); nothing is trained, and the outputs judge

The teacher is the captured program. Features are the values of residual streams at the joins that both still have, each
relative to the teacher's ("LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models";
"Progressive Knowledge Distillation of Stable Diffusion XL Using Layer Level Loss", of SSD-1B and Vega). A stream that
was pruned or rotated is compared through the linear map that fits it best before training ("FitNets: Hints for Thin
Deep Nets"). The task is the user's own loss.

Adam with a rate that rises and falls; some batches are kept aside, and the weights are those of the step that was best
on them, which may be the first: training never makes worse what it is judged by. A subclass that overrides
`Recover.train_step` trains in its own way. With a run directory an interrupted training goes on where it was.

Lossy. The same seed gives the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.analysis.blocks import find_blocks
from graphopt.calibration.batches import running
from graphopt.calibration.judge import Judge, divergence
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Rewriter, operator, provenance, trainable
from graphopt.passes.prune.elimination import Fit, Normal
from graphopt.passes.prune.refit import fittable, in_order, joined, refit
from graphopt.pipeline import Context, LossyPass, site_names
from graphopt.pipeline.checkpoint import Checkpoint
from graphopt.pipeline.unfinished import run_key

_CHECKS = 10  # evaluations on what is kept aside, over all steps
_PATIENCE = 5  # of them without a gain: what was fitted in closed form gets worse before it gets better
_WARM_UP = 0.1  # share of the steps in which the rate rises
_ASIDE = 8  # every so-many-th batch is kept aside
_FITTED = 16  # batches to which the maps between streams are fitted
_SAME = 0.5  # of the teacher's square: a stream that is nearer has the same coordinates


@dataclass(frozen=True)
class Recover(LossyPass):
    """Distil the original into the program.

    Attributes:
        method: distillation, blocks or closed_form, see above.
        steps: of Adam, a batch each.
        rate: its largest learning rate.
        outputs: what the divergence of the outputs counts.
        features: what the distance of the residual streams counts.
        task: what the user's loss counts; needs one.
        samples: batches of the calibration data that are used, at most; they are kept in memory.
    """

    method: Literal["distillation", "blocks", "closed_form"] = "distillation"
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
        if self.method == "closed_form":
            return self._solve(program, teacher, rewriter, context)
        student = trainable(program)
        frozen = [name for name in student.weights if (self.only or self.skip) and self._kept(student, name)]
        training = Training(self, teacher, student, frozen, batches, context)
        if self.method == "blocks" and not training.joins:
            rewriter.decline("program", "it has no residual branch that the original has as well")
            return rewriter.finish()
        before, after = training.run()
        rewriter.note(loss=[before, after], steps=training.done, features=[join.name for join in training.joins])
        if not after < before:
            rewriter.decline("program", f"training gained nothing over {before:.3g} on the batches kept aside")
            return rewriter.finish()
        _put(rewriter, training.best)
        rewriter.touch("program", f"trained for {training.done} steps, loss {before:.3g} -> {after:.3g}")
        return rewriter.finish()

    def train_step(self, given: Step) -> None:
        """Change the student's weights by a batch; override it to train in another way.

        What is overridden may use everything in `given`, and its own batches besides. The loss on the batches that are
        kept aside still says which step was best.
        """
        loss = given.loss()
        given.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        given.optimizer.step()

    def _solve(self, program: Program, teacher: Program, rewriter: Rewriter, context: Context) -> Changes:
        """Solve everything that can be, in the order of the data."""
        known = {node.name: node for node in teacher.graph.nodes if node.op == "call_function"}
        sites: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            if not fittable(program, node) or self.refusal_of(site_names(program, node)):
                continue
            join = joined(node)
            aim = next((each for each in (join, node) if each is not None and _alike(each, known.get(each.name))), None)
            if aim is not None:
                sites[node] = aim
        batches = context.needed_calibration(self.name)
        names = {node.name for site, aim in sites.items() for node in (site, aim) if _alike(node, known.get(node.name))}
        same = _same_coordinates(teacher, program, names, batches.first(_FITTED))
        aims = in_order(program, {site: aim for site, aim in sites.items() if aim.name in same}, alone=True)
        aims = {site: aim for site, aim in aims.items() if aim.name in same}
        if not aims:
            rewriter.decline("program", "it has no linear and no convolution whose output the original has as well")
            return rewriter.finish()
        values, errors = refit(teacher, program, aims, batches, context.progress, self.name, leave=True)
        for site in (site for site in aims if site.name not in errors):
            rewriter.decline(site, "calibration data gives too few rows for its inputs; it stays as it is")
        if not errors:
            return rewriter.finish()
        twin = program.clone()
        solved = Rewriter(twin, self.name)
        _put(solved, {str(node.target): value for node, value in values.items()})
        solved.finish()
        judge = Judge(teacher, batches, self.samples)
        before, after = judge(program), judge(twin)
        rewriter.note(relative_errors=errors, loss=[before, after])
        if not after < before:
            rewriter.decline("program", f"solving gained nothing: outputs diverge by {before:.3g}, then {after:.3g}")
            return rewriter.finish()
        _put(rewriter, {str(node.target): value for node, value in values.items()})
        what = f"{len(errors)} linears and convolutions were solved for what the original gives"
        rewriter.touch("program", f"{what}, divergence {before:.3g} -> {after:.3g}")
        return rewriter.finish()

    def _kept(self, program: Program, name: str) -> bool:
        return bool(self.refusal_of([name, *[alias for alias, target in program.aliases.items() if target == name]]))


def _put(rewriter: Rewriter, values: Mapping[str, Tensor]) -> None:
    """Give weights new values where these are others."""
    nodes = {str(node.target): node for node in rewriter.graph.nodes if node.op == "get_attr"}
    for name, value in values.items():
        if name in nodes and not torch.equal(value, rewriter.program.weight(name)):
            rewriter.replace(nodes[name], rewriter.weight(value, name, value.dtype, nodes[name]))


@dataclass(frozen=True)
class Step:
    """What a step of training is given.

    Attributes:
        student, teacher: modules that are called as the user's model is. batch: inputs in the form of the calibration
            data. optimizer: of the student's weights. loss: returns what is to fall, with gradients.
    """

    student: nn.Module
    teacher: nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Join:
    """A value of the student that is compared with one of the teacher.

    Attributes:
        name: of both. dim: of the channels, from the last. change: [student's, teacher's channels], the linear map
            through which the student's is seen; None: as it is.
    """

    name: str
    dim: int
    change: Tensor | None = None

    def error(self, made: Tensor, target: Tensor) -> Tensor:
        if self.change is not None:
            made = (made.movedim(self.dim, -1) @ self.change.to(made.dtype)).movedim(-1, self.dim)
        return _relative(made, target)


class Training:
    """A student, its teacher and its optimizer.

    Attributes:
        joins: what is compared. done: steps. best: weights by name.
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
        self._local = options.method == "blocks"
        self._aside = [index for index in range(len(batches)) if index % _ASIDE == _ASIDE - 1] or [len(batches) - 1]
        self._train = [index for index in range(len(batches)) if index not in self._aside]
        self._batches = batches
        self.joins = self._seen(_shared_joins(teacher, student)) if options.features or self._local else []
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
        optimizer = torch.optim.Adam(list(self._learned.values()), options.rate)
        generator = torch.Generator().manual_seed(self.context.seed)
        journal = self.context.journal.path
        checkpoint = Checkpoint(None if journal is None else journal.parent, self._key())
        order: list[int] = []
        without_gain = 0
        if (state := checkpoint.restore()) is not None:
            before, best, self.best = state["before"], state["least"], state["best"]
            self.done, order, without_gain = state["done"], state["order"], state["without_gain"]
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
            with torch.no_grad():
                for name, weight in self._learned.items():
                    weight.copy_(state["weights"][name])
        else:
            before = best = self._judged()
        with self.context.progress.stage("recover", options.steps) as stage:
            stage.advance(self.done)
            while self.done < options.steps and without_gain < _PATIENCE:
                for group in optimizer.param_groups:
                    group["lr"] = options.rate * _schedule(self.done / options.steps)
                order = order or torch.randperm(len(self._train), generator=generator).tolist()
                if not self._step(self._train[order.pop()], optimizer):
                    break  # what was best so far stays
                self.done += 1
                stage.advance()
                if self.done % max(1, options.steps // _CHECKS) == 0 or self.done == options.steps:
                    now = self._judged()
                    without_gain = 0 if now < best else without_gain + 1
                    if now < best:
                        best, self.best = now, self._copied()
                    checkpoint.save(
                        {
                            "before": before, "least": best, "best": self.best, "done": self.done, "order": order,
                            "without_gain": without_gain, "optimizer": optimizer.state_dict(),
                            "generator": generator.get_state(), "weights": self._copied(),
                        }
                    )  # fmt: skip
        checkpoint.remove()
        return before, best

    @torch.enable_grad()
    def _step(self, index: int, optimizer: torch.optim.Optimizer) -> bool:
        """Learn from a batch; return whether the loss was a number."""
        losses: list[Tensor] = []

        def loss() -> Tensor:
            losses.append(self._loss(index))
            if not bool(losses[-1].isfinite()):
                raise FloatingPointError
            return losses[-1]

        args, kwargs = pytree.tree_unflatten(list(self._batches[index]), self.student.signature.in_spec)
        modules = self.student.module(), self.teacher.module()
        try:
            self.options.train_step(Step(*modules, kwargs or args, optimizer, loss))
        except FloatingPointError:
            return False
        return True

    def _key(self) -> str:
        """Return the digest of what decides how training goes on."""
        return run_key(self.student, None, self.options, self.context.seed, len(self._batches))

    def _copied(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self._learned.items()}

    @torch.no_grad()
    def _judged(self) -> float:
        return sum(float(self._loss(index)) for index in self._aside) / len(self._aside)

    def _loss(self, index: int) -> Tensor:
        flat, options = self._batches[index], self.options
        names = {join.name for join in self.joins}
        outputs, targets, found, wanted = _both(self.teacher, self.student, flat, index, names, self._local)
        total = torch.zeros(())
        for join in self.joins:
            weight = 1.0 if self._local else options.features
            total = total + weight / len(self.joins) * join.error(found[join.name], wanted[join.name])
        if self._local:
            return total
        for made, target in zip(outputs, targets, strict=True):
            if not isinstance(target, Tensor) or not target.is_floating_point():
                continue
            if target.dim() and target.shape[-1] > 1:
                total = total + options.outputs * divergence(made, target) / target.shape[:-1].numel()
            else:
                total = total + options.outputs * _relative(made, target)
        if options.task:
            assert self.context.loss is not None
            args, kwargs = pytree.tree_unflatten(list(flat), self.student.signature.in_spec)
            total = total + options.task * self.context.loss(self.student.module(), kwargs or args)
        return total

    @torch.no_grad()
    def _seen(self, joins: Sequence[Join]) -> list[Join]:
        """Return the joins with the maps through which they are compared, where they lie in other coordinates."""
        names = {join.name for join in joins}
        normals: dict[str, Normal] = {}
        plain = dict.fromkeys(names, 0.0)
        for index in self._train[:_FITTED]:
            _, _, found, wanted = _both(self.teacher, self.student, self._batches[index], index, names)
            for join in joins:
                made, target = (each[join.name].movedim(join.dim, -1).flatten(0, -2) for each in (found, wanted))
                normal = normals.setdefault(join.name, Normal(made.shape[-1], target.shape[-1], constant=False))
                normal.update(made, target)
                alike = made.shape == target.shape
                plain[join.name] += float((made - target).square().sum()) if alike else math.inf
        seen = []
        for join in joins:
            normal = normals[join.name]
            if plain[join.name] <= _SAME * normal.squares:
                seen.append(join)
                continue
            labels = torch.full((normal.inputs,), -1)
            fit = Fit(normal, torch.zeros(normal.inputs, normal.outputs), labels)
            seen.append(replace(join, change=fit.weight))
        return seen


def _schedule(done: float) -> float:
    """Return the rate, relative to its largest: it rises in a line and falls as a cosine."""
    if done < _WARM_UP:
        return (done + 1e-3) / (_WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def _relative(made: Tensor, target: Tensor) -> Tensor:
    finite = target.isfinite()
    error = torch.where(finite, made - target, 0.0).float().square().sum()
    return error / torch.where(finite, target, 0.0).float().square().sum().clamp(min=1e-30)


def _shared_joins(teacher: Program, student: Program) -> list[Join]:
    """Return the joins of residual branches that were captured and that the teacher has, but for their channels."""
    known = {node.name: node for node in teacher.graph.nodes if node.op == "call_function"}
    found: dict[str, Join] = {}
    for branch in find_blocks(student).branches:
        join, ends = branch.join, [operator(end) for end in branch.ends]
        there = known.get(join.name)
        if provenance(join)["by"] or there is None or there.target != join.target:
            continue
        ours, theirs = (list(each.meta["val"].shape) for each in (join, there))
        image = any(end.startswith("conv") for end in ends)
        dim = 1 - len(ours) if image else -1
        if len(ours) == len(theirs) > 1:
            ours[dim] = theirs[dim]
            if ours == theirs:
                found[join.name] = Join(join.name, dim)
    return list(found.values())


def _alike(node: fx.Node, other: fx.Node | None) -> bool:
    """Return whether the teacher has a value of the same shape, by the same operator."""
    if other is None or other.target != node.target:
        return False
    return tuple(node.meta["val"].shape) == tuple(other.meta["val"].shape)


def _both(
    teacher: Program, student: Program, flat: Sequence[Any], index: int, names: set[str], local: bool = False
) -> tuple[list[Any], list[Any], Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Return outputs and named values of the student and, without gradients, of the teacher."""
    with torch.no_grad(), running(index):
        one = _Watched(teacher, names)
        targets = list(one.run(*flat))
    with running(index):
        other = _Watched(student, names, local)
        outputs = list(other.run(*flat))
    return outputs, targets, other.found, one.found


@torch.no_grad()
def _same_coordinates(
    teacher: Program, student: Program, names: set[str], batches: Sequence[list[Any]]
) -> set[str]:
    """Return the names of values that are near the teacher's: what was rotated is not."""
    errors, squares = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for index, flat in enumerate(batches):
        _, _, found, wanted = _both(teacher, student, flat, index, names)
        for name in names:
            errors[name] += float((found[name] - wanted[name]).square().sum())
            squares[name] += float(wanted[name].square().sum())
    return {name for name in names if errors[name] <= _SAME * squares[name]}


class _Watched(fx.Interpreter):
    """Runs a program and keeps some values; `local`: no gradient passes these."""

    def __init__(self, program: Program, names: set[str], local: bool = False) -> None:
        super().__init__(program.graph_module)
        self._names, self._local = names, local
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self._names:
            return value
        self.found[n.name] = value
        return value.detach() if self._local else value
