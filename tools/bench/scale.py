#!/usr/bin/env python3
"""How analysis and transformation grow with depth: a decoder of 10, 30 and 100 layers, each in a process of its own.

    tools/bench/scale.py                    the table
    tools/bench/scale.py --layers 10 30     other depths
    tools/bench/scale.py --width 128        another width (default 256)

Seconds are medians of three for the analyses, single runs for the passes, validation among them in a column of its own.
Memory is how far the peak of the process rises, during a pass and its validation, over what it holds before the pass
and the weights that the pass makes anew, in multiples of one layer's weights. The C library is told to give back what
is freed; left alone, glibc keeps blocks of it between those in use, up to as much again as all weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 8  # tokens: what is measured is the compiler, not the model


def measure(layers: int, width: int) -> dict[str, Any]:
    """Return the figures of one depth; runs in a process of its own, so that its peak memory is its own."""
    import torch
    import transformers

    import graphopt
    from graphopt.analysis.blocks import find_blocks
    from graphopt.passes import Canonicalize, CenterNorms, FoldNormAffine, Rotate, Smooth
    from graphopt.pipeline import Context
    from graphopt.pipeline.validation import Validator
    from graphopt.target import Target

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=width // 8, use_cache=False,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(512, (1, LENGTH))}
    started = time.perf_counter()
    program = graphopt.capture(transformers.Qwen3ForCausalLM(config).eval(), inputs)  # type: ignore[no-untyped-call]
    found: dict[str, Any] = {"layers": layers, "capture": time.perf_counter() - started}
    found["nodes"] = len(list(program.graph.nodes))
    weights = sum(weight.nbytes for weight in program.weights.values())
    context = Context(Target(name="none", backend="none"), calibration=graphopt.calibration.Batches([inputs], program))
    Canonicalize().run(program, context)
    analysis: list[float] = [_timed(lambda: graphopt.analyze(program).spaces) for _ in range(3)]
    found["analyze"] = statistics.median(analysis)
    found["blocks"] = statistics.median(_timed(lambda: find_blocks(program)) for _ in range(3))
    for pass_ in (Smooth(), FoldNormAffine(), CenterNorms(), Rotate()):
        validator = Validator(program, 0)
        after = program.clone()
        before = _peak_bytes(reset=True)
        started = time.perf_counter()
        with torch.no_grad():
            changes = pass_.run(after, context)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        error = validator.check(after, changes.unrounded)[0] if changes.changed else 0.0
        if error > pass_.tolerance:
            raise SystemExit(f"{pass_.name} changed the outputs by {error:.1e}")
        validation = time.perf_counter() - started
        old = {weight.data_ptr() for weight in program.weights.values()}
        new = sum(weight.nbytes for weight in after.weights.values() if weight.data_ptr() not in old)
        extra = (_peak_bytes() - before - new) / (weights / layers)
        found[pass_.name] = {"seconds": seconds, "validation": validation, "extra": extra, "new": new / weights}
        program = after
    return found


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _peak_bytes(reset: bool = False) -> int:
    """Return the peak of resident memory; with `reset`, what is resident now, from which the peak starts anew."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def _child(layers: int, width: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(layers), "--width", str(width)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"scale: {layers} layers failed: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _table(rows: list[dict[str, Any]]) -> str:
    passes = [key for key, value in rows[0].items() if isinstance(value, dict)]
    head = ["layers", "nodes", "analyze s", "blocks s", *(f"{name} s" for name in passes)]
    head += ["validation s", "s per 1,000 nodes", "new weights", "extra memory, layers"]
    lines = [" | ".join(head), "|".join(["---:"] * len(head))]
    for row in rows:
        total = row["analyze"] + row["blocks"] + sum(row[name]["seconds"] for name in passes)
        validation = sum(row[name]["validation"] for name in passes)
        cells = [str(row["layers"]), f"{row['nodes']:,}", f"{row['analyze']:.2f}", f"{row['blocks']:.2f}"]
        cells += [f"{row[name]['seconds']:.2f}" for name in passes]
        cells += [f"{validation:.2f}", f"{1000 * total / row['nodes']:.2f}"]
        cells.append(f"{max(row[name]['new'] for name in passes):.2f} x")
        cells.append(f"{max(row[name]['extra'] for name in passes):.1f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 30, 100], metavar="N")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.width)))
        return
    print(_table([_child(layers, options.width) for layers in options.layers]))


if __name__ == "__main__":
    main()
