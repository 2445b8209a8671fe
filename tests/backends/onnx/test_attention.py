"""Attention means in the file what it means in torch, whatever hides which keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import graphopt
from graphopt.backends.onnx.backend import OnnxBackend


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(query, key, value, mask, **self.options)


def _qkv(*lead: int, rows: int = 5, columns: int = 7, heads: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    others = lead if heads is None else (*lead[:-1], heads)
    shapes = [(*lead, rows, 8), (*others, columns, 8), (*others, columns, 6)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _written(module: nn.Module, inputs: list[Tensor], path: Path, shapes: Any = None) -> tuple[list[str], Any]:
    """Return the operator types of the file and a function that runs it."""
    examples = tuple(value if value.dtype is torch.bool else value.nan_to_num(neginf=0.0) for value in inputs)
    program = graphopt.capture(module, examples, dynamic_shapes=shapes)
    backend = OnnxBackend()
    backend.lower(program, path)
    return [node.op_type for node in onnx.load(path).graph.node], lambda values: backend.run(path, values)[0]


HIDDEN_ROW = torch.ones(2, 1, 5, 7).bool()
HIDDEN_ROW[0, 0, 2] = False
HIDDEN_ROW[1, 0, :, 3:] = False
FLOATS = torch.zeros(5, 7).masked_fill(~HIDDEN_ROW[0, 0], -torch.inf) + torch.linspace(0, 1, 7)

CASES: dict[str, tuple[dict[str, Any], list[Tensor]]] = {
    "plain": ({}, _qkv(2, 3)),
    "scale": ({"scale": 0.7}, _qkv(2, 3)),
    "three_axes": ({}, _qkv(2)),
    "causal": ({"is_causal": True}, _qkv(2, 3)),
    "grouped": ({"enable_gqa": True}, _qkv(2, 4, heads=2)),
    "bool_mask": ({}, [*_qkv(2, 3), HIDDEN_ROW]),
    "float_mask": ({}, [*_qkv(2, 3), FLOATS]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_computes_what_torch_does(name: str, tmp_path: Path) -> None:
    options, inputs = CASES[name]
    module = Attention(**options)
    kinds, run = _written(module, inputs, tmp_path / "a.onnx")
    np.testing.assert_allclose(run(inputs), module(*inputs).numpy(), rtol=0, atol=2e-6)
    assert "IsNaN" not in kinds
    assert ("Where" in kinds) == name.endswith("mask")  # rows that may be hidden completely


def test_a_hidden_row_is_zeros_and_nan_stays_nan(tmp_path: Path) -> None:
    _, inputs = CASES["bool_mask"]
    _, run = _written(Attention(), inputs, tmp_path / "a.onnx")
    assert not run(inputs)[0, :, 2].any()
    broken = [inputs[0].clone(), *inputs[1:]]
    broken[0][1, 0, 0, 0] = torch.nan
    assert np.isnan(run(broken)[1, 0, 0]).all()


def test_causal_attention_of_other_lengths(tmp_path: Path) -> None:
    module, inputs = Attention(is_causal=True, enable_gqa=True), _qkv(2, 4, rows=6, columns=6, heads=2)
    length = Dim("length", min=2, max=64)
    shapes = ({0: Dim("batch"), 2: length}, {0: Dim("batch"), 2: length}, {0: Dim("batch"), 2: length}, None)
    _, run = _written(module, inputs, tmp_path / "a.onnx", shapes[:3])
    others = _qkv(3, 4, rows=9, columns=9, heads=2)
    np.testing.assert_allclose(run(others), module(*others).numpy(), rtol=0, atol=2e-6)


def test_a_layer_norm_and_the_sum_before_it_stay_apart(tmp_path: Path) -> None:
    from graphopt.backends.onnx.fusion import check_fusion

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.norm(torch.tanh(a) + torch.sin(b))

    inputs = [torch.randn(2, 4, 8), torch.randn(2, 4, 8)]
    kinds, run = _written(Norm(), inputs, tmp_path / "n.onnx")
    module = Norm()
    np.testing.assert_allclose(run(inputs), module(*inputs).detach().numpy(), rtol=0, atol=2e-6)
    assert "Sum" in kinds and "Add" not in kinds
    assert "SkipLayerNormalization" not in check_fusion(tmp_path / "n.onnx").executed
