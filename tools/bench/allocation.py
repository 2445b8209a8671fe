#!/usr/bin/env python3
"""What levels chosen under a budget gain over uniform ones, and over other ways to choose.

    tools/bench/allocation.py --list
    tools/bench/allocation.py                                       every row; an hour
    tools/bench/allocation.py --setting NAME --method EvoPress      some of them
    tools/bench/allocation.py --speed                               the solver, and two processes beside one
    tools/bench/allocation.py --docs docs/allocation.md             write the tables of what was measured last, and draw
                                                                    the pictures of docs/search.md

Every row chooses among the same levels, computed once, at what a uniform level costs; candidates are put together from
them and judged on held-out data by their divergence from the original. `evaluations` counts candidates judged on all of
the calibration data, trying units alone included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records
from environments import ROOT, python_of
from rows import measure_row

RESULTS = ROOT / "runs" / "bench" / "allocation.jsonl"
IMAGES = ("digits_cnn", "digits_depthwise", "digits_vit")
_SAMPLES, _EVALUATIONS = 32, 50
_GROUP_SIZE = 64  # of peers; what our levels have anyway
_TOTAL = 150  # evaluations of EvoPress: no less than the others take, units tried alone included


@dataclass(frozen=True)
class Setting:
    """A table: what may be chosen on a task, and which uniform level says how much it may cost.

    Attributes:
        choices: passes that offer levels. resource: what is bounded. uniform: the level to compare with, the best that
            everything can be at. times: what it costs, times this, is the bound. peers: peers choose, too; they take
            the linears of a decoder, and a bound that is `uniform` itself.
    """

    name: str
    task: str
    choices: tuple[str, ...]
    resource: str
    uniform: str
    times: float = 1.0
    peers: bool = False

    @property
    def methods(self) -> list[str]:
        return [each for each in METHODS if self.peers or each not in PEERS]


_LANGUAGE = "quantize_weights(levels=['int8', 'int6', 'int4', 'int3', 'int2'])"
_MIXED = "quantize_weights(levels=['int8', 'int4'])"
_LOW = "quantize_weights(levels=['int4', 'int3', 'int2', 'ternary'])"
_LAYERS, _BRANCHES = "drop_blocks", "drop_blocks(unit='branches')"
_DROPS = {"bits alone": (_LOW,), "layers and bits": (_LAYERS, _LOW), "branches and bits": (_BRANCHES, _LOW)}
SETTINGS = (
    Setting("language, 3 bits", "language", (_LANGUAGE,), "bits", "int3", peers=True),
    *(
        Setting(f"8 layers, {what}{less}", "language_deep", choices, "bits", "ternary", times)
        for less, times in (("", 1.0), (", 0.85 times the bits of ternary", 0.85))
        for what, choices in _DROPS.items()
        if times == 1 or len(choices) > 1  # below, bits alone cannot get
    ),
    *(Setting(f"{task}, 1.5 times the bytes of int4", task, (_MIXED,), "size_bytes", "int4", 1.5) for task in IMAGES),
)
PEERS = {  # name: environment, method of children/choose_bits.py
    "AutoRound AutoScheme": ("autoround", "scheme"),
    "AutoQuantize, gradients": ("modelopt", "gradient"),
    "AutoQuantize, divergence": ("modelopt", "divergence"),
}
METHODS: dict[str, tuple[Any, Any] | None] = {  # name: solver, estimate
    "uniform": None,
    "random": ("random", "divergence"),
    "sqnr, integer program": ("integer", "sqnr"),
    "fisher, integer program": ("integer", "fisher"),
    "hessian, greedy": ("greedy", "hessian"),
    "hessian, integer program": ("integer", "hessian"),
    "measured losses, integer program": ("integer", "divergence"),
    "with pairs, integer program": ("integer", "interaction"),
    "with pairs, evolution": ("evolution", "interaction"),
    "EvoPress": None,
    **dict.fromkeys(PEERS),
}


def measure(setting: Setting, methods: list[str]) -> list[dict[str, Any]]:
    """Return the figures of each method, cheapest uniform first; runs in a process of its own."""
    import torch
    from tasks import TASKS, deep_language

    import graphopt
    from graphopt.analysis import resources
    from graphopt.calibration import Batches
    from graphopt.calibration.judge import Judge
    from graphopt.pipeline import Context, builtin, parse_pass
    from graphopt.pipeline import target as target_by_name
    from graphopt.search import Assembler, Store, StoredCandidates, gathered

    material = deep_language() if setting.task == "language_deep" else TASKS[setting.task].make()
    exact = [*builtin("exact").passes, parse_pass("retype_floats")]
    program = graphopt.optimize(material.model, material.example_inputs, recipe=exact).program
    context = Context(target_by_name("onnxruntime-cpu"), Batches(material.calibration, program), original=program)
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as name:
        folder, started = Path(name), time.perf_counter()
        with torch.no_grad():
            passes = [parse_pass(each) for each in setting.choices]
            choices = gathered(passes, program, context, Store(folder), resources(program))
        seconds = time.perf_counter() - started
        limit = setting.times * choices.problem.costs(choices.problem.uniform(setting.uniform))[setting.resource]
        problem = dataclasses.replace(choices.problem, limits={setting.resource: limit})
        few = context.needed_calibration("").first(_SAMPLES)
        kept = StoredCandidates.keep(folder, "", program, program, choices, few, 0, None)
        assembler = Assembler(program, choices, Store(folder))
        judge = Judge(program, Batches(material.heldout, program), 10**6)
        rows = []
        for method in methods:
            chosen = _chosen(setting, method, problem, kept, program, assembler, material)
            figures = {"levels_seconds": seconds, **chosen}
            made = assembler(tuple(figures["assignment"]))
            figures |= {"heldout": judge(made), "over": figures["costs"][setting.resource] > 1.0001 * limit}
            rows.append({"method": method, **figures})
    return rows


def _chosen(
    setting: Setting, method: str, problem: Any, kept: Any, program: Any, assembler: Any, material: Any
) -> dict[str, Any]:
    from evopress import evolve

    from graphopt.search import Evaluator, Search, curvature, singles_of

    store = assembler.store
    evaluator = Evaluator(problem, kept)

    def others(estimate: str) -> dict[tuple[int, int], float]:
        if estimate not in ("hessian", "fisher", "sqnr"):
            return {}
        changes = {key: assembler.choices.weights_of(*key, store) for key in singles_of(problem)}
        changes = {key: each for key, each in changes.items() if each}
        if estimate == "sqnr":
            return curvature.sqnr(program, changes)
        by = curvature.hessian if estimate == "hessian" else curvature.fisher
        return by(program, changes, _batches(kept)[:8], None, 0)

    started = time.perf_counter()
    facts: dict[str, Any] = {}
    if method == "uniform":
        best = problem.uniform(setting.uniform)
    elif method == "EvoPress":
        start = problem.uniform(setting.uniform)
        best = evolve(evaluator, start, _TOTAL, setting.resource, 0)
    elif method in PEERS:
        best = _by_peer(method, problem, setting.uniform, material)
    else:
        solver, estimate = METHODS[method]  # type: ignore[misc]
        search = Search(evaluator, solver, estimate, others, _EVALUATIONS, compare=("sqnr", "fisher", "hessian"))
        model = search.estimated()
        front = search.solved(model)
        search.correlate(model, front)
        best, facts = min(front, key=lambda each: each.loss).assignment, search.facts["correlations"]
    seconds = time.perf_counter() - started
    (loss,) = evaluator.losses([best])
    return {
        "assignment": list(best), "loss": loss, "seconds": seconds,
        "evaluations": evaluator.evaluated / evaluator.pieces, "correlations": facts,
        "costs": problem.costs(best), "overhead": 1 - evaluator.busy / max(seconds, 1e-9),
    }  # fmt: skip


def _by_peer(method: str, problem: Any, uniform: str, material: Any) -> tuple[int, ...]:
    """Return the assignment with the bits that a peer gives to each linear of a decoder."""
    import torch
    from language.names import transformers_names, transformers_sizes
    from safetensors.torch import save_file

    environment, name = PEERS[method]
    names = transformers_names(material.model.shape)
    weights = {names[each]: value.detach().clone() for each, value in material.model.state_dict().items()}
    weights["calibration"] = torch.cat([inputs[0] for inputs in material.calibration])
    levels = [level.name for level in problem.units[0].levels[1:]]
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as made:
        folder = Path(made)
        save_file(weights, folder / "weights")
        job = {
            "weights": str(folder / "weights"), "result": str(folder / "result.json"), "method": name,
            "sizes": transformers_sizes(material.model.shape), "widths": [int(each[3:]) for each in levels],
            "group_size": _GROUP_SIZE, "average_bits": float(uniform[3:]),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        child = Path(__file__).parent / "children" / "choose_bits.py"
        command: list[str | Path] = [python_of(environment), "-P", child, folder / "job.json"]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
        bits = json.loads((folder / "result.json").read_text())["bits"]
    chosen = [bits.get(names[unit.name].removesuffix(".weight"), 16) for unit in problem.units]
    return tuple(0 if each == 16 else 1 + levels.index(f"int{each}") for each in chosen)


def speed() -> dict[str, Any]:
    """Return the time of a large integer program, and of evaluations in one process and in two; runs alone.

    A process has one thread, and the search is long enough that the seconds in which processes start do not decide.
    Overhead is what the search takes besides evaluations, the levels, estimates by gradients and, at the end, the
    passes that make what was chosen.
    """
    import numpy as np
    import torch
    from tasks import TASKS

    import graphopt
    from graphopt.passes import Allocate
    from graphopt.pipeline import builtin
    from graphopt.search import Level, Problem, Unit, integer_program

    torch.set_num_threads(1)
    rng, bits = np.random.default_rng(0), (16, 8, 6, 4, 3, 2)
    sizes = rng.choice([1e5, 4e5, 1e6, 3e6], 10_000)
    units = tuple(
        Unit(str(at), tuple(Level(str(each), {"size_bytes": size * each / 8}) for each in bits))
        for at, size in enumerate(sizes)
    )
    losses = [[0.0, *(float(rng.lognormal() * 4.0**-each) for each in bits[1:])] for _ in units]
    started = time.perf_counter()
    integer_program(Problem(units, {"size_bytes": float(sizes.sum() * 3.3 / 8)}), losses)
    figures: dict[str, Any] = {"program_seconds": time.perf_counter() - started}
    material = TASKS["language"].make()
    for workers in (1, 2):
        allocate = Allocate(choices=(_LANGUAGE,), workers=workers, evaluations=150, compare=())
        result = graphopt.optimize(
            material.model, material.example_inputs, [*builtin("exact").passes, allocate],
            calibration=material.calibration, budget=graphopt.Budget(average_bits=4),
        )  # fmt: skip
        figures[f"{workers} processes"] = result.trace["allocate"].facts["seconds"]
    one, two = (figures[f"{workers} processes"] for workers in (1, 2))
    figures["evaluations, two over one"] = one["evaluations"] / two["evaluations"]
    figures["overhead"] = 1 - sum(one[part] for part in ("evaluations", "levels", "estimates", "making")) / one["all"]
    return figures


def _batches(kept: Any) -> Any:
    import torch

    return torch.load(kept.folder / "data.pt", weights_only=True)["batches"]


def run(names: list[str], methods: list[str] | None) -> None:
    """Measure settings one after the other, each in a process of its own; rows are written when a setting is done."""
    for name in names:
        setting = next(each for each in SETTINGS if each.name == name)
        known = [each for each in setting.methods if methods is None or each in ("uniform", *methods)]
        measure_row(__file__, RESULTS, [name, known], task=name)


def tables() -> str:
    """Return the tables of the newest record of each setting."""
    newest = {record["task"]: record for record in records.read(RESULTS)}
    text = [
        "# Levels chosen under a budget", "",
        "Written by `tools/bench/allocation.py --docs`. All rows of a table choose among the same levels, computed",
        "once, under the same bound. Loss is the divergence from the original on the calibration data that a search",
        "sees, and on held-out data; evaluations count candidates judged on all of the former. Peers choose by their",
        "own estimates, of the model that they round themselves.",
    ]  # fmt: skip
    for setting in SETTINGS:
        record = newest.get(setting.name)
        if record is None:
            continue
        text += ["", f"## {setting.name}", ""]
        if "figures" not in record:
            text.append(record["error"][0])
            continue
        rows = record["figures"]
        uniform = next(row for row in rows if row["method"] == "uniform")
        text += ["| method | loss | held out | over uniform | evaluations | seconds |"]
        text += ["|---|---:|---:|---:|---:|---:|"]
        for row in rows:
            ratio = row["heldout"] / uniform["heldout"]
            name = row["method"] + (" (beyond the bound)" if row.get("over") else "")
            cells = [name, f"{row['loss']:.3g}", f"{row['heldout']:.3g}", f"{ratio:.2f}"]
            text.append("| " + " | ".join([*cells, f"{row['evaluations']:.0f}", f"{row['seconds']:.0f}"]) + " |")
        text += ["", f"Levels took {uniform['levels_seconds']:.0f} s. {record['date']}, commit {record['commit']}."]
        told = next((row["correlations"] for row in rows if row["method"] == "with pairs, evolution"), None)
        if told:
            text += ["", "How estimates follow the true losses (rank correlation, that of logarithms): " + "; ".join(
                f"{name} {each['rank']}, {each['logarithm']}" for name, each in told.items()
            ) + "."]  # fmt: skip
    return "\n".join(text) + "\n"


def main() -> None:
    known = [setting.name for setting in SETTINGS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name settings and methods and leave")
    parser.add_argument("--setting", nargs="+", choices=known, default=known)
    parser.add_argument("--method", nargs="+", choices=list(METHODS), help="uniform comes along")
    parser.add_argument("--speed", action="store_true", help="time the solver and processes instead; run it alone")
    parser.add_argument("--docs", type=Path, help="write tables and pictures, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, methods = json.loads(given.child)
        setting = next(each for each in SETTINGS if each.name == name)
        print(json.dumps(measure(setting, methods)))
    elif given.speed:
        print(json.dumps(speed(), indent=1))
    elif given.list:
        print("\n".join([*known, "", *METHODS]))
    elif given.docs:
        if not RESULTS.exists():
            parser.error(f"nothing was measured yet: {RESULTS} is not there; run without --docs first")
        given.docs.write_text(tables())
        subprocess.run([sys.executable, ROOT / "tools" / "draw_search.py"], check=True)
    else:
        run(given.setting, given.method)


if __name__ == "__main__":
    main()
