"""A decoder with all that rotations and scales meet, in a handful of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Decoder(nn.Module):
    """Tokens, one block of grouped attention and a gated MLP, a head.

    Attributes:
        post: whether a norm writes the residual after the attention.
        spelled: whether attention is products and a softmax.
        partial: whether positions rotate only half of a head, so that weights may rotate the other half.
        capped: whether scores pass a tanh before the softmax; spelled attention only.
    """

    def __init__(
        self,
        width: int = 12,
        post: bool = False,
        spelled: bool = False,
        norm: type = nn.RMSNorm,
        *,
        partial: bool = False,
        capped: bool = False,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.one, self.two, self.last = norm(width), norm(width), norm(width)
        self.after = norm(width) if post else nn.Identity()
        self.q, self.k, self.v = nn.Linear(width, 16), nn.Linear(width, 8), nn.Linear(width, 8)
        self.o = nn.Linear(16, width)
        self.gate, self.up, self.down = nn.Linear(width, 20), nn.Linear(width, 20), nn.Linear(20, width)
        self.head = nn.Linear(width, 11)
        self.spelled, self.capped = spelled, capped
        self.turned = 2 if partial else 4

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, 4)).transpose(1, 2) for each in (self.q, self.k, self.v))
        half = self.turned // 2
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1][:half])
        cos, sin = (each(torch.cat((angle, angle), -1)) for each in (torch.cos, torch.sin))
        q, k = (self.turn(each, cos, sin) for each in (q, k))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.spelled:
            scores = q @ k.mT / 2
            y = (torch.tanh(scores) if self.capped else scores).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x, rest = x[..., : self.turned], x[..., self.turned :]
        half = self.turned // 2
        x = x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
        return torch.cat((x, rest), -1) if rest.shape[-1] else x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.after(x + self.attend(self.one(x)))
        y = self.two(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        z: Tensor = self.head(self.last(x))
        return z


def example_ids() -> tuple[Tensor, ...]:
    """Two sequences of five tokens."""
    return (torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1)),)
