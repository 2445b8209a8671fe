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
    """

    def __init__(self, width: int = 12, post: bool = False, spelled: bool = False, norm: type = nn.RMSNorm) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.one, self.two, self.last = norm(width), norm(width), norm(width)
        self.after = norm(width) if post else nn.Identity()
        self.q, self.k, self.v = nn.Linear(width, 16), nn.Linear(width, 8), nn.Linear(width, 8)
        self.o = nn.Linear(16, width)
        self.gate, self.up, self.down = nn.Linear(width, 20), nn.Linear(width, 20), nn.Linear(20, width)
        self.head = nn.Linear(width, 11)
        self.spelled = spelled

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, 4)).transpose(1, 2) for each in (self.q, self.k, self.v))
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = (each(torch.cat((angle, angle), -1)) for each in (torch.cos, torch.sin))
        q, k = (each * cos + torch.cat((-each[..., 2:], each[..., :2]), -1) * sin for each in (q, k))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.spelled:
            y = (q @ k.mT / 2).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out

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
