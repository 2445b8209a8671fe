"""center_norms: the mean subtraction of layer norms into what writes their input."""

from __future__ import annotations

import torch
from harness import Example, apply, before, four_tests
from torch import Tensor, nn
from torch.nn import functional

from graphopt.ir import operator
from graphopt.passes import CenterNorms

PASS = CenterNorms()


class Residual(nn.Module):
    """Tokens, positions and a class token on a residual stream that layer norms read; a branch; a head.

    Attributes:
        peek: whether a linear reads the stream without a norm.
        post: whether a norm writes the stream.
        clamp: whether the branch ends in a nonlinearity.
    """

    def __init__(self, peek: bool = False, post: bool = False, clamp: bool = False) -> None:
        super().__init__()
        self.table, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(6, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.one, self.two, self.last = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.peek, self.post, self.clamp = peek, post, clamp

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(ids.shape[0], -1, -1), self.table(ids)], 1) + self.position
        if self.post:
            x = self.two(x)
        y = self.down(functional.gelu(self.up(self.one(x))))
        x = x + (y.clamp(-1, 1) if self.clamp else y)
        z: Tensor = self.head(self.last(x))
        return z + self.head(x) if self.peek else z


def _ids() -> tuple[Tensor, ...]:
    return (torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1)),)


EXAMPLES = [
    Example("residual", Residual, _ids, fires=2),
    Example("read_without_norm", lambda: Residual(peek=True), _ids, declines="reads it without removing the mean"),
    Example(
        "post_norm",
        lambda: Residual(post=True),
        _ids,
        fires=1,
        declines="writes it, a layer norm with an affine (two.weight)",
    ),
    Example("nonlinear_writer", lambda: Residual(clamp=True), _ids, declines="clamp"),
    Example("input", lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)), (2, 8), declines="no weight writes"),
    Example(
        "affine_stays",
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)),
        (2, 4),
        fires=1,
        golden="""
        linear = linear(input_1, @0.weight, @0.bias)
        rms_norm = rms_norm(linear, [8], @1.weight, eps=1e-05)
        add = add(rms_norm, @1.bias)
        gelu = gelu(add)
        linear_1 = linear(gelu, @3.weight, @3.bias)
        return linear_1
        """,
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(PASS, EXAMPLES)


def test_every_writer_is_centered() -> None:
    """Tokens, positions, the class token, the branch's weight and its bias have no mean any more."""
    after, _ = apply(PASS, before(EXAMPLES[0], PASS))
    weights = {name: value.double() for name, value in after.weights.items()}
    for name, dim in {"table.weight": 1, "position": -1, "token": -1, "down.weight": 0, "down.bias": 0}.items():
        assert weights[name].mean(dim).abs().max() < 1e-7, name
    assert not [node for node in after.nodes if operator(node) == "layer_norm"]
