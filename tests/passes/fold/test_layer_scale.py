"""fold_layer_scale: vectors behind linears and convolutions, on whichever axis and side they stand."""

from __future__ import annotations

import torch
from harness import Example, Function, apply, before, four_tests
from torch import Tensor, nn

import graphopt
from graphopt.passes import FoldLayerScale, Rotate

PASS = FoldLayerScale()


class Scaled(nn.Module):
    """A layer, and a vector of a shape of its own behind it."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], first: bool = False) -> None:
        super().__init__()
        self.layer, self.scale, self.first = layer, nn.Parameter(torch.full(shape, 0.5)), first

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return self.scale * y if self.first else y * self.scale


class Channels(nn.Module):
    """A convolution whose channels are moved to the back, scaled there, and moved forth again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x).permute(0, 2, 3, 1) * self.scale).permute(0, 3, 1, 2)


class Shared(nn.Module):
    """A linear layer used twice, scaled once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x) * self.scale)


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * self.scale + y


EXAMPLES = [
    Example(
        "linear",
        lambda: Scaled(nn.Linear(6, 4), (4,)),
        (3, 6),
        fires=1,
        golden="""
        linear = linear(x, @layer.weight, @layer.bias)
        return linear
        """,
    ),
    Example("vector_first", lambda: Scaled(nn.Linear(6, 4, bias=False), (1, 4), first=True), (3, 6), fires=1),
    Example("convolution", lambda: Scaled(nn.Conv2d(4, 6, 3, groups=2), (6, 1, 1)), (2, 4, 5, 5), fires=1),
    Example("transposed", lambda: Scaled(nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 6, 1)), (2, 4, 5), fires=1),
    Example("channels_last", Channels, (2, 3, 6, 6), fires=1),
    Example("shared", Shared, (3, 4), fires=1),
    Example("another_axis", lambda: Scaled(nn.Linear(6, 4), (5, 1)), (2, 5, 6), declines="writes axis 2, the norm"),
    Example("read_twice", ReadTwice, (3, 4), declines="linear is read by 2 nodes"),
    Example("a_number", lambda: Scaled(nn.Linear(6, 4), (1,)), (3, 6), fires=0),
    Example("a_matrix", lambda: Scaled(nn.Linear(6, 4), (3, 4)), (3, 6), fires=0, batch=False),
    Example("no_linear", lambda: Scaled(nn.ReLU(), (6,)), (3, 6), fires=0),
    Example(
        "computed",
        lambda: Function(lambda x, w: nn.functional.linear(x, w) * x.sum(-2)[:4], w=torch.rand(4, 4)),
        (3, 4),
        fires=0,
        batch=False,
    ),
]
test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(PASS, EXAMPLES)


def test_a_factor_of_zero_silences_the_channel() -> None:
    def silent(module: Scaled) -> None:
        module.scale[1] = 0

    example = Example("zero", lambda: Scaled(nn.Linear(6, 4), (4,)), (3, 6), prepare=silent)
    after, _ = apply(PASS, before(example, PASS))
    assert not after.weights["layer.weight"][1].any() and not after.weights["layer.bias"][1].any()


def test_a_stream_behind_layer_scales_can_be_rotated() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
            self.scale = nn.Parameter(torch.full((8,), 0.3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(self.norm(x)).relu()) * self.scale

    model = nn.Sequential(nn.Linear(5, 8), Block(), Block(), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    record = graphopt.optimize(model, (torch.randn(2, 5),), [Rotate(values=False)]).trace["rotate"]
    assert [site.reason for site in record.touched] == ["rotated 0.out (8), 9 weights"]
    assert record.error < 1e-12
