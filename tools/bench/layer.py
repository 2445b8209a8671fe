#!/usr/bin/env python3
"""How long rounding one large layer by GPTQ takes here and in llm-compressor, side by side, and what it leaves.

    tools/bench/layer.py                    4096 x 4096, 4 bits in groups of 128, five runs of each in turn
    tools/bench/layer.py --size 2048

Both get the same weight and the same inputs, twice as many as the layer has, and take these in the order of the Gram
matrix's diagonal. The error is tr E H E^T over tr W H W^T, H that of all inputs that could have been drawn. Ours fits
ranges on the way; of the peer's time only the rounding counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from environments import python_of

DAMPING = 0.01


def ours(source: str, output: str, bits: int, group: int) -> None:
    """Round as children/round_layer.py does; runs in a process of its own."""
    import torch
    from safetensors.torch import load_file, save_file

    from graphopt.quantization.coding import Form
    from graphopt.quantization.grids import grid
    from graphopt.quantization.objectives import Gram
    from graphopt.quantization.solve import Choices, quantize_matrix

    given = load_file(source)
    weight, gram = given["weight"].T[None].contiguous(), Gram(1, given["weight"].shape[1])
    gram.update(given["inputs"][None], "layer")
    choices = Choices(Form(grid(f"int{bits}"), group, symmetric=False), "gptq", damping=DAMPING)
    started = time.perf_counter()
    made = quantize_matrix(weight, choices, gram)
    seconds = time.perf_counter() - started
    save_file({"weight": made.value()[0].T.contiguous(), "seconds": torch.tensor(seconds)}, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        source, output = given.child
        ours(source, output, given.bits, given.group)
        return
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    mix = torch.randn(given.size, given.size) * torch.logspace(0, -1.5, given.size) / given.size**0.5
    inputs = torch.randn(2 * given.size, given.size) @ mix
    weight, hessian = torch.randn(given.size, given.size) / given.size**0.5, inputs.T @ inputs / len(inputs)
    settings = [str(given.bits), str(given.group)]
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder:
        source, output = str(Path(folder) / "layer"), str(Path(folder) / "rounded")
        save_file({"weight": weight, "hessian": hessian, "inputs": inputs}, source)
        peer = Path(__file__).parent / "children" / "round_layer.py"
        options = ["--bits", settings[0], "--group", settings[1]]
        commands: dict[str, list[str | Path]] = {
            "graphopt": [sys.executable, __file__, "--child", source, output, *options],
            "llm-compressor": [python_of("llmcompressor"), "-P", peer, source, output, *settings],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        left: dict[str, float] = {}
        for _ in range(given.runs):
            for name, command in commands.items():
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                made = load_file(output)
                seconds[name].append(float(made["seconds"]))
                error = weight - made["weight"]
                left[name] = float((error @ mix.T).square().sum() / (weight @ mix.T).square().sum())
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    found = machine.describe()
    print(f"{given.size} x {given.size}, {given.bits} bits, groups of {given.group}, {found['cpu']}")
    for name, each in seconds.items():
        ratio = medians[name] / medians["llm-compressor"]
        spread = f"{min(each):.2f} to {max(each):.2f}"
        print(f"{name:16} {medians[name]:6.2f} s ({spread})  {ratio:.2f}x  error {left[name]:.3e}")


if __name__ == "__main__":
    main()
