"""What every transformation does to every model of the zoo, and whether it is exact there.

`judge(name, transformation)` is one place of the table; `python tests/transformations.py` judges all of them, prints
the table and writes what stands in `docs/zoo.md` and, for the tests to compare with, `tests/transformations.json`.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from zoo import CAPTURED, MODELS, built

import graphopt
from graphopt.calibration import Batches
from graphopt.ir import Program
from graphopt.ir.precision import retype
from graphopt.passes import (
    CenterNorms,
    Equalize,
    FoldBatchNorm,
    FoldLayerScale,
    FoldNormAffine,
    MergeLinears,
    Permute,
    Rotate,
    Smooth,
    SplitLinears,
)
from graphopt.pipeline import Context, Pass, make_pass
from graphopt.pipeline.validation import relative_error, resample, run_seeded
from graphopt.target import Target

TOLERANCE = 1e-9
GOLDEN = Path(__file__).with_name("transformations.json")

TRANSFORMATIONS: dict[str, tuple[str, tuple[Pass, ...]]] = {
    "fold": ("affines of norms into their readers", (FoldNormAffine(),)),
    "center": ("means of layer norms into the writers", (CenterNorms(),)),
    "scale": ("vectors behind branches into the linears before them", (FoldLayerScale(),)),
    "split": ("fused linears into their parts", (SplitLinears(),)),
    "merge": ("linears that read the same into one", (MergeLinears(),)),
    "equalize": ("channel ranges between layers", (FoldBatchNorm(), Equalize())),
    "smooth": ("channel ranges of activations into weights", (FoldBatchNorm(), Smooth())),
    "smooth explicit": (
        "the same, by a multiplication where nothing absorbs",
        (FoldBatchNorm(), Smooth(explicit=True)),
    ),
    "permute": ("channels in the order of their ranges", (FoldBatchNorm(), Permute(group_size=4))),
    "R1": ("residual spaces rotated", (FoldBatchNorm(), Rotate(values=False))),
    "R1 explicit": (
        "the same, with a linear behind norms in the way",
        (FoldBatchNorm(), Rotate(values=False, explicit=True)),
    ),
    "R2": ("spaces inside of branches rotated", (FoldBatchNorm(), Rotate(residual=False))),
    "R3": ("queries and keys transformed online", (Rotate(residual=False, values=False, queries_keys=True),)),
    "R4": ("hidden activations transformed online", (Rotate(residual=False, values=False, hidden=True),)),
    "all": (
        "all of them, one after the other",
        (
            FoldBatchNorm(),
            SplitLinears(),
            Equalize(),
            Smooth(),
            Permute(group_size=4),
            Rotate(queries_keys=True, hidden=True, explicit=True),
            MergeLinears(),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a transformation did to a model.

    Attributes:
        applied: places rewritten; of `all`, by all passes that are not only preparations.
        skipped: places declined. reasons: why, the most frequent first.
        error: the largest relative change of an output in float64, over two shapes of the inputs.
    """

    applied: int
    skipped: int
    reasons: tuple[str, ...]
    error: float


@functools.cache
def program_of(name: str) -> Program:
    """Capture a model of the zoo in float64, and canonicalize it."""
    model, inputs = built(name)
    return captured_wide(model, inputs, MODELS[name].dynamic_shapes)


def captured_wide(model: nn.Module, inputs: Any, dynamic_shapes: Any) -> Program:
    """Capture a model in float64, and canonicalize it."""
    double = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
    program = graphopt.capture(copy.deepcopy(model).double(), double, dynamic_shapes=dynamic_shapes)
    make_pass("canonicalize").run(program, Context(Target(name="none", backend="none")))
    return widened(program)


def widened(program: Program) -> Program:
    """Return the program in float64 throughout: what it casts to float32 itself would round what passes write there."""
    wide = retype(program, torch.float64)
    for node in wide.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            node.meta["val"] = value.double()
    return wide


def judge(name: str, transformation: str) -> Verdict:
    """Apply a transformation to a model of the zoo, with what it requires."""
    return judge_program(program_of(name), TRANSFORMATIONS[transformation][1])


def judge_program(before: Program, passes: tuple[Pass, ...]) -> Verdict:
    """Apply passes, and what they require, and compare at the example's shape and at another one.

    Counted are the places of the last pass; where there are several transformations, of all of them.
    """
    after = before.clone()
    shapes = [before.flat_example, resample(before, 1), resample(before, 2, resize=False)]
    done: set[Pass] = {make_pass("canonicalize")}
    counted = passes[-1:] if len(passes) < 3 else passes
    applied, skipped, reasons = 0, 0, Counter[str]()
    for pass_ in (each for named in passes for each in (*_required(named), named)):
        if pass_ in done:
            continue
        done.add(pass_)
        data = Batches([_unflattened(before, flat) for flat in shapes[::2]], before)
        with torch.no_grad():
            changes = pass_.run(after, Context(Target(name="none", backend="none"), calibration=data))
        if pass_ in counted:
            applied += len(changes.touched)
            skipped += len(changes.skipped)
            reasons.update(_general(site.reason) for site in changes.skipped)
    error = max(relative_error(run_seeded(after, flat), run_seeded(before, flat)) for flat in shapes)
    return Verdict(applied, skipped, tuple(reason for reason, _ in reasons.most_common()), error)


def _required(pass_: Pass) -> list[Pass]:
    found = []
    for name in pass_.requires:
        needed = make_pass(name)
        found += [*_required(needed), needed]
    return found


def _unflattened(program: Program, flat: list[Any]) -> Any:
    """Bring flat inputs into the form of the example's."""
    _, kwargs = program.example_inputs
    return dict(zip(kwargs, flat, strict=True)) if kwargs else tuple(flat)


def _general(reason: str) -> str:
    """Leave out of a reason which of many alike places it is about: numbers of layers and nodes, and figures."""
    reason = re.sub(r"\S+ (is in a good order): .*", r"\1", reason)
    return re.sub(r"\.\d+\b", ".N", re.sub(r"_\d+\b", "", reason))


def table(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    """Return the page that `docs/zoo.md` is."""
    lines = [
        "# What every transformation does to every model",
        "",
        "Written by `python tests/transformations.py`; `tools/test -m slow` checks every number of it. The models are",
        "tiny, their values drawn so that errors show; see `tests/zoo.py`. Each place says at how many sites the",
        "transformation was applied, or why it was not. All outputs are the same to "
        f"{TOLERANCE:g} relative in float64, at two shapes.",
        "",
    ]
    for key, (what, passes) in TRANSFORMATIONS.items():
        lines.append(f"- **{key}**: {what} (`{', '.join(map(str, passes))}`)")
    lines += ["", "| model | " + " | ".join(TRANSFORMATIONS) + " | largest error |"]
    lines += ["|---" * (len(TRANSFORMATIONS) + 2) + "|"]
    for name, entry in MODELS.items():
        if entry.refused:
            lines.append(f"| {name} | " + " | ".join("" for _ in TRANSFORMATIONS) + f" | refused: {entry.refused} |")
            continue
        cells = [_cell(verdicts[name][key]) for key in TRANSFORMATIONS]
        worst = max(verdict.error for verdict in verdicts[name].values())
        lines.append(f"| {name} | {' | '.join(cells)} | {worst:.0e} |")
    legend = "A number alone: applied there, nothing skipped. `5 (2)`: applied at 5, skipped at 2. `–`: no such place."
    lines += ["", legend, ""]
    lines += ["## Why places were skipped", ""]
    for name in CAPTURED:
        lines += [f"### {name}", ""]
        for key in TRANSFORMATIONS:
            for reason in verdicts[name][key].reasons if key != "all" else ():
                lines.append(f"- {key}: {_escaped(reason)}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(verdict: Verdict) -> str:
    if not verdict.applied and not verdict.skipped:
        return "–"
    return f"{verdict.applied} ({verdict.skipped})" if verdict.skipped else str(verdict.applied)


def _escaped(text: str) -> str:
    return re.sub(r"([_*<>|`\[\]])", r"\\\1", text)


def golden() -> dict[str, dict[str, int]]:
    """Return at how many places each transformation was applied when the table was made."""
    found: dict[str, dict[str, int]] = json.loads(GOLDEN.read_text())
    return found


def main() -> None:
    verdicts: dict[str, dict[str, Verdict]] = {}
    for name in CAPTURED:
        verdicts[name] = {key: judge(name, key) for key in TRANSFORMATIONS}
        print(f"{name:<12}", *(f"{key} {_cell(v)} {v.error:.0e};" for key, v in verdicts[name].items()), flush=True)
    counts = {name: {key: verdict.applied for key, verdict in each.items()} for name, each in verdicts.items()}
    GOLDEN.write_text(json.dumps(counts, indent=1) + "\n")
    docs = Path(__file__).parents[1] / "docs" / "zoo.md"
    docs.write_text(table(verdicts))
    print(f"wrote {docs.name} and {GOLDEN.name}")


if __name__ == "__main__":
    main()
