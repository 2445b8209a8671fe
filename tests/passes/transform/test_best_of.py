"""The alternative that quantization is best off with stays; the others leave no trace but their figures."""

from __future__ import annotations

import pytest
import targets
import torch
from torch import Tensor, nn

import graphopt
from graphopt.calibration import Batches
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.passes import BestOf, Canonicalize, FoldBatchNorm, QuantizeStatic
from graphopt.pipeline import Context, Recipe, parse_pass, run_passes
from graphopt.pipeline.trace import Trace

ALTERNATIVES = (("equalize",), ("smooth",), ("smooth", "rotate"))


def _run(module: nn.Module, inputs: Tensor, **options: object) -> tuple[Trace, list[Tensor], list[Tensor]]:
    program = capture(module.eval(), (inputs,))
    context = Context(targets.EXACT, Batches([(inputs,)] * 2, program), strict=True)
    passes = [Canonicalize(), FoldBatchNorm(), BestOf(ALTERNATIVES, **options), QuantizeStatic()]  # type: ignore[arg-type]
    after, trace = run_passes(program, passes, context)
    return trace, after.run([inputs]), program.run([inputs])


def _outlier_mlp() -> tuple[nn.Module, Tensor]:
    """A norm whose gains spread over three orders of magnitude, undone by what reads it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    spread = torch.logspace(-1.5, 1.5, 32)
    with torch.no_grad():
        module[0].weight.mul_(spread)
        module[1].weight.div_(spread)
    return module, torch.randn(64, 32)


def _noise(made: list[Tensor], exact: list[Tensor]) -> float:
    return float((made[0] - exact[0]).square().sum() / exact[0].square().sum())


def test_what_helps_is_kept_with_its_records() -> None:
    module, inputs = _outlier_mlp()
    trace, made, exact = _run(module, inputs)
    figures = trace["best_of"].facts["output_noise"]
    assert next(iter(figures)) == "nothing" and figures["smooth"] < figures["nothing"] / 10
    kept = [record for record in trace if record.name in ("equalize", "smooth", "rotate")]
    assert kept and all(record.changed for record in kept) and trace["best_of"].index > kept[-1].index
    assert [record.index for record in trace] == list(range(len(trace)))
    assert not trace["best_of"].changed
    plain, _ = run_passes(
        capture(module, (inputs,)),
        [Canonicalize(), QuantizeStatic()],
        Context(targets.EXACT, Batches([(inputs,)] * 2, capture(module, (inputs,)))),
    )
    assert _noise(made, exact) < _noise(plain.run([inputs]), exact) / 10


def test_what_does_not_help_is_dropped() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    trace, _, _ = _run(module, torch.randn(64, 16), gain=0.9)
    assert [record.name for record in trace if record.name in ("equalize", "smooth", "rotate")] == []
    assert trace["quantize_static"].before == trace["best_of"].text


def test_alternatives_that_find_nothing_to_do_are_not_judged() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(x)  # type: ignore[no-any-return]

    trace, _, _ = _run(Plain(), torch.randn(8, 4))
    assert list(trace["best_of"].facts["output_noise"]) == ["nothing"]


def test_options_are_plain_data_and_misspelt_passes_are_refused_at_once() -> None:
    found = BestOf(ALTERNATIVES, gain=0.3)
    assert parse_pass(str(found)) == found
    recipe = Recipe("r", (found,))
    assert Recipe.from_yaml(recipe.to_yaml()).passes == recipe.passes
    with pytest.raises(GraphoptError, match="no pass called 'smoth'"):
        BestOf((("smoth",),))
    with pytest.raises(GraphoptError, match="needs calibration"):
        graphopt.optimize(nn.Linear(2, 2), (torch.randn(1, 2),), recipe=[found])
