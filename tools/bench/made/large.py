"""Networks of the sizes that people deploy, with random weights from transformers' configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Output(nn.Module):
    """A model of transformers as a function to one tensor, its logits or hidden states."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, **inputs: Tensor) -> Tensor:
        found: Tensor = getattr(self.model(**inputs), self.key)
        return found


class FromPixels(Output):
    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixel_values=pixel_values)


class FromTokens(Output):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def textured_images(count: int, size: int, seed: int) -> list[Tensor]:
    """`count` images [1, 3, size, size]: noise summed over octaves, most of it, as in photographs, coarse."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        image = torch.zeros(1, 3, size, size)
        cells = 4
        while cells <= size:
            noise = torch.randn(1, 3, cells, cells, generator=generator)
            octave = torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear")
            image += octave * (4 / cells) ** 0.5
            cells *= 2
        images.append((image - image.mean()) / image.std())
    return images


def settle_batch_norms(model: nn.Module, batches: list[Any]) -> None:
    """Replace the initial running statistics (0 and 1) by averages over `batches`, as after training."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def image_network(kind: str, **options: Any) -> nn.Module:
    """`<kind>ForImageClassification` of 1,000 classes in eval mode, its batch norms settled."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    config.num_labels = 1000
    model: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        settle_batch_norms(model, [torch.cat(textured_images(16, 224, seed)) for seed in range(100, 104)])
    return FromPixels(model, "logits").eval()


def text_network() -> nn.Module:
    """BERT of the base size with a head of two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return FromTokens(BertForSequenceClassification(BertConfig()), "logits").eval()


def texts(count: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    """Random ids of a vocabulary of 30,522, filled to between half and all of `length`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(1000, 30522, (1, length), generator=generator)
        end = int(torch.randint(length // 2, length + 1, (), generator=generator))
        mask = (torch.arange(length) < end).long()[None]
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found
