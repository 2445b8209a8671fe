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
from graphopt.ir import Changes, Program, Rewriter
from graphopt.passes import BestOf, Canonicalize, FoldBatchNorm, QuantizeStatic, Smooth
from graphopt.pipeline import Context, Recipe, parse_pass, run_passes
from graphopt.pipeline.trace import Trace

ALTERNATIVES = (("equalize",), ("smooth",), ("smooth", "rotate"))


def _run(module: nn.Module, inputs: Tensor, **options: object) -> tuple[Trace, list[Tensor], list[Tensor]]:
    program = capture(module.eval(), (inputs,))
    context = Context(targets.EXACT, Batches([(inputs,)] * 2, program), strict=True)
    options = {"enough": 0.0, **options}
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


def test_nothing_is_tried_where_quantization_costs_next_to_nothing() -> None:
    module, inputs = _outlier_mlp()
    trace, _, _ = _run(module, inputs, enough=1.0)
    assert list(trace["best_of"].facts["output_noise"]) == ["nothing"]


def test_the_chosen_one_is_made_again_from_all_the_data() -> None:
    """The largest outlier is in the last batch, which the comparison does not read."""
    module, inputs = _outlier_mlp()
    program = capture(module.eval(), (inputs,))
    data = [(inputs,)] * 2 + [(inputs * torch.logspace(0, 2, 32),)]
    passes = [Canonicalize(), BestOf((("smooth",),), batches=1, enough=0.0)]
    texts = {}
    for count in (2, 3):
        _, trace = run_passes(program, passes, Context(targets.EXACT, Batches(data[:count], program), strict=True))
        texts[count] = trace["smooth"].text
    assert texts[2] != texts[3]


def test_a_defective_pass_of_the_chosen_branch_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch was compared unchecked; it is made again with checks, and what does not hold goes."""
    honest = Smooth.run

    def run(self: Smooth, program: Program, context: Context) -> Changes:
        changes = honest(self, program, context)
        for node in program.graph.nodes:
            if node.op == "get_attr" and "bias" in str(node.target):
                rewriter = Rewriter(program, self.name)
                moved = rewriter.weight(rewriter.value(node) + 1e-3, "moved", torch.float32)
                rewriter.replace(node, moved)
                rewriter.finish()
                break
        return changes

    monkeypatch.setattr(Smooth, "run", run)
    module, inputs = _outlier_mlp()
    program = capture(module.eval(), (inputs,))
    context = Context(targets.EXACT, Batches([(inputs,)] * 2, program))
    after, trace = run_passes(program, [Canonicalize(), BestOf((("smooth",),), enough=0.0)], context)
    made, exact = after.run([inputs]), program.run([inputs])
    torch.testing.assert_close(made[0], exact[0])
    assert not any(record.name == "smooth" and record.changed for record in trace)
    assert any(note.startswith("smooth: it changed the outputs by") for note in trace.notes)


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
