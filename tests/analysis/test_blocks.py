"""Residual branches, layers and cuts, on modules whose structure is written down and on the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_decoder import Decoder, example_ids
from torch import Tensor, fx, nn
from zoo import FEW, capture

import graphopt
from graphopt.analysis.blocks import Blocks, correspondence, find_blocks, weights_of
from graphopt.ir import Program, operator
from graphopt.pipeline import Context, make_pass
from graphopt.target import Target


def _canonical(program: Program) -> Program:
    program = program.clone()
    make_pass("canonicalize").run(program, Context(Target(name="none", backend="none")))
    return program


def _blocks(module: nn.Module, *inputs: Tensor) -> tuple[Program, Blocks]:
    torch.manual_seed(0)
    program = _canonical(graphopt.capture(module.eval(), inputs or (torch.randn(2, 6),)))
    return program, find_blocks(program)


def _mlp(width: int = 6, act: type[nn.Module] = nn.GELU) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 9), act(), nn.Linear(9, width))


class Residual(nn.Module):
    """Blocks x + f(n(x)), n(x + f(x)) or x + f(n(x)) + g(n(x)), one after the other."""

    def __init__(self, kind: str, depth: int = 3, acts: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__()
        self.kind = kind
        acts = acts or (nn.GELU,) * depth
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(depth))
        self.ones, self.twos = (nn.ModuleList(_mlp(act=act) for act in acts) for _ in range(2))
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, one, two in zip(self.norms, self.ones, self.twos, strict=True):
            match self.kind:
                case "pre-norm":
                    x = x + one(norm(x))
                case "post-norm":
                    x = norm(x + one(x))
                case "none":
                    x = x + one(x)
                case "parallel":
                    x = x + one(norm(x)) + two(norm(x))
                case "side by side":
                    y = norm(x)
                    x = (x + one(y)) + two(y)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm", "none"])
def test_a_stream_of_equal_layers(kind: str) -> None:
    program, blocks = _blocks(Residual(kind))
    assert [branch.kind for branch in blocks.branches] == [kind] * 3
    assert [len(group) for group in blocks.groups] == [3]
    assert [len(stream) for stream in blocks.streams] == [3]
    for number, (layer, branch) in enumerate(zip(blocks.layers, blocks.branches, strict=True)):
        assert layer.branches == (branch,)
        names = {str(node.target) for node in weights_of(branch.body)}
        assert {f"ones.{number}.0.weight", f"ones.{number}.2.weight"} <= names
        assert (f"norms.{number}.weight" in names) is (kind == "pre-norm")
    assert str(blocks).startswith("3 layers of 1 ")
    assert program.graph.nodes


@pytest.mark.parametrize("kind", ["parallel", "side by side"])
def test_parallel_branches_of_one_source(kind: str) -> None:
    _, blocks = _blocks(Residual(kind))
    assert len(blocks.branches) == 6
    assert [len(layer.branches) for layer in blocks.layers] == [2, 2, 2]
    assert [len(group) for group in blocks.groups] == [3]
    for layer in blocks.layers:
        assert len({branch.source for branch in layer.branches}) == 1


def test_layers_are_the_same_where_their_operators_are() -> None:
    _, blocks = _blocks(Residual("pre-norm", acts=(nn.GELU, nn.ReLU, nn.GELU)))
    assert sorted(len(group) for group in blocks.groups) == [1, 2]
    first, odd, last = blocks.layers
    assert correspondence(first, odd) is None
    found = correspondence(first, last)
    assert found is not None
    assert all(operator(found[node]) == operator(node) for node in first.nodes)
    weights = {str(one.target): str(other.target) for one, other in found.items() if one.op == "get_attr"}
    assert weights["ones.0.0.weight"] == "ones.2.0.weight"
    assert weights["norms.0.bias"] == "norms.2.bias"


class Nested(nn.Module):
    """A residual inside the branch of a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), _mlp(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(x).tanh()
        return x + self.a(y + self.b(y))  # type: ignore[no-any-return]


def test_nested_residuals() -> None:
    _, blocks = _blocks(Nested())
    inner, outer = blocks.branches
    assert inner.parent is outer and outer.parent is None
    assert set(inner.body) < set(outer.body)


class Projected(nn.Module):
    """A bottleneck around which a convolution goes, and a second without. x: [batch, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1))
        self.around, self.next = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.relu()) + self.around(x.relu())
        return (x + self.next(x)).relu()  # type: ignore[no-any-return]


def test_a_projection_is_part_of_the_way_around() -> None:
    _, blocks = _blocks(Projected(), torch.randn(2, 3, 8, 8))
    assert [[operator(node) for node in branch.skip] for branch in blocks.branches] == [["conv2d"], []] or [
        len(branch.skip) for branch in blocks.branches
    ] == [1]


class Skips(nn.Module):
    """Two values that go around what is below them and are concatenated. x: [batch, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.deep, self.up = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x).relu()
        b = self.bottom(a).relu()
        c = self.up(torch.cat((b, self.deep(b).relu()), 1)).relu()
        return self.last(torch.cat((a, c), 1))  # type: ignore[no-any-return]


def test_skips_by_concatenation() -> None:
    _, blocks = _blocks(Skips(), torch.randn(2, 3, 8, 8))
    assert blocks.branches == ()
    assert len(blocks.skips) == 2
    inner = min(blocks.skips, key=lambda skip: len(skip.body))
    outer = max(blocks.skips, key=lambda skip: len(skip.body))
    assert inner.parent is outer
    assert "2 skips by concatenation" in str(blocks)


class NoResidual(nn.Module):
    """Sums and products that are none: gating, rotary embedding, cubes, two maps of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x * self.c(x).sigmoid()
        x = x * 0.3 + torch.cat((-x[..., 3:], x[..., :3]), -1) * 0.7
        x = x + 0.1 * x**3
        return self.b(x) + self.c(x)  # type: ignore[no-any-return]


def test_what_is_no_residual() -> None:
    _, blocks = _blocks(NoResidual())
    assert (blocks.branches, blocks.skips, blocks.layers) == ((), (), ())


@pytest.mark.parametrize("module", [nn.Linear(6, 3), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.Tanh())])
def test_programs_without_residual(module: nn.Module) -> None:
    _, blocks = _blocks(module)
    assert blocks.branches == () and blocks.layers == ()
    assert str(blocks)


def test_a_decoder() -> None:
    _, blocks = _blocks(Decoder(), *example_ids())
    assert [branch.kind for branch in blocks.branches] == ["pre-norm", "pre-norm"]
    attention, mlp = blocks.branches
    assert "scaled_dot_product_attention" in {operator(node) for node in attention.body}
    assert {"gate.weight", "up.weight", "down.weight"} <= {str(node.target) for node in weights_of(mlp.body)}


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm", "parallel"])
def test_a_program_can_be_run_from_cut_to_cut(kind: str) -> None:
    """Everything behind a cut is computed from the cut and from what never touched the stream."""
    program, blocks = _blocks(Residual(kind))
    assert len(blocks.cuts) >= 4
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    start = next(node for node in program.graph.nodes if operator(node) == "linear")
    for cut in blocks.cuts:
        touched = _follows(start)
        for node in touched:
            if order[node] > order[cut]:
                for source in node.all_input_nodes:
                    assert source is cut or order[source] > order[cut] or source not in touched, (cut, node, source)


def _follows(start: fx.Node) -> set[fx.Node]:
    found, pending = {start}, [start]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


@pytest.mark.parametrize("depth", [1, 2, 40])
def test_depth(depth: int) -> None:
    _, blocks = _blocks(Residual("pre-norm", depth))
    assert len(blocks.branches) == depth
    assert len(blocks.layers) == depth
    assert [len(group) for group in blocks.groups] == [depth]


# What the zoo's models are made of: branches, their kinds, skips, and the sizes of groups of equal layers.
ZOO: dict[str, tuple[int, set[str], int, list[int]]] = {
    "Llama": (4, {"pre-norm"}, 0, [2]),
    "Mistral": (4, {"pre-norm"}, 0, [2]),
    "Qwen2": (4, {"pre-norm"}, 0, [2]),
    "Qwen3": (4, {"pre-norm"}, 0, [2]),
    "Gemma2": (4, {"pre-norm"}, 0, [1, 1]),  # a window in every second layer
    "Phi3": (4, {"pre-norm"}, 0, [2]),
    "GPT2": (4, {"pre-norm"}, 0, [2]),
    "OPT": (4, {"pre-norm"}, 0, [2]),
    "GPTNeoX": (4, {"pre-norm"}, 0, [2]),
    "BLOOM": (4, {"pre-norm"}, 0, [2]),
    "Mixtral": (4, {"pre-norm"}, 0, [2]),
    "BERT": (4, {"post-norm"}, 0, [2]),
    "RoBERTa": (4, {"post-norm"}, 0, [2]),
    "ELECTRA": (4, {"post-norm"}, 0, [2]),
    "DistilBERT": (4, {"post-norm"}, 0, [2]),
    "T5": (10, {"pre-norm"}, 0, [2, 2, 2, 2]),
    "Whisper": (10, {"pre-norm"}, 0, [2, 2, 2, 2]),
    "ViT": (4, {"pre-norm"}, 0, [2]),
    "DeiT": (4, {"pre-norm"}, 0, [2]),
    "Swin": (8, {"pre-norm"}, 0, [1, 1, 1, 1]),  # shifted windows, two widths
    "SegFormer": (8, {"pre-norm"}, 0, [1] * 8),  # another width in each stage
    "CLIP": (8, {"pre-norm"}, 0, [2, 2]),
    "ConvNeXt": (5, {"none"}, 0, [2, 2, 1]),
    "ResNet": (5, {"none"}, 0, [1] * 5),
    "RegNet": (5, {"none"}, 0, [1] * 5),
    "MobileNetV2": (10, {"none"}, 0, [3, 3, 2, 2]),
    "EfficientNet": (2, {"none"}, 0, [1, 1]),
    "UNet": (5, {"pre-norm"}, 2, [1] * 5),
}


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def test_zoo(name: str) -> None:
    branches, kinds, skips, groups = ZOO[name]
    blocks = find_blocks(_canonical(capture(name)))
    assert len(blocks.branches) == branches
    assert {branch.kind for branch in blocks.branches} == kinds
    assert len(blocks.skips) == skips
    assert [len(group) for group in blocks.groups] == groups
    for group in blocks.groups:
        for other in group[1:]:
            found: dict[Any, Any] | None = correspondence(group[0], other)
            assert found is not None
            for one, same in found.items():
                if one.op == "get_attr":
                    assert one.meta["val"].shape == same.meta["val"].shape
