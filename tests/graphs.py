"""Random models whose symmetries are known because they were planted: for the analysis of spaces and for passes.

`models()` is a hypothesis strategy of `Planted`. What it draws is a description, plain data that a failing example
prints; `Planted.module` is built of it with honest values, always the same ones.

Sizes that mean different things differ (a residual width is no hidden width, a head's no number of heads), so that a
weight's axis and a size name one space.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from honest_values import redraw
from hypothesis import strategies
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import graphopt
from graphopt.ir import Program

PERMUTATION = frozenset({"permutation"})
SCALES = frozenset({"sign", "diagonal"})
LINEAR = PERMUTATION | SCALES | {"orthogonal", "general"}
ROTATIONS = PERMUTATION | {"sign", "orthogonal"}
POSITIVE = PERMUTATION | {"diagonal"}
PASSED = {"identity": LINEAR, "relu": POSITIVE, "gelu": PERMUTATION, "silu": PERMUTATION}  # by an activation


@dataclass(frozen=True)
class Symmetric:
    """A space that a model has by construction.

    Attributes:
        holds: weight axes that lie in it, as (weight, axis).
        size: how many coordinates it has.
        free: the symmetries under which it may change; it may have others.
        lacks: weight axes that do not lie in it, where `holds` alone names several spaces.
        fibres: a size on whose index the change may depend for all symmetries but permutation; 1: none is demanded.
    """

    holds: tuple[tuple[str, int], ...]
    size: int
    free: frozenset[str]
    lacks: tuple[tuple[str, int], ...] = ()
    fibres: int = 1


@dataclass(frozen=True)
class Planted:
    """A model with what is known of it.

    Attributes:
        description: what it was built from.
        dynamic: whether `program` has symbols for the batch and, in sequence models, the length.
    """

    description: Sequence | Images
    dynamic: bool = False

    @functools.cached_property
    def module(self) -> nn.Module:
        """The model in eval mode, float32, with redrawn values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return redraw(self.description.build(), 1).eval()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Example inputs, always the same ones."""
        return self.description.inputs(torch.Generator().manual_seed(2))

    @property
    def symmetries(self) -> tuple[Symmetric, ...]:
        return tuple(self.description.planted())

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Dim], ...] | None:
        return ({dim: Dim(name) for dim, name in enumerate(self.description.symbols)},) if self.dynamic else None

    def program(self) -> Program:
        """Capture the model anew."""
        return graphopt.capture(self.module, self.inputs, dynamic_shapes=self.dynamic_shapes)


# Sequences ------------------------------------------------------------------------------------------------------------

WIDTH, VOCABULARY = 20, 23


@dataclass(frozen=True)
class Norm:
    """none, or rms and layer norms with or without a gain (and a bias, of layer norms)."""

    kind: str = "none"
    gain: bool = False

    def build(self, width: int = WIDTH) -> nn.Module:
        match self.kind:
            case "rms":
                return nn.RMSNorm(width, elementwise_affine=self.gain)
            case "layer":
                return nn.LayerNorm(width, elementwise_affine=self.gain)
        return nn.Identity()

    @property
    def passed(self) -> frozenset[str]:
        """What it lets its input undergo."""
        if self.kind == "none":
            return LINEAR | {"center"}
        if self.kind == "layer":
            return PERMUTATION | {"center"}
        return PERMUTATION if self.gain else ROTATIONS


@dataclass(frozen=True)
class Attention:
    """Attention of `groups` key heads with `repeats` queries each.

    Attributes:
        form: sdpa (heads repeated first), grouped (`enable_gqa`) or spelled (softmax(q k) v).
        fused: whether q, k and v are one linear.
        rotary: "", "half" (first with second half) or "pairs" (even with odd).
        inner: norm of queries and keys.
    """

    groups: int = 3
    repeats: int = 2
    dim: int = 8
    form: str = "sdpa"
    fused: bool = False
    bias: bool = True
    causal: bool = True
    rotary: str = ""
    inner: Norm = Norm()

    def build(self) -> nn.Module:
        return _Attention(self)

    def planted(self, at: str) -> Iterable[Symmetric]:
        q, k, v = (f"{at}.{'qkv' if self.fused else name}.weight" for name in "qkv")
        out = f"{at}.out.weight"
        yield Symmetric(((v, 0), (out, 1)), self.dim, LINEAR, fibres=self.groups)
        if self.groups > 1:
            yield Symmetric(((q, 0), (k, 0), (v, 0), (out, 1)), self.groups, PERMUTATION)
        if self.repeats > 1:
            yield Symmetric(((q, 0), (out, 1)), self.repeats, PERMUTATION)
        free = PERMUTATION | SCALES if self.rotary else LINEAR
        size = self.dim // 2 if self.rotary else self.dim
        if self.inner.kind != "none" and self.inner.gain:
            gains = ((f"{at}.q_norm.weight", 0), (f"{at}.k_norm.weight", 0))
            yield Symmetric(gains, size, PERMUTATION | SCALES)
        free &= self.inner.passed
        yield Symmetric(((q, 0), (k, 0)), size, free, ((out, 1),), 1 if self.inner.gain else self.groups)


class _Attention(nn.Module):
    def __init__(self, of: Attention) -> None:
        super().__init__()
        self.of = of
        query, key = of.groups * of.repeats * of.dim, of.groups * of.dim
        if of.fused:
            self.qkv = nn.Linear(WIDTH, query + 2 * key, bias=of.bias)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias=of.bias) for size in (query, key, key))
        self.q_norm, self.k_norm = of.inner.build(of.dim), of.inner.build(of.dim)
        self.out = nn.Linear(query, WIDTH, bias=of.bias)
        if of.rotary:
            self.register_buffer("frequencies", 100.0 ** (-torch.arange(0, of.dim, 2) / of.dim))

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), self.frequencies)
        if self.of.rotary == "half":
            cos, sin = (each(torch.cat((angles, angles), -1)) for each in (torch.cos, torch.sin))
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin
        cos, sin = angles.cos(), angles.sin()
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        of, (batch, length, _) = self.of, x.shape
        if of.fused:
            key = of.groups * of.dim
            split = self.qkv(x).split((of.repeats * key, key, key), -1)
        else:
            split = self.q(x), self.k(x), self.v(x)
        q, k, v = (each.view(batch, length, -1, of.dim).transpose(1, 2) for each in split)
        q, k = self.q_norm(q), self.k_norm(k)
        if of.rotary:
            q, k = self.rotated(q), self.rotated(k)
        if of.form != "grouped" and of.repeats > 1:
            k, v = (each.repeat_interleave(of.repeats, 1) for each in (k, v))
        if of.form == "spelled":
            scores = q @ k.mT / of.dim**0.5
            if of.causal:
                scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
            y = scores.softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=of.causal, enable_gqa=of.form == "grouped")
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


@dataclass(frozen=True)
class MLP:
    """down(f(up(x))), or down(f(gate(x)) * up(x))."""

    hidden: int = 14
    activation: str = "relu"
    gated: bool = False
    bias: bool = True

    def build(self) -> nn.Module:
        return _MLP(self)

    def planted(self, at: str) -> Iterable[Symmetric]:
        free = PASSED[self.activation] | (SCALES if self.gated else frozenset())
        if self.gated:
            free -= {"orthogonal", "general"}  # a product is no linear map of both
            yield Symmetric(((f"{at}.gate.weight", 0), (f"{at}.up.weight", 0)), self.hidden, PERMUTATION)
        yield Symmetric(((f"{at}.down.weight", 1),), self.hidden, free)


class _MLP(nn.Module):
    def __init__(self, of: MLP) -> None:
        super().__init__()
        self.of = of
        self.up, self.down = nn.Linear(WIDTH, of.hidden, of.bias), nn.Linear(of.hidden, WIDTH, of.bias)
        self.gate = nn.Linear(WIDTH, of.hidden, of.bias) if of.gated else None

    def forward(self, x: Tensor) -> Tensor:
        act = _activation(self.of.activation)
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class Block:
    """x + sum of branch(before(x)), then `after`: the branches are parallel, the norms optional."""

    branches: tuple[Attention | MLP, ...]
    before: Norm = Norm()
    after: Norm = Norm()


@dataclass(frozen=True)
class Sequence:
    """Tokens or vectors, blocks on a residual stream, a norm and a head; `tied`: the head is the table."""

    blocks: tuple[Block, ...]
    final: Norm = Norm()
    tokens: bool = True
    tied: bool = False
    symbols = ("batch", "length")

    def build(self) -> nn.Module:
        return _Sequence(self)

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        if self.tokens:
            return (torch.randint(VOCABULARY, (2, 5), generator=generator),)
        return (torch.randn(2, 5, 6, generator=generator),)

    def planted(self) -> Iterable[Symmetric]:
        free = LINEAR | {"center"}
        for block in self.blocks:
            free &= block.before.passed & (block.after.passed - ({"center"} if block.after.kind != "none" else set()))
        free &= self.final.passed
        if self.tied or any(norm.kind != "layer" for norm in (self.final, *(each.before for each in self.blocks))):
            free -= {"center"}  # somebody reads the mean
        if self.tied:
            free -= {"diagonal", "general"}  # the table is read and written
        writer = ("embed.weight", 1 if self.tokens else 0)
        writers = [(f"blocks.{i}.branches.{j}.{'down' if isinstance(branch, MLP) else 'out'}.weight", 0)
                   for i, block in enumerate(self.blocks) for j, branch in enumerate(block.branches)]  # fmt: skip
        for symmetry in free:
            # A norm after a block begins a stream of other scales and means: only what passes it holds all writers.
            all_of_one = all(symmetry in block.after.passed for block in self.blocks)
            yield Symmetric((writer, *writers) if all_of_one else (writer,), WIDTH, frozenset({symmetry}))
        for i, block in enumerate(self.blocks):
            for j, branch in enumerate(block.branches):
                yield from branch.planted(f"blocks.{i}.branches.{j}")
            if block.before.gain and block.before.kind != "none":
                yield Symmetric(((f"blocks.{i}.before.weight", 0),), WIDTH, SCALES)
        if self.final.gain and self.final.kind != "none" and not self.tied:
            yield Symmetric((("final.weight", 0), ("head.weight", 1)), WIDTH, SCALES)


class _Sequence(nn.Module):
    def __init__(self, of: Sequence) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH) if of.tokens else nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(_Block(block) for block in of.blocks)
        self.final = of.final.build()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not of.tied)
        if of.tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x))


class _Block(nn.Module):
    def __init__(self, of: Block) -> None:
        super().__init__()
        self.before, self.after = of.before.build(), of.after.build()
        self.branches = nn.ModuleList(branch.build() for branch in of.branches)

    def forward(self, x: Tensor) -> Tensor:
        read = self.before(x)
        for branch in self.branches:
            x = x + branch(read)
        return self.after(x)


def _activation(name: str):
    return (lambda x: x) if name == "identity" else getattr(functional, name)


# Images ---------------------------------------------------------------------------------------------------------------

CHANNELS = 12


@dataclass(frozen=True)
class Layer:
    """A piece of a convolutional net that reads a stream of CHANNELS channels and leaves one.

    Attributes:
        kind: residual    x + project(f(expand(x)))
              inverted    x + project(f(depthwise(f(expand(x)))))
              grouped     f(conv of `groups` groups of (conv of as many))
              concat      conv(cat(x, f(conv(x))))
              pool_max, pool_average
        hidden: channels inside. activation: f. batch_norm: whether one follows each inner convolution.
    """

    kind: str
    hidden: int = 16
    activation: str = "relu"
    batch_norm: bool = False
    groups: int = 4

    @property
    def passed(self) -> frozenset[str]:
        """What the layer lets the stream undergo that it reads."""
        return {"pool_max": POSITIVE, "inverted": LINEAR, "residual": LINEAR}.get(self.kind, LINEAR)

    def build(self) -> nn.Module:
        return _Layer(self)

    def planted(self, at: str) -> Iterable[Symmetric]:
        passed = PERMUTATION if self.batch_norm else PASSED[self.activation]
        if self.kind == "residual":
            yield Symmetric(((f"{at}.expand.weight", 0), (f"{at}.project.weight", 1)), self.hidden, passed)
        if self.kind == "inverted":
            places = ((f"{at}.expand.weight", 0), (f"{at}.depthwise.weight", 0), (f"{at}.project.weight", 1))
            yield Symmetric(places, self.hidden, PERMUTATION)
            mixed = passed - {"orthogonal", "general"}  # each channel has taps of its own
            yield Symmetric(places[:2], self.hidden, mixed)
            yield Symmetric(places[1:], self.hidden, mixed)
        if self.kind == "grouped":
            inner = self.hidden // self.groups
            places = ((f"{at}.expand.weight", 0), (f"{at}.grouped.weight", 1))
            yield Symmetric(places, inner, PASSED["identity"], fibres=self.groups)
            places = ((f"{at}.grouped.weight", 0), (f"{at}.project.weight", 1))
            yield Symmetric(places, inner, passed, fibres=self.groups)
            yield Symmetric(((f"{at}.expand.weight", 0), *places), self.groups, PERMUTATION)
        if self.kind == "concat":
            yield Symmetric(((f"{at}.expand.weight", 0), (f"{at}.project.weight", 1)), self.hidden, passed)


class _Layer(nn.Module):
    def __init__(self, of: Layer) -> None:
        super().__init__()
        self.of = of
        if of.kind.startswith("pool"):
            return
        self.expand = nn.Conv2d(CHANNELS, of.hidden, 1 if of.kind == "inverted" else 3, padding="same")
        read = of.hidden + (CHANNELS if of.kind == "concat" else 0)
        self.project = nn.Conv2d(read, CHANNELS, 1)
        if of.kind == "inverted":
            self.depthwise = nn.Conv2d(of.hidden, of.hidden, 3, padding=1, groups=of.hidden)
        if of.kind == "grouped":
            self.grouped = nn.Conv2d(of.hidden, of.hidden, 3, padding=1, groups=of.groups)
        self.first, self.second = (nn.BatchNorm2d(of.hidden) if of.batch_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        of, act = self.of, _activation(self.of.activation)
        match of.kind:
            case "pool_max":
                return functional.max_pool2d(x, 2, ceil_mode=True)
            case "pool_average":
                return functional.avg_pool2d(x, 2, ceil_mode=True)
            case "residual":
                return x + self.project(act(self.first(self.expand(x))))
            case "inverted":
                y = act(self.first(self.expand(x)))
                return x + self.project(act(self.second(self.depthwise(y))))
            case "grouped":
                return self.project(act(self.first(self.grouped(self.expand(x)))))
        return self.project(torch.cat((x, act(self.first(self.expand(x)))), 1))


@dataclass(frozen=True)
class Images:
    """Images, layers on a stream of channels, a mean over space and a head."""

    layers: tuple[Layer, ...]
    symbols = ("batch",)
    _begins: frozenset[str] = field(default=frozenset({"grouped", "concat"}), repr=False)

    def build(self) -> nn.Module:
        return _Images(self)

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(2, 3, 9, 8, generator=generator),)

    def planted(self) -> Iterable[Symmetric]:
        holds, free = [("stem.weight", 0)], LINEAR
        for index, layer in enumerate(self.layers):
            at = f"layers.{index}"
            yield from layer.planted(at)
            free &= layer.passed
            if not layer.kind.startswith("pool"):
                holds.append((f"{at}.expand.weight", 1))
            if layer.kind in self._begins:
                if layer.kind == "concat":
                    holds.append((f"{at}.project.weight", 1))
                yield Symmetric(tuple(holds), CHANNELS, free)
                holds, free = [], LINEAR
            if not layer.kind.startswith("pool"):
                holds.append((f"{at}.project.weight", 0))
        yield Symmetric((*holds, ("head.weight", 1)), CHANNELS, free)


class _Images(nn.Module):
    def __init__(self, of: Images) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.layers = nn.Sequential(*(layer.build() for layer in of.layers))
        self.head = nn.Linear(CHANNELS, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


# Strategies -----------------------------------------------------------------------------------------------------------


def norms(kinds: tuple[str, ...] = ("none", "rms", "layer")) -> strategies.SearchStrategy[Norm]:
    return strategies.builds(Norm, kind=strategies.sampled_from(kinds), gain=strategies.booleans())


def attentions() -> strategies.SearchStrategy[Attention]:
    return strategies.builds(
        Attention,
        groups=strategies.sampled_from((3, 1)),
        repeats=strategies.sampled_from((2, 1)),
        dim=strategies.sampled_from((8, 10)),
        form=strategies.sampled_from(("sdpa", "grouped", "spelled")),
        fused=strategies.booleans(),
        bias=strategies.booleans(),
        causal=strategies.booleans(),
        rotary=strategies.sampled_from(("", "half", "pairs")),
        inner=norms(("none", "rms")),
    )


def mlps() -> strategies.SearchStrategy[MLP]:
    return strategies.builds(
        MLP,
        hidden=strategies.sampled_from((14, 18)),
        activation=strategies.sampled_from(tuple(PASSED)),
        gated=strategies.booleans(),
        bias=strategies.booleans(),
    )


def sequences() -> strategies.SearchStrategy[Sequence]:
    """Every block has norms of its own, or all share one kind: only then do rotations and centering stay free."""
    branches = strategies.lists(attentions() | mlps(), min_size=1, max_size=2).map(tuple)

    def of(before: strategies.SearchStrategy[Norm], after: strategies.SearchStrategy[Norm]):
        blocks = strategies.builds(Block, branches=branches, before=before, after=after)
        return strategies.builds(
            _sequence, strategies.lists(blocks, min_size=1, max_size=2).map(tuple), before,
            strategies.booleans(), strategies.booleans(),
        )  # fmt: skip

    none = strategies.just(Norm())
    return strategies.one_of(
        norms().flatmap(lambda norm: of(strategies.just(norm), none)),
        of(norms(), none),
        of(none, norms()),
        of(norms(), norms()),
    )


def _sequence(blocks: tuple[Block, ...], final: Norm, tokens: bool, tied: bool) -> Sequence:
    return Sequence(blocks, final, tokens, tied and tokens)


def images() -> strategies.SearchStrategy[Images]:
    layers = strategies.builds(
        Layer,
        kind=strategies.sampled_from(("residual", "inverted", "grouped", "concat", "pool_max", "pool_average")),
        hidden=strategies.sampled_from((16, 28)),
        activation=strategies.sampled_from(tuple(PASSED)),
        batch_norm=strategies.booleans(),
        groups=strategies.sampled_from((4, 2)),
    )
    return strategies.builds(Images, strategies.lists(layers, min_size=1, max_size=3).map(tuple))


def models() -> strategies.SearchStrategy[Planted]:
    """Sequence models and convolutional nets, in equal parts, with fixed or symbolic sizes."""
    return strategies.builds(Planted, sequences() | images(), dynamic=strategies.booleans())
