"""Remove residual branches and layers whose loss the rest can bear.

    y = x + f(x)      ->      y = x            or, on demand,      y = x + W x + b

Branches and layers are those that `analysis/blocks` finds, in transformers, residual convolutional networks and U-Nets
alike. Which ones go is decided by

    cosine      1 - mean cos(x, y) of what goes in and comes out ("Layers in Large Language Models are More Redundant
                Than You Expect")
    influence   how far the model's outputs move when it alone is gone ("Learnable Layers Fusion of Generative
                Pre-trained Transformers", its macro influence)
    additive    the same, added up, as the costs of a knapsack: the cheapest set that saves enough ("LAPTOP-Diff: Layer
                Pruning and Normalized Distillation for Compressing Diffusion Models")
    greedy      one after the other, each time the one that costs least on top of what is gone ("2SSP: A Two-Stage
                Framework for Structured Pruning of LLMs", second stage); then one that is gone changes places with one
                that stays as long as that costs less
    tail        the last ones ("L3Prune: Large Language Models Can Be Good Text Encoders, and Shallow")

How far outputs move is their divergence over some of the calibration data, or what the user's metric falls by.
Afterwards what writes the residual stream behind a gap is fitted to what the original has there
(`graphopt.passes.prune.refit`).

Lossy. Removing nothing is the identity.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, fx
from torch.nn import functional

from graphopt.analysis import macs, parameters, resources
from graphopt.analysis.blocks import Branch, find_blocks
from graphopt.calibration.collect import observe
from graphopt.calibration.judge import Judge
from graphopt.errors import GraphoptError, nearest
from graphopt.ir import Changes, Program, Rewriter, arguments, operator
from graphopt.metric import rated
from graphopt.passes.prune.allocation import bounds_of, told
from graphopt.passes.prune.latency import latency_of
from graphopt.passes.prune.refit import added_to, fittable, in_order, refit
from graphopt.pipeline import Context, LossyPass, site_names
from graphopt.search import Choosing, Level, Offer, Problem, Store, integer_program
from graphopt.search import Unit as SearchUnit
from graphopt.target import Target

aten = torch.ops.aten
_STAYS, _GOES = "stays", "goes"
_GAIN = 1e-6  # relative: exchanging units for less is chasing noise
_CONVOLUTIONS = {"conv1d": aten.conv1d.default, "conv2d": aten.conv2d.default, "conv3d": aten.conv3d.default}


@dataclass(frozen=True, eq=False)
class Unit:
    """What goes or stays as one.

    Attributes:
        name: of its first call. branches: of it, in the order of the data.
        source, end: the values that go in and come out, by name.
    """

    name: str
    branches: tuple[Branch, ...]
    source: str
    end: str


@dataclass(frozen=True)
class DropBlocks(LossyPass, Choosing):
    """Remove layers or branches.

    Attributes:
        unit: layers, or single branches (an attention, an MLP, a residual block).
        count: how many go; None: as many as the budget's macs_ratio, params_ratio, size_ratio, latency_ratio ask for.
        criterion: by which they go, see above.
        judge: divergence of the outputs, or metric: what the user's metric falls by.
        exchange: whether greedy exchanges what is gone for what stays, in the end.
        samples: batches of the calibration data that judge.
        replace: linear puts a linear map, fitted to what is gone, in its place; none leaves nothing.
        resolve: whether what stays is fitted to the original.
        spill: keep activations in files between stages.
        blocks: what goes, by name, instead of what a criterion says (`allocate` chooses so).
    """

    unit: Literal["layers", "branches"] = "layers"
    count: Annotated[int, Field(ge=0)] | None = None
    criterion: Literal["cosine", "influence", "additive", "greedy", "tail"] = "greedy"
    judge: Literal["divergence", "metric"] = "divergence"
    exchange: bool = True
    samples: Annotated[int, Field(ge=1)] = 32
    replace: Literal["none", "linear"] = "none"
    resolve: bool = True
    spill: bool = False
    blocks: tuple[str, ...] = ()

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        units = self._units(program, rewriter)
        chosen = self._named(units) if self.blocks else _Choice(self, program, units, context).made()
        if not chosen:
            return rewriter.finish()
        before = program.clone()
        maps = _take_out(rewriter, chosen, self.replace == "linear")
        for unit in chosen:
            what = "a linear map stands for it" if unit in maps else "it is gone"
            rewriter.touch(unit.name, f"{len(unit.branches)} residual branches up to {unit.end}: {what}")
        rewriter.note(removed=[unit.name for unit in chosen])
        if self.resolve or maps:
            sites = _sites_behind(program, chosen, maps, self.resolve)
            batches = context.needed_calibration(self.name)
            values, errors = refit(before, program, sites, batches, context.progress, self.name, self.spill)
            for node, value in values.items():
                rewriter.replace(node, rewriter.weight(value, str(node.target), value.dtype, node))
            rewriter.note(relative_errors=errors)
        return rewriter.finish()

    def offers(self, program: Program, context: Context, store: Store) -> list[Offer]:
        """Return for every layer or branch whether it stays; what others become when it alone goes is stored."""
        before = resources(program)
        found = []
        units = self._units(program, Rewriter(program.clone(), self.name))
        with context.progress.stage("take blocks out", len(units)) as stage:
            for unit in units:
                without = program.clone()
                if self.resolve:
                    replace(self, blocks=(unit.name,), count=None, replace="none").run(without, context)
                    store.put(unit.name, _GOES, _changed(program, without))
                else:
                    self._take(without, [unit])
                found.append(self._offer(program, unit, without, before))
                stage.advance()
        return found

    def _offer(self, program: Program, unit: Unit, without: Program, before: Mapping[str, float]) -> Offer:
        after = resources(without)
        costs = {name: was - after[name] for name, was in before.items()}
        gone = frozenset(program.weights.keys() - without.weights.keys())
        nodes = tuple(node.name for branch in unit.branches for node in (*branch.body, branch.join))
        return Offer(unit.name, (Level(_STAYS, costs), Level(_GOES)), {_GOES: gone}, nodes)

    def restructure(self, program: Program, levels: Mapping[str, str], target: Target, store: Store) -> None:
        units = self._units(program, Rewriter(program.clone(), self.name))
        self._take(program, [unit for unit in units if unit.name in levels])

    def chosen(self, levels: Mapping[str, str]) -> DropBlocks | None:
        return replace(self, blocks=tuple(levels), count=None) if levels else None

    def sketched(self, levels: Mapping[str, str]) -> DropBlocks | None:
        made = self.chosen(levels)
        return None if made is None else replace(made, resolve=False)

    def _take(self, program: Program, units: Sequence[Unit]) -> None:
        rewriter = Rewriter(program, self.name)
        _take_out(rewriter, units)
        rewriter.finish()

    def _named(self, units: Sequence[Unit]) -> list[Unit]:
        known = [unit.name for unit in units]
        if unknown := [name for name in self.blocks if name not in known]:
            raise GraphoptError(
                f"{self.name}: there is no block {unknown[0]!r} that can go{nearest(unknown[0], known)}; there are "
                f"{', '.join(known) or 'none'}"
            )
        return [unit for unit in units if unit.name in self.blocks]

    def _units(self, program: Program, rewriter: Rewriter) -> list[Unit]:
        blocks = find_blocks(program)
        found = []
        if self.unit == "layers":
            layers = [layer for layer in blocks.layers if layer.inputs and layer.outputs]
            groups = [(layer.branches, layer.inputs[0], layer.outputs[0]) for layer in layers]
        else:
            groups = [((branch,), branch.source, branch.join) for branch in blocks.branches]
        for branches, source, end in groups:
            unit = Unit(branches[0].body[0].name, tuple(branches), source.name, end.name)
            nodes = [node for branch in branches for node in branch.body]
            reason = self.refusal_of([name for node in nodes for name in site_names(program, node)])
            if not reason and not all(_additions(end) for branch in branches for end in branch.ends):
                reason = "what it adds is read by more than an addition"
            if reason:
                rewriter.decline(branches[0].join, f"{unit.name}: {reason}")
            else:
                found.append(unit)
        if not groups:
            rewriter.decline("program", "it has no block that can be removed: no residual branch was found")
        return found


def _additions(end: fx.Node) -> list[fx.Node]:
    """Return the additions that read a branch's end; none where anything else reads it."""
    users = list(end.users)
    return users if all(operator(user) == "add" and arguments(user).get("alpha", 1) == 1 for user in users) else []


def _take_out(rewriter: Rewriter, units: Sequence[Unit], linear: bool = False) -> dict[Unit, fx.Node]:
    """Take units out of a program, which may be a clone; return the linear maps put in their places."""
    by_name = {node.name: node for node in rewriter.graph.nodes}
    maps = {}
    for unit in units:
        ends = [by_name[end.name] for branch in unit.branches for end in branch.ends]
        for index, end in enumerate(ends):
            for join in _additions(end):
                other = added_to(end, join)
                if linear and index == len(ends) - 1 and (made := _linear_map(rewriter, end, other, join)) is not None:
                    rewriter.redirect(join, end, made)
                    maps[unit] = made
                else:
                    rewriter.replace(join, other)
    rewriter.sweep()
    _erase_dead(rewriter)
    return maps


def _erase_dead(rewriter: Rewriter) -> None:
    """Erase calls that nobody reads: of what was taken out, and of what only that needed."""
    for node in reversed(list(rewriter.graph.nodes)):
        if node.op == "call_function" and not node.users:
            rewriter.graph.erase_node(node)


def _linear_map(rewriter: Rewriter, end: fx.Node, x: fx.Node, join: fx.Node) -> fx.Node | None:
    """Insert a map of x that gives zero so far; None where `end` is neither a linear nor a convolution."""
    kind = operator(end)
    if kind != "linear" and kind not in _CONVOLUTIONS:
        return None
    like = rewriter.program.weight(arguments(end)["weight"])
    channels = like.shape[0]
    shape = (channels, channels, *[1] * (like.dim() - 2))
    name = str(arguments(end)["weight"].target)
    weight = rewriter.weight(torch.zeros(shape), name, like.dtype)
    bias = rewriter.weight(torch.zeros(channels), f"{name}_bias", like.dtype)
    target = aten.linear.default if kind == "linear" else _CONVOLUTIONS[kind]
    return rewriter.insert(target, x, weight, bias, before=join, origin=[end])


def _sites_behind(
    program: Program, units: Sequence[Unit], maps: Mapping[Unit, fx.Node], resolve: bool
) -> dict[fx.Node, fx.Node]:
    """Return what can be fitted, with the addition that reads it: the maps, and what writes the stream behind a gap."""
    gaps = {unit.end for unit in units} | {branch.join.name for unit in units for branch in unit.branches}
    sources = {unit.source for unit in units}
    changed: set[fx.Node] = set()
    found: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.name in gaps or node.name in sources or any(each in changed for each in node.all_input_nodes):
            changed.add(node)
        joins = _additions(node)
        if len(joins) != 1 or not fittable(program, node) or not any(x in changed for x in node.all_input_nodes):
            continue
        if node in maps.values() or (resolve and joins[0].name not in gaps):
            found[node] = joins[0]
    return in_order(program, found)


class _Choice:
    """Which units go."""

    def __init__(self, options: DropBlocks, program: Program, units: Sequence[Unit], context: Context) -> None:
        self.options, self.program, self.units, self.context = options, program, list(units), context
        self._bounds = [] if options.count is not None else bounds_of(
            context, program, macs, parameters, "drop_blocks(count=...)",
            lambda: latency_of(context, program, options.name),
        )  # fmt: skip
        self._costs: dict[frozenset[str], float] = {}

    def made(self) -> list[Unit]:
        """Return the units that go, in the order of the data."""
        options = self.options
        if self._enough([]):
            return []
        if not self._enough(self.units):
            raise GraphoptError(self._short())
        if options.criterion == "greedy":
            chosen = self._greedy()
        elif options.criterion == "additive":
            chosen = self._knapsack()
        elif options.criterion == "tail":
            chosen = self._first(list(reversed(self.units)))
        else:
            alone = self._cosines() if options.criterion == "cosine" else {u: self._cost([u]) for u in self.units}
            chosen = self._first(sorted(self.units, key=lambda unit: alone[unit]))
        return [unit for unit in self.units if unit in chosen]

    def _without(self, units: Sequence[Unit]) -> Program:
        twin = self.program.clone()
        rewriter = Rewriter(twin, self.options.name)
        _take_out(rewriter, units)
        rewriter.finish()
        return twin

    def _enough(self, units: Sequence[Unit]) -> bool:
        if self.options.count is not None:
            return len(units) >= self.options.count
        made = self._without(units)
        return all(bound.of(made) <= bound.limit for bound in self._bounds)

    def _short(self) -> str:
        what = self.options.unit
        if self.options.count is not None:
            return f"drop_blocks cannot remove {self.options.count} {what}: there are {len(self.units)} that can go"
        got = told(self._bounds, self._without(self.units))
        return (
            f"drop_blocks cannot meet {got} by removing all {len(self.units)} {what} that can go; allow more, or prune"
        )

    def _cost(self, units: Sequence[Unit]) -> float:
        """Return how far the outputs move without some units, or what the metric falls by."""
        key = frozenset(unit.name for unit in units)
        if key not in self._costs:
            self._costs[key] = self._judge(self._without(units))
        return self._costs[key]

    @functools.cached_property
    def _judge(self) -> Callable[[Program], float]:
        if self.options.judge == "divergence":
            return Judge(self.program, self.context.needed_calibration(self.options.name), self.options.samples)
        evaluate = self.context.evaluate
        if evaluate is None:
            raise GraphoptError("drop_blocks(judge='metric') needs a metric; pass evaluate=")
        best = rated(evaluate, self.program, "the program", self.context.seed, finite=True)
        return lambda made: best - rated(evaluate, made, "a candidate", self.context.seed)

    def _first(self, ordered: Sequence[Unit]) -> list[Unit]:
        return next(list(ordered[:n]) for n in range(len(ordered) + 1) if self._enough(ordered[:n]))

    def _greedy(self) -> list[Unit]:
        chosen: list[Unit] = []
        with self.context.progress.stage("drop blocks", len(self.units)) as stage:
            while not self._enough(chosen):
                left = [unit for unit in self.units if unit not in chosen]
                chosen.append(min(left, key=lambda unit: self._cost([*chosen, unit])))
                stage.advance()
        better = self.options.exchange
        while better and chosen:
            left = [unit for unit in self.units if unit not in chosen]
            swaps = [[*(u for u in chosen if u is not old), new] for old in chosen for new in left]
            swaps = [swap for swap in swaps if self._enough(swap)]
            best = min(swaps, key=self._cost, default=chosen)
            better = self._cost(best) < self._cost(chosen) - _GAIN * abs(self._cost(chosen))
            chosen = best if better else chosen
        return chosen

    def _knapsack(self) -> list[Unit]:
        """Return the set of the least sum of costs that saves enough, by an integer program."""
        if self.options.count is not None:
            saved: list[dict[str, float]] = [{"count": 1.0} for _ in self.units]
            limits, whole = {"count": float(len(self.units) - self.options.count)}, {"count": float(len(self.units))}
        else:
            whole = {bound.name: bound.of(self.program) for bound in self._bounds}
            limits = {bound.name: bound.limit for bound in self._bounds}
            alone = [self._without([unit]) for unit in self.units]
            saved = [{bound.name: whole[bound.name] - bound.of(made) for bound in self._bounds} for made in alone]
        levels = [(Level(_STAYS, each), Level(_GOES)) for each in saved]
        fixed = {name: value - sum(each[name] for each in saved) for name, value in whole.items()}
        problem = Problem(tuple(map(SearchUnit, (unit.name for unit in self.units), levels)), limits, fixed)
        losses = [[0.0, max(self._cost([unit]), 0.0)] for unit in self.units]
        chosen = problem.names(integer_program(problem, losses))
        return [unit for unit in self.units if chosen[unit.name] == _GOES]

    def _cosines(self) -> dict[Unit, float]:
        """Return 1 - mean cosine of what goes into a unit and what comes out, over all tokens."""
        by_name = {node.name: node for node in self.program.graph.nodes}
        cosines = {unit: _Cosine(operator(unit.branches[-1].ends[0]) in _CONVOLUTIONS) for unit in self.units}
        shown: dict[fx.Node, _Observed] = {}
        for unit, cosine in cosines.items():
            shown.setdefault(by_name[unit.source], _Observed()).sources.append(cosine)
            shown.setdefault(by_name[unit.end], _Observed()).ends.append(cosine)
        batches = self.context.needed_calibration(self.options.name).head(self.options.samples)
        observe(self.program, shown, batches, self.context.progress)
        return {unit: cosine.total / max(cosine.count, 1) for unit, cosine in cosines.items()}


@dataclass(eq=False)
class _Cosine:
    """Sums up 1 - cos(x, y) over the tokens of values [..., C], or of images [N, C, ...]."""

    image: bool
    x: Tensor | None = None
    total: float = 0.0
    count: int = 0

    def update(self, y: Tensor) -> None:
        x, self.x = self.x, None
        if x is None or x.shape != y.shape:
            self.total, self.count = math.inf, self.count + 1  # it changes the shape: nothing to compare
            return
        cosine = functional.cosine_similarity(x.float(), y.float(), 1 if self.image else -1)
        self.total += float((1 - cosine).sum())
        self.count += cosine.numel()


@dataclass(eq=False)
class _Observed:
    """Shows a value to what begins with it and to what ends with it."""

    sources: list[_Cosine] = field(default_factory=list)
    ends: list[_Cosine] = field(default_factory=list)

    def update(self, values: Tensor, name: str) -> None:
        for each in self.ends:
            each.update(values)
        for each in self.sources:
            each.x = values


def _changed(program: Program, made: Program) -> dict[str, Tensor]:
    """Return the weights of `made` that `program` has otherwise, by name."""
    known = program.weights
    return {
        name: each for name, each in made.weights.items()
        if name in known and each.shape == known[name].shape and not torch.equal(each, known[name])
    }  # fmt: skip
