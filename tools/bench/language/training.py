"""Training, once: the weights are kept in the user's cache folder."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from made.kept import kept
from rich.console import Console
from rich.progress import track
from torch.nn import functional

from language import corpus
from language.model import LanguageModel, Shape


@dataclass(frozen=True)
class Training:
    """What decides the weights: a change of any field trains anew."""

    shape: Shape = field(default_factory=Shape)
    steps: int = 1200
    batch: int = 16
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0


def trained(training: Training, folder: Path) -> LanguageModel:
    """Return the trained model in eval mode, from the folder where it is there, else trained and put there."""
    decides = dataclasses.asdict(training)
    return kept("language", decides, lambda: LanguageModel(training.shape), lambda: train(training), folder)


def train(training: Training) -> LanguageModel:
    """Train on the standard library; prints the loss as it goes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = LanguageModel(training.shape)
    text = corpus.read()
    generator = torch.Generator().manual_seed(training.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, training.learning_rate, betas=(0.9, 0.95))
    length = training.shape.context
    shown = Console(stderr=True)
    for step in track(range(training.steps), "training the language model", console=shown):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _schedule(step, training)
        ids = text.batch(training.batch, length + 1, generator)
        loss = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: {loss.item() / math.log(2):.3f} bits a byte", flush=True)
    return model


def _schedule(step: int, training: Training) -> float:
    if step < training.warmup:
        return (step + 1) / training.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - training.warmup) / max(training.steps - training.warmup, 1)))
