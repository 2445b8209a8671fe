"""In half precision a program still means what it meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.cuda.halves import in_halves


class _Masked(nn.Module):
    """Attention as some write it: hidden places are filled with the lowest float32; a whole row may be hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.full((4,), torch.finfo(torch.float32).min))
        self.norm = nn.RMSNorm(8)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        first = scores.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
        second = torch.where(seen, scores, self.low).softmax(-1)
        third = (scores + torch.full((4, 4), -3.0e38).tril(-1)).softmax(-1)
        return self.norm((first + second + third) @ x * 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lowest_numbers_and_epsilons(dtype: torch.dtype) -> None:
    x, seen = torch.randn(4, 8), torch.ones(4, 4, dtype=torch.bool).tril()
    seen[2] = False
    program = graphopt.capture(_Masked().eval(), (x, seen))
    (wanted,) = program.run(program.flat_example)
    (got,) = in_halves(program, dtype).run([x.to(dtype), seen])
    assert got.dtype == dtype and got.isfinite().all()
    assert (got.float() - wanted).abs().max() < (2e-2 if dtype is torch.float16 else 1e-1)


def test_infinities_stay() -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("odd", torch.tensor([torch.inf, -torch.inf, 1e30, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x > 0, -torch.inf) + self.odd

    x = torch.tensor([-1.0, -1.0, -1.0, 1.0])
    twin = in_halves(graphopt.capture(Infinite(), (x,)), torch.float16)
    assert next(iter(twin.weights.values())).tolist() == [torch.inf, -torch.inf, 65504, 1]
    assert twin.run([x.half()])[0].tolist() == [torch.inf, -torch.inf, 65504, -torch.inf]
