#!/usr/bin/env python3
"""What the HTML report of a large run costs: writing it, its size, and how fast it answers in a browser.

    tools/bench/report.py                         ResNet-50 and a decoder of 24 layers, to int8; five minutes
    tools/bench/report.py --docs docs/report.md   write the table of what was measured last

Times in the browser are medians of five loads in headless Chromium. The share of the trace is what describing programs
takes of the time of the passes, with everything that the records hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
from environments import ROOT
from rows import measure_row

RESULTS = ROOT / "runs" / "bench" / "report.jsonl"
MODELS = ("ResNet-50", "decoder of 24 layers")
_LOADS = 5


def material(name: str) -> tuple[Any, Any, list[Any]]:
    """Return a model with random weights, example inputs and calibration data."""
    import torch

    if name == "ResNet-50":
        from tasks import TASKS

        made = TASKS["resnet50"].make()
        return made.model, made.example_inputs, made.calibration[:16]
    from language.model import LanguageModel, Shape

    torch.manual_seed(0)
    tokens = [(torch.randint(256, (1, 128)),) for _ in range(16)]
    return LanguageModel(Shape(layers=24)).eval(), tokens[0], tokens


def measure(name: str) -> dict[str, Any]:
    """Return the figures of one model's report; runs in a process of its own."""
    import graphopt
    from graphopt.pipeline import manager

    spent = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*given)
            finally:
                spent[0] += time.perf_counter() - started

        return run

    for each in ("program_text", "_describe"):
        setattr(manager, each, timed(getattr(manager, each)))
    model, inputs, calibration = material(name)
    started = time.perf_counter()
    result = graphopt.optimize(model, inputs, "int8", calibration=calibration)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder:
        path = Path(folder) / "report.html"
        result.export(Path(folder) / "model.onnx", measure=False)
        started = time.perf_counter()
        causes = result.explain()
        explained = time.perf_counter() - started
        assert causes is not None
        started = time.perf_counter()
        result.report.save_html(path)
        written = time.perf_counter() - started
        return {
            "nodes": result.trace[-1].nodes, "passes": len(result.trace), "run_seconds": seconds,
            "trace_share": spent[0] / seconds, "causes_seconds": explained, "sites": len(causes.sites),
            "write_seconds": written, "bytes": path.stat().st_size, **browsed(path),
        }  # fmt: skip


def browsed(path: Path) -> dict[str, float]:
    """Return milliseconds until the explorer shows a diff, of a pass chosen, and of a search."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((found for each in names if (found := shutil.which(each))), None)
    loads, passes, searches = [], [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=executable, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        for _ in range(_LOADS):
            page = browser.new_page()
            started = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector("#pass-diff tr")
            loads.append(1e3 * (time.perf_counter() - started))
            passes.append(page.evaluate(_TIMED % "document.querySelector('#pass-list li:last-child button').click()"))
            page.evaluate("document.getElementById('search').value = 'conv'")
            asked = "document.getElementById('search').dispatchEvent(new Event('input'))"
            searches.append(page.evaluate(_TIMED % asked))
            page.close()
        browser.close()
    return {
        "interactive_ms": statistics.median(loads), "pass_ms": statistics.median(passes),
        "search_ms": statistics.median(searches),
    }  # fmt: skip


# What an action takes with the layout that it causes.
_TIMED = """(() => {
  const started = performance.now(); %s; document.body.getBoundingClientRect();
  return performance.now() - started;
})()"""


def table() -> str:
    """Return the newest record of each model."""
    newest = {record["task"]: record for record in records.read(RESULTS)}
    text = [
        "# The report of a large run", "",
        "Written by `tools/bench/report.py --docs`. Interactive: from opening the file until a diff is shown, in",
        "headless Chromium; a pass: until the diff of another one is laid out; search: until the places found are. The",
        "trace's share is of the time of the run. Root causes: of all places that are quantized, in torch and in ONNX",
        "Runtime, with the remedies that are tried.", "",
        "| model | operators | passes | run | trace's share | places | root causes | written in | size | interactive "
        "| a pass | search |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name in MODELS:
        if (record := newest.get(name)) is None:
            continue
        if "figures" not in record:
            text.append(f"| {name} | {record['error'][0]} |")
            continue
        each = record["figures"]
        cells = [
            name, str(each["nodes"]), str(each["passes"]), f"{each['run_seconds']:.0f} s",
            f"{each['trace_share']:.1%}", str(each["sites"]), f"{each['causes_seconds']:.1f} s",
            f"{each['write_seconds']:.2f} s", f"{each['bytes'] / 1e6:.2f} MB", f"{each['interactive_ms']:.0f} ms",
            f"{each['pass_ms']:.0f} ms", f"{each['search_ms']:.0f} ms",
        ]  # fmt: skip
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--docs", type=Path, help="write the table of what was measured last, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(json.loads(given.child)[0])))
    elif given.docs:
        if not RESULTS.exists():
            parser.error(f"nothing was measured yet: {RESULTS} is not there; run without --docs first")
        given.docs.write_text(table())
    else:
        for name in given.model:
            measure_row(__file__, RESULTS, [name], task=name)


if __name__ == "__main__":
    main()
