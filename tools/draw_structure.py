#!/usr/bin/env python3
"""Draw docs/pictures/structure.svg: which coordinates each space of the demo network lost, and what was gained.

    tools/draw_structure.py [--share 0.35]      share of the multiply-accumulates that stays
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from draw_spaces import COLOURS, PICTURES, PINNED, label, rectangle, svg

import graphopt
from graphopt import Result, demo

CELL, ROW, LEFT = 8, 18, 190


def picture(result: Result, before: float, after: float) -> str:
    """Return a strip for each space, a cell for each coordinate: coloured where it stays."""
    facts = result.trace["prune"].facts
    rows = list(rows_of(facts))
    width = LEFT + CELL * max(len(cells) for _, cells, _ in rows) + 110
    left = f"multiply-accumulates {result.report.macs.ratio:.0%}, parameters {result.report.parameters.ratio:.0%}"
    parts = [label(10, 20, f"{left} of the original; accuracy {before:.2f} -> {after:.2f} %, nothing trained")]
    for index, (name, cells, error) in enumerate(rows):
        y = 38 + ROW * index
        parts.append(label(10, y + 10, name, "small"))
        parts += [
            rectangle(LEFT + CELL * place, y, CELL - 1, ROW - 6, COLOURS[1] if stays else PINNED)
            for place, stays in enumerate(cells)
        ]
        beside = f"{sum(cells)} of {len(cells)}, error {error:.1%}"
        parts.append(label(LEFT + CELL * len(cells) + 6, y + 10, beside, "small"))
    return svg(width, 38 + ROW * len(rows) + 8, parts)


def rows_of(facts: dict[str, dict[str, object]]) -> Iterator[tuple[str, list[bool], float]]:
    """Yield the name of each space, which of its coordinates stay, and the largest error of the readers fitted."""
    errors: Any = facts["relative_errors"]
    for name, kept in facts["kept"].items():
        size: Any = facts["widths"][name]
        readers: Any = facts["readers"][name]
        cells = [place in kept for place in range(size[0])]  # type: ignore[operator]
        yield name, cells, max(float(errors[reader]) for reader in readers if reader in errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--share", type=float, default=0.35, help="of the multiply-accumulates")
    share = parser.parse_args().share
    model, inputs = demo.model()
    result = graphopt.optimize(
        model, inputs, recipe="prune", calibration=demo.calibration(), budget=graphopt.Budget(macs_ratio=share)
    )
    before, after = (demo.evaluate(each) for each in (model, result.module))
    (PICTURES / "structure.svg").write_text(picture(result, before, after))


if __name__ == "__main__":
    main()
