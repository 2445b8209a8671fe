"""smooth: scales between activation channels and the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from harness import CONTEXT, Example, before
from small_decoder import Decoder, example_ids
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.analysis.numerics import quantized_rows
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, operator, verify
from graphopt.passes import Smooth
from graphopt.passes.transform.smooth import smoothing_scale
from graphopt.pipeline import Context, make_pass
from graphopt.pipeline.validation import Validator

PASS = Smooth()
DECODER = Example("decoder", Decoder, example_ids)


class Hidden(nn.Module):
    """A norm, a gated MLP and one that nothing can be absorbed in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.down(functional.silu(self.gate(y)) * self.up(y))
        z: Tensor = self.two(functional.gelu(self.one(y)))
        return z


def _planted(module: Hidden) -> None:
    """A channel of the norm is 40 times as large as the others, and so is a hidden one."""
    module.norm.weight[2] *= 40
    module.norm.bias[2] *= 40
    for reader in (module.gate, module.up):
        reader.weight[:, 2] /= 40
    module.up.weight[3] *= 40
    module.up.bias[3] *= 40
    module.down.weight[:, 3] /= 40


HIDDEN = Example("hidden", Hidden, (7, 6), prepare=_planted)


def _run(pass_: Smooth, program: Program, batches: Iterable[object] | None = None) -> tuple[Program, Changes]:
    after = program.clone()
    data = batches if batches is not None else [program.flat_example[0]]
    with torch.no_grad():
        changes = pass_.run(after, Context(CONTEXT.target, calibration=Batches(data, program)))
    verify(after, reference=program)
    return after, changes


@pytest.mark.parametrize(
    "pass_",
    [
        PASS,
        Smooth(alpha=1.0),
        Smooth(search="space"),
        Smooth(search="model"),
        Smooth(explicit=True),
        Smooth(search="space", weight_bits=4, activation_bits=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("example", [DECODER, HIDDEN], ids=str)
def test_means_the_same(pass_: Smooth, example: Example) -> None:
    for symbolic in (False, True):
        program = before(example, pass_, symbolic)
        validator = Validator(program, seed=5)
        after, changes = _run(pass_, program)
        error, rounding = validator.check(after, changes.unrounded)
        assert changes.changed
        assert error <= pass_.tolerance
        assert rounding < 1e-5


def test_the_scale_is_that_of_the_paper() -> None:
    """A norm before a linear: gain / s, weight · s, s = max|x|^α / max|W|^(1 - α)."""
    example = Example("plain", lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 4)), (9, 6))
    program = before(example, PASS)
    after, changes = _run(Smooth(alpha=0.7), program)
    gain, weight = program.weights["0.weight"].double(), program.weights["1.weight"].double()
    x = program.flat_example[0].double()
    largest = (x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * gain).abs().amax(0)
    scale = largest**0.7 / weight.abs().amax(0) ** 0.3
    torch.testing.assert_close(after.weights["0.weight"].double(), gain / scale, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(after.weights["1.weight"].double(), weight * scale, rtol=1e-5, atol=1e-7)
    assert [site.reason for site in changes.touched] == ["smoothed 0.weight before linear, α = 0.7"]


def test_every_place_that_can_absorb_a_scale_does() -> None:
    """Norm to its readers, up to down, value to output, query to key; not what a silu writes."""
    _, changes = _run(PASS, before(DECODER, PASS))
    spaces = " ".join(site.reason for site in changes.touched)
    for part in ("one.weight", "two.weight", "last.weight", "up.out", "v.out", "q.out"):
        assert part in spaces, spaces
    _, changes = _run(PASS, before(HIDDEN, PASS))
    assert [site.reason for site in changes.skipped] == [
        "nothing absorbs a scale of what it reads: gelu is gelu, which is not linear",
    ]


def test_explicit_multiplies_where_nothing_absorbs() -> None:
    program = before(HIDDEN, PASS)
    after, changes = _run(Smooth(explicit=True), program)
    inserted = [node for node in after.nodes if operator(node) == "mul" and node not in program.nodes]
    assert len(inserted) == len([node for node in program.nodes if operator(node) == "mul"]) + 1
    assert any("is multiplied at run time (5 multiplications a token)" in site.reason for site in changes.touched)


def test_dead_channels_and_extremes_stay_finite() -> None:
    scale = smoothing_scale(torch.tensor([0.0, 1.0, 1e30, 4.0]), torch.tensor([1.0, 0.0, 1e-30, 1.0]), 0.5)
    assert scale.tolist() == [1.0, 1.0, 1e4, 2.0]


@pytest.mark.parametrize(("search", "bits"), [("space", 4), ("space", 8), ("model", 4), ("model", 8)])
def test_a_search_is_no_worse_than_any_fixed_alpha_by_what_it_looks_at(search: str, bits: int) -> None:
    """For one norm before one linear both searches look at the same error, which is computed here directly."""
    example = Example(
        "plain",
        lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 4, bias=False)),
        (200, 6),
        prepare=lambda m: m[0].weight.mul_(torch.tensor([1.0, 30, 1, 1, 7, 1])),
    )
    program = before(example, PASS)

    def error(of: Program) -> float:
        x, norm, w = (value.double() for value in (of.flat_example[0], of.weights["0.weight"], of.weights["1.weight"]))
        y = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * norm
        return float((quantized_rows(y, bits) @ quantized_rows(w, bits).mT - y @ w.mT).square().sum().detach())

    fixed = [error(_run(Smooth(alpha=step / 10), program)[0]) for step in range(11)]
    options = {"search": search, "weight_bits": bits, "activation_bits": bits}
    after, changes = _run(Smooth(**options), program)  # type: ignore[arg-type]
    assert error(after) <= min([*fixed, error(program)]) * 1.02  # the search sees float32 and no more than 256 rows
    assert changes.facts["alphas"]


def test_numbers_show_what_was_won() -> None:
    _, changes = _run(Smooth(activation_bits=4), before(HIDDEN, PASS))
    gate = changes.facts["sites"]["linear"]
    assert gate["after"]["max_to_median"] < gate["before"]["max_to_median"] / 2
    assert gate["after"]["kurtosis"] < gate["before"]["kurtosis"] / 2
    assert gate["after"]["qsur"] > gate["before"]["qsur"]


def test_smoothing_again_changes_nothing_more() -> None:
    """s = 1 where activations and weights are balanced: the second run's scales are those of rounding.

    For one place: the scales of several act on one another's weights.
    """
    example = Example("plain", lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 4)), (9, 6))
    once, _ = _run(PASS, before(example, PASS))
    twice, _ = _run(PASS, once)
    for name, weight in once.weights.items():
        torch.testing.assert_close(twice.weights[name], weight, rtol=1e-5, atol=1e-6)


def test_without_data_it_says_what_to_pass() -> None:
    with pytest.raises(GraphoptError, match="smooth needs calibration data"):
        PASS.run(before(HIDDEN, PASS), CONTEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"search": "grid"}, "'none', 'space' or 'model'"),
        ({"weight_bits": 1}, "greater"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        Smooth(**options)  # type: ignore[arg-type]


def test_data_of_nothing_but_nan_is_refused() -> None:
    program = before(HIDDEN, PASS)
    with pytest.raises(GraphoptError, match="NaN or infinity"):
        _run(PASS, program, [torch.full((7, 6), torch.nan)])


class _Folded(nn.Module):
    """Values whose heads are one axis with the batch where the scores read them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            each(x).unflatten(-1, (2, 4)).transpose(1, 2).reshape(batch * 2, length, 4)
            for each in (self.q, self.k, self.v)
        )
        y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
        z: Tensor = self.o(y.view(batch, 2, length, 4).transpose(1, 2).flatten(2))
        return z


def test_a_space_read_along_the_batch_is_declined_by_name() -> None:
    module = _Folded().eval()
    program = graphopt.capture(module, (torch.randn(3, 5, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    make_pass("canonicalize").run(program, CONTEXT)
    _, changes = _run(PASS, program)
    assert any("shares an axis with the batch where it is read" in site.reason for site in changes.skipped)


def test_a_program_without_places_is_left_alone() -> None:
    example = Example("bare", lambda: nn.Sequential(nn.ReLU()), (2, 3))
    _, changes = _run(PASS, before(example, PASS))
    assert not changes.changed
