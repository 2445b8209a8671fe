"""Deleting coordinates takes their contributions out of every sum: on real architectures, and operator by operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deletions import delete, keep_all, removed, run_unrounded
from torch import Tensor, nn
from torch.nn import functional
from zoo import CAPTURED, MODELS

import graphopt
from graphopt.analysis.spaces import Analysis, Space, analyze
from graphopt.ir import Program
from graphopt.ir.verify import verify
from graphopt.passes import Canonicalize, CenterNorms, FoldBatchNorm
from graphopt.passes.prune.deletion import Deletion, Undeletable
from graphopt.pipeline import Context
from graphopt.pipeline.validation import relative_error
from graphopt.target import Target

CONTEXT = Context(Target(name="none", backend="none"))
TOLERANCE = 1e-9
FASTEST = ("Llama", "ViT", "MobileNetV2")


def prepared(program: Program) -> Program:
    for each in (Canonicalize(), FoldBatchNorm(), CenterNorms()):
        each.run(program, CONTEXT)
    return program


@functools.cache
def _zoo(name: str) -> Program:
    model, inputs = MODELS[name].build()
    return prepared(graphopt.capture(model, inputs))  # of fixed sizes, so that every place can be counted


def deletable(analysis: Analysis) -> list[Space]:
    return [each for each in analysis.under("permutation") if each.free and not each.counted and each.size > 1]


def assert_removed(given: Program, names: list[str], seed: int = 0) -> Program:
    """Delete half of the spaces with these names from a clone and compare; return the clone."""
    program = given.clone()
    analysis = analyze(program)
    random = torch.Generator().manual_seed(seed)
    kept = keep_all([space for space in analysis.under("permutation") if space.name in names], 0.5, random)
    expected = removed(program, analysis, kept, program.flat_example)
    changes = delete(program, analysis, kept)
    verify(program)
    error = relative_error(run_unrounded(program, changes, program.flat_example), expected)
    assert error <= TOLERANCE, f"{', '.join(names)}: {error:.1e}"
    return program


@pytest.mark.parametrize(
    "name", [name if name in FASTEST else pytest.param(name, marks=pytest.mark.slow) for name in CAPTURED]
)
def test_every_space_alone_and_all_together(name: str) -> None:
    program = _zoo(name)
    names = [space.name for space in deletable(analyze(program))]
    assert names
    for each in names:
        assert_removed(program, [each])
    smaller = assert_removed(program, names)
    assert sum(w.numel() for w in smaller.weights.values()) < sum(w.numel() for w in program.weights.values())


@pytest.mark.parametrize("name", FASTEST)
def test_composes_with_itself_and_runs_at_other_sizes(name: str) -> None:
    model, inputs = MODELS[name].build()
    program = prepared(graphopt.capture(model, inputs, dynamic_shapes=MODELS[name].dynamic_shapes))
    for seed in range(2):
        analysis, random = analyze(program), torch.Generator().manual_seed(seed)
        delete(program, analysis, keep_all(deletable(analysis), 0.7, random))
        verify(program)
        outputs = program(**MODELS[name].second_inputs())
        assert all(bool(x.isfinite().all()) for x in torch.utils._pytree.tree_leaves(outputs))


# Operator by operator -------------------------------------------------------------------------------------------------

class Of(nn.Module):
    """linear -> function -> linear, of channels-last values [4, 12]."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 12, out: int = 12) -> None:
        super().__init__()
        self.before, self.function, self.after = nn.Linear(5, width), function, nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))  # type: ignore[no-any-return]


class Convolved(nn.Module):
    def __init__(self, *inner: nn.Module, channels: int = 12, out: int = 12) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, channels, 3), *inner, nn.Conv2d(out, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Attended(nn.Module):
    """Attention over 4 query heads of 6, 2 key heads, values of 5."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(7, 24), nn.Linear(7, 12), nn.Linear(7, 10), nn.Linear(20, 7)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        q, k = (each(x).unflatten(-1, (-1, 6)).transpose(1, 2) for each in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, 5)).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.options)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


FLAT, IMAGE = torch.randn(4, 5), torch.randn(2, 3, 7, 7)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "relu": (lambda: Of(torch.relu), FLAT),
    "sigmoid, which is not zero at zero": (lambda: Of(torch.sigmoid), FLAT),
    "mean": (lambda: Of(lambda x: x - x.mean(-1, keepdim=True)), FLAT),
    "mean over two axes": (lambda: Of(lambda x: x * x.unflatten(-1, (3, 4)).mean((-2, -1))[:, None]), FLAT),
    "length": (lambda: Of(lambda x: functional.normalize(x, dim=-1)), FLAT),
    "RMS norm": (lambda: Of(nn.RMSNorm(12, eps=1e-3)), FLAT),
    "RMS norm without weight": (lambda: Of(nn.RMSNorm(12, elementwise_affine=False, eps=0.5)), FLAT),
    "RMS norm of each head": (
        lambda: Of(nn.Sequential(nn.Unflatten(-1, (3, 4)), nn.RMSNorm(4, eps=1e-3), nn.Flatten(-2))), FLAT
    ),
    "split in unequal parts": (lambda: Of(lambda x: torch.cat([y.relu() for y in x.split([2, 7, 3], -1)], -1)), FLAT),
    "split in equal parts": (lambda: Of(lambda x: x.split(6, -1)[0] * x.split(6, -1)[1], out=6), FLAT),
    "chunks": (lambda: Of(lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], out=6), FLAT),
    "slices": (lambda: Of(lambda x: torch.cat([x[..., 5:], x[..., :5].relu()], -1)), FLAT),
    "slices of a part": (lambda: Of(lambda x: torch.cat([x[..., 2:5], x[..., 5:-1]], -1), out=9), FLAT),
    "every second": (lambda: Of(lambda x: torch.cat([x[..., ::2], -x[..., 1::2]], -1)), FLAT),
    "repeat": (lambda: Of(lambda x: x.repeat(1, 3), out=36), FLAT),
    "repeat_interleave": (lambda: Of(lambda x: x.repeat_interleave(3, -1), out=36), FLAT),
    "expand": (lambda: Of(lambda x: x[:, None].expand(4, 3, 12).flatten(1), out=36), FLAT),
    "a tensor of ones": (lambda: Of(lambda x: x * torch.ones(4, 12)), FLAT),
    "narrow": (lambda: Of(lambda x: x.narrow(-1, 3, 6), out=6), FLAT),
    "depthwise": (lambda: Convolved(nn.Conv2d(12, 12, 3, groups=12), nn.ReLU()), IMAGE),
    "depthwise with a multiplier": (lambda: Convolved(nn.Conv2d(12, 24, 3, groups=12), out=24), IMAGE),
    "groups": (lambda: Convolved(nn.Conv2d(12, 8, 3, groups=4), out=8), IMAGE),
    "group norm": (lambda: Convolved(nn.GroupNorm(3, 12)), IMAGE),
    "group norm and groups": (
        lambda: Convolved(nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 6, 1, groups=3), out=6), IMAGE
    ),
    "batch norm": (lambda: Convolved(nn.Sigmoid(), nn.BatchNorm2d(12), nn.ReLU()), IMAGE),
    "channel shuffle": (lambda: Convolved(nn.ChannelShuffle(3)), IMAGE),
    "pixel shuffle": (lambda: Convolved(nn.PixelShuffle(2), out=3), IMAGE),
    "transposed": (lambda: Convolved(nn.ConvTranspose2d(12, 12, 2, stride=2)), IMAGE),
    "transposed with groups": (lambda: Convolved(nn.ConvTranspose2d(12, 8, 2, groups=4), out=8), IMAGE),
    "pooled and flattened": (lambda: Convolved(nn.AdaptiveAvgPool2d(2), nn.ReLU()), IMAGE),
    "attention": (Attended, torch.randn(2, 5, 7)),
    "causal attention of a given scale": (lambda: Attended(is_causal=True, scale=0.3), torch.randn(2, 5, 7)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    make, x = CASES[name]
    torch.manual_seed(0)
    program = prepared(graphopt.capture(make().eval(), (x,)))
    names = [space.name for space in deletable(analyze(program))]
    assert names
    for each in names:
        assert_removed(program, [each])
    assert_removed(program, names, seed=1)


def test_nothing_deleted_is_nothing_changed() -> None:
    program = _zoo("ViT").clone()
    analysis = analyze(program)
    before = str(program)
    delete(program, analysis, {space: torch.arange(space.size) for space in deletable(analysis)})
    assert str(program).split("graph")[-1] == before.split("graph")[-1]


def test_a_size_computed_at_run_time_is_refused() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).reshape(x.shape[0] * 3, 4).relu())
            return y.reshape(x.shape[0], 3, 2).sum(1)  # type: ignore[no-any-return]

    program = graphopt.capture(Folded().eval(), (FLAT,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    analysis = analyze(program)
    space = next(each for each in deletable(analysis) if each.size == 3)
    with pytest.raises(Undeletable, match="size that is computed when the model runs"):
        Deletion(analysis, {space: torch.arange(2)})
