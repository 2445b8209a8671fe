#!/usr/bin/env python3
"""Take docs/pictures/report_*.png: the report of the demo network's int8 run, as Chromium shows it.

    tools/draw_report.py [--run RUN_DIR]      the report of a run that is there, instead of the demo's
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import graphopt
from graphopt import demo
from graphopt.report import Report

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def take(report: Path) -> None:
    """Write the pictures: a pass's diff, one place with its surroundings, and where the error comes from."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)  # None: playwright's own
    with sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=found, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(report.as_uri() + "#pass=fold_batch_norm")
        page.wait_for_selector("#pass-diff tr")
        page.screenshot(path=PICTURES / "report_diff.png")
        page.goto(report.as_uri() + "#pass=quantize_static&node=conv2d_1")
        page.wait_for_selector("#place:not([hidden])")
        page.locator("#place").screenshot(path=PICTURES / "report_place.png")
        page.locator("section[aria-labelledby=causes]").screenshot(path=PICTURES / "report_causes.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a run directory")
    run = parser.parse_args().run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        if run is not None:
            Report.read(run).save_html(path)
        else:
            model, inputs = demo.model()
            result = graphopt.optimize(model, inputs, "int8", calibration=demo.calibration())
            result.export(Path(folder) / "model.onnx")
            result.explain()
            result.report.save_html(path)
        take(path)


if __name__ == "__main__":
    main()
