"""`graphopt optimize`: from arguments to the call a user of Python would make.

What is cheap to check is checked first: a misspelt option should not cost the time of a capture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graphopt.api import choose_recipe
from graphopt.api import optimize as optimize_model
from graphopt.capture import capture
from graphopt.cli.named import load_function, load_model
from graphopt.cli.samples import SampleFile
from graphopt.cli.settings import Settings
from graphopt.files import check_replaceable
from graphopt.pipeline import target as target_by_name
from graphopt.progress import default_progress
from graphopt.result import Result
from graphopt.rundir import MARKER, RUN_FILES

DEFAULT_TARGET = "onnxruntime-cpu"


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    model: str
    output: Path
    recipe: str | None = None
    calibration: Path | None = None
    evaluate: str | None = None
    keep_float: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    trust: bool = False


def run(request: Request) -> Result:
    """Optimize and write the run directory; GraphoptError says what is wrong with the request."""
    check_replaceable(request.output, MARKER, RUN_FILES)
    settings = Settings.parse(request.settings)
    bounded = request.evaluate is not None and bool(settings.budget.bounds())
    recipe, notes = choose_recipe(request.recipe, request.calibration is not None, bounded)
    recipe = settings.applied(recipe.keeping_float(request.keep_float))
    target = target_by_name(settings.target or DEFAULT_TARGET)
    samples = SampleFile.open(request.calibration) if request.calibration is not None else None
    evaluate = load_function(request.evaluate, "--evaluate") if request.evaluate is not None else None
    named = load_model(request.model)
    progress = default_progress()
    with progress.stage("capture"):
        program = capture(named.model, named.example_inputs, dynamic_shapes=named.dynamic_shapes, trust=request.trust)
    calibration = samples.batches(program) if samples is not None else None
    program.notes += [*notes, *(calibration.notes if calibration is not None else ())]
    return optimize_model(
        program,
        recipe=recipe,
        calibration=calibration,
        evaluate=evaluate,
        budget=settings.budget,
        target=target,
        run_dir=request.output,
        seed=settings.seed,
        progress=progress,
    )
