"""graphopt::hadamard: matrices by their definition, the fast product against the matrix, the operator's contracts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.analysis import node_macs
from graphopt.ir import dialect, operator
from graphopt.ir.hadamard import factors, hadamard, matrix_of, orthogonal, randomized, stages, transform
from graphopt.ir.precision import retype

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 76, 84, 100, 108, 140, 148, 160, 192]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_signs_and_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.mT, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, 3, 6, 10, 14, 30, 92, 116])
def test_orders_that_are_not_known(order: int) -> None:
    assert hadamard(order) is None


@given(st.integers(1, 300))
def test_factors_take_out_the_largest_known_order(size: int) -> None:
    m, k = factors(size)
    assert m * k == size
    assert hadamard(m) is not None
    assert all(hadamard(other) is None for other in range(m + 1, size + 1) if size % other == 0)
    assert k % 2 == 1


@given(
    size=st.sampled_from([1, 2, 3, 6, 8, 12, 20, 24, 30, 36, 48, 56, 64, 92, 96, 120, 128, 260, 448]),
    blocks=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 9),
    transpose=st.booleans(),
)
@settings(deadline=None)
def test_the_fast_product_is_the_product(size: int, blocks: int, seed: int, transpose: bool) -> None:
    block = size // blocks if size % blocks == 0 else 0
    rotation = randomized(size, seed, block)
    x = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = matrix_of(size, *rotation, transpose)
    torch.testing.assert_close(transform(x, *rotation, transpose), x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    back = transform(transform(x, *rotation, transpose), *rotation, not transpose)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize(("size", "block"), [(24, 0), (24, 8), (7, 0), (92, 0)])
def test_random_rotations_are_orthogonal_and_belong_to_their_seed(kind: str, size: int, block: int) -> None:
    one, again, other = (orthogonal(size, seed, kind, block) for seed in (1, 1, 2))
    torch.testing.assert_close(one @ one.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    if block:
        outside = torch.block_diag(*[torch.ones(block, block)] * (size // block)) == 0
        assert not bool(one[outside].any())


def test_a_spike_is_spread_evenly() -> None:
    """What the rotation is for: one large coordinate becomes many of one size."""
    x = torch.zeros(64, dtype=torch.float64)
    x[5] = 8
    assert torch.equal(transform(x[None], *randomized(64, 0)).abs(), torch.ones(1, 64, dtype=torch.float64))


def test_stages_cost_less_than_the_matrix() -> None:
    for order in (256, 1024, 4096, 8192):
        assert sum(torch.tensor(group).prod() for group in stages(order)) < order / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 10), None, None, 4, False), "blocks of 4 do not divide the last axis of x, of size 10"),
        ((torch.zeros(3, 6), None, None, 0, False), r"a block of 6 takes a small matrix \[3, 3\]"),
        ((torch.zeros(3, 8), torch.eye(3), None, 0, False), "small has shape"),
        ((torch.zeros(3, 8), None, torch.ones(5), 0, False), "signs has shape"),
        ((torch.zeros(3, 8, dtype=torch.int64), None, None, 0, False), "takes a floating-point tensor"),
        ((torch.zeros(()), None, None, 0, False), "takes a floating-point tensor with an axis"),
    ],
    ids=["block", "order", "small", "signs", "integers", "scalar"],
)
def test_arguments_that_do_not_fit(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dialect.hadamard(*arguments)


def test_sizes_that_are_not_positive() -> None:
    with pytest.raises(ValueError, match="positive size"):
        factors(0)
    with pytest.raises(ValueError, match="no kind of rotation is called 'dft'"):
        orthogonal(4, 0, "dft")


class Rotated(nn.Module):
    """A linear and its transformed output. x: [batch, length, 8]."""

    def __init__(self, size: int, block: int = 0) -> None:
        super().__init__()
        self.linear, self.block = nn.Linear(8, size), block
        k = factors(block or size)[1]
        self.register_buffer("small", orthogonal(k, 0, "orthogonal").float() if k > 1 else None)
        self.register_buffer("signs", (torch.randint(0, 2, (size,)) * 2 - 1).float())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = dialect.hadamard(self.linear(x), self.small, self.signs, self.block, False)
        return y


@pytest.mark.parametrize(("size", "block"), [(12, 0), (56, 28), (30, 0)])
def test_in_a_program_with_symbols_and_in_float64(size: int, block: int) -> None:
    torch.manual_seed(0)
    module = Rotated(size, block)
    shapes = ({0: Dim("batch"), 1: Dim("length")},)
    program = graphopt.capture(module, (torch.randn(2, 3, 8),), dynamic_shapes=shapes)
    (node,) = [node for node in program.nodes if operator(node) == "graphopt.hadamard"]
    assert node_macs(node) >= 6 * size
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(program(x), module(x))
    wide = retype(program, torch.float64)(x.double())
    matrix = matrix_of(size, module.small, module.signs, block)
    torch.testing.assert_close(wide, module.linear.double()(x.double()) @ matrix, rtol=0, atol=1e-12)


def test_gradients() -> None:
    rotation = randomized(24, 0, 12)
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    for transpose in (False, True):
        assert torch.autograd.gradcheck(lambda x, t=transpose: dialect.hadamard(x, *rotation, t), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    x = torch.full((1, 4096), 300.0, dtype=dtype)  # sums of 4096 of these overflow float16
    made = dialect.hadamard(x, None, None, 0, False)
    assert made.dtype == dtype
    assert made[0, 0] == 300 * 64
    assert not bool(made[0, 1:].any())


def test_nothing_and_strides() -> None:
    assert dialect.hadamard(torch.zeros(0, 8), None, None, 0, False).shape == (0, 8)
    x = torch.randn(8, 5).mT
    torch.testing.assert_close(dialect.hadamard(x, None, None, 0, False), x @ matrix_of(8).float())
