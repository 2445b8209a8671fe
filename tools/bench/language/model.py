"""A small language model over bytes, of the kind that large ones are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: `heads` queries share each of `groups` keys and values."""

    width: int = 256
    hidden: int = 640
    layers: int = 5
    heads: int = 8
    groups: int = 4
    context: int = 128


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings. x: [batch, length, width]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dim = shape.width // shape.heads
        self.repeats = shape.heads // shape.groups
        self.q = nn.Linear(shape.width, shape.heads * self.dim, bias=False)
        self.k = nn.Linear(shape.width, shape.groups * self.dim, bias=False)
        self.v = nn.Linear(shape.width, shape.groups * self.dim, bias=False)
        self.o = nn.Linear(shape.heads * self.dim, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for each in (self.q, self.k, self.v))
        q, k = (each * cos + _turned(each) * sin for each in (q, k))
        k, v = (each.repeat_interleave(self.repeats, 1) for each in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


class Block(nn.Module):
    """Attention and a gated MLP, each behind an RMS norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(shape.width, 1e-5), Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width, 1e-5)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.mlp_norm(x)
        out: Tensor = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return out


class LanguageModel(nn.Module):
    """Bytes [batch, length] to logits [batch, length, 256]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.table = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, 1e-5)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        dim = shape.width // shape.heads
        angles = torch.outer(torch.arange(shape.context), 1e4 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    @property
    def layers(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.layers:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits
