"""The pass as a whole: whole models, random expressions, time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from harness import CONTEXT, Example, Function, apply, captured, check_idempotent, check_means_the_same, operators
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import MODELS, ODD, REQUIRED, SpelledRMSNorm
from torch import Tensor, nn

import graphopt
from graphopt.ir import Program, verify
from graphopt.passes import Canonicalize
from graphopt.passes.canonicalize.duplicates import _key
from graphopt.passes.canonicalize.operators import is_pure
from graphopt.pipeline.passes import parse
from graphopt.pipeline.validation import Validator

PASS = Canonicalize()


@pytest.mark.parametrize("name", [*REQUIRED, *ODD])
def test_models_mean_the_same_and_come_to_rest(name: str) -> None:
    model = MODELS[name]()
    program = graphopt.capture(model.module, model.example_inputs, model.dynamic_shapes)
    after = program.clone()
    changes = PASS.run(after, CONTEXT)
    verify(after, reference=program)
    error, _ = Validator(program, seed=0).check(after, changes.unrounded)
    assert error <= PASS.tolerance
    assert not PASS.run(after.clone(), CONTEXT).changed


def test_a_real_language_model_in_half_precision() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)
    program = graphopt.capture(model, {"input_ids": torch.randint(0, 64, (1, 12))})
    after, changes = apply(PASS, program)
    error, _ = Validator(program, seed=0).check(after, changes.unrounded)
    assert error <= PASS.tolerance
    # Two layers of two norms and the last one; sines and cosines of the positions are tables, one for all layers.
    assert operators(after).count("rms_norm") == 5
    assert not {"rsqrt", "mean", "cos", "sin", "_to_copy", "arange"} & set(operators(after))
    assert {"model.rotary_emb.cos", "model.rotary_emb.sin"} <= set(after.weights)


# Random expressions ---------------------------------------------------------------------------------------------------

_STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b * 0.5,
    "sin": lambda a, b: torch.sin(a),
    "neg": lambda a, b: -a,
    "transpose": lambda a, b: a.transpose(0, 1).transpose(0, 1),
    "permute": lambda a, b: a.permute(1, 0, 2),
    "times_one": lambda a, b: a * 1,
    "plus_zero": lambda a, b: a + 0.0,
    "dropout": lambda a, b: nn.functional.dropout(a, 0.3, training=False),
    "clone": lambda a, b: a.clone(),
    "view": lambda a, b: a.reshape(3, 9).reshape(3, 3, 3),
    "flat": lambda a, b: a.transpose(1, 2).contiguous().view(9, 3).view(3, 3, 3),
    "cast": lambda a, b: a.double().float(),
    "constant": lambda a, b: a + torch.arange(3) * 2.0,
    "expand": lambda a, b: a.expand(3, 3, 3),
    "slice": lambda a, b: a[0:3],
    "gelu": lambda a, b: 0.5 * a * (1 + torch.erf(a / 2**0.5)),
    "rms": lambda a, b: a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-3),
}


def _expression(seed: int, steps: list[str], returned: int) -> nn.Module:
    """A graph over the last few values; each step is taken twice, so that there are duplicates."""
    rng = random.Random(seed)
    picks = [(step, rng.random(), rng.random()) for step in steps]

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        values = [x, torch.sin(x)]
        for step, first, second in picks:
            a, b = values[int(first * len(values))], values[int(second * len(values))]
            values += [_STEPS[step](a, b), _STEPS[step](a, b)]
        return tuple(values[-returned:])

    return Function(compute)


def _duplicates(program: Program) -> list[str]:
    seen: set[object] = set()
    found = []
    for node in program.nodes:
        if node.op == "call_function" and is_pure(node):
            if _key(node) in seen:
                found.append(node.name)
            seen.add(_key(node))
    return found


# Shrinking a failure would export a model hundreds of times.
@settings(max_examples=7, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    seed=st.integers(0, 2**16),
    steps=st.lists(st.sampled_from(sorted(_STEPS)), min_size=1, max_size=8),
    returned=st.integers(1, 3),
)
def test_random_expressions(seed: int, steps: list[str], returned: int) -> None:
    example = Example("random", lambda: _expression(seed, steps, returned), (3, 3, 3), batch=False)
    check_means_the_same(PASS, example)
    check_idempotent(PASS, example)
    program = captured(example)
    after, _ = apply(PASS, program)
    assert len(operators(after)) <= len(operators(program))
    assert _duplicates(after) == []


def test_two_runs_give_the_same_text() -> None:
    model = MODELS["tied_language_model"]()
    program = graphopt.capture(model.module, model.example_inputs)
    assert str(apply(PASS, program)[0]) == str(apply(PASS, program)[0])


@pytest.mark.slow
def test_time_grows_with_the_graph_and_no_faster() -> None:
    """Four times the nodes may take eight times as long, not sixteen; 1,000 nodes take about a third of a second."""

    def seconds(blocks: int) -> float:
        class Deep(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
                self.norms = nn.ModuleList(SpelledRMSNorm(8) for _ in range(blocks))

            def forward(self, x: Tensor) -> Tensor:
                for linear, norm in zip(self.linears, self.norms, strict=True):
                    x = x + norm(nn.functional.dropout(torch.relu(linear(x)), 0.1, training=False))
                return x

        program = graphopt.capture(Deep().eval(), (torch.randn(2, 8),))
        best = float("inf")
        for _ in range(3):
            candidate = program.clone()
            started = time.process_time()
            PASS.run(candidate, CONTEXT)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(80) <= 8 * seconds(20)


def test_it_prints_and_parses() -> None:
    assert str(Canonicalize()) == "canonicalize"
    assert parse(str(Canonicalize(max_bytes=7))) == ("canonicalize", {"max_bytes": 7})
