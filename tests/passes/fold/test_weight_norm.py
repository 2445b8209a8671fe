"""fold_weight_norm: the operator in both forms that torch writes; spelled-out norms are canonicalization's."""

from __future__ import annotations

import pytest
import torch
from harness import Example, Function, apply, before, captured, check_means_the_same, four_tests, operators
from models import MODELS
from torch import Tensor, nn

import graphopt
from graphopt.passes import Canonicalize, FoldWeightNorm
from graphopt.passes.fold.weight_norm import normalized

PASS = FoldWeightNorm()


def _wrapped(module: nn.Module, dim: int | None = 0) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(module, dim=dim)  # type: ignore[no-any-return,arg-type]


EXAMPLES = [
    Example(
        "conv",
        lambda: nn.Sequential(_wrapped(nn.Conv2d(3, 4, 3))),
        (2, 3, 8, 8),
        fires=1,
        golden="""
        conv2d = conv2d(input_1, @0.weight, @0.bias)
        return conv2d
        """,
    ),
    Example("conv_transpose", lambda: nn.Sequential(_wrapped(nn.ConvTranspose1d(3, 4, 3), 1)), (2, 3, 8), fires=1),
    Example("linear_last_axis", lambda: nn.Sequential(_wrapped(nn.Linear(6, 4), 1)), (3, 6), fires=1),
    Example("one_norm_for_all", lambda: nn.Sequential(_wrapped(nn.Linear(6, 4), None)), (3, 6), fires=1),
    Example(
        "computed_magnitude",
        lambda: Function(
            lambda x, v: nn.functional.linear(x, torch._weight_norm(v, x.mean() + v[:, :1], 0)), v=torch.rand(4, 6)
        ),
        (3, 6),
        declines="g of _weight_norm is computed by add, not a weight",
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(PASS, EXAMPLES)


@pytest.mark.parametrize("name", ["weight_norm_parametrized", "weight_norm_hook"])
def test_models(name: str) -> None:
    model = MODELS[name]()
    example = Example(name, lambda: model.module, lambda: model.example_inputs, batch=False)  # type: ignore[arg-type,return-value]
    check_means_the_same(PASS, example)
    program = before(example, PASS)
    after, _ = apply(PASS, program)
    assert "_weight_norm" not in operators(after)
    # The weights are called what the user calls them, and the parts are gone.
    weights = [weight for weight in after.weights if not weight.endswith("bias")]
    assert weights and all(weight.split(".")[-1] == "weight" and "parametrizations" not in weight for weight in weights)
    assert all(isinstance(weight, nn.Parameter) for weight in after.weights.values())


def test_shared_use_is_folded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = _wrapped(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.linear(x)))  # type: ignore[no-any-return]

    after, _ = apply(PASS, before(Example("twice", Twice, (3, 6)), PASS))
    assert sorted(after.weights) == ["linear.bias", "linear.weight"]


def test_declines_a_direction_of_length_zero() -> None:
    program = before(EXAMPLES[0], PASS).map_weights(
        lambda name, weight: torch.zeros_like(weight) if name.endswith("original1") else weight
    )
    after, changes = apply(PASS, program)
    assert "_weight_norm" in operators(after)
    assert [site.reason for site in changes.skipped] == ["a slice of 0.parametrizations.weight.original1 has norm zero"]


def test_rounds_once() -> None:
    program = before(EXAMPLES[0], PASS)
    v, g = (program.weight(f"0.parametrizations.weight.original{i}").double() for i in (1, 0))
    after, changes = apply(PASS, program)
    exact = v * g / v.square().sum((1, 2, 3), keepdim=True).sqrt()
    assert torch.equal(after.weight("0.weight"), exact.float())
    assert torch.allclose(changes.unrounded["0.weight"], exact, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_normalized_is_what_torch_computes(dim: int) -> None:
    v = torch.randn(3, 4, 5, dtype=torch.float64)
    shape = [size if axis == dim else 1 for axis, size in enumerate(v.shape)] if dim >= 0 else []
    g = torch.rand(shape, dtype=torch.float64)
    assert torch.allclose(normalized(v, g, dim), torch._weight_norm(v, g, dim), rtol=1e-14)


def test_spelled_out_norms_are_evaluated_before() -> None:
    """What other decompositions leave of a reparameterisation, and spectral norm, is a constant like any other."""

    def spelled(x: Tensor, weight_v: Tensor, weight_g: Tensor) -> Tensor:
        return nn.functional.linear(x, weight_v * (weight_g / torch.linalg.vector_norm(weight_v, dim=1, keepdim=True)))

    example = Example(
        "spelled", lambda: Function(spelled, weight_v=torch.rand(4, 6), weight_g=torch.rand(4, 1)), (3, 6)
    )
    # A cap of one byte: the result is no larger than the weight that dies with it.
    after, _ = apply(Canonicalize(max_bytes=1), captured(example))
    assert operators(after) == ["linear"]
    assert list(after.weights) == ["weight"]
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)).eval()
    program = graphopt.capture(spectral, (torch.randn(3, 6),))
    after, _ = apply(Canonicalize(), program)
    assert operators(after) == ["linear"]
    assert sorted(after.weights) == ["bias", "weight"]
