"""Operators are told by what they are, not by how Python calls them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.ir import operator


class Flattened(nn.Module):
    """Sizes multiplied and added by Python beside tensors multiplied and added by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[0], x.shape[1]
        y = self.linear(x.reshape(rows * columns, 8)).relu()
        return torch.cat([y, y.new_zeros(rows + columns, 4)]) * 2 + 1


SHAPES = ({0: Dim("rows", min=2), 1: Dim("columns", min=2)},)


def test_arithmetic_on_sizes_is_not_arithmetic_on_tensors() -> None:
    program = graphopt.capture(Flattened(), (torch.randn(3, 5, 8),), SHAPES)
    names = {operator(node) for node in program.nodes if node.op == "call_function"}
    assert "python.mul" in names and "mul" in names


@pytest.mark.parametrize("recipe", ["exact", "int8", "int8_dynamic"])
def test_every_recipe_takes_arithmetic_on_sizes(recipe: str) -> None:
    example = (torch.randn(3, 5, 8),)
    model = Flattened()
    result = graphopt.optimize(model, example, recipe, calibration=[example], dynamic_shapes=SHAPES)
    assert not [note for note in result.notes if "rejected" in note]
    other = torch.randn(4, 6, 8)
    torch.testing.assert_close(result(other), model(other), atol=0.1, rtol=0.1)
