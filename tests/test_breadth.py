"""Every kind of model becomes a file that ONNX Runtime loads and runs, on integers or with the reason why not.

`python tests/test_breadth.py` writes docs/models.md, the table of all of them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from breadth import KINDS
from torch import Tensor
from torch.utils import _pytree as pytree

import graphopt
from graphopt.backend import ExportReport
from graphopt.backends.onnx.backend import OnnxBackend
from graphopt.backends.onnx.compare import sqnr_db
from graphopt.ir import operator

RECIPES = ("int8_static", "int8_dynamic")
ANCHORS = ("linear", "conv1d", "conv2d", "conv3d")
TABLE = Path(__file__).parents[1] / "docs" / "models.md"
ZOO = [name for name, entry in zoo.MODELS.items() if not entry.refused]
# Whole numbers decide here, which experts a token goes to: rounding can change the decision, not the computation.
ROUTED = {"Mixtral"}


@dataclass
class Written:
    """A model as a file: what was optimized, what the export says, and whether other sizes were tried."""

    result: graphopt.Result
    report: ExportReport
    second: Any

    @property
    def floats(self) -> list[tuple[str, str]]:
        """(node, reason) of convolutions and linears that stay float."""
        kept = {
            node.name
            for node in self.result.program.graph.nodes
            if operator(node) in ANCHORS and operator(node.args[0]) != "graphopt.dequantize"
        }
        reasons = {site.node: site.reason for record in self.result.trace for site in record.skipped}
        return [(name, reasons.get(name, "")) for name in sorted(kept)]


def write(name: str, recipe: str, folder: Path, measured: bool = False) -> Written:
    """Optimize one of KINDS or of the zoo and export it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in KINDS:
            kind = KINDS[name]
            model, shapes = kind.make().eval(), kind.dynamic_shapes
            batches = [kind.inputs(2, 9, seed) for seed in range(1, 4)]
            second = kind.inputs(3, 14, 9) if shapes else None
        else:
            entry = zoo.MODELS[name]
            (model, inputs), shapes = entry.build(), entry.dynamic_shapes
            batches, second = [inputs], entry.second_inputs() if shapes else None
    result = graphopt.optimize(
        model,
        batches[0],
        recipe=recipe,
        calibration=None if recipe == "int8_dynamic" else batches,
        dynamic_shapes=shapes,
    )
    return Written(result, result.export(folder / f"{name}.onnx", measure=measured), second)


def check(name: str, written: Written) -> None:
    """Nothing is lost on the way, at either size, and what stays float says why."""
    report, result = written.report, written.result
    assert report.sqnr_db is not None and report.max_steps is not None
    assert report.sqnr_db >= (KINDS[name].sqnr_db if name in KINDS else 0.0 if name in ROUTED else 12.0)
    if name not in ROUTED:
        # Of an output without a scale a step is 1/255 of its range; one value rounded the other way upstream grows on
        # its way through a model whose random weights amplify.
        assert report.max_steps <= 10
    if written.second is not None:
        for made, exact in zip(_run(report.path, written.second), _outputs(result(**written.second)), strict=True):
            assert made.shape == exact.shape
            close = np.abs(made - exact).max() <= 0.03 * max(np.abs(exact).max(), 1e-6)
            # A model of random weights that amplifies each rounding may differ by a tenth of what quantizing does.
            amplifies = report.sqnr_db < 16
            assert name in ROUTED or close or (amplifies and sqnr_db(exact, made) >= report.sqnr_db + 10)
    assert all(reason for _, reason in written.floats), written.floats
    assert sum(report.fused.values()) > 0 or written.floats


def _outputs(value: Any) -> list[Any]:
    tensors = [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]
    return [each.detach().float().numpy().astype(np.float64) for each in tensors]


def _run(path: Path, inputs: Any) -> Iterator[Any]:
    for value in OnnxBackend().run(path, pytree.tree_leaves(inputs)):
        yield np.asarray(value, dtype=np.float64)


@pytest.mark.parametrize("recipe", ["int8_static", pytest.param("int8_dynamic", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_becomes_a_file(name: str, recipe: str, tmp_path: Path) -> None:
    check(name, write(name, recipe, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ZOO)
def test_a_model_of_the_zoo_becomes_a_file(name: str, recipe: str, tmp_path: Path) -> None:
    check(name, write(name, recipe, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KINDS, *ZOO])
def test_the_measured_recipe_takes_it_too(name: str, tmp_path: Path) -> None:
    written = write(name, "int8", tmp_path)
    assert written.report.sqnr_db is not None and written.report.sqnr_db >= (0 if name in ROUTED else 12)
    assert all(reason for _, reason in written.floats), written.floats


@pytest.mark.parametrize("name", ["lstm", "detector"])
def test_the_measured_recipe_takes_some_of_them(name: str, tmp_path: Path) -> None:
    written = write(name, "int8", tmp_path)
    assert written.report.sqnr_db is not None and written.report.sqnr_db >= KINDS[name].sqnr_db


def test_recurrence_stays_float_and_says_so(tmp_path: Path) -> None:
    written = write("lstm", "int8_static", tmp_path)
    recurrent = [node for node in written.result.program.graph.nodes if operator(node) == "lstm"]
    assert recurrent and sum(written.report.fused.values()) >= 2


def table() -> str:
    """The table of all models as Markdown."""
    lines = [
        "# Models as int8 files",
        "",
        "Small models of each kind in ONNX Runtime, by `python tests/test_breadth.py`. Integer: kernels that compute",
        "on integers, data movement among them. Float: convolutions and linears that stay float. Random weights.",
        "",
        "| model | recipe | integer | float | SQNR dB | other sizes | why float |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in (*KINDS, *ZOO):
            for recipe in RECIPES:
                written = write(name, recipe, Path(folder))
                check(name, written)
                reasons = list(dict.fromkeys(reason for _, reason in written.floats))
                sizes = "yes" if written.second is not None else "fixed"
                cells = [name, recipe, str(sum(written.report.fused.values())), str(len(written.floats))]
                cells += [f"{written.report.sqnr_db:.0f}", sizes, "; ".join(reasons[:2])]
                lines.append("| " + " | ".join(cells) + " |")
                print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    TABLE.write_text(table())
