"""Errors by site: against two whole programs where one can build them, and on a sabotaged layer."""

from __future__ import annotations

import math

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import graphopt
from graphopt.analysis.numerics import Noise, explain_sites, site_errors
from graphopt.ir import Program
from graphopt.passes import QuantizeDynamic, QuantizeEmbedding, QuantizeStatic


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def _pair(
    module: nn.Module, inputs: tuple[Tensor, ...], *passes: object
) -> tuple[Program, Program, list[list[Tensor]]]:
    calibration = [tuple(torch.randn_like(x) for x in inputs) for _ in range(4)]
    before = graphopt.optimize(module, inputs, recipe=[graphopt.passes.Canonicalize()]).program
    after = graphopt.optimize(before, recipe=list(passes), calibration=calibration).program
    return before, after, [list(batch) for batch in calibration]


def _ratio(made: Tensor, exact: Tensor) -> float:
    return float((made.double() - exact.double()).square().sum().detach() / exact.double().square().sum().detach())


def test_the_effect_of_a_site_is_that_of_a_program_with_it_alone_quantized() -> None:
    torch.manual_seed(0)
    module, inputs = Chain(), (torch.randn(5, 6),)
    before, after, batches = _pair(module, inputs, QuantizeStatic())
    found = {site.node: site for site in site_errors(before, after, batches[:1])}
    assert list(found) and all(site.kind == "linear" for site in found.values())
    calibration = [tuple(batch) for batch in batches]
    for name, site in found.items():
        alone = graphopt.optimize(before, recipe=[QuantizeStatic(only=(name,))], calibration=calibration).program
        wanted = _ratio(alone.run(batches[0])[0], before.run(batches[0])[0])
        assert site.effect.ratio == pytest.approx(wanted, rel=1e-6)


def test_the_last_site_carries_the_whole_propagated_error() -> None:
    torch.manual_seed(0)
    before, after, batches = _pair(Chain(), (torch.randn(5, 6),), QuantizeStatic())
    sites = {site.node: site for site in site_errors(before, after, batches[:1], effects=False)}
    last = sites["linear_2"]
    assert last.propagated.ratio == pytest.approx(_ratio(after.run(batches[0])[0], before.run(batches[0])[0]), rel=1e-6)
    first = sites["linear"]  # nothing came before it
    assert first.local.ratio == pytest.approx(first.propagated.ratio, rel=1e-9)
    assert last.effect.sqnr_db is None


@pytest.mark.parametrize("name", ["residual_cnn", "vision_transformer", "tied_language_model"])
def test_a_sabotaged_layer_comes_first(name: str) -> None:
    case = MODELS[name]()
    before = graphopt.optimize(case.module, case.example_inputs, recipe=[graphopt.passes.Canonicalize()]).program
    passes = [QuantizeEmbedding(), QuantizeStatic()]
    after = graphopt.optimize(before, recipe=passes, calibration=case.calibration).program
    scales = [name for name in after.weights if name.endswith("weight_scale")]
    assert len(scales) > 3
    victim = scales[len(scales) // 2]
    broken = after.map_weights(lambda key, value: value * 8 if key == victim else value)
    worst = site_errors(before, broken, [before.flat_example])[0]
    weight = victim.removesuffix("_scale")
    reader = next(node for node in before.graph.nodes if node.name == worst.node)
    assert any(source.op == "get_attr" and source.target == weight for source in reader.all_input_nodes)


def test_dynamic_scales_are_sites_too_and_nothing_quantized_has_none() -> None:
    torch.manual_seed(0)
    before, after, batches = _pair(Chain(), (torch.randn(5, 6),), QuantizeDynamic())
    assert len(site_errors(before, after, batches[:1])) == 3
    assert site_errors(before, before, batches[:1]) == []
    assert len(site_errors(before, after, batches[:1], only={"linear_1"})) == 1


def test_sentences_name_the_sites() -> None:
    torch.manual_seed(0)
    before, after, batches = _pair(Chain(), (torch.randn(5, 6),), QuantizeStatic())
    lines = explain_sites(site_errors(before, after, batches), count=2)
    assert len(lines) == 2 and all(line.startswith("linear") and "dB" in line for line in lines)


def test_noise_leaves_out_what_is_not_finite() -> None:
    noise = Noise()
    noise.add(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, -math.inf]))
    assert noise.ratio == pytest.approx(0.5)
    noise.add(torch.tensor([1]), torch.tensor([7]))  # indices are no signal
    assert noise.ratio == pytest.approx(0.5) and noise.sqnr_db == pytest.approx(10 * math.log10(2))
    assert Noise(1.0, 0.0).sqnr_db is None and Noise().ratio == 0
