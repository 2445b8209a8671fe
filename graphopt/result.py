"""Result: the optimized program with everything that is known about how it came about."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.backend import ExportReport
from graphopt.budget import Budget
from graphopt.errors import GraphoptError
from graphopt.files import replacing_folder, write_text
from graphopt.ir.program import Program, ProgramModule
from graphopt.pipeline import Context, Recipe, Trace, backend, make_pass
from graphopt.pipeline.registry import UnknownPass, targets
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.report import Report

MARKER = "report.json"  # a folder that holds it is a run directory
RUN_FILES = frozenset(
    ("model.onnx", "model.onnx.data", "model.pt2", "recipe.yaml", MARKER, "report.html", "trace")
)  # and what else a run directory holds
_NO_FILE = "no model.onnx was written: "


@dataclass
class Result:
    """What `graphopt.optimize` returns.

    Attributes:
        program: the optimized program. original: as captured, None after `load`.
        trace: what every pass did. recipe: what was run. target: for what.
        notes: sentences about choices made on the way.
        metric, original_metric: of the user's `evaluate`, after and before.
        exported: the report of the last export.
    """

    program: Program
    original: Program | None
    trace: Trace
    recipe: Recipe
    target: Target
    budget: Budget = field(default_factory=Budget)
    notes: list[str] = field(default_factory=list)
    metric: float | None = None
    original_metric: float | None = None
    exported: ExportReport | None = None

    @functools.cached_property
    def module(self) -> ProgramModule:
        """The optimized model as an eval-mode `nn.Module` with the original's signature and outputs."""
        return self.program.module()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with the optimized numerics."""
        return self.module(*args, **kwargs)

    @property
    def report(self) -> Report:
        """Size, bits, errors and latency as known by now; the export adds its part."""
        from graphopt.report import Report

        return Report.of(self)

    def export(self, path: str | Path, measure: bool = True) -> ExportReport:
        """Write the program for its target, check the file, run it in the runtime and compare; see ExportReport.

        `measure=False` leaves out the latency comparison with the float export.
        """
        before = self.exported
        self.exported = backend(self.target.backend).export(self.program, Path(path), self._baseline(), measure)
        if self.original is None and before is not None and self.exported.baseline_size_bytes is None:
            # After `load` there is no float program to export again; its size is still what it was.
            self.exported.baseline_size_bytes = before.baseline_size_bytes
        return self.exported

    def _baseline(self) -> Program | None:
        """The captured program in a floating type that runtimes compute in: what the user would export without us."""
        if self.original is None:
            return None
        program = self.original.clone()
        make_pass("retype_floats").run(program, Context(self.target))
        return program

    def save(self, folder: str | Path) -> None:
        """Write the run directory, all or nothing: model.onnx and .pt2, recipe.yaml, report.json and .html, trace/.

        An older run directory is replaced as a whole, so it may hold nothing but these. Where the target has no form
        for the program, model.onnx is missing and the report says why.
        """
        with replacing_folder(Path(folder), MARKER, RUN_FILES) as temporary:
            self.notes = [note for note in self.notes if not note.startswith(_NO_FILE)]
            try:
                self.export(temporary / "model.onnx")
            except GraphoptError as error:
                if isinstance(error.__cause__, OSError):  # nor could anything else be written
                    raise
                self.exported = None
                self.notes.append(f"{_NO_FILE}{error}")
                for name in ("model.onnx", "model.onnx.data"):
                    (temporary / name).unlink(missing_ok=True)
            self.program.save(temporary / "model.pt2")
            write_text(temporary / "recipe.yaml", self.recipe.to_yaml())
            self.trace.save(temporary / "trace")
            if self.exported is not None:
                self.exported.path = Path(folder) / "model.onnx"
            report = self.report
            write_text(temporary / MARKER, report.to_json())
            report.save_html(temporary / "report.html")


def load(folder: str | Path, trust: bool = False) -> Result:
    """Read a run directory written by `Result.save`.

    A recipe or target that is not installed here does not keep the program from being read; a note says so.
    `trust=True` allows unpickling what its model.pt2 holds; see `Program.load`. Raises GraphoptError where something is
    missing or damaged.
    """
    from graphopt.report import Report

    root = Path(folder)
    if not (root / MARKER).is_file():
        raise GraphoptError(f"{root} is no run directory: it holds no {MARKER}")
    try:
        data = json.loads((root / MARKER).read_text(encoding="utf-8"))
        text = (root / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GraphoptError(f"the run directory {root} is damaged ({reason}); run the optimization again") from None
    report = Report.from_dict(data, source=str(root / MARKER))
    notes = []
    profile = targets().get(report.target)
    if profile is None:
        notes.append(f"the target {report.target!r} is not installed here: the model runs but cannot be exported")
        profile = Target(report.target, "none")
        data["target"] = ""
    try:
        recipe = Recipe.from_yaml(text, str(root / "recipe.yaml"))
    except UnknownPass as error:
        notes.append(f"the recipe cannot be run again here: {error}")
        recipe = Recipe(report.recipe, ())
    result = Result(Program.load(root / "model.pt2", trust=trust), None, Trace.load(root / "trace"), recipe, profile)
    Report.restore(data, result)
    result.notes += [note for note in notes if note not in result.notes]
    if result.exported is not None:
        result.exported.path = root / "model.onnx"  # wherever the folder stands now
    return result
