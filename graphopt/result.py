"""Result: the optimized program with everything that is known about how it came about."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.backend import ExportReport
from graphopt.budget import Budget
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError, NotExpressible, described
from graphopt.files import replacing_folder, write_text
from graphopt.ir.program import Program, ProgramModule
from graphopt.pipeline import Context, Recipe, Trace, backend, make_pass
from graphopt.pipeline.registry import UnknownPass, targets
from graphopt.progress import Progress, default_progress
from graphopt.rundir import MARKER, RUN_FILES, read_text
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.causes import Causes
    from graphopt.report import Report

_NO_FILE = "no model.onnx was written: "
_NO_CAUSES = "root causes are not known: "


@dataclass
class Result:
    """What `graphopt.optimize` returns.

    Attributes:
        program: the optimized program. original: as captured, None after `load`.
        trace: what every pass did. recipe: what was run. target: for what.
        notes: sentences about choices made on the way.
        metric, original_metric: of the user's `evaluate`, after and before.
        exported: the report of the last export.
        causes: where it loses what it loses; see `explain`. samples: calibration data that it is looked for on.
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
    causes: Causes | None = None
    samples: Batches | None = field(default=None, repr=False, compare=False)

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

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def export(self, path: str | Path, measure: bool = True) -> ExportReport:
        """Write the program for its target, check the file, run it in the runtime and compare; see ExportReport.

        `measure=False` leaves out the latency comparison with the float export. Raises NotExpressible where the target
        has no form for the program, and GraphoptError where anything else goes wrong.
        """
        if not self.target.backend:
            raise NotExpressible(f"the target {self.target.name!r} has no backend here that could write a file")
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

    def compile(self, backend_name: str = "cuda", **options: Any) -> Any:
        """Return a callable that runs the program by a backend's own kernels, in the place of the model.

        `options` are the backend's; of "cuda": `dtype`, `device`, `graphs` (see `CudaBackend.compile`). Raises
        GraphoptError where there is no such backend, or it only writes files.
        """
        chosen = backend(backend_name)
        if not hasattr(chosen, "compile"):
            raise GraphoptError(f"the backend {backend_name!r} writes files; use result.export(path)")
        try:
            inspect.signature(chosen.compile).bind(self.program, **options)
        except TypeError as error:
            raise GraphoptError(f"the backend {backend_name!r} does not take these options: {error}") from error
        return chosen.compile(self.program, **options)

    def explain(
        self,
        calibration: Iterable[Any] | None = None,
        file: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Causes | None:
        """Find where the result loses what it loses, and try what would help; None where nothing is quantized.

        Sites are looked at on the first rows of `calibration`, by default of the data that the passes were given, or
        on the example inputs; in the runtime too, as it computes `file`, by default that of the last export where it is
        still there. The report shows what was found. Raises GraphoptError where the captured model is not at hand
        (after `load`), the data does not fit or the file cannot be run.
        """
        from graphopt.causes import find_causes

        batches = self.samples if calibration is None else Batches(calibration, self.program)
        path = Path(file) if file is not None else self.exported.path if self.exported is not None else None
        if file is None and path is not None and not path.exists():
            path = None
        self.causes = find_causes(self, batches, path, progress or default_progress())
        return self.causes

    def save(self, folder: str | Path, progress: Progress | None = None) -> None:
        """Write the run directory, all or nothing: model.onnx and .pt2, recipe.yaml, report.json and .html, trace/.

        The report tells root causes (`explain`), which are looked for now if nobody did before.

        An older run directory is replaced as a whole, so it may hold nothing but these. Where the target has no form
        for the program, model.onnx is missing and the report says why. Raises GraphoptError where anything else goes
        wrong: nothing is written then, and an older run directory stays as it was.
        """
        exported, notes = self.exported, self.notes
        try:
            with replacing_folder(Path(folder), MARKER, RUN_FILES) as temporary:
                try:
                    self._write(temporary, Path(folder), progress)
                except GraphoptError as error:
                    reason = str(error).replace(str(temporary), str(folder))
                    raise GraphoptError(f"{reason}; the run was not saved to {folder}") from error
        except BaseException:
            self.exported, self.notes = exported, notes
            raise

    def _write(self, temporary: Path, final: Path, progress: Progress | None) -> None:
        """Write into `temporary`, a new folder, what will stand in `final`."""
        self.notes = [note for note in self.notes if not note.startswith((_NO_FILE, _NO_CAUSES))]
        try:
            self.export(temporary / "model.onnx")
        except NotExpressible as error:
            self.exported = None
            self.notes.append(_NO_FILE + str(error).replace(str(temporary), str(final)))
            for name in ("model.onnx", "model.onnx.data"):
                (temporary / name).unlink(missing_ok=True)
        if self.causes is None and self.original is not None:
            try:
                self.explain(progress=progress)
            except Exception as error:  # the model is good; only its explanation is missing
                self.notes.append(_NO_CAUSES + (str(error) if isinstance(error, GraphoptError) else described(error)))
        self.program.save(temporary / "model.pt2")
        write_text(temporary / "recipe.yaml", self.recipe.to_yaml())
        self.trace.save(temporary / "trace")
        if self.exported is not None:
            self.exported.path = final / "model.onnx"
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
    report = Report.read(root)
    text = read_text(root, "recipe.yaml")
    notes = []
    profile = targets().get(report.target)
    if profile is None:
        notes.append(f"the target {report.target!r} is not installed here: the model runs but cannot be exported")
        profile = Target(report.target, backend="")
    try:
        recipe = Recipe.from_yaml(text, str(root / "recipe.yaml"))
    except UnknownPass as error:
        notes.append(f"the recipe cannot be run again here: {error}")
        recipe = Recipe(report.recipe, ())
    result = Result(Program.load(root / "model.pt2", trust=trust), None, report.trace, recipe, profile)
    report.restore(result)
    result.notes += [note for note in notes if note not in result.notes]
    if result.exported is not None:
        result.exported.path = root / "model.onnx"  # wherever the folder stands now
    return result
