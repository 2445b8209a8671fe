"""Pieces: targets are what the exact program gives, inputs what the changed pieces before give, for any graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_decoder import Decoder
from torch import Tensor, fx, nn

from graphopt import capture
from graphopt.calibration import Batches
from graphopt.calibration.pieces import Piece, Pieces
from graphopt.errors import GraphoptError
from graphopt.ir import Program, dialect, operator
from graphopt.ir.arguments import arguments
from graphopt.progress import Silent


def sites_of(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if operator(node) in ("linear", "conv2d")]


def residual() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.two(self.one(x).relu())
            return out

    return nn.Sequential(*(Block() for _ in range(3)), nn.Flatten(), nn.Linear(64, 5)), [
        (torch.randn(2, 4, 4, 4),) for _ in range(3)
    ]


def decoder() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return Decoder(width=16), [(torch.randint(11, (2, 6)),) for _ in range(3)]


def towers() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """Two inputs that meet at the end, and two outputs."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            left = self.left(x).tanh()
            return self.last(left * self.right(y).sigmoid()), left

    torch.manual_seed(0)
    return Towers(), [(torch.randn(2, 4), torch.randn(2, 6)) for _ in range(3)]


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("make", [residual, decoder, towers])
def test_every_site_once_between_what_changed_and_what_should_come_out(make: Any, whole: bool, spill: bool) -> None:
    module, batches = make()
    program = capture(module.eval(), batches[0])
    sites = sites_of(program)
    halved = {str(arguments(site)["weight"].target) for site in sites}
    changed = program.map_weights(lambda name, weight: weight * 0.5 if name in halved else weight)
    seen: list[fx.Node] = []
    checked = 0

    def learn(piece: Piece) -> Mapping[fx.Node, Tensor]:
        nonlocal checked
        seen.extend(piece.sites)
        new = {site: program.weight(arguments(site)["weight"]) * 0.5 for site in piece.sites}
        assert piece.count == len(batches)
        for (lane, targets), batch in zip(piece.batches(), batches, strict=True):
            made = piece.outputs(lane, new)
            assert set(made) == set(targets) == set(piece.exits)
            for node in piece.exits:
                torch.testing.assert_close(targets[node], value_at(program, node, batch))
                torch.testing.assert_close(made[node], value_at(changed, node, batch))
                checked += 1
        return new

    Pieces(program, sites, Batches(batches, program), Silent(), whole, spill).run(learn)
    assert sorted(seen, key=str) == sorted(sites, key=str)
    assert checked
    assert whole or make is towers or len(batches) < checked


def value_at(program: Program, node: fx.Node, batch: tuple[Tensor, ...]) -> Tensor:
    twin = program.clone()
    twin.graph.output_node().args = ((next(each for each in twin.graph.nodes if each.name == node.name),),)
    twin.graph_module.recompile()
    (value,) = twin.run(list(batch))
    assert isinstance(value, Tensor)
    return value


def test_gradients_pass_quantized_activations_and_targets_do_not_see_them() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.tensor(0.5)
            codes = dialect.quantize(self.one(x), scale, None, 0, 0, "int8")
            out: Tensor = self.two(dialect.dequantize(codes, scale, None, None, 0, 0, "int8"))
            return out

    torch.manual_seed(0)
    module, batches = Quantized(), [(torch.randn(3, 4),)]
    program = capture(module.eval(), batches[0])

    def learn(piece: Piece) -> Mapping[fx.Node, Tensor]:
        leaves = {
            site: program.weight(arguments(site)["weight"]).detach().clone().requires_grad_() for site in piece.sites
        }
        ((lane, targets),) = piece.batches()
        made = piece.outputs(lane, leaves)
        (exit,) = piece.exits
        (x,) = batches[0]
        torch.testing.assert_close(made[exit], module(x))
        torch.testing.assert_close(targets[exit], module.two(module.one(x)))
        made[exit].square().sum().backward()  # type: ignore[no-untyped-call]
        assert all(leaf.grad is not None and bool(leaf.grad.abs().sum() > 0) for leaf in leaves.values())
        return {site: leaf.detach() for site, leaf in leaves.items()}

    Pieces(program, sites_of(program), Batches(batches, program), Silent(), whole=True).run(learn)


def test_no_batch_is_refused() -> None:
    module, batches = residual()
    program = capture(module.eval(), batches[0])
    with pytest.raises(GraphoptError, match="calibration"):
        Pieces(program, sites_of(program), Batches([], program), Silent()).run(lambda piece: {})
