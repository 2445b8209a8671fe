"""The residual stream of the language model rotated and sliced, layer by layer, as a method to compare with.

    x_l -> x_l Q_l,  Q_l: the eigenvectors of sum x x^T of what the norm of half-layer l gives, the first n of them

Every half-layer (an attention, an MLP) reads in its own coordinates and writes in those of the next, and so does what
it is added to, by Q_l^T Q_l+1: matrices that are kept ("SliceGPT: Compress Large Language Models by Deleting Rows and
Columns"). Each half-layer is seen as the sliced ones before it leave it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from language.model import LanguageModel


class Sliced(nn.Module):
    """A language model whose stream has `width` coordinates."""

    def __init__(self, model: LanguageModel, width: int, calibration: Sequence[Tensor]) -> None:
        super().__init__()
        self._shape, self._full = model.shape, model.shape.width
        self.cos, self.sin = model.cos, model.sin
        weights: list[dict[str, Tensor]] = []
        with torch.no_grad():
            full = [model.table(ids) for ids in calibration]  # what stands there, seen from outside
            turn = self._principal(full, width)
            self.table = nn.Parameter(model.table.weight @ turn)
            sliced = [x @ turn for x in full]
            for block in model.layers:
                for norm, half in ((block.attention_norm, "attention"), (block.mlp_norm, "mlp")):
                    own = self._half(block, half, norm.weight, turn)
                    # In the coordinates of the model.
                    full = [x @ turn.mT + self._added(own, half, self._normed(x)) for x in sliced]
                    after = self._principal(full, width)
                    own["out"] = after.mT @ own["out"]
                    own["skip"] = turn.mT @ after
                    sliced = [x @ own["skip"] + self._added(own, half, self._normed(x)) for x in sliced]
                    weights.append(own)
                    turn = after
            self.head = nn.Parameter(model.head.weight * model.norm.weight @ turn)
        self.halves = nn.ModuleList(nn.ParameterDict(each) for each in weights)

    def forward(self, ids: Tensor) -> Tensor:
        x = functional.embedding(ids, self.table)
        for index, own in enumerate(self.halves):
            assert isinstance(own, nn.ParameterDict)
            x = x @ own["skip"] + self._added(own, ("attention", "mlp")[index % 2], self._normed(x))
        return functional.linear(self._normed(x), self.head)

    def _principal(self, values: Sequence[Tensor], width: int) -> Tensor:
        moment = torch.zeros(self._full, self._full, dtype=torch.float64)
        for x in values:
            rows = functional.rms_norm(x, (self._full,), eps=1e-5).flatten(0, -2).double()
            moment += rows.mT @ rows
        vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
        return vectors.flip(-1)[:, :width].float()

    def _normed(self, x: Tensor) -> Tensor:
        """Divide by the root of the mean over as many coordinates as there were."""
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self._full + 1e-5)

    def _half(self, block: nn.Module, half: str, gain: Tensor, turn: Tensor) -> dict[str, Tensor]:
        names = ("q", "k", "v") if half == "attention" else ("gate", "up")
        owner, last = (block.attention, "o") if half == "attention" else (block, "down")
        read = {name: getattr(owner, name).weight * gain @ turn for name in names}
        return read | {"out": getattr(owner, last).weight.clone()}

    def _added(self, own: nn.ParameterDict | dict[str, Tensor], half: str, y: Tensor) -> Tensor:
        if half == "mlp":
            return (functional.silu(y @ own["gate"].mT) * (y @ own["up"].mT)) @ own["out"].mT
        shape, length = self._shape, y.shape[1]
        dim, cos, sin = shape.width // shape.heads, self.cos[:length], self.sin[:length]
        rows = (y @ own[name].mT for name in ("q", "k", "v"))
        q, k, v = (x.reshape(*x.shape[:2], -1, dim).transpose(1, 2) for x in rows)
        q, k = (each * cos + _turned(each) * sin for each in (q, k))
        k, v = (each.repeat_interleave(shape.heads // shape.groups, 1) for each in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2) @ own["out"].mT


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def sliced_to(model: LanguageModel, share: float, calibration: Sequence[Tensor]) -> Sliced:
    """Return the widest sliced model with at most this share of the parameters, multiples of 8 wide."""
    limit = share * sum(each.numel() for each in model.parameters())
    shape = model.shape
    read = shape.width + 2 * (shape.width * shape.groups // shape.heads) + shape.width + 3 * shape.hidden
    best = max(
        width for width in range(8, shape.width + 1, 8)
        if width * (2 * model.head.weight.shape[0] + shape.layers * read) + 2 * shape.layers * width**2 <= limit
    )  # fmt: skip
    return Sliced(model, best, calibration)
