"""How far quantized copies of a model are from it: KL to its own predictions on text it has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.ir import Program
from graphopt.passes.transform.emulation import Emulated
from graphopt.pipeline import Pass


@dataclass(frozen=True)
class Text:
    """ids, int64 [batch, length]: to calibrate with, and to judge by."""

    calibration: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]


def transformed(model: nn.Module, passes: list[Pass], text: Text) -> Program:
    """Return the program after exact passes."""
    batches = [(ids,) for ids in text.calibration]
    result = graphopt.optimize(model, batches[0], recipe=passes, calibration=batches)
    for record in result.trace:
        if record.rejected:
            raise SystemExit(f"{record.name}: {record.rejected}")
    return result.program


@torch.no_grad()
def divergence(program: Program, reference: nn.Module, text: Text, weight_bits: int, activation_bits: int) -> float:
    """Return KL(reference || quantized) in nats, the mean over the held-out bytes.

    Linear layers are quantized by rounding to the nearest, weights by output channel, activations by token.
    """
    quantized = Emulated(program, {}, weight_bits, activation_bits)
    total, count = 0.0, 0
    for ids in text.held_out:
        expected = functional.log_softmax(reference(ids).double(), -1)
        (logits,) = quantized.run_flat([ids])
        found = functional.log_softmax(logits.double(), -1)
        total += float((expected.exp() * (expected - found)).sum())
        count += ids.numel()
    return total / count


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Text) -> float:
    """Return the cross-entropy on the held-out text in bits a byte."""
    total, count = 0.0, 0
    for ids in text.held_out:
        logits = model(ids[:, :-1]).flatten(0, 1)
        total += float(functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return total / count / math.log(2)
