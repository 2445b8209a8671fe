"""What an analysis offers, and models made to break it: whatever stays free must be free."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from freedom import assert_free
from small_decoder import Decoder, example_ids
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.analysis.spaces import Analysis, Space
from graphopt.passes import Canonicalize
from graphopt.pipeline import Context
from graphopt.target import Target


def analyzed(module: nn.Module, *inputs: Tensor, dynamic_shapes: Any = None) -> Analysis:
    program = graphopt.capture(module.eval(), inputs, dynamic_shapes=dynamic_shapes)
    Canonicalize().run(program, Context(Target(name="none", backend="none")))
    return graphopt.analyze(program)


def named(analysis: Analysis, name: str, symmetry: str = "permutation") -> Space:
    (space,) = [space for space in analysis.under(symmetry) if space.name == name]
    return space


def test_the_text_of_a_small_model() -> None:
    class Heads(nn.Module):
        """Values of 2 heads, each read by 2 of the output projection's 4."""

        def __init__(self) -> None:
            super().__init__()
            self.v, self.o = nn.Linear(5, 6, bias=False), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.v(x).unflatten(-1, (2, 3)).repeat_interleave(2, -2)
            y: Tensor = self.o(heads.flatten(-2))
            return y

    assert str(analyzed(Heads(), torch.randn(4, 5))) == textwrap.dedent("""\
        v.out[0]: 2 coordinates, 2 members; diagonal, general, orthogonal, permutation, sign; one change for each of 3
          v.weight[0] writes: [2] x 3
          o.weight[1] reads: [2] x 2 x 3
        v.out[1]: 3 coordinates, 2 members; diagonal, general, orthogonal, permutation, sign; one change for each of 2
          v.weight[0] writes: 2 x [3]
          o.weight[1] reads: 2 x 2 x [3]
        v.in: 5 coordinates, 1 members; no change is free
          v.weight[1] reads: [5]
          pinned: x is an input of the model
        o.out: 5 coordinates, 2 members; no change is free
          o.weight[0] writes: [5]
          o.bias[0] bias: [5]
          pinned: output is where the model returns it
        o.in[1]: 2 coordinates, 1 members; permutation; one change for each of 2 x 3
          o.weight[1] reads: 2 x [2] x 3""")


def test_the_residual_of_a_decoder_is_one_space_for_permutations() -> None:
    (space,) = [each for each in analyzed(Decoder(), *example_ids()).spaces if each.name == "table.out"]
    assert space.size == 12 and {"permutation", "sign", "diagonal"} <= space.symmetries
    members = {(each.weight, each.axis): each.role for each in space.members}
    assert members["table.weight", 1] == "writes"
    assert members["q.weight", 1] == members["up.weight", 1] == members["head.weight", 1] == "reads"
    assert members["o.weight", 0] == members["down.weight", 0] == "writes"
    assert members["one.weight", 0] == members["last.weight", 0] == "scale"


def test_each_relation_is_made_once_and_takes_names() -> None:
    analysis = analyzed(Decoder(), *example_ids())
    assert analysis.under("orthogonal") is analysis.under("orthogonal")
    with pytest.raises(ValueError, match="shear"):
        analysis.under("shear")


def test_transform_says_what_it_cannot_do() -> None:
    analysis = analyzed(Decoder(), *example_ids())
    pinned = named(analysis, "gate.out", "orthogonal")
    with pytest.raises(ValueError, match=r"gate.out cannot change: silu is silu, which is not linear"):
        pinned.transform(torch.eye(20))
    values = named(analysis, "v.out[1]", "orthogonal")
    assert values.shape == (2, 4, 4)
    with pytest.raises(ValueError, match=r"takes a change of shape \[2, 4, 4\], not \[3, 3\]"):
        values.transform(torch.eye(3))


def test_one_change_serves_every_fibre_and_weights_stay_as_they_were() -> None:
    analysis = analyzed(Decoder(), *example_ids())
    space = named(analysis, "v.out[1]", "orthogonal")
    before = {name: weight.clone() for name, weight in analysis.program.weights.items()}
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    changed = space.transform(rotation)
    assert set(changed) == {"v.weight", "v.bias", "o.weight"}
    heads = changed["v.weight"].view(2, 4, 12)
    torch.testing.assert_close(heads, torch.einsum("nm,hmd->hnd", rotation, before["v.weight"].double().view(2, 4, 12)))
    for name, weight in analysis.program.weights.items():
        assert torch.equal(weight, before[name])


class _Shared(nn.Module):
    """One linear layer used three times, its weight tied to a table and to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for _ in range(3):
            x = x + self.mix(torch.relu(self.mix(x)))
        y: Tensor = self.head(x)
        return y


class _Both(nn.Module):
    """A weight that is a factor, a bias, a linear map and an output at once."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.square = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(x) @ self.square * self.square[0] + self.square[:, 1]
        return y, self.square


class _Reused(nn.Module):
    """A value that meets itself transposed: its two axes become one space."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        gram = y.mT @ y
        z: Tensor = self.down(gram + gram.mT)
        return z


class _Custom(nn.Module):
    """An operator that no rule knows, in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cummax(self.up(x), -1).values
        z: Tensor = self.last(self.down(y))
        return z


class _Sizes(nn.Module):
    """Axes of one, of none, and an empty batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.down = nn.Linear(6, 4), nn.Linear(4, 1), nn.Linear(1, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(x)
        return self.down(self.one(y)), y[:, :0]


class _Conditional(nn.Module):
    """A mask from the values themselves, and positions taken by index."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = torch.where(y > y.mean(-1, keepdim=True), y, -y)
        z: Tensor = self.down(y[:, torch.tensor([2, 0])])
        return z


ADVERSARIES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "shared": (_Shared, (torch.tensor([[1, 5, 2]]),)),
    "both": (_Both, (torch.randn(3, 6),)),
    "reused": (_Reused, (torch.randn(5, 4),)),
    "custom": (_Custom, (torch.randn(3, 6),)),
    "sizes": (_Sizes, (torch.randn(3, 6),)),
    "conditional": (_Conditional, (torch.randn(2, 4, 6),)),
    "activation only": (lambda: nn.Softmax(-1), (torch.randn(2, 3),)),
    "identity": (nn.Identity, (torch.randn(2, 3),)),
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_an_adversary_is_analysed_and_what_is_free_is_free(name: str) -> None:
    make, inputs = ADVERSARIES[name]
    torch.manual_seed(0)
    analysis = analyzed(make(), *inputs)
    assert_free(analysis.program, analysis)
    assert str(analysis) is not None


def test_an_unknown_operator_pins_what_it_touches_by_name() -> None:
    analysis = analyzed(_Custom(), torch.randn(3, 6))
    assert any("cummax" in str(pin) for pin in named(analysis, "up.out").pins)
    assert named(analysis, "down.out").free, "what it does not touch stays free"


def test_symbolic_sizes_are_atoms_of_their_own() -> None:
    """Batch and length split no weight, and a space beside them stays free."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    analysis = analyzed(Decoder(), *example_ids(), dynamic_shapes=({0: batch, 1: length},))
    assert named(analysis, "table.out").free
    assert all(space.size > 1 for space in analysis.spaces)


def test_grouped_channels_are_groups_times_channels() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4)
            self.three = nn.Conv2d(12, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.three(functional.relu(self.two(functional.relu(self.one(x)))))
            return y

    analysis = analyzed(Grouped(), torch.randn(1, 3, 4, 4))
    inner = named(analysis, "one.out[1]", "diagonal")
    assert inner.size == 2 and inner.fibres == (4,) and inner.free
    groups = named(analysis, "one.out[0]")
    assert {(member.weight, member.axis) for member in groups.members} >= {
        ("one.weight", 0), ("two.weight", 0), ("three.weight", 1),
    }  # fmt: skip
