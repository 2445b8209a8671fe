"""The commands and their options. Each is a few lines: the calls that a user of Python makes do the work.

typer, because it derives parsing, checking and help from the types below; click underneath does the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BEYOND = 3  # exit status of a comparison with a bound that does not hold

app = typer.Typer(
    name="graphopt",
    help="An optimizing compiler for neural networks: PyTorch in; smaller, faster, verified ONNX out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from graphopt.report.report import graphopt_version

        print(f"graphopt {graphopt_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces.")] = False,
) -> None:
    """Options of every command."""


@app.command()
def optimize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="package.module:factory, which returns a module, or a module and its example inputs "
            "(and dynamic shapes); or a .pt2 file.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN_DIR", help="Folder to write the run to.")],
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Built-in recipe, or a YAML file. Default: int8 with data."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="One array per input name, axis 0 = samples.")
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="The metric: function(model) -> float, higher is better."),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Node, weight or module names that no pass quantizes. Repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="target, seed, budget.FIELD or PASS.FIELD. Repeatable."),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Allow unpickling a .pt2; this runs code from the file.")
    ] = False,
) -> None:
    """Optimize a model and write a run directory.

    It holds model.onnx, model.pt2, recipe.yaml, report.json, report.html and trace/.
    """
    from graphopt.cli import console
    from graphopt.cli.optimize import Request, run

    request = Request(
        model,
        output,
        recipe,
        calibration,
        evaluate,
        tuple(keep_float or ()),
        tuple(set_ or ()),
        trust,
    )
    console.show(run(request).report)
    console.paths(output)


@app.command()
def inspect(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A folder that graphopt wrote.")],
    pass_: Annotated[
        str | None,
        typer.Option("--pass", metavar="NAME|NUMBER", help="Show this pass: its diff and what it skipped."),
    ] = None,
    why: Annotated[
        str | None,
        typer.Option(metavar="NODE|SPACE", help="Tell the story of this operator, weight, module or space."),
    ] = None,
    bisect: Annotated[
        str | None,
        typer.Option(
            metavar="QUANTITY=BOUND",
            help="Find the first pass beyond error=1e-5, sqnr=30 (dB) or metric=98.5; the last runs the passes again.",
        ),
    ] = None,
    causes: Annotated[
        bool,
        typer.Option(
            "--causes",
            help="Tell where the error comes from, place by place; with --model, measure it again, on --calibration.",
        ),
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(metavar="MODEL.onnx", help="For --causes: look at this file instead of the run's own."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="For --causes and --bisect metric=...: what was optimized.")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="For --bisect metric=...: the metric.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="For the same: what the passes were given.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Allow unpickling a .pt2; this runs code from the file.")
    ] = False,
) -> None:
    """Show what a run did, what one pass did, the story of one place, where an error came in, or what causes it."""
    from graphopt.cli import console
    from graphopt.cli import inspect as views
    from graphopt.errors import GraphoptError
    from graphopt.report import Report

    if sum(bool(each) for each in (pass_, why, bisect, causes)) > 1:
        raise GraphoptError("give one of --pass, --why, --bisect and --causes")
    if (file or (causes and calibration)) and not (causes and model):
        raise GraphoptError("--file and --calibration are for --causes --model MODEL: give these too")
    report = Report.read(run_dir)
    if pass_ is not None:
        view = views.one_pass(report, pass_)
    elif why is not None:
        view = views.why(report, why)
    elif bisect is not None:
        replay = views.Replay(model, evaluate, calibration, trust, report.target) if model and evaluate else None
        view = views.first_beyond(report, bisect, replay)
    elif causes:
        measured = views.measured_causes(run_dir, model, calibration, file, trust) if model else None
        view = views.where_from(measured or report.causes)
    else:
        view = views.whole(report)
    if as_json:
        console.data(view.data)
    else:
        console.show(*view.parts)


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx|RUN_DIR", help="What to time.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="OTHER.onnx|RUN_DIR", help="Time this too, in turns with the first."),
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="Backend that runs the file.")] = "onnx",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    runtime: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run and time it there too and compare outputs: openvino."),
    ] = None,
) -> None:
    """Time a model in its runtime and show where the time goes."""
    from graphopt.cli.bench import bench_text

    print(bench_text(model, against, backend, threads, runtime or ()), end="")


@app.command()
def diff(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B")],
    max_: Annotated[
        list[str] | None,
        typer.Option(
            "--max",
            metavar="NAME=NUMBER",
            help="End with status 3 where B beside A has more: metric_drop, size_ratio, latency_ratio, macs_ratio, "
            "params_ratio or sqnr_drop (dB). Repeatable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Compare two runs.

    Recipe, sizes, metric, errors and latency, where passes decided otherwise, and what differs pass by pass.
    """
    from graphopt.cli import console
    from graphopt.cli.difference import difference

    found = difference(run_a, run_b, max_ or ())
    if as_json:
        console.data(found.data)
    else:
        console.show(*found.parts)
    if found.exceeded:
        raise typer.Exit(BEYOND)


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this pass.")] = None,
) -> None:
    """List the passes, or describe one and its options."""
    from graphopt.cli.show import pass_help, passes_text

    print(passes_text() if name is None else pass_help(name), end="")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe.")] = None,
) -> None:
    """List the recipes, or print one as YAML."""
    from graphopt.cli.show import recipes_text
    from graphopt.pipeline import builtin

    print(recipes_text() if name is None else builtin(name).to_yaml(), end="")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="RUN_DIR", help="Folder to write the run to.")
    ] = Path("runs/demo"),
) -> None:
    """Train a small CNN on real data and optimize it.

    A residual CNN on scikit-learn's digits, to int8; it prints accuracy, size and latency of both.
    """
    from graphopt.cli.demo import run

    run(output)
