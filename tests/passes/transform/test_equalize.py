"""equalize: channel ranges on both sides of every space that passes a positive scale."""

from __future__ import annotations

import pytest
import torch
from harness import Example, apply, before, four_tests
from small_decoder import Decoder, example_ids
from torch import Tensor, nn

from graphopt.errors import GraphoptError
from graphopt.passes import Equalize

PASS = Equalize()


def _unbalance(module: nn.Sequential) -> None:
    """Scale the channels of the first layer by up to 2^±5 and undo it in the next: the function stays."""
    first, second = (layer for layer in module if isinstance(layer, nn.Linear | nn.Conv2d))
    scale = 2.0 ** torch.linspace(-5, 5, len(first.weight))
    first.weight.mul_(scale.reshape(-1, *[1] * (first.weight.dim() - 1)))
    first.bias.mul_(scale)
    second.weight.div_(scale.reshape(1, -1, *[1] * (second.weight.dim() - 2)))


class Depthwise(nn.Module):
    """Pointwise, depthwise and pointwise convolutions with batch norms, beside a residual. x: [batch, 4, 6, 6]."""

    def __init__(self, bound: bool = False) -> None:
        super().__init__()
        act = nn.ReLU6() if bound else nn.ReLU()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), act,
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), act,
            nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer called twice: what it writes it also reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.layer(self.layer(x).relu()).relu())
        return y


LINEAR = Example(
    "linear", lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), (2, 5), fires=1, prepare=_unbalance
)
EXAMPLES = [
    LINEAR,
    Example(
        "conv",
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 2, 3)),
        (2, 3, 8, 8),
        fires=1,
        prepare=_unbalance,
    ),
    Example("depthwise", Depthwise, (2, 4, 6, 6), fires=2),
    Example("bounded", lambda: Depthwise(bound=True), (2, 4, 6, 6), declines="passes no scale"),
    Example("gelu", lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)), (2, 5), declines="gelu"),
    Example("decoder", Decoder, example_ids),
    Example("shared", Twice, (2, 6)),
    Example("alone", lambda: nn.Sequential(nn.Linear(5, 7)), (2, 5), fires=0),
    Example(
        "dead_channel",
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)),
        (2, 5),
        fires=1,
        prepare=lambda module: (_unbalance(module), module[0].weight[2].zero_(), module[2].weight[:, 4].zero_()),
    ),
]
test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(PASS, EXAMPLES)


def test_ranges_are_the_geometric_mean_of_what_they_were() -> None:
    program = before(LINEAR, PASS)
    after, changes = apply(PASS, program)
    old, new = (
        (each.weights["0.weight"].abs().amax(1), each.weights["2.weight"].abs().amax(0)) for each in (program, after)
    )
    expected = (old[0] * old[1]).sqrt()
    torch.testing.assert_close(new[0], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(new[1], expected, rtol=1e-4, atol=0)
    was, now = changes.facts["imbalance"]["0.out"]
    assert was > 100 and now < 20


def test_every_space_of_a_chain_is_balanced_in_the_end() -> None:
    after, _ = apply(Equalize(convergence=1e-3), before(EXAMPLES[2], PASS))
    first, depthwise, last = (after.weights[f"body.{index}.weight"] for index in (0, 3, 6))
    rows = depthwise.abs().amax((1, 2, 3))
    torch.testing.assert_close(first.abs().amax((1, 2, 3)), rows, rtol=5e-3, atol=0)
    torch.testing.assert_close(rows, last.abs().amax((0, 2, 3)), rtol=5e-3, atol=0)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"convergence": 0.0}, {"convergence": 1.0}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(GraphoptError, match="equalize"):
        Equalize(**options)  # type: ignore[arg-type]
