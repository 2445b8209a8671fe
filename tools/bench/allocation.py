#!/usr/bin/env python3
"""What levels chosen under a budget gain over uniform ones, and over other ways to choose.

    tools/bench/allocation.py --list
    tools/bench/allocation.py                                       every row; an hour
    tools/bench/allocation.py --task digits_cnn --method evolution  some of them
    tools/bench/allocation.py --docs docs/allocation.md             write the tables of what was measured last

Every row chooses among the same levels, computed once, at what a uniform level costs; candidates are put together from
them and judged on held-out data by their divergence from the original. `evaluations` counts candidates judged on all of
the calibration data, trying units alone included. The rows "by the passes" are what a user gets: the passes do what was
chosen on all the data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records
from environments import ROOT
from rows import measure_row

RESULTS = ROOT / "runs" / "bench" / "allocation.jsonl"
IMAGES = ("digits_cnn", "digits_depthwise", "digits_vit")
_SAMPLES, _EVALUATIONS = 32, 50


@dataclass(frozen=True)
class Setting:
    """A table: what may be chosen on a task, and which uniform level says how much it may cost.

    Attributes:
        choices: passes that offer levels. resource: what is bounded. uniform: levels to compare with, the first bounds.
    """

    name: str
    task: str
    choices: tuple[str, ...]
    resource: str
    uniform: tuple[str, ...]


_LANGUAGE = "quantize_weights(levels=['int8', 'int6', 'int4', 'int3', 'int2'])"
_MIXED = "quantize_weights(levels=['int8', 'int4'])"
SETTINGS = (
    Setting("language, 3 bits", "language", (_LANGUAGE,), "bits", ("int3",)),
    *(Setting(f"{task}, int4 / int8 / float", task, (_MIXED,), "size_bytes", ("int4",)) for task in IMAGES),
)
METHODS = (
    "uniform", "random", "sqnr, greedy", "fisher, greedy", "hessian, greedy", "hessian, integer program",
    "single losses, integer program", "pairs, integer program", "evolution", "EvoPress",
)  # fmt: skip


def measure(setting: Setting, methods: list[str]) -> list[dict[str, Any]]:
    """Return the figures of each method; runs in a process of its own."""
    import torch
    from tasks import TASKS

    import graphopt
    from graphopt.analysis import resources
    from graphopt.calibration import Batches
    from graphopt.passes.allocate.allocate import Allocate
    from graphopt.pipeline import Context, builtin, parse_pass
    from graphopt.pipeline import target as target_by_name
    from graphopt.search import Store, StoredCandidates, gathered

    material = TASKS[setting.task].make()
    exact = [*builtin("exact").passes, parse_pass("retype_floats")]
    program = graphopt.optimize(material.model, material.example_inputs, recipe=exact).program
    context = Context(target_by_name("onnxruntime-cpu"), Batches(material.calibration, program))
    context.original = program
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as name:
        folder = Path(name)
        with torch.no_grad():
            started = time.perf_counter()
            passes = [parse_pass(each) for each in setting.choices]
            choices = gathered(passes, program, context, Store(folder), resources(program))
            levels_seconds = time.perf_counter() - started
        problem = choices.problem
        costs = problem.costs(problem.uniform(setting.uniform[0]))
        problem = dataclasses.replace(problem, limits={setting.resource: costs[setting.resource]})
        few, heldout = (StoredCandidates.keep(
            _made(folder / kind), "", program, program, choices, batches, 0, None, levels=folder
        ) for kind, batches in (
            ("few", context.needed_calibration("").first(_SAMPLES)),
            ("heldout", Batches(material.heldout, program).first(10**6)),
        ))  # fmt: skip
        judge = heldout.load()
        return [
            {"method": method, "levels_seconds": levels_seconds, **_row(method, setting, problem, few, judge, context)}
            for method in methods
        ]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
