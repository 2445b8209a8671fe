"""Milliseconds of every unit at every level, from a few timed programs.

For each level there is one program with every unit at it, where it has it, and all are timed in turns beside the
program as it is. The time of a unit at a level is that of its operators there, and of the conversions that they read
through. What blocks take is what their operators take less what is decided apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.pipeline import Context
from graphopt.quantization.timing import region_of, site_times
from graphopt.search import GONE, Choices, Choosing, Level, Problem, Unit

RESOURCE = "latency_ms"


def with_latencies(choices: Choices, program: Program, context: Context, who: str) -> Choices:
    """Return the choices with what each level takes, and what the rest of the program takes in any case.

    Raises GraphoptError where nothing can be timed, NotExpressible where the target has no form for a level.
    """
    if context.measure is None:
        raise GraphoptError(
            f"{who} cannot bound the latency on {context.target.name}: nothing can be timed for it here; bound another "
            "field"
        )
    problem = choices.problem
    names = dict.fromkeys(
        level.name
        for unit, owners in zip(problem.units, choices.owners, strict=True)
        for level, owner in zip(unit.levels, owners, strict=True)
        if owner >= 0 and not _takes(choices, unit, level)
    )
    programs = {"as it is": program} | {name: _uniform(choices, program, context, name) for name in names}
    with context.progress.stage("measure levels"):
        profiles = context.timed(programs)
    by_name = {node.name: node for node in program.graph.nodes}
    listed = {name for nodes in choices.nodes for name in nodes}
    regions = {name: region_of(by_name[name], profiles["as it is"], listed) for name in listed}
    times = {name: site_times(programs[name], profiles[name], regions) for name in programs}
    units = []
    for at, unit in enumerate(problem.units):
        spent = {name: sum(times[name][node] for node in choices.nodes[at]) for name in times}
        units.append(Unit(unit.name, tuple(_level(each, index, spent) for index, each in enumerate(unit.levels))))
    for tie in problem.ties:
        whole, part = units[tie.whole], units[tie.part].levels[0].costs[RESOURCE]
        units[tie.whole] = Unit(whole.name, tuple(
            _with(each, each.costs[RESOURCE] - part) if index != tie.at else each
            for index, each in enumerate(whole.levels)
        ))  # fmt: skip
    rest = profiles["as it is"].latency_ms - sum(unit.levels[0].costs[RESOURCE] for unit in units)
    fixed = {**problem.fixed, RESOURCE: rest}
    return dataclasses.replace(choices, problem=Problem(tuple(units), problem.limits, fixed, problem.ties))


def _takes(choices: Choices, unit: Unit, level: Level) -> bool:
    """Return whether a level takes other units away, or has no operator left: such a one takes no time."""
    at = choices.problem.units.index(unit)
    return not level.costs or any(tie.whole == at and unit.levels[tie.at] is level for tie in choices.problem.ties)


def _level(level: Level, index: int, spent: Mapping[str, float]) -> Level:
    if level.name == GONE or not level.costs:
        return _with(level, 0.0)
    return _with(level, spent["as it is"] if index == 0 else spent.get(level.name, spent["as it is"]))


def _with(level: Level, milliseconds: float) -> Level:
    return Level(level.name, {**level.costs, RESOURCE: milliseconds})


def _uniform(choices: Choices, program: Program, context: Context, level: str) -> Program:
    """Return the program with every unit at a level, rounded in the quickest way."""
    made = program.clone()
    for each, levels in zip(choices.passes, choices.levels_of(choices.problem.uniform(level)), strict=True):
        assert isinstance(each, Choosing)
        if (sketch := each.sketched(levels)) is not None:
            sketch.run(made, context)
    return made
