"""graphopt::hadamard in ONNX: small products one after the other, never the whole matrix."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.backends.onnx.backend import OnnxBackend
from graphopt.backends.onnx.compare import run_onnx
from graphopt.ir import dialect
from graphopt.ir.hadamard import factors, orthogonal, stages


class Transformed(nn.Module):
    """x: [batch, length, 8] to [batch, length, size]."""

    def __init__(self, size: int, block: int, signs: int, transpose: bool) -> None:
        super().__init__()
        self.linear, self.block, self.transpose = nn.Linear(8, size), block, transpose
        k = factors(block or size)[1]
        self.register_buffer("small", orthogonal(k, 0, "orthogonal").float() if k > 1 else None)
        self.register_buffer("signs", (torch.randint(0, 2, (signs,)) * 2 - 1).float() if signs else None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = dialect.hadamard(self.linear(x), self.small, self.signs, self.block, self.transpose)
        return y


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("size", "block", "signs"),
    [(64, 0, 0), (512, 0, 512), (60, 20, 20), (60, 30, 60), (960, 0, 960), (182, 0, 0), (6, 0, 6), (1, 0, 0)],
)
def test_computes_the_same_in_the_runtime(size: int, block: int, signs: int, transpose: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Transformed(size, block, signs, transpose)
    shapes = ({0: Dim("batch"), 1: Dim("length")},)
    program = graphopt.capture(module, (torch.randn(3, 4, 8),), dynamic_shapes=shapes)
    path = tmp_path / "model.onnx"
    OnnxBackend().lower(program, path)
    for x in (torch.randn(3, 4, 8), torch.randn(1, 7, 8)):
        (made,) = run_onnx(path, {"x": x.numpy()}).values()
        expected = module(x).detach().numpy()
        np.testing.assert_allclose(made, expected, rtol=0, atol=2e-5)


def test_the_products_are_those_of_the_stages(tmp_path: Path) -> None:
    module = Transformed(4096, 0, 0, False)
    program = graphopt.capture(module, (torch.randn(3, 4, 8),))
    OnnxBackend().lower(program, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["MatMul"] + kinds["Gemm"] == len(stages(4096)) + 1
    # Two matrices of 64 x 64 stand in the file, not one of 4096 x 4096.
    assert (tmp_path / "model.onnx").stat().st_size < 4 * (8 * 4096 + 4096 + 2 * 64 * 64) + 20_000
