"""The algebra of changes: what a change and its dual leave as it was."""

from __future__ import annotations

import pytest
import torch
from freedom import draw
from hypothesis import given
from hypothesis.strategies import integers, lists, sampled_from
from torch import Tensor

from graphopt.analysis.spaces.symmetry import ALL, LINEAR, PERMUTATION, Symmetry, apply

GROUPS = [symmetry for symmetry in Symmetry if symmetry is not Symmetry.CENTER]


def change(symmetry: Symmetry, shape: list[int], size: int, seed: int) -> Tensor:
    class Shaped:
        pass

    shaped = Shaped()
    shaped.symmetry, shaped.size = symmetry, size
    shaped.shape = (*shape, *[size] * (2 if symmetry in (Symmetry.ORTHOGONAL, Symmetry.GENERAL) else 1))
    found = draw(shaped, torch.Generator().manual_seed(seed))
    assert found is not None
    return found


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(sampled_from(GROUPS), lists(integers(1, 3), max_size=2), integers(1, 6), integers(0, 99))
def test_a_change_and_its_dual_leave_a_contraction(symmetry: Symmetry, fibres: list[int], size: int, seed: int) -> None:
    """Σ x y over the axis is Σ (T x) (T^-T y), one T for each fibre."""
    one, other = values(4, *fibres, size, seed=seed), values(4, *fibres, size, seed=seed + 1)
    by = change(symmetry, fibres, size, seed)
    found = (apply(symmetry, by, one, False) * apply(symmetry, by, other, True)).sum(-1)
    torch.testing.assert_close(found, (one * other).sum(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symmetry", GROUPS)
def test_a_fibre_changes_by_its_own_matrix(symmetry: Symmetry) -> None:
    by, x = change(symmetry, [2], 5, 3), values(7, 2, 5)
    whole = apply(symmetry, by, x, False)
    for index in range(2):
        torch.testing.assert_close(whole[:, index], apply(symmetry, by[index], x[:, index], False))


def test_what_each_does_to_a_vector() -> None:
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    assert apply(Symmetry.PERMUTATION, order, x, False).tolist() == [4, 1, 2]
    assert apply(Symmetry.PERMUTATION, order, x, True).tolist() == [4, 1, 2]
    scale = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    assert apply(Symmetry.DIAGONAL, scale, x, False).tolist() == [2, 1, 4]
    assert apply(Symmetry.DIAGONAL, scale, x, True).tolist() == [0.5, 4, 4]
    matrix = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    assert apply(Symmetry.GENERAL, matrix, x, False).tolist() == [3, 2, 4]
    assert apply(Symmetry.GENERAL, matrix, x, True).tolist() == [1, 1, 4]
    centered = apply(Symmetry.CENTER, None, x, False)
    assert centered.sum().abs() < 1e-12
    torch.testing.assert_close(apply(Symmetry.CENTER, None, centered, False), centered)


def test_every_symmetry_has_a_bit_of_its_own() -> None:
    assert sum(symmetry.bit for symmetry in Symmetry) == ALL == LINEAR | PERMUTATION
    assert [symmetry for symmetry in Symmetry if symmetry.twisted] == [Symmetry.DIAGONAL, Symmetry.GENERAL]
