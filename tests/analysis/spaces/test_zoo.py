"""Every change that the analysis calls free, made at random in real models; and the spaces each must have."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from freedom import assert_free
from zoo import CAPTURED, FEW, capture

from graphopt.analysis.spaces import analyze
from graphopt.ir import Program
from graphopt.passes import Canonicalize, FoldBatchNorm
from graphopt.pipeline import Context
from graphopt.pipeline.validation import resample
from graphopt.target import Target

CONTEXT = Context(Target(name="none", backend="none"))
FREE = {  # symmetry -> models of FEW -> how many spaces at least
    "permutation": {"Llama": 10, "BERT": 9, "GPT2": 9, "ViT": 9, "MobileNetV2": 25},
    "diagonal": {"Llama": 11, "BERT": 5, "GPT2": 8, "ViT": 9, "MobileNetV2": 7},
    "orthogonal": {"Llama": 2, "BERT": 4, "GPT2": 4, "ViT": 4, "MobileNetV2": 7},
}


def prepared(name: str) -> Program:
    program = capture(name).clone()
    for each in (Canonicalize(), FoldBatchNorm()):
        each.run(program, CONTEXT)
    return program


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in CAPTURED]
)
def test_what_is_called_free_is_free_at_two_shapes(name: str) -> None:
    program = prepared(name)
    analysis = analyze(program)
    assert any(space.free for space in analysis.under("permutation"))
    counts = assert_free(program, analysis)
    for symmetry, least in FREE.items():
        assert counts[symmetry] >= least.get(name, 0)
    with torch.no_grad():
        assert_free(program, analysis, resample(program, 1))


def test_a_space_that_is_not_free_changes_the_model() -> None:
    """The check can fail: forced through its pins, a change of a nonlinear space shows."""
    program = prepared("Llama")
    analysis = analyze(program)
    pinned = next(s for s in analysis.under("orthogonal") if s.pins and any("silu" in str(pin) for pin in s.pins))
    analysis._under[pinned.symmetry] = (dataclasses.replace(pinned, pins=()),)
    with pytest.raises(AssertionError, match="orthogonal changes outputs"):
        assert_free(program, analysis)
