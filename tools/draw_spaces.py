#!/usr/bin/env python3
"""Draw the pictures of docs/spaces.md from what graphopt itself says.

    tools/draw_spaces.py              docs/pictures/spaces.svg: the axes of a decoder, of the document's own snippets
    tools/draw_spaces.py --outliers   docs/pictures/outliers.svg too: of the model of tools/bench/outliers.py, which the
                                      first run trains (some ten minutes)
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

from graphopt import Program
from graphopt.analysis.spaces import Analysis, Space
from graphopt.calibration import Batches, Channels, observe
from graphopt.ir import arguments, operator
from graphopt.progress import Silent

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
COLOURS = ("#c2452d", "#2b6cb0", "#d29922", "#2f855a", "#805ad5", "#b83280", "#0f766e", "#7b5e3b")
PINNED = "#b8bcc4"
STRIP, CELL, GAP = 8, 3, 14
STYLE = "<style>text{font:12px system-ui,sans-serif;fill:#3b4252}.small{font-size:10px}</style>"

Box = tuple[str, list[list[tuple[int, str]]]]  # a weight, and the (size, colour) of each factor of each axis


def svg(width: float, height: float, parts: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">'
    ground = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    return "\n".join([head, STYLE, ground, *parts, "</svg>", ""])


def rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}"/>'


def label(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={chr(34)}{style}{chr(34)}" if style else ""}>{escape(text)}</text>'


def boxes(analysis: Analysis, prefixes: Sequence[str]) -> tuple[list[Box], dict[Space, str]]:
    """Return the weights below some modules with the colours of their axes, and the colour of each space."""
    factors: dict[str, dict[int, dict[int, tuple[int, str]]]] = {}
    colours: dict[Space, str] = {}
    for space in analysis.spaces:
        members = [each for each in space.members if each.weight.startswith(tuple(prefixes))]
        members = [each for each in members if "bias" not in each.role]
        if not members:
            continue
        free = [each for each in colours if each.free]
        colours[space] = COLOURS[len(free) % len(COLOURS)] if space.free else PINNED
        for member in members:
            for place, text in enumerate(member.layout.split(" x ")):
                size = int(text.strip("[]"))  # a sum has no picture yet: ValueError
                of_axis = factors.setdefault(member.weight, {}).setdefault(member.axis, {})
                of_axis[place] = size, colours[space] if "[" in text else of_axis.get(place, (0, PINNED))[1]
    found = [
        (name, [[of_axis[place] for place in sorted(of_axis)] for _, of_axis in sorted(axes.items())])
        for name, axes in factors.items()
    ]
    order = list(analysis.program.weights)
    return sorted(found, key=lambda box: order.index(box[0])), colours


def bar(x: float, y: float, axis: list[tuple[int, str]], upright: bool) -> list[str]:
    """Draw an axis as a strip for each factor, the slowest outside, cut where its index changes."""
    total = CELL
    for size, _ in axis:
        total *= size
    parts, repeats = [], 1
    for place, (size, colour) in enumerate(axis):
        offset = (place - len(axis)) * (STRIP + 1)
        repeats *= size
        length = total / repeats
        for index in range(repeats):
            start, thickness = index * length, max(length - 1, 1)
            if upright:
                parts.append(rectangle(x + offset, y + start, STRIP, thickness, colour))
            else:
                parts.append(rectangle(x + start, y + offset, thickness, STRIP, colour))
    return parts


def picture_of_spaces(analysis: Analysis, prefixes: Sequence[str], width: int = 900) -> str:
    """Return an SVG of weights as rectangles; what is drawn in one colour are the same coordinates."""
    found, colours = boxes(analysis, prefixes)
    parts, x, y, tallest = [], 8, 24, 0
    for name, axes in found:
        sizes = [CELL * _product(size for size, _ in axis) for axis in axes]
        height, across = sizes[0], sizes[1] if len(sizes) > 1 else 0
        left, top = 3 * (STRIP + 1), max(map(len, axes)) * (STRIP + 1) + 6
        taken = left + max(across, 7 * len(name)) + GAP
        if x + taken > width:
            x, y, tallest = 8, y + tallest + GAP + 8, 0
        parts.append(label(x + left, y, name))
        parts += bar(x + left, y + top, axes[0], upright=True)
        if across:
            parts.append(rectangle(x + left + 1, y + top + 1, across - 2, height - 2, "#eef0f4"))
            parts += bar(x + left, y + top, axes[1], upright=False)
        x, tallest = x + taken, max(tallest, height + top + 8)
    y += tallest + GAP + 8
    for space, colour in colours.items():
        parts.append(rectangle(8, y - 10, 12, 12, colour))
        allowed = ", ".join(sorted(space.symmetries)) or f"pinned: {space.pins[0]}"
        parts.append(label(28, y, f"{space.name} ({space.size}): {allowed}"))
        y += 18
    return svg(width, y, parts)


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def picture_of_the_document() -> str:
    """Run the document's first snippet and draw the analysis that it makes: its first block and what is around."""
    text = (ROOT / "docs" / "spaces.md").read_text()
    (first, *_) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    names: dict[str, Any] = {"print": lambda *_: None}
    exec(compile(first, "spaces.md", "exec"), names)
    analysis = names["analysis"]
    assert isinstance(analysis, Analysis)
    return picture_of_spaces(analysis, ("0.", "1.", "3.", "4."))


def largest(program: Program, weight: str, data: Any) -> list[float]:
    """Return the largest magnitude of each channel of what the linear layer with this weight reads."""
    linears = [arguments(node) for node in program.nodes if operator(node) == "linear"]
    (source,) = [named["input"] for named in linears if named["weight"].target == weight]
    channels = Channels((source.meta["val"].dim() - 1,))
    observe(program, {source: channels}, Batches(data, program), Silent())
    assert channels.largest is not None
    return [float(value) for value in channels.largest.flatten()]


def picture_of_outliers(rows: dict[str, dict[str, list[float]]], width: int = 900) -> str:
    """Return an SVG of channel magnitudes, each panel on its own scale; rows: activation -> what was done -> values."""
    parts, y, height = [], 20, 90
    for title, panels in rows.items():
        parts.append(label(8, y, title))
        each = (width - 8) / len(panels)
        for index, (name, values) in enumerate(panels.items()):
            x, top = 8 + index * each, max(values)
            median = sorted(values)[len(values) // 2]
            parts.append(label(x, y + 18, f"{name}: largest ÷ median {top / median:.1f}", "small"))
            step = (each - 12) / len(values)
            ground = y + 26 + height
            bars = "".join(
                f"M{x + (place + 0.5) * step:.1f} {ground:g}V{ground - height * value / top:.1f}"
                for place, value in enumerate(values)
            )
            parts.append(f'<path d="{bars}" stroke="{COLOURS[1]}" stroke-width="{step:.2f}"/>')
        y += height + 54
    return svg(width, y - 16, parts)


def measured_outliers() -> dict[str, dict[str, list[float]]]:
    from language import corpus
    from language.judge import Text, transformed
    from language.outliers import plant
    from language.training import Training, trained

    from graphopt.passes import Rotate, Smooth

    training, library = Training(), corpus.read()
    cache = Path(os.environ.get("GRAPHOPT_CACHE") or "~/.cache/graphopt").expanduser()
    calibration = corpus.even_pieces(library.train, 32, training.shape.context).split(8)  # type: ignore[no-untyped-call]
    model = plant(trained(training, cache), calibration[0])
    recipes = {
        "with outliers": [],
        "smoothed": [Smooth()],
        "rotated": [Rotate()],
        "both": [Smooth(), Rotate()],
    }
    programs = {
        name: transformed(model, passes, Text(tuple(calibration), ()))  # type: ignore[arg-type]
        for name, passes in recipes.items()
    }
    weights = {
        "what an up-projection reads": "blocks.2.up.weight",
        "what the down-projection behind it reads": "blocks.2.down.weight",
    }
    data = [(ids,) for ids in calibration]
    return {
        title: {name: largest(program, weight, data) for name, program in programs.items()}
        for title, weight in weights.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outliers", action="store_true", help="draw the language model's activations too")
    options = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "spaces.svg").write_text(picture_of_the_document())
    if options.outliers:
        (PICTURES / "outliers.svg").write_text(picture_of_outliers(measured_outliers()))
    print(*sorted(path.name for path in PICTURES.glob("*.svg")))


if __name__ == "__main__":
    main()
