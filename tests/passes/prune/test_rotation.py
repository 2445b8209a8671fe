"""Principal coordinates: exact by themselves, and what lies in few directions is pruned at no cost."""

from __future__ import annotations

from typing import Any

import pytest
import targets
import torch
from small_decoder import Decoder
from torch import Tensor, nn
from torch.nn import functional

from graphopt import capture
from graphopt.analysis.spaces import analyze
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program, Rewriter
from graphopt.ir.verify import verify
from graphopt.passes import Canonicalize, CenterNorms, FoldNormAffine, Prune
from graphopt.passes.prune.candidates import find_candidates
from graphopt.passes.prune.rotation import _balanced, turn
from graphopt.pipeline import Context, run_passes

Given = list[tuple[Tensor, ...]]


def turned(model: nn.Module, batches: Given) -> tuple[Program, Program, list[str]]:
    program = capture(model.eval(), batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True)
    prepared, _ = run_passes(program, [Canonicalize(), FoldNormAffine(), CenterNorms()], context)
    analysis, after = analyze(prepared), prepared.clone()
    rewriter = Rewriter(after, "test")
    analysis = analyze(after)
    candidates = find_candidates(after, analysis, lambda *_: None)
    turn(rewriter, analysis, candidates, Context(targets.EXACT, calibration=Batches(batches, after)))
    changes = rewriter.finish()
    verify(after)
    return program, after, [site.reason.split(":")[0] for site in changes.touched]


def pruned(model: nn.Module, batches: Given, each: Prune) -> tuple[Program, Program, dict[str, list[int]]]:
    program = capture(model.eval(), batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True)
    after, trace = run_passes(program, [each], context)
    verify(after)
    return program, after, trace["prune"].facts["widths"]


def tokens(count: int = 8) -> Given:
    random = torch.Generator().manual_seed(0)
    return [(torch.randint(11, (2, 12), generator=random),) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_balanced_matrices_are_one_diagonal(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    roots = [torch.randn(3, 6, 9, generator=random, dtype=torch.float64) for _ in range(2)]
    written, read = (root @ root.mT for root in roots)
    change = _balanced(written, read)
    inverse = torch.linalg.inv(change)
    one, two = change @ written @ change.mT, inverse.mT @ read @ inverse
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one, torch.diag_embed(one.diagonal(dim1=1, dim2=2)), rtol=1e-3, atol=1e-3)
    assert bool((one.diagonal(dim1=1, dim2=2).diff(dim=-1) <= 1e-9).all())


def test_a_truncated_product_is_the_best_of_its_rank() -> None:
    """V = X Wv, W: no V' W' of rank r is nearer to V W than what balanced coordinates give."""
    random = torch.Generator().manual_seed(0)
    v = torch.randn(200, 6, generator=random, dtype=torch.float64) @ torch.randn(6, 6, generator=random).double()
    w = torch.randn(6, 8, generator=random, dtype=torch.float64)
    change = _balanced((v.mT @ v)[None], (w @ w.mT)[None])[0]
    there, back = v @ change.mT, torch.linalg.inv(change).mT @ w
    for rank in (1, 3, 5):
        best = torch.linalg.svd(v @ w).S[rank:].square().sum()
        error = (there[:, :rank] @ back[:rank] - v @ w).square().sum()
        assert float(error) == pytest.approx(float(best), rel=1e-3)


def test_turning_changes_nothing_of_the_outputs() -> None:
    torch.manual_seed(0)
    program, after, spaces = turned(Decoder(), tokens())
    assert {name for name in spaces if "v.out" in name} and len(spaces) >= 2
    for batch in tokens():
        torch.testing.assert_close(after(*batch), program(*batch), rtol=1e-3, atol=1e-4)


class Attention(nn.Module):
    """Scores and values of one head that need half of its dimensions, in directions that no coordinate has."""

    def __init__(self, width: int = 8, rank: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 3)
        basis = torch.linalg.qr(torch.randn(width, rank)).Q
        with torch.no_grad():
            for layer in (self.q, self.v):
                layer.weight.copy_(basis @ basis.mT @ layer.weight)
                layer.bias.copy_(basis @ basis.mT @ layer.bias)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.head(torch.relu(self.o(y)))  # type: ignore[no-any-return]


def sequences(count: int = 8) -> Given:
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 9, 8, generator=random),) for _ in range(count)]


@torch.no_grad()
def error(program: Program, after: Program, batches: Given) -> float:
    return sum(float((after(*b) - program(*b)).square().sum() / program(*b).var()) for b in batches) / len(batches)


def test_what_lies_in_few_directions_goes_at_no_cost() -> None:
    torch.manual_seed(0)
    model, errors = Attention(), {}
    for turns in (True, False):
        each = Prune(ratio=0.5, turn=turns, only=("q", "k", "v"), multiple=1, resolve=False)
        program, after, widths = pruned(model, sequences(), each)
        assert sorted(widths.values()) == [[8, 4], [8, 4]]
        errors[turns] = error(program, after, sequences())
    assert errors[True] < 1e-4 and errors[True] < 1e-3 * errors[False]


class Stream(nn.Module):
    """Blocks on a residual stream of 12 in which everything lies in 6 directions; of 20 neurons 10 are copies."""

    def __init__(self, width: int = 12, rank: int = 6) -> None:
        super().__init__()
        basis = torch.linalg.qr(torch.randn(width, rank)).Q
        self.embed, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.up, self.down = (
            nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((width, 20), (20, width))
        )
        with torch.no_grad():
            for layer in (self.embed, *self.down):
                layer.weight.copy_(basis @ basis.mT @ layer.weight)
                layer.bias.copy_(basis @ basis.mT @ layer.bias)
            for layer in self.up:
                layer.weight[10:], layer.bias[10:] = layer.weight[:10], layer.bias[:10]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(x)  # type: ignore[no-any-return]


def test_a_stream_loses_the_directions_it_does_not_use() -> None:
    torch.manual_seed(0)
    model = Stream()
    random = torch.Generator().manual_seed(0)
    batches: Given = [(torch.randn(16, 5, generator=random),) for _ in range(8)]
    errors = {}
    for turns in (True, False):
        program, after, widths = pruned(model, batches, Prune(ratio=0.5, turn=turns, multiple=1))
        assert sorted(widths.values()) == [[12, 6], [20, 10], [20, 10]]
        errors[turns] = error(program, after, batches)
    assert errors[True] < 1e-4 and errors[True] < 0.01 * errors[False]


@pytest.mark.parametrize("zero", ["q", "k", "v", "o"])
def test_weights_of_zeros_are_turned_to_finite_ones(zero: str) -> None:
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        getattr(model, zero).weight.zero_()
        getattr(model, zero).bias.zero_()
    program, after, _ = pruned(model, sequences(), Prune(ratio=0.5, only=("q", "k", "v"), multiple=1))
    assert all(weight.isfinite().all() for weight in after.weights.values())
    assert error(program, after, sequences()) < 0.1


def test_nan_in_the_data_is_a_sentence() -> None:
    torch.manual_seed(0)
    batches = sequences()
    batches[3][0][0, 0, 0] = torch.inf
    with pytest.raises(GraphoptError, match="NaN or infinity"):
        pruned(Attention(), batches, Prune(ratio=0.5))


@torch.no_grad()
def test_what_is_left_is_spread_over_its_coordinates() -> None:
    """Of a stream with two strong directions none of the coordinates that stay holds much more than the others."""
    torch.manual_seed(0)
    model = Stream(rank=12)
    with torch.no_grad():
        model.embed.weight *= torch.linspace(0.05, 3, 12)[:, None]
    random = torch.Generator().manual_seed(0)
    batches: Given = [(torch.randn(16, 5, generator=random),) for _ in range(8)]
    _, after, widths = pruned(model, batches, Prune(ratio=0.34, multiple=1))
    assert [12, 8] in widths.values()
    (table,) = [node for node in after.graph.nodes if node.op == "call_function"][:1]
    energies = torch.zeros(8)

    class Seen(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n is table:
                energies.add_(value.square().sum(0))
            return value

    for batch in batches:
        Seen(after.graph_module).run(*batch)
    assert float(energies.max() / energies.mean()) < 3
