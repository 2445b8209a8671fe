#!/usr/bin/env python3
"""What equalization is worth: accuracy and speed in int8 of a depthwise CNN whose channel ranges are far apart.

    tools/bench/equalization.py            trains for some minutes, then prints the table
    tools/bench/equalization.py --epochs 1 a quick try

The network is trained on scikit-learn's scanned digits. Then each channel between two layers is scaled by 2^-5 to 2^5
and the next layer scales it back: the float function stays. Scales are one for each output channel of a weight and one
for each activation, as the runtime's integer kernels take them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from made.digits import trained_depthwise, unbalance
from made.kept import cache_folder

import graphopt
from graphopt.demo.task import calibration, evaluate
from graphopt.passes import Equalize, FoldBatchNorm, QuantizeStatic
from graphopt.pipeline import Pass

EXPORTS = 3  # of each file; latency is the median


def row(name: str, model: nn.Module, passes: list[Pass], folder: Path) -> str:
    """Optimize, export and measure; returns a line of the table."""
    batches = calibration()
    result = graphopt.optimize(model, batches[0], recipe=passes, calibration=batches)
    reports = [result.export(folder / "model.onnx") for _ in range(EXPORTS)]
    timed = [(each.latency_ms, each.baseline_latency_ms) for each in reports]
    ratios = [one / other for one, other in timed if one and other]
    before, after = evaluate(model), evaluate(result)
    cells = [name, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}", str(len(reports[0].unfused))]
    cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    model = trained_depthwise(cache_folder(), options.epochs)
    planted = unbalance(model)
    plain, equalized = [FoldBatchNorm(), QuantizeStatic()], [FoldBatchNorm(), Equalize(), QuantizeStatic()]
    print("| model | fp32 % | int8 % | points | unfused | int8 / fp32 latency |\n|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, of, passes in (
            ("as trained, int8", model, plain),
            ("as trained, equalized, int8", model, equalized),
            ("unbalanced, int8", planted, plain),
            ("unbalanced, equalized, int8", planted, equalized),
        ):
            print(row(name, of, passes, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
