"""What passes let a search choose, and candidates put together from it.

A pass that derives from `Choosing` says which units it decides about and what each level costs, and computes every
level once. What a level makes of weights goes to a store on disk, from which processes map it into memory: to evaluate
a candidate, weights are swapped, nothing is computed anew. Passes may decide about the same unit (a weight that is
stored as codes, or whose operator runs on integers): the levels of a unit are those of all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from graphopt.calibration.judge import Judge, targets_of
from graphopt.errors import GraphoptError, first_line
from graphopt.files import replacing, write_text
from graphopt.ir import Program
from graphopt.ir.program import assign_weight
from graphopt.metric import rated
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.registry import parse_pass
from graphopt.search.evaluator import EffectsTask, LossTask, MetricTask
from graphopt.search.problem import Assignment, Level, Problem, Tie, Unit
from graphopt.target import Target

_ROWS = 64  # of each output of a piece, where effects are compared
GONE = "gone"  # the level of a unit that another unit's level takes away


@dataclass(frozen=True)
class Offer:
    """What a pass decides about one place.

    Attributes:
        unit: name of the place; passes that decide about the same one call it alike.
        levels: the choices, the first leaves it as it is.
        takes: at which levels the place takes other units away, and these units' names.
        nodes: the operators whose time the place's is.
        group: places with the same one are decided together, where they have the same levels; empty: alone.
    """

    unit: str
    levels: tuple[Level, ...]
    takes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    group: str = ""


class Choosing:
    """What a pass adds so that a search can choose for it."""

    def offers(self, program: Program, context: Context, store: Store) -> list[Offer]:
        """Return what can be chosen, and put what each level makes of weights into the store."""
        raise NotImplementedError

    def restructure(self, program: Program, levels: Mapping[str, str], target: Target, store: Store) -> None:
        """Change the graph of a program, which is a clone, to what levels other than the first ask for."""

    def chosen(self, levels: Mapping[str, str]) -> Pass | None:
        """Return the pass that makes a choice for good, levels by unit; None where nothing is to be done."""
        raise NotImplementedError

    def sketched(self, levels: Mapping[str, str]) -> Pass | None:
        """Return a pass that takes as long in the runtime, and is quicker to run."""
        return self.chosen(levels)


class Store:
    """What levels make of weights: a file for each unit and level, mapped into memory where it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[str, str], dict[str, Tensor]] = {}

    def put(self, unit: str, level: str, weights: Mapping[str, Tensor]) -> None:
        """Keep weights by name. Raises GraphoptError where they cannot be written."""
        _save(self._path(unit, level), {name: each.detach().clone() for name, each in weights.items()})

    def get(self, unit: str, level: str) -> dict[str, Tensor]:
        """Return weights by name; none where the level leaves them."""
        key = unit, level
        if key not in self._known:
            path = self._path(unit, level)
            self._known[key] = torch.load(path, mmap=True, weights_only=True) if path.exists() else {}
        return self._known[key]

    def _path(self, unit: str, level: str) -> Path:
        return self.folder / f"level-{hashlib.sha256(json.dumps([unit, level]).encode()).hexdigest()[:32]}.pt"


def _save(path: Path, value: Any) -> None:
    try:
        with replacing(path) as temporary:
            torch.save(value, temporary)
    except RuntimeError as error:  # as which torch reports a full disk
        raise GraphoptError(f"cannot write {path} ({first_line(error)}); free some space") from error


@dataclass(frozen=True)
class Choices:
    """What all passes together let a search choose.

    Attributes:
        passes: that decide. problem: the units and what they cost, without limits.
        owners: of each unit, of each level, the pass that makes it; -1: it leaves the unit as it is.
        members: of each unit, the places that it stands for. nodes: and the operators whose time is theirs.
        target: what the program is meant to run on.
    """

    passes: tuple[Pass, ...]
    problem: Problem
    owners: tuple[tuple[int, ...], ...]
    members: tuple[tuple[str, ...], ...]
    nodes: tuple[tuple[str, ...], ...]
    target: Target

    def levels_of(self, assignment: Assignment) -> list[dict[str, str]]:
        """Return for each pass the places that it changes, with their levels."""
        found: list[dict[str, str]] = [{} for _ in self.passes]
        for unit, owners, names, level in zip(self.problem.units, self.owners, self.members, assignment, strict=True):
            if owners[level] >= 0:
                found[owners[level]] |= dict.fromkeys(names, unit.levels[level].name)
        return found

    def weights_of(self, unit: int, level: int, store: Store) -> dict[str, Tensor]:
        """Return what a unit at a level makes of weights; none where it changes more than these, or nothing."""
        name, owner = self.problem.units[unit].levels[level].name, self.owners[unit][level]
        if owner >= 0 and _restructures(self.passes[owner]):
            return {}
        return {key: each for member in self.members[unit] for key, each in store.get(member, name).items()}

    def chosen(self, assignment: Assignment) -> list[Pass]:
        """Return the passes that make an assignment for good."""
        made = (each.chosen(levels) for each, levels in zip(self.passes, self.levels_of(assignment), strict=True))  # type: ignore[attr-defined]
        return [each for each in made if each is not None]

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        plain = dataclasses.asdict(self.problem)
        passes = list(map(str, self.passes))
        lists = {"owners": self.owners, "members": self.members, "nodes": self.nodes}
        target = TypeAdapter(Target).dump_python(self.target, mode="json")
        return json.dumps({"passes": passes, **lists, "problem": plain, "target": target})

    @staticmethod
    def from_json(text: str) -> Choices:
        known = json.loads(text)
        owners, members, nodes = (tuple(map(tuple, known[name])) for name in ("owners", "members", "nodes"))
        passes = tuple(parse_pass(each) for each in known["passes"])
        problem = TypeAdapter(Problem).validate_python(known["problem"])
        target = TypeAdapter(Target).validate_python(known["target"])
        return Choices(passes, problem, owners, members, nodes, target)


def gathered(
    passes: Sequence[Pass], program: Program, context: Context, store: Store, spent: Mapping[str, float]
) -> Choices:
    """Return what passes let a search choose of a program.

    Args:
        store: gets what the levels make of weights.
        spent: what the whole program costs of each resource as it is.

    Raises GraphoptError for a pass that lets nothing be chosen.
    """
    units: dict[str, list[Level]] = {}
    owners: dict[str, list[int]] = {}
    groups: dict[str, str] = {}
    nodes: dict[str, tuple[str, ...]] = {}
    takes: list[tuple[str, str, frozenset[str]]] = []
    for index, each in enumerate(passes):
        if not isinstance(each, Choosing):
            raise GraphoptError(f"{each.name} has nothing to choose from; see `graphopt passes allocate`")
        for offer in each.offers(program, context, store):
            first, *others = offer.levels
            known = units.setdefault(offer.unit, [first])
            owned = owners.setdefault(offer.unit, [-1])
            if twice := [level.name for level in others if level.name in {one.name for one in known}]:
                raise GraphoptError(f"two passes offer the level {twice[0]!r} for {offer.unit}; leave one of them out")
            known += others
            owned += [index] * len(others)
            takes += [(offer.unit, level, names) for level, names in offer.takes.items()]
            groups[offer.unit] = offer.group or groups.get(offer.unit, "")
            nodes[offer.unit] = tuple(dict.fromkeys([*nodes.get(offer.unit, ()), *offer.nodes]))
    members = _merged(units, owners, groups, takes)
    takes = [(whole, level, names & units.keys()) for whole, level, names in takes]
    for _, _, names in takes:
        for name in names:
            if GONE not in [level.name for level in units[name]]:
                units[name].append(Level(GONE))
                owners[name].append(-1)
    place = {name: at for at, name in enumerate(units)}
    ties = []
    for whole, level, names in takes:
        at = [each.name for each in units[whole]].index(level)
        for name in sorted(names, key=place.__getitem__):
            ties.append(Tie(place[name], len(units[name]) - 1, place[whole], at))
            # What the whole costs as it is holds what is decided apart.
            units[whole] = [_less(each, units[name][0]) if i != at else each for i, each in enumerate(units[whole])]
    made = tuple(Unit(name, tuple(levels)) for name, levels in units.items())
    fixed = {name: value - sum(unit.levels[0].costs.get(name, 0.0) for unit in made) for name, value in spent.items()}
    owned_by = tuple(tuple(owners[unit.name]) for unit in made)
    of_units = tuple(members[unit.name] for unit in made)
    timed = tuple(tuple(node for name in names for node in nodes[name]) for names in of_units)
    return Choices(tuple(passes), Problem(made, {}, fixed, tuple(ties)), owned_by, of_units, timed, context.target)


def _merged(
    units: dict[str, list[Level]],
    owners: dict[str, list[int]],
    groups: Mapping[str, str],
    takes: Sequence[tuple[str, str, frozenset[str]]],
) -> dict[str, tuple[str, ...]]:
    """Make one unit, called like the first, of those of a group that have the same levels; return the members of each.

    Those that others take away are only merged with what goes at the same time.
    """
    alike: dict[Any, list[str]] = {}
    for name, levels in units.items():
        gone = tuple((whole, level) for whole, level, names in takes if name in names)
        same = (groups[name], tuple(level.name for level in levels), tuple(owners[name]), gone)
        alike.setdefault(same if groups[name] else name, []).append(name)
    for first, *others in alike.values():
        for other in others:
            units[first] = [_more(one, each) for one, each in zip(units[first], units.pop(other), strict=True)]
            del owners[other]
    return {names[0]: tuple(names) for names in alike.values()}


def _more(level: Level, part: Level) -> Level:
    names = dict.fromkeys([*level.costs, *part.costs])
    return Level(level.name, {name: level.costs.get(name, 0.0) + part.costs.get(name, 0.0) for name in names})


def _less(level: Level, part: Level) -> Level:
    return Level(level.name, {name: cost - part.costs.get(name, 0.0) for name, cost in level.costs.items()})


class Assembler:
    """Puts candidates together; a program it returns is good until the next one is asked for."""

    def __init__(self, program: Program, choices: Choices, store: Store) -> None:
        self._program, self.choices, self.store = program, choices, store
        self._structure: tuple[Any, ...] = ()
        self._made: Program | None = None
        self._weights = program.weights
        self._swapped: set[str] = set()

    def __call__(self, assignment: Assignment) -> Program:
        levels = self.choices.levels_of(assignment)
        structure = tuple(
            tuple(sorted(each.items())) if _restructures(one) else ()
            for one, each in zip(self.choices.passes, levels, strict=True)
        )
        if self._made is None or structure != self._structure:
            self._made, self._structure, self._swapped = self._program.clone(), structure, set()
            for one, each in zip(self.choices.passes, levels, strict=True):
                if each and _restructures(one):
                    one.restructure(self._made, each, self.choices.target, self.store)  # type: ignore[attr-defined]
        new: dict[str, Tensor] = {}
        for each in levels:
            for unit, level in each.items():
                for name, value in self.store.get(unit, level).items():
                    new[name] = _both(new[name], value, self._weights[name]) if name in new else value
        there = self._made.weights.keys()
        for name in (self._swapped | new.keys()) & there:
            assign_weight(self._made.graph_module, name, new.get(name, self._weights[name]))
        self._swapped = set(new)
        return self._made


def _both(first: Tensor, second: Tensor, original: Tensor) -> Tensor:
    """Return a weight with two changes: what the second changes is added where the first has not put a zero."""
    return torch.where(first == 0, first, first + second - original)


def _restructures(one: Pass) -> bool:
    return type(one).restructure is not Choosing.restructure  # type: ignore[attr-defined]


@dataclass(frozen=True)
class StoredCandidates:
    """Candidates whose program, levels and data lie in a folder; what is sent to a process is small.

    Attributes:
        folder: of `keep`. key: of its contents. pieces: of data. seed: for the metric.
        evaluate: the user's metric.
    """

    folder: Path
    key: str
    pieces: int
    seed: int = 0
    evaluate: Callable[[Any], float] | None = None

    @staticmethod
    def keep(
        folder: Path, key: str, program: Program, original: Program, choices: Choices, batches: Sequence[list[Any]],
        seed: int, evaluate: Callable[[Any], float] | None,
    ) -> StoredCandidates:  # fmt: skip
        """Write what candidates are made of, beside the levels, which are there already.

        `original` is what they are compared with, on `batches`. Raises GraphoptError where it cannot be written.
        """
        program.save(folder / "program.pt2")
        _save(folder / "data.pt", {"batches": list(batches), "targets": targets_of(original, batches)})
        write_text(folder / "choices.json", choices.to_json())
        return StoredCandidates(folder, key, len(batches), seed, evaluate)

    def load(self) -> Callable[[Any], Any]:
        data = torch.load(self.folder / "data.pt", mmap=True, weights_only=True)
        choices = Choices.from_json((self.folder / "choices.json").read_text(encoding="utf-8"))
        assembler = Assembler(Program.load(self.folder / "program.pt2"), choices, Store(self.folder))
        return Judged(assembler, Judge.of(data["batches"], data["targets"]), self.seed, self.evaluate)


@dataclass
class Judged:
    """Judges candidates: the function that `StoredCandidates.load` returns."""

    assembler: Assembler
    judge: Judge
    seed: int
    evaluate: Callable[[Any], float] | None

    @torch.no_grad()
    def __call__(self, task: LossTask | MetricTask | EffectsTask) -> Any:
        if isinstance(task, MetricTask):
            return self._metric(self.assembler(task.assignment))
        if isinstance(task, EffectsTask):
            return self._effects(task)
        program = self.assembler(task.assignment)
        found: list[float] = []
        for piece in task.pieces:
            found.append(self.judge.piece(program, piece))
            if not math.fsum(found) <= task.bound:
                break
        return found

    def _effects(self, task: EffectsTask) -> list[list[float]]:
        found = [self.judge.effect(self.assembler(each), task.piece, _ROWS) for each in task.assignments]
        vectors = torch.stack(found)
        return (vectors @ vectors.mT).tolist()

    def _metric(self, program: Program) -> float:
        assert self.evaluate is not None
        return rated(self.evaluate, program, "a candidate", self.seed)
