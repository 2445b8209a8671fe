"""A convolution takes over the padding before it where it can say it."""

from __future__ import annotations

import torch
from harness import Example, four_tests
from torch import Tensor, nn

from graphopt.passes import Canonicalize


class Padded(nn.Module):
    def __init__(self, axes: int, widths: tuple[int, ...], value: float | None = None, **options: object) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](3, 4, 3, **options)  # type: ignore[arg-type]
        self.widths, self.value = widths, value

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, self.widths, value=self.value))  # type: ignore[no-any-return]


class ReadTwice(Padded):
    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, self.widths)
        return self.conv(padded).sum() + padded.sum()  # type: ignore[no-any-return]


IMAGE = (2, 3, 8, 7)
RULE = "merge_padding"
EXAMPLES = [
    Example(
        "two_axes",
        lambda: Padded(2, (1, 1, 2, 2), padding=1),
        IMAGE,
        fires=1,
        rule=RULE,
        golden="""
        conv2d = conv2d(x, @conv.weight, @conv.bias, padding=[3, 2])
        return conv2d
        """,
    ),
    Example("one_axis", lambda: Padded(1, (2, 2), stride=2), (2, 3, 9), fires=1, rule=RULE),
    Example("one_of_two_axes", lambda: Padded(2, (1, 1)), IMAGE, fires=1, rule=RULE),
    Example("three_axes", lambda: Padded(3, (1, 1, 0, 0, 2, 2), dilation=2), (2, 3, 6, 6, 7), fires=1, rule=RULE),
    Example("read_by_others", lambda: ReadTwice(2, (1, 1, 1, 1)), IMAGE, fires=1, rule=RULE),
    Example("uneven", lambda: Padded(2, (0, 1, 0, 1)), IMAGE, declines="pads one side more than the other"),
    Example("cut", lambda: Padded(2, (-1, -1, 0, 0)), IMAGE, declines="pads one side more than the other"),
    Example("ones", lambda: Padded(2, (1, 1), value=1.0), IMAGE, declines="something else than zeros"),
    Example(
        "batch",
        lambda: Padded(2, (1, 1, 1, 1, 0, 0, 1, 1)),
        IMAGE,
        declines="pads more than the axes of space",
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(Canonicalize(), EXAMPLES)


def test_the_shape_stays() -> None:
    module = Padded(2, (1, 1, 2, 2), padding=1)
    assert module(torch.zeros(IMAGE)).shape == (2, 4, 12, 9)
