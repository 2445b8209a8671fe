"""`graphopt.optimize`: capture, choose a recipe, run it, measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graphopt.budget import Budget
from graphopt.calibration import Batches, check_source
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.files import check_replaceable
from graphopt.ir.program import Program
from graphopt.metric import rated
from graphopt.pipeline import Context, Pass, Recipe, as_recipe, backend, builtin, run_passes
from graphopt.pipeline import target as target_by_name
from graphopt.pipeline.journal import Journal
from graphopt.pipeline.manager import with_requirements
from graphopt.pipeline.unfinished import Unfinished, run_key
from graphopt.progress import Progress, default_progress
from graphopt.result import Result
from graphopt.rundir import MARKER, RUN_FILES
from graphopt.target import Target


def optimize(
    model: Any,
    example_inputs: Any = None,
    recipe: str | Path | Recipe | Sequence[Pass] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    budget: Budget | None = None,
    target: str | Target = "onnxruntime-cpu",
    dynamic_shapes: Any = None,
    run_dir: str | Path | None = None,
    seed: int = 0,
    trust: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Optimize a PyTorch model and explain how.

    Args:
        model: `nn.Module`, `fx.GraphModule`, `ExportedProgram`, the path of a `.pt2`, or a captured Program, which has
            its own `example_inputs` and `dynamic_shapes`. A module in training mode is captured as it is at inference.
        example_inputs: tuple of positional or dict of keyword tensors; None where the model says what it eats.
        recipe: built-in name, path of a YAML file, Recipe or list of passes. None takes `auto` where calibration data,
            a metric and a budget are given, `int8` where only data is, else `int8_dynamic`.
        calibration: iterable of inputs in the form of `example_inputs`; streamed, never held in memory.
        evaluate: `evaluate(module) -> float`, higher is better; called on the original and on the result.
        loss: `loss(module, batch) -> scalar`, for passes that need gradients.
        budget: what must hold; the report says what does not.
        target: name of a target profile, or a Target.
        dynamic_shapes: as `torch.export.export` takes it.
        run_dir: folder to write the run to, at the end and as a whole (as `Result.save` does). Until then a hidden
            folder beside it keeps the state: a run that was interrupted goes on when the same call is made again, and
            ends in the same files. The metric is called again: what it returns is not kept.
        seed: of every random choice, the metric's among them where it draws with torch.
        trust: allow unpickling what a `.pt2` holds.
        progress: where long work is shown; None draws bars on a terminal.

    Raises:
        GraphoptError: a mistake of the caller, in one sentence.
    """
    _check_arguments(model, example_inputs, dynamic_shapes, evaluate, loss, budget, seed)
    shown = progress or default_progress()
    profile = target if isinstance(target, Target) else target_by_name(str(target))
    chosen, notes = choose_recipe(recipe, calibration is not None, evaluate is not None and budget is not None)
    _check_needs(chosen, {"calibration": calibration, "evaluate": evaluate, "loss": loss})
    if calibration is not None:
        check_source(calibration)
    if run_dir is not None:
        check_replaceable(Path(run_dir), MARKER, RUN_FILES)
        if profile.backend:
            backend(profile.backend)  # it will be asked to write the file
    # What is made in inference mode cannot be changed outside of it, nor differentiated.
    with torch.inference_mode(False):
        with shown.stage("capture"):
            captured = isinstance(model, Program)
            program = model if captured else capture(model, example_inputs, dynamic_shapes=dynamic_shapes, trust=trust)
        batches = Batches(calibration, program) if calibration is not None else None
        if batches is not None:
            batches.first(1)
        unfinished = None
        if run_dir is not None:
            decides = (chosen.to_yaml(), profile, budget, seed, _named(evaluate), _named(loss), torch.__version__)
            unfinished = Unfinished(Path(run_dir), run_key(program, batches, version("graphopt"), *decides))
            notes += [unfinished.dropped] if unfinished.dropped else []
        context = Context(
            profile,
            batches,
            evaluate,
            loss,
            measure=getattr(backend(profile.backend), "profile", None) if profile.measurable else None,
            journal=unfinished.journal if unfinished is not None else Journal(),
            budget=budget or Budget(),
            seed=seed,
            progress=shown,
        )
        try:
            before = rated(evaluate, program, "the original model", seed, finite=True) if evaluate else None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                optimized, trace = run_passes(program, chosen.passes, context, unfinished=unfinished)
            after = rated(evaluate, optimized, "the optimized model", seed, finite=True) if evaluate else None
            notes = list(dict.fromkeys([*program.notes, *notes, *trace.notes]))
            result = Result(optimized, program, trace, chosen, profile, budget or Budget(), notes, after, before)
            result.samples = batches
            result.notes += [f"{record.key} was rejected: {record.rejected}" for record in trace if record.rejected]
            result.notes += [f"{record.key}: {step}" for record in trace for step in record.facts.get("path", ())]
            result.notes += [
                f"{record.key} changed nothing: {site.reason}"
                for record in trace
                for site in record.skipped
                if site.node == "program"
            ]
            if run_dir is not None:
                with shown.stage("export and measure"):
                    result.save(run_dir, progress=shown)
            if unfinished is not None:
                unfinished.finish()
        finally:
            if unfinished is not None:
                unfinished.close()
    return result


def _check_arguments(
    model: Any, example_inputs: Any, dynamic_shapes: Any, evaluate: Any, loss: Any, budget: Any, seed: Any
) -> None:
    """Refuse, before any work is done, what is not of the kind that `optimize` takes."""
    if isinstance(model, Program) and (example_inputs is not None or dynamic_shapes is not None):
        raise GraphoptError("a captured Program has its own example inputs and shapes; leave out those arguments")
    for name, value in (("evaluate", evaluate), ("loss", loss)):
        if value is not None and not callable(value):
            raise GraphoptError(f"{name} must be a function, not {type(value).__name__}")
    if budget is not None and not isinstance(budget, Budget):
        raise GraphoptError(f"budget must be a graphopt.Budget(...), not {type(budget).__name__}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise GraphoptError(f"seed must be a whole number of 64 bits, not {seed!r}")


def _named(function: Any) -> str:
    """Name a function in the key of a run; its code is not looked at."""
    return "" if function is None else f"{function.__module__}.{getattr(function, '__qualname__', type(function))}"


def choose_recipe(
    recipe: str | Path | Recipe | Sequence[Pass] | None, calibrated: bool, bounded: bool = False
) -> tuple[Recipe, list[str]]:
    """Return the recipe to run and sentences about the choice; `bounded`: there are a metric and a budget."""
    if recipe is None and calibrated and bounded:
        return builtin("auto"), ["recipe auto was chosen because calibration data, a metric and a budget were given"]
    if recipe is None:
        name = "int8" if calibrated else "int8_dynamic"
        why = "calibration data was given" if calibrated else "no calibration data was given"
        return builtin(name), [f"recipe {name} was chosen because {why}"]
    chosen = as_recipe(recipe)
    if recipe == "int8" and not calibrated:
        return builtin("int8_dynamic"), ["recipe int8 needs calibration data; int8_dynamic was run instead"]
    return chosen, []


def _check_needs(recipe: Recipe, given: Mapping[str, Any]) -> None:
    for each, inserted in with_requirements(recipe.passes):
        for need in sorted(each.needs):
            if given[need] is None:
                who = f"the pass {each.name}" + (f", which {inserted} requires," if inserted else "")
                raise GraphoptError(f"{who} needs {need}; pass {need}= to optimize")
