"""fold_batch_norm: a batch norm in every position, and random small networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from harness import Example, Function, apply, before, check_means_the_same, four_tests, operators
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import _BATCH_NORMS, BATCH_NORMS
from torch import Tensor, nn
from torch.nn import functional

from graphopt.ir import arguments, operator
from graphopt.passes import FoldBatchNorm

PASS = FoldBatchNorm()

# How often the batch norm is folded, or why it is not.
POSITIONS: dict[str, int | str] = {
    "conv_bn": 1,
    "conv_bn_no_bias": 1,
    "conv_bn_no_affine": 1,
    "grouped_conv_bn": 1,
    "conv1d_bn": 1,
    "conv3d_bn": 1,
    "conv_transpose_bn": 1,
    "grouped_conv_transpose_bn": 1,
    "linear_bn": 1,
    "bn_conv_unpadded": 1,
    "bn_conv_no_bias": 1,
    "bn_grouped_conv": 1,
    "bn_conv_padded_reflect": 1,
    "bn_linear": 1,
    "conv_bn_conv": 1,
    "conv_bn_bn": 2,
    "shared_bn": 2,
    "shared_conv": 2,
    "bn_conv_padded": "conv2d pads with zeros, which the shift does not reach",
    "bn_conv_transpose": "at the border of conv_transpose2d fewer taps meet",
    "conv_relu_bn": "no linear operator is next to it: it reads relu and is read by output",
    "bn_relu_conv": "no linear operator is next to it: it reads input_1 and is read by relu",
    "bn_alone": "no linear operator is next to it",
    "conv_bn_no_statistics": "it normalises by the statistics of its batch",
    "linear_bn_other_axis": "linear writes axis 2, the norm works along axis 1",
    "conv_read_twice": "conv2d is read by 2 nodes (batch_norm, add)",
}


def _position(name: str, expected: int | str) -> Example:
    module, shape = _BATCH_NORMS[name]
    if isinstance(expected, str):
        return Example(name, module, shape, declines=expected)
    return Example(name, module, shape, fires=expected)


class _Sequence(nn.Module):
    """Modules one after the other, with functions between."""

    def __init__(self, *steps: object) -> None:
        super().__init__()
        self.steps = steps
        self.held = nn.ModuleList([step for step in steps if isinstance(step, nn.Module)])

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)  # type: ignore[operator]
        return x


def _unshifted(module: nn.Sequential) -> None:
    module[0].bias.zero_()  # type: ignore[union-attr,operator]
    module[0].running_mean.zero_()  # type: ignore[union-attr,operator]


class _TwoReaders(nn.Module):
    """Two linears read the batch norm; or a linear and somebody else."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.norm, self.one, self.two, self.other = nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Linear(6, 4), other

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = self.one(x) + self.two(x)
        return y + x[:, :4] if self.other else y  # type: ignore[no-any-return]


class _SharedAfterNorms(nn.Module):
    """One convolution, read through two batch norms of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.conv = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm1(x)) + self.conv(self.norm2(torch.relu(x)))  # type: ignore[no-any-return]


def _computed_weight(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    y = functional.conv2d(x, weight * x.mean(), None)
    return functional.batch_norm(y, mean, var, None, None)


def _computed_statistics(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return functional.batch_norm(functional.conv2d(x, weight), mean * x.mean(), var, None, None)


_IMAGE = (2, 3, 8, 8)
_WEIGHTS = {"weight": torch.rand(4, 3, 3, 3), "buffer_mean": torch.rand(4), "buffer_var": torch.rand(4) + 0.5}

MORE = [
    Example(
        "linear_transpose_bn",
        lambda: _Sequence(nn.Linear(6, 4), lambda x: x.transpose(1, 2), nn.BatchNorm1d(4)),
        (3, 5, 6),
        fires=1,
        golden="""
        linear = linear(x, @held.0.weight, @held.0.bias)
        transpose = transpose(linear, 1, dim1=2)
        return transpose
        """,
    ),
    Example(
        "bn_transpose_linear",
        lambda: _Sequence(nn.BatchNorm1d(6), lambda x: x.transpose(1, 2), nn.Linear(6, 4)),
        (3, 6, 5),
        fires=1,
        golden="""
        transpose = transpose(x, 1, dim1=2)
        linear = linear(transpose, @held.1.weight, @held.1.bias)
        return linear
        """,
    ),
    Example(
        "bn_flatten_linear",
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16, 4)),
        (2, 3, 4, 4),
        fires=1,
    ),
    Example(
        "bn_linear_over_another_axis",
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)),
        (3, 6, 6),
        declines="linear contracts axis 2, the norm works along axis 1",
    ),
    Example("bn_conv_replicate", lambda: _replicated("replicate"), _IMAGE, fires=1),
    Example("bn_conv_circular", lambda: _replicated("circular"), _IMAGE, batch=False),
    Example(
        "bn_depthwise_conv", lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3)), _IMAGE, fires=1
    ),
    Example(
        "bn_two_readers",
        lambda: _TwoReaders(False),
        (3, 6),
        fires=1,
        golden="""
        linear = linear(x, @one.weight, @one.bias)
        linear_1 = linear(x, @two.weight, @two.bias)
        add = add(linear, linear_1)
        return add
    """,
    ),
    Example("bn_one_reader_is_not_linear", lambda: _TwoReaders(True), (3, 6), declines="is read by slice_1"),
    Example("norms_before_a_shared_conv", _SharedAfterNorms, _IMAGE, fires=2),
    Example(
        "bn_without_shift_conv_padded",
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
        _IMAGE,
        fires=1,
        prepare=_unshifted,
    ),
    Example(
        "bn_without_shift_conv_transpose",
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3, 2, 1)),
        _IMAGE,
        fires=1,
        prepare=_unshifted,
    ),
    Example(
        "bn_without_shift_grouped_conv_transpose",
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2)),
        (2, 4, 8, 8),
        fires=1,
        prepare=_unshifted,
    ),
    Example(
        "bn_returned_and_read",
        lambda: Function(
            lambda x, w, m, v: (y := functional.batch_norm(x, m, v), functional.linear(y, w)),
            w=torch.rand(4, 6),
            buffer_m=torch.rand(6),
            buffer_v=torch.rand(6) + 0.5,
        ),
        (3, 6),
        declines="the program returns batch_norm",
    ),
    Example(
        "weight_is_computed",
        lambda: Function(_computed_weight, **_WEIGHTS),
        _IMAGE,
        declines="w of batch_norm is computed by mul, not a weight",
    ),
    Example(
        "statistics_are_computed",
        lambda: Function(_computed_statistics, **_WEIGHTS),
        _IMAGE,
        declines="mean of batch_norm is computed by mul, not a weight",
    ),
]


def _replicated(mode: str) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))


test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(
    PASS, [*(_position(name, expected) for name, expected in POSITIONS.items()), *MORE]
)


def test_every_position_of_the_model_zoo_is_here() -> None:
    assert set(POSITIONS) == set(BATCH_NORMS)


def _filled(name: str, value: float) -> Callable[[str, Tensor], Tensor]:
    """Return a change of one weight's first number, after capture, which refuses a model with NaN."""

    def change(weight_name: str, weight: Tensor) -> Tensor:
        if weight_name != name:
            return weight
        changed = weight.detach().clone()
        changed.view(-1)[0] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("1.weight", math.nan, "weight 1.weight holds NaN or infinity"),
        ("0.weight", math.inf, "weight 0.weight holds NaN or infinity"),
        ("1.running_var", -1.0, "a variance of 1.running_var plus eps is -0.99999"),
        ("1.running_var", 1e-40, ""),
    ],
)
def test_numbers_that_are_none(name: str, value: float, reason: str) -> None:
    def module() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    program = before(Example("bad", module, _IMAGE), PASS).map_weights(_filled(name, value))
    after, changes = apply(PASS, program)
    assert operators(after) == (["conv2d", "batch_norm"] if reason else ["conv2d"])
    assert [site.reason for site in changes.skipped] == ([reason] if reason else [])


def test_declines_what_overflows() -> None:
    def module() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half()

    program = before(Example("huge", module, lambda: (torch.randn(2, 3, 8, 8).half(),)), PASS)
    program = program.map_weights(_filled("1.weight", 3e4)).map_weights(_filled("1.running_var", 0.0))
    after, changes = apply(PASS, program)
    assert operators(after) == ["conv2d", "batch_norm"]
    assert [site.reason for site in changes.skipped] == ["the folded weight would overflow torch.float16"]


def test_a_shared_weight_is_not_overwritten() -> None:
    example = _position("shared_conv", 2)
    program = before(example, PASS)
    original = program.weight("conv.weight").clone()
    after, _ = apply(PASS, program)
    weights = [arguments(node)["weight"].target for node in after.nodes if operator(node) == "conv2d"]
    assert len(set(weights)) == 2
    assert torch.equal(program.weight("conv.weight"), original)


def test_uses_that_get_the_same_edit_share_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(torch.relu(self.norm(self.conv(x)))))  # type: ignore[no-any-return]

    example = Example("twice", Twice, _IMAGE, fires=2)
    after, changes = apply(PASS, before(example, PASS))
    assert len(changes.touched) == 2
    assert sorted(after.weights) == ["conv.bias", "conv.weight"]


def test_names_and_types_stay() -> None:
    after, _ = apply(PASS, before(_position("conv_bn_no_bias", 1), PASS))
    assert sorted(after.weights) == ["0.bias", "0.weight"]
    assert all(isinstance(weight, nn.Parameter) for weight in after.weights.values())


# Random networks ------------------------------------------------------------------------------------------------------

_LAYERS = st.lists(
    st.sampled_from(
        ["conv", "padded", "grouped", "transposed", "reflect", "norm", "norm", "relu", "plain_norm", "fork"]
    ),
    min_size=1,
    max_size=6,
)


class _Fork(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def _layer(kind: str, bias: bool) -> nn.Module:
    match kind:
        case "conv":
            return nn.Conv2d(4, 4, 2, bias=bias)
        case "padded":
            return nn.Conv2d(4, 4, 3, padding=1, bias=bias)
        case "grouped":
            return nn.Conv2d(4, 4, 2, groups=2, bias=bias)
        case "transposed":
            return nn.ConvTranspose2d(4, 4, 2, groups=2, bias=bias)
        case "reflect":
            return nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=bias)
        case "norm":
            return nn.BatchNorm2d(4)
        case "plain_norm":
            return nn.BatchNorm2d(4, affine=False)
        case "fork":
            return _Fork(nn.BatchNorm2d(4))
        case _:
            return nn.ReLU()


# Shrinking a failure would export a model hundreds of times.
@settings(max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(layers=_LAYERS, bias=st.booleans(), head=st.sampled_from(["none", "flatten", "pool"]))
def test_random_networks(layers: list[str], bias: bool, head: str) -> None:
    def module() -> nn.Module:
        body = [_layer(kind, bias) for kind in layers]
        end: list[nn.Module] = []
        if head == "pool":
            end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=bias), nn.BatchNorm1d(3)]
        elif head == "flatten":
            size = nn.Sequential(*body).eval()(torch.zeros(1, 4, 9, 9)).flatten().shape[0]
            end = [nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(size, 3, bias=bias)]
        return nn.Sequential(*body, *end)

    example = Example("random", module, (2, 4, 9, 9), batch=False)
    check_means_the_same(PASS, example)
    after, changes = apply(PASS, before(example, PASS))
    kept = [node.name for node in after.nodes if operator(node) == "batch_norm"]
    assert set(kept) == {site.node for site in changes.skipped}, "each batch norm that stays has its reason"
    assert not apply(PASS, after)[1].changed
