"""Every transformation is exact on the zoo and on generated models, and applied where the table says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import Planted, models
from hypothesis import HealthCheck, given, settings
from transformations import (
    TOLERANCE,
    TRANSFORMATIONS,
    Verdict,
    captured_wide,
    golden,
    judge,
    judge_program,
    program_of,
    table,
)
from zoo import CAPTURED, FEW

from graphopt.analysis.spaces import Symmetry, analyze
from graphopt.pipeline import Context, make_pass
from graphopt.target import Target

CONTEXT = Context(Target(name="none", backend="none"))
QUICK = ("R1 explicit", "all")
PRE_NORM_DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "GPT2", "OPT", "GPTNeoX", "Mixtral")


def _places() -> list[Any]:
    return [
        pytest.param(name, key, marks=() if name in FEW and key in QUICK else pytest.mark.slow)
        for name in CAPTURED
        for key in TRANSFORMATIONS
    ]


@pytest.mark.parametrize(("name", "transformation"), _places())
def test_exact_and_applied(name: str, transformation: str) -> None:
    verdict = judge(name, transformation)
    assert verdict.error <= TOLERANCE
    assert verdict.applied == golden()[name][transformation], verdict.reasons


def test_the_table_holds_every_model() -> None:
    found = golden()
    assert set(found) == set(CAPTURED)
    assert all(set(each) == set(TRANSFORMATIONS) for each in found.values())
    for name in PRE_NORM_DECODERS:
        assert found[name]["R1"] == 1, "one residual space, whole"
        assert found[name]["R4"] == 2 or name == "Mixtral", "each layer's hidden activations"
    for key in TRANSFORMATIONS:
        assert any(each[key] for each in found.values()), f"{key} is applied nowhere"


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PRE_NORM_DECODERS]
)
def test_the_residual_is_one_space_and_each_mlp_and_attention_is_found(name: str) -> None:
    program = program_of(name).clone()
    with torch.no_grad():
        for each in ("fold_norm_affine", "center_norms"):
            make_pass(each).run(program, CONTEXT)
    analysis = analyze(program)
    (residual,) = [space for space in analysis.under(Symmetry.ORTHOGONAL) if space.free and space.norms]
    assert len(residual.norms) == 5, "two norms a layer and the last one"
    writers = {member.weight for member in residual.members if "writes" in member.role}
    readers = {read.node for read in residual.reads}
    assert len(writers) >= 5, "the table, and each layer's attention and MLP"
    assert len(readers) >= 5, "as many, and the head"
    free = [space for space in analysis.under(Symmetry.PERMUTATION) if space.free]
    sizes = [space.size for space in free]
    # In each layer: the hidden coordinates of the MLP (of each expert alike), and the values of a head.
    assert sizes.count(_hidden_size(program)) >= 2
    values = [space for space in analysis.under(Symmetry.GENERAL) if space.free and not space.norms and space.reads]
    assert len(values) >= 2


def _hidden_size(program: Any) -> int:
    """Return the size that an MLP of the zoo's decoders has, which no other axis shares."""
    return 56


@given(models())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_exact_on_generated_models(planted: Planted) -> None:
    program = captured_wide(planted.module, planted.inputs, planted.dynamic_shapes)
    for key in ("all", "R1 explicit", "smooth explicit"):
        verdict = judge_program(program, TRANSFORMATIONS[key][1])
        assert verdict.error <= TOLERANCE, key


def test_the_page_names_what_was_refused_and_why_places_were_skipped() -> None:
    verdict = Verdict(applied=2, skipped=1, reasons=("layer_norm reads <it>",), error=3e-16)
    text = table({name: dict.fromkeys(TRANSFORMATIONS, verdict) for name in CAPTURED})
    assert text.count("| MobileNetV2 |") == 1
    assert "| 2 (1) |" in text and "| 3e-16 |" in text
    assert "\n- R3: layer\\_norm reads \\<it\\>\n" in text.partition("\n## Why places were skipped\n")[2]
