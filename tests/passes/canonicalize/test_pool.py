"""A mean over space is a global average pool, behind a convolution."""

from __future__ import annotations

import torch
from harness import Example, Function, four_tests
from torch import Tensor, nn

from graphopt.passes import Canonicalize


def _behind(*steps: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *steps)


class _Mean(nn.Module):
    def __init__(self, dims: object, keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=self.keepdim)  # type: ignore[no-any-return,call-overload]


IMAGE = (2, 3, 8, 8)
EXAMPLES = [
    Example(
        "keepdim",
        lambda: _behind(_Mean((2, 3), True)),
        IMAGE,
        fires=1,
        golden="""
        conv2d = conv2d(input_1, @0.weight, @0.bias)
        adaptive_avg_pool2d = adaptive_avg_pool2d(conv2d, [1, 1])
        return adaptive_avg_pool2d
        """,
    ),
    Example(
        "flat",
        lambda: _behind(nn.SiLU(), nn.ReLU(), _Mean((-1, -2))),
        IMAGE,
        fires=1,
        golden="""
        conv2d = conv2d(input_1, @0.weight, @0.bias)
        silu = silu(conv2d)
        relu = relu(silu)
        adaptive_avg_pool2d = adaptive_avg_pool2d(relu, [1, 1])
        reshape = reshape(adaptive_avg_pool2d, [-1, 4])
        return reshape
        """,
    ),
    Example(
        "behind_a_norm", lambda: _behind(nn.BatchNorm2d(4), _Mean((2, 3))), IMAGE, fires=1, rule="write_global_pool"
    ),
    Example("one_axis", lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.SiLU(), _Mean(2)), (2, 3, 8), fires=1),
    Example("three_axes", lambda: nn.Sequential(nn.Conv3d(3, 4, 3), _Mean((2, 3, 4), True)), (2, 3, 4, 4, 4), fires=1),
    Example("after_a_pool", lambda: _behind(nn.MaxPool2d(2), nn.Hardswish(), _Mean((2, 3))), IMAGE, fires=1),
    Example("one_of_the_axes", lambda: _behind(_Mean((3,))), IMAGE, fires=0),
    Example("channels_too", lambda: _behind(_Mean((1, 2, 3))), IMAGE, fires=0),
    Example(
        "no_convolution",
        lambda: Function(lambda x: x.sin().mean((2, 3))),
        IMAGE,
        declines="sin does not come from a convolution",
    ),
    Example(
        "axes_moved",
        lambda: Function(lambda x, w: torch.conv2d(x, w).permute(0, 2, 3, 1).mean((2, 3)), w=torch.rand(4, 3, 3, 3)),
        IMAGE,
        declines="permute does not come from a convolution",
    ),
    Example("tokens", lambda: nn.Sequential(nn.Linear(6, 6), _Mean(2, True)), (2, 4, 6), fires=0),
    Example(
        "in_another_type",
        lambda: Function(lambda x, w: torch.conv2d(x, w).mean((2, 3), dtype=torch.float64), w=torch.rand(4, 3, 3, 3)),
        IMAGE,
        fires=0,
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(Canonicalize(), EXAMPLES)
