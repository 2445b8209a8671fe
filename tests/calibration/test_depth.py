"""Memory of calibration that goes from layer to layer: what is held is the border between two blocks, not the depth."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHILD = """
import sys
import torch
import graphopt
from graphopt.memory import peak_bytes
from graphopt.passes import QuantizeWeights

torch.set_num_threads(1)
depth, width, rows, batches = int(sys.argv[1]), 128, 8192, 8
layers = [each for _ in range(depth) for each in (torch.nn.Linear(width, width), torch.nn.ReLU())]
given = [(torch.randn(rows, width),) for _ in range(batches)]
quantize = QuantizeWeights(grid="int4", rounding="gptq", tune="none")
result = graphopt.optimize(torch.nn.Sequential(*layers), given[0], recipe=[quantize], calibration=given)
assert len(result.trace["quantize_weights"].touched) == depth, result.trace["quantize_weights"]
print(peak_bytes())
"""
_BORDER = 8 * 8192 * 128 * 4  # bytes of all batches between two layers: 32 MiB


def _peak(depth: int) -> int:
    done = subprocess.run([sys.executable, "-c", _CHILD, str(depth)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak as Linux gives it")
def test_the_peak_does_not_grow_with_depth() -> None:
    """Sixteen layers more, of 32 MiB of activations each, cost less than two of them."""
    assert _peak(20) - _peak(4) < 2 * _BORDER
