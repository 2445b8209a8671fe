"""Outliers as large models have them, planted without changing the function.

    fold      norm gains into their readers                           gain -> 1, W -> W diag(gain)
    align     the residual stream with its principal axes             x -> Vᵀ x
    norms     a few gains up, their readers' columns down             gain_c -> f gain_c, W_:c -> W_:c / f
    hidden    a few up-projection rows up, down-projection columns down

Training leaves the principal axes of a residual stream anywhere; in large models they lie along coordinates, which is
what makes single channels large. f is drawn between 20 and 60.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from language.model import LanguageModel


@torch.no_grad()
def plant(model: LanguageModel, ids: Tensor, seed: int = 0, count: int = 6) -> LanguageModel:
    """Return a copy of the model with outliers; `ids` [batch, length] is text to find the principal axes by.

    `count` channels of every norm, the same ones, and as many hidden coordinates of every MLP become large.
    """
    planted = copy.deepcopy(model).double()
    for norm, readers in norms(planted):
        for reader in readers:
            reader.weight.mul_(norm.weight)
        norm.weight.fill_(1)
    _rotate(planted, principal_axes(planted, ids))
    generator = torch.Generator().manual_seed(seed)

    def factors() -> Tensor:
        return 20 + 40 * torch.rand(count, generator=generator, dtype=torch.float64)

    channels = torch.randperm(planted.shape.width, generator=generator)[:count]
    for norm, readers in norms(planted):
        factor = factors()
        norm.weight[channels] *= factor
        for reader in readers:
            reader.weight[:, channels] /= factor
    for block in planted.layers:
        rows, factor = torch.randperm(planted.shape.hidden, generator=generator)[:count], factors()
        block.up.weight[rows] *= factor[:, None]
        block.down.weight[:, rows] /= factor
    return planted.float()


def norms(model: LanguageModel) -> Iterator[tuple[nn.RMSNorm, list[nn.Linear]]]:
    """Yield each norm with the linears that read it."""
    for block in model.layers:
        yield block.attention_norm, [block.attention.q, block.attention.k, block.attention.v]
        yield block.mlp_norm, [block.gate, block.up]
    yield model.norm, [model.head]


def principal_axes(model: LanguageModel, ids: Tensor) -> Tensor:
    """Return the eigenvectors V [width, width] of the stream's second moment over all norms, as columns."""
    moment = torch.zeros(model.shape.width, model.shape.width, dtype=torch.float64)

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).double()
        moment.add_(rows.mT @ rows / rows.square().sum())

    handles = [norm.register_forward_pre_hook(add) for norm, _ in norms(model)]
    model(ids)
    for handle in handles:
        handle.remove()
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors.flip(-1)


def _rotate(model: LanguageModel, axes: Tensor) -> None:
    model.table.weight.copy_(model.table.weight @ axes)
    for block in model.layers:
        for writer in (block.attention.o, block.down):
            writer.weight.copy_(axes.mT @ writer.weight)
    for _, readers in norms(model):
        for reader in readers:
            reader.weight.copy_(reader.weight @ axes)
