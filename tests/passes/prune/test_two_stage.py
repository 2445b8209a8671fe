"""TwoStage: the balance of its paper, both stages in the trace, and what cannot be met."""

from __future__ import annotations

from typing import Any

import pytest
import targets
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt import Budget, capture
from graphopt.analysis import parameters
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.ir.verify import verify
from graphopt.passes import TwoStage
from graphopt.pipeline import Context, run_passes
from graphopt.pipeline.trace import Trace

LAYERS, WIDTH, HIDDEN = 4, 12, 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.one, self.two = nn.RMSNorm(WIDTH, 1e-5, False), nn.RMSNorm(WIDTH, 1e-5, False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(self.one(x)).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.two(x))))  # type: ignore[no-any-return]


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, WIDTH), *(Layer() for _ in range(LAYERS)), nn.Linear(WIDTH, 11)).eval()


def two_stages(each: TwoStage, model: nn.Module | None = None, **options: Any) -> tuple[Program, Program, Trace]:
    random = torch.Generator().manual_seed(0)
    batches = [(torch.randint(11, (2, 9), generator=random),) for _ in range(6)]
    program = capture(decoder() if model is None else model, batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True, **options)
    after, trace = run_passes(program, [each], context)
    verify(after)
    return program, after, trace


@pytest.mark.parametrize(("sparsity", "alpha"), [(0.25, 1.5), (0.375, 1.0), (0.5, 1.5)])
def test_the_balance_is_the_papers(sparsity: float, alpha: float) -> None:
    _, after, trace = two_stages(TwoStage(sparsity=sparsity, alpha=alpha))
    attention, mlp = 4 * WIDTH * WIDTH, 2 * WIDTH * HIDDEN
    count = round(LAYERS * sparsity ** (mlp / attention / alpha))
    assert sum(name.endswith("qkv.weight") for name in after.weights) == LAYERS - count
    whole = LAYERS * (attention + mlp)
    neurons = (sparsity * whole - count * attention) / (LAYERS * mlp)
    widths = {w.shape[0] for name, w in after.weights.items() if name.endswith("up.weight")}
    assert widths == {round(HIDDEN * (1 - neurons))}
    facts = trace["two_stage"].facts
    assert facts["attentions"] == count and facts["neurons"] == pytest.approx(neurons)
    assert trace["prune"].changed and trace["drop_blocks"].changed


def test_neurons_of_the_largest_outputs_stay() -> None:
    model = decoder()
    program, after, _ = two_stages(TwoStage(sparsity=0.25), model)
    random = torch.Generator().manual_seed(0)
    x = torch.cat([model[0](torch.randint(11, (2, 9), generator=random)) for _ in range(6)])  # type: ignore[index]
    layer: Any = model[1]  # type: ignore[index]
    q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in layer.qkv(layer.one(x)).chunk(3, -1))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + layer.o(y.transpose(1, 2).flatten(2))
    energy = torch.relu(layer.up(layer.two(x))).square().mean((0, 1))
    left = after.weights["1.up.weight"]
    best = energy.argsort(descending=True)[: len(left)].sort().values
    torch.testing.assert_close(left, program.weights["1.up.weight"][best])


def test_a_budget_of_parameters() -> None:
    program, after, _ = two_stages(TwoStage(), budget=Budget(params_ratio=0.8))
    assert parameters(after) / parameters(program) == pytest.approx(0.8, abs=0.03)


def test_fitting_helps() -> None:
    errors = {}
    for resolve in (False, True):
        program, after, _ = two_stages(TwoStage(sparsity=0.25, resolve=resolve))
        random = torch.Generator().manual_seed(5)
        judged = [torch.randint(11, (2, 9), generator=random) for _ in range(4)]
        errors[resolve] = sum(float((after(x) - program(x)).square().sum()) for x in judged)
    assert errors[True] < 0.8 * errors[False]


def test_mistakes_are_sentences() -> None:
    with pytest.raises(GraphoptError, match="two_stage needs to know how much goes"):
        two_stages(TwoStage())
    with pytest.raises(GraphoptError, match=r"cannot meet budget.params_ratio ≤ 0.01: the blocks hold"):
        two_stages(TwoStage(), budget=Budget(params_ratio=0.01))
    with pytest.raises(GraphoptError, match="of the MLPs would have to go; give another alpha"):
        two_stages(TwoStage(sparsity=0.95, alpha=0.1))


def test_no_layers_of_that_kind() -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11)).eval()
    _, _, trace = two_stages(TwoStage(sparsity=0.5), model)
    assert trace["two_stage"].skipped[-1].reason == "it has no layers of attentions and MLPs"
