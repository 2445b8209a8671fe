"""Weights alone on integers, in real ONNX Runtime: the packed kernel is used, and gives what the program gives."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnx import packing
from graphopt.backends.onnx.processor import multiplies_packed
from graphopt.errors import NotExpressible
from graphopt.passes import QuantizeActivations, QuantizeWeights
from graphopt.pipeline import Pass

PLAIN: dict[str, Any] = {"objective": "plain", "rounding": "nearest"}


def stack(*widths: int, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def exported(
    module: nn.Module, x: Tensor, path: Path, *passes: Pass, calibration: Any = None
) -> tuple[graphopt.Result, Any, onnx.ModelProto]:
    result = graphopt.optimize(module.eval(), (x,), recipe=list(passes), calibration=calibration)
    report = result.export(path / "m.onnx", measure=False)
    return result, report, onnx.load(path / "m.onnx")


def types(model: onnx.ModelProto) -> set[int]:
    return {each.data_type for each in model.graph.initializer}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("name", "group", "stored"),
    [
        ("int8", 0, TensorProto.INT8),
        ("int8", 32, TensorProto.INT8),
        ("uint8", 64, TensorProto.UINT8),
        ("int4", 32, TensorProto.INT4),
        ("uint4", 64, TensorProto.UINT4),
        ("int3", 32, TensorProto.INT4),
        ("ternary", 32, TensorProto.INT2 if packing.two_bits_known() else TensorProto.INT4),
        ("int2", 64, TensorProto.INT2 if packing.two_bits_known() else TensorProto.INT4),
    ],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_linears_become_packed_products(
    name: str, group: int, stored: int, bias: bool, rows: int, tmp_path: Path
) -> None:
    module, x = stack(128, 64, 32, bias=bias), torch.randn(rows, 128)
    _, report, model = exported(module, x, tmp_path, QuantizeWeights(grid=name, group_size=group, **PLAIN))
    assert report.fused == {"MatMulNBits": 2}
    assert not report.unfused
    assert stored in types(model)
    assert report.max_steps is not None
    assert report.max_steps < 12  # inputs go through 8 bits inside of the kernel
    assert not report.notes


def test_a_type_that_the_runtime_multiplies_wrongly_by_is_not_used(tmp_path: Path) -> None:
    """Ten channels in two bits: the file takes four bits there, two elsewhere."""
    _, report, model = exported(
        stack(128, 64, 10), torch.randn(5, 128), tmp_path, QuantizeWeights(grid="int2", group_size=64, **PLAIN)
    )
    assert report.max_steps is not None
    assert report.max_steps < 12
    if packing.two_bits_known() and not multiplies_packed(ir.DataType.INT2, 10, 64, 25):
        shapes = {each.data_type: list(each.dims) for each in model.graph.initializer if each.dims[-1:] == [10]}
        assert shapes.get(TensorProto.INT4) in ([128, 10], [64, 10], [2, 10], [1, 10])
        assert TensorProto.INT2 not in shapes
        assert TensorProto.INT2 in types(model)


@pytest.mark.parametrize("packed", [ir.DataType.INT4, ir.DataType.UINT4])
@pytest.mark.parametrize("channels", [1, 10, 33, 64])
@pytest.mark.parametrize("block", [0, 32, 64])
def test_four_bits_multiply_right(packed: ir.DataType, channels: int, block: int) -> None:
    assert multiplies_packed(packed, channels, block, packing.PACKED_OPSET)


@pytest.mark.parametrize("group", [5, 48, 64])
def test_blocks_that_no_packed_kernel_takes_still_give_the_program(group: int, tmp_path: Path) -> None:
    """Not a power of two, and inputs that no block divides: float products of weights that stay small in the file."""
    _, report, _ = exported(
        stack(100, 70, 8), torch.randn(3, 100), tmp_path, QuantizeWeights(group_size=group, **PLAIN)
    )
    assert report.max_steps is not None
    assert report.max_steps < 12
    assert report.size_bytes < 0.45 * sum(w.numel() * 4 for w in stack(100, 70, 8).parameters()) + 2000


def test_side_information_is_plain_operators(tmp_path: Path) -> None:
    x = torch.randn(40, 64)
    each = QuantizeWeights(grid="int4", group_size=32, columns=0.05, rank=2)
    _, report, model = exported(stack(64, 32), x, tmp_path, each, calibration=[(x,)])
    names = [node.op_type for node in model.graph.node]
    assert "Gather" in names
    assert names.count("MatMul") + names.count("Gemm") >= 4
    assert report.max_steps is not None
    assert report.max_steps < 12
    assert TensorProto.FLOAT16 in types(model)


def test_sparse_outliers_run_too(tmp_path: Path) -> None:
    x = torch.randn(40, 64)
    _, report, _ = exported(stack(64, 32), x, tmp_path, QuantizeWeights(outliers=0.01), calibration=[(x,)])
    assert report.max_steps is not None
    assert report.max_steps < 0.01


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
@pytest.mark.parametrize("group", [0, 8])
def test_convolutions_are_small_in_the_file_and_float_to_the_kernel(name: str, group: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1)), torch.randn(1, 16, 8, 8)
    _, report, model = exported(module, x, tmp_path, QuantizeWeights(grid=name, conv_group_size=group, **PLAIN))
    assert report.max_steps is not None
    assert report.max_steps < 0.01
    assert report.size_bytes < (32 * 16 * 9 + 128) * 1.3 + 3500
    assert {node for node, _ in report.unfused} & {"conv2d", "view"}
    assert TensorProto.INT8 in types(model) or types(model) & {TensorProto.INT4, TensorProto.INT2}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(40, 64), nn.Linear(64, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(ids).tanh())
        return out


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_tied_table_is_in_the_file_once(name: str, group: int, tmp_path: Path) -> None:
    ids = torch.randint(40, (2, 7))
    each = QuantizeWeights(group_size=group, embeddings=name, **PLAIN)
    _, report, model = exported(Tied(), ids, tmp_path, each)
    assert report.max_steps is not None
    assert report.max_steps < 12
    large = [each for each in model.graph.initializer if int(np.prod(each.dims)) >= 40 * 64]
    assert len(large) == 1


@pytest.mark.parametrize("name", ["e4m3", "mxfp4", "nf4", "codebook4"])
def test_other_numbers_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    x = torch.randn(4, 64)
    with pytest.raises(NotExpressible, match="ONNX files hold integer codes here, dequantize"):
        exported(stack(64, 32), x, tmp_path, QuantizeWeights(grid=name), calibration=[(x,)])
    assert not list(tmp_path.iterdir())


def test_scales_by_token_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotExpressible, match="run time per tensor in uint8 only"):
        exported(stack(64, 32), torch.randn(4, 64), tmp_path, QuantizeActivations())
