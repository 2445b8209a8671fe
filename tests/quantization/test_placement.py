"""Where Q/DQ go: one small model a rule of the placement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphopt import Program, capture
from graphopt.backends.onnx.target import ONNXRUNTIME_CPU
from graphopt.ir import operator
from graphopt.quantization.placement import Placement, place


def placed(module: nn.Module, *inputs: Any, keep: tuple[str, ...] = ()) -> tuple[Program, Placement]:
    program = capture(module.eval(), inputs)
    return program, place(program, ONNXRUNTIME_CPU, lambda node: "kept" if node.name in keep else "")


def integer_names(placement: Placement) -> set[str]:
    return {node.name for node in placement.integer}


def value_of(placement: Placement, name: str) -> Any:
    return next(value for value in placement.values if value.node.name == name)


def reasons(placement: Placement) -> dict[str, str]:
    return {node.name: reason for node, reason in placement.declined}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        z = torch.relu(self.b(y) + y)
        return self.head(F.adaptive_avg_pool2d(F.max_pool2d(z, 2), 1).flatten(1))


def test_a_residual_network_is_one_integer_region() -> None:
    program, placement = placed(Residual(), torch.randn(1, 3, 8, 8))
    calls = {node.name for node in program.nodes if node.op == "call_function"}
    assert integer_names(placement) == calls
    assert placement.declined == []
    assert [node.name for node in placement.anchors] == ["conv2d", "conv2d_1", "linear"]


def test_a_relu_is_absorbed_and_pins_the_zero_point() -> None:
    _, placement = placed(Residual(), torch.randn(1, 3, 8, 8))
    names = {value.node.name for value in placement.values}
    assert "conv2d" not in names and "add" not in names, "the value behind the clamp is quantized, not the one before"
    assert value_of(placement, "relu").starts_at_zero
    assert not value_of(placement, "conv2d_1").starts_at_zero


def test_every_reader_has_a_dequantize_of_its_own_and_both_branches_are_quantized() -> None:
    _, placement = placed(Residual(), torch.randn(1, 3, 8, 8))
    assert [reader.name for reader in value_of(placement, "relu").readers] == ["conv2d_1", "add"]
    assert [reader.name for reader in value_of(placement, "conv2d_1").readers] == ["add"]


def test_max_pool_shares_the_parameters_of_its_input_and_is_not_observed() -> None:
    _, placement = placed(Residual(), torch.randn(1, 3, 8, 8))
    pooled = value_of(placement, "max_pool2d")
    assert pooled.group is value_of(placement, "relu_1").group
    assert not pooled.observed and value_of(placement, "relu_1").observed


def test_the_last_linear_writes_floats() -> None:
    program, placement = placed(Residual(), torch.randn(1, 3, 8, 8))
    assert all(value.node.name != "linear" for value in placement.values)
    assert all(not isinstance(each, fx.Node) or each.name == "linear" for each in program.outputs)


class Branches(nn.Module):
    """Two convolutions into one concatenation, each with or without a clamp."""

    def __init__(self, clamp_left: bool, clamp_right: bool) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)
        self.clamps = (clamp_left, clamp_right)

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(x) for conv in (self.left, self.right)]
        parts = [torch.relu(part) if clamp else part for part, clamp in zip(parts, self.clamps, strict=True)]
        return self.last(torch.cat(parts, 1))


@pytest.mark.parametrize(("left", "right", "tied"), [(True, True, True), (False, False, True), (True, False, False)])
def test_concatenation_ties_its_parts_unless_only_some_clamp_at_zero(left: bool, right: bool, tied: bool) -> None:
    _, placement = placed(Branches(left, right), torch.randn(1, 3, 4, 4))
    parts = [value.group for value in placement.values if any(operator(reader) == "cat" for reader in value.readers)]
    assert len(parts) == 2
    assert (len(set(parts)) == 1) == tied
    assert (value_of(placement, "cat").group in parts) == tied


class Mixed(nn.Module):
    """A concatenation of an integer and a float branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)
        self.up = nn.ConvTranspose2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([torch.relu(self.conv(x)), self.up(x)], 1))


def test_a_float_part_of_a_concatenation_is_quantized_at_the_border() -> None:
    _, placement = placed(Mixed(), torch.randn(1, 3, 4, 4))
    assert "cat" in integer_names(placement)
    assert [reader.name for reader in value_of(placement, "conv_transpose2d").readers] == ["cat"]
    assert "transposed" in reasons(placement)["conv_transpose2d"]


class Encoder(nn.Module):
    """Attention with a mask: linears are integer, masks and scores never."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        bias = (1.0 - mask.to(x.dtype)) * torch.finfo(x.dtype).min
        scores = q @ k.transpose(1, 2) + bias[:, None, :]
        return x + self.out(scores.softmax(-1) @ v)


def test_masks_scores_and_float_residuals_are_never_touched() -> None:
    _, placement = placed(Encoder(), torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool))
    assert integer_names(placement) == {"linear", "linear_1"}
    assert {value.node.name for value in placement.values} == {"layer_norm", "matmul_1"}
    fed_by_mask = {"mask", "_to_copy", "rsub", "mul"}
    assert not fed_by_mask & {value.node.name for value in placement.values}


class Split(nn.Module):
    def __init__(self, use_both: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
        self.use_both = use_both

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.a(x).split(4, 1)
        return self.b(left), self.c(right) if self.use_both else right.tanh()


def test_a_split_is_transparent_when_all_its_parts_are_integer() -> None:
    _, placement = placed(Split(True), torch.randn(1, 3, 4, 4))
    parts = [value for value in placement.values if operator(value.node) == "getitem"]
    assert len(parts) == 2
    assert {part.group for part in parts} == {value_of(placement, "conv2d").group}


def test_a_split_with_a_float_reader_stays_float() -> None:
    _, placement = placed(Split(False), torch.randn(1, 3, 4, 4))
    assert all(operator(node) != "getitem" for node in placement.integer)


def test_a_clamp_with_another_reader_before_it_is_not_absorbed() -> None:
    class Leak(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(torch.relu(y)) + y.tanh()

    _, placement = placed(Leak(), torch.randn(1, 3, 4, 4))
    assert "relu" not in integer_names(placement)
    assert {reader.name for reader in value_of(placement, "conv2d").readers} == {"relu", "tanh"}
    assert [reader.name for reader in value_of(placement, "relu").readers] == ["conv2d_1"]


@pytest.mark.parametrize(("low", "absorbed"), [(0.0, True), (-1.0, False)])
def test_only_clamps_from_zero_are_absorbed(low: float, absorbed: bool) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).clamp(low, 1.0))

    _, placement = placed(Clamped(), torch.randn(1, 3, 4, 4))
    assert ("clamp" in integer_names(placement)) == absorbed


def test_what_the_user_keeps_float_is_float_with_the_reason() -> None:
    _, placement = placed(Residual(), torch.randn(1, 3, 8, 8), keep=("conv2d_1",))
    assert "conv2d_1" not in integer_names(placement) and "add" not in integer_names(placement)
    assert reasons(placement)["conv2d_1"] == "kept"
    assert reasons(placement)["add"] == "its input conv2d_1 (conv2d) is float"


def test_weights_with_nan_and_computed_weights_keep_their_operator_float() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor, gain: Tensor) -> Tensor:
            return F.linear(x, self.weight * gain)

    _, placement = placed(Computed(), torch.randn(2, 8), torch.randn(1))
    assert placement.anchors == []
    assert reasons(placement)["linear"] == "its weight is computed by mul"


def test_concatenation_keeps_apart_clamps_with_different_upper_bounds() -> None:
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([F.relu6(self.a(x)), torch.relu(self.b(x))], 1))

    _, placement = placed(Clamps(), torch.randn(1, 3, 4, 4))
    six, open_ended = value_of(placement, "relu6"), value_of(placement, "relu")
    assert six.group is not open_ended.group
    assert (six.upper, open_ended.upper) == (6.0, float("inf"))


def test_a_split_with_an_unused_part_stays_float() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).split(4, 1)[0])

    _, placement = placed(Half(), torch.randn(1, 3, 4, 4))
    assert all(operator(node) != "getitem" for node in placement.integer)


def test_a_linear_on_a_vector_stays_float() -> None:
    _, placement = placed(nn.Linear(4, 2), torch.randn(4))
    assert placement.anchors == [] and reasons(placement) == {"linear": "its input has a single axis"}
