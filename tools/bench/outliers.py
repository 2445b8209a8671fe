#!/usr/bin/env python3
"""What rotation and smoothing are worth: KL of a quantized language model to itself, with and without outliers.

    tools/bench/outliers.py                the table; trains the model the first time (some ten minutes on one core)
    tools/bench/outliers.py --json FILE    the same as data
    tools/bench/outliers.py --tiny         a model of seconds, to try the script

The model is a decoder of 3.6 million weights over bytes, trained on the source of Python's standard library. Nothing is
fine-tuned: weights are rounded to the nearest by output channel, activations by token.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from language import corpus
from language.judge import Text, bits_per_byte, divergence, transformed
from language.model import Shape
from language.outliers import plant
from language.training import Training, trained
from made.kept import cache_folder

from graphopt.passes import Rotate, Smooth
from graphopt.pipeline import Pass

BITS = {"W8A8": (8, 8), "W4A4": (4, 4)}
TINY = Training(Shape(width=32, hidden=48, layers=2, heads=4, groups=2, context=32), steps=30, batch=8, warmup=5)


def recipes(bits: int) -> dict[str, list[Pass]]:
    """The combinations that are compared, at so many bits."""
    rotate = Rotate(activation_bits=bits)
    online = Rotate(queries_keys=False, hidden=True, activation_bits=bits)
    smooth = Smooth(activation_bits=bits, weight_bits=bits)
    searched = Smooth(search="space", activation_bits=bits, weight_bits=bits)
    return {
        "none": [],
        "smooth": [smooth],
        "smooth, α searched": [searched],
        "rotate": [rotate],
        "rotate, hidden online": [online],
        "smooth + rotate": [smooth, rotate],
        "smooth, α searched + rotate": [searched, rotate],
        "smooth + rotate, hidden online": [smooth, online],
    }


def measure(training: Training, folder: Path) -> dict[str, Any]:
    """Return KL by model, numerics and recipe."""
    library = corpus.read()
    length = training.shape.context
    calibration = corpus.even_pieces(library.train, 32, length).split(8)  # type: ignore[no-untyped-call]
    held_out = corpus.even_pieces(library.held_out, 64, length).split(8)  # type: ignore[no-untyped-call]
    text = Text(tuple(calibration), tuple(held_out))
    plain = trained(training, folder)
    models = {"as trained": plain, "outliers planted": plant(plain, calibration[0])}
    found: dict[str, Any] = {"bits a byte": {name: bits_per_byte(model, text) for name, model in models.items()}}
    for name, model in models.items():
        for numerics, (weights, activations) in BITS.items():
            for recipe, passes in recipes(activations).items():
                program = transformed(model, passes, text)
                value = divergence(program, model, text, weights, activations)
                found.setdefault("kl", {}).setdefault(name, {}).setdefault(numerics, {})[recipe] = value
                print(f"{name}, {numerics}, {recipe}: {value:.3g}", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Return the figures as a table, with how many times each recipe lowers what no recipe leaves."""
    names = list(recipes(8))
    lines = ["| model | numerics | " + " | ".join(names) + " | best |", "|---|---|" + "---:|" * (len(names) + 1)]
    for model, by_numerics in found["kl"].items():
        for numerics, kl in by_numerics.items():
            gains = {name: f" (÷{kl['none'] / kl[name]:.1f})" for name in names[1:]}
            cells = [f"{kl[name]:.2g}{gains.get(name, '')}" for name in names]
            best = min(names, key=kl.__getitem__)
            cells.append(f"{best}: ÷{kl['none'] / kl[best]:.1f}")
            lines.append("| " + " | ".join([model, numerics, *cells]) + " |")
    rates = ", ".join(f"{name} {value:.3f}" for name, value in found["bits a byte"].items())
    return "\n".join([*lines, "", f"KL in nats a byte. In fp32, bits a byte on held-out text: {rates}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as data")
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, not cached")
    options = parser.parse_args()
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(TINY, Path(folder))
    else:
        found = measure(Training(), cache_folder())
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
