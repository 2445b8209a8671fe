#!/usr/bin/env python3
"""Draw docs/pictures/search_*.svg: what `allocate` chose for the demo network, from which losses and candidates.

    tools/draw_search.py [--bits 4.5]      average bits of a weight
"""

from __future__ import annotations

import argparse
from pathlib import Path

import graphopt
from graphopt import demo
from graphopt.passes import Allocate
from graphopt.pipeline import builtin
from graphopt.report.allocation import pictures
from graphopt.report.svg import alone

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bits", type=float, default=4.5, help="on average, scales counted")
    bits = parser.parse_args().bits
    model, inputs = demo.model()
    result = graphopt.optimize(
        model, inputs, [*builtin("exact").passes, Allocate()], calibration=demo.calibration(), evaluate=demo.evaluate,
        budget=graphopt.Budget(average_bits=bits),
    )  # fmt: skip
    drawn = pictures(result.trace["allocate"])
    assert drawn is not None
    for name in ("front", "losses", "bits"):
        picture = getattr(drawn, name)
        if picture is not None:
            (PICTURES / f"search_{name}.svg").write_text(alone(picture), encoding="utf-8")
    facts = result.trace["allocate"].facts
    accuracy = f"{result.original_metric:.2f} -> {result.metric:.2f}"
    print(f"loss {facts['loss']:.3g} by {facts['origin']}; accuracy {accuracy}")
    for name, each in facts["correlations"].items():
        print(f"{name}: rank {each['rank']}, logarithm {each['logarithm']}")


if __name__ == "__main__":
    main()
