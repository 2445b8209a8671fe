"""A decoder with a cache, one token at a time: what is exported for decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class CachedDecoder(nn.Module):
    """Pre-norm blocks of grouped attention and a gated MLP; keys and values of past tokens come in and go out.

    forward(token [b, 1], position [1], keys and values [layers, b, heads, length, head]) gives logits [b, 1,
    vocabulary] and the caches with the new token at `position`.
    """

    def __init__(
        self, vocabulary: int = 97, width: int = 64, layers: int = 2, heads: int = 4, length: int = 16
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.shape = (layers, heads // 2, length, width // heads)

    def caches(self, batch: int = 1) -> tuple[Tensor, Tensor]:
        layers, heads, length, size = self.shape
        return torch.zeros(layers, batch, heads, length, size), torch.zeros(layers, batch, heads, length, size)

    def forward(self, token: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.table(token)
        new_keys, new_values = [], []
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, position, keys[i], values[i])
            new_keys.append(k)
            new_values.append(v)
        return self.head(self.norm(x)), torch.stack(new_keys), torch.stack(new_values)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.one, self.two = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.heads = heads

    def forward(self, x: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.one(x)
        size = keys.shape[-1]
        q, k, v = (each(h).unflatten(-1, (-1, size)).transpose(1, 2) for each in (self.q, self.k, self.v))
        keys = keys.index_copy(2, position, k)
        values = values.index_copy(2, position, v)
        seen = torch.arange(keys.shape[2]) <= position
        y = functional.scaled_dot_product_attention(
            q, keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1), attn_mask=seen[None, None, None]
        )
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.two(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h)), keys, values
