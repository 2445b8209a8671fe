"""Every operator in the table, alone: what its rule lets the coordinates before it undergo, and that this is true.

Graphs are written by hand, operator by operator: capture would decompose many of them. Before the operator stands a
linear layer, behind it one that contracts the axis in question.

    p permutation   s sign   d diagonal   o orthogonal   g general   c center

Some rules promise less than is true (a sign may pass a square); none more. A linear layer reads the mean, so `center`
is free only before layer norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from freedom import assert_free
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from graphopt.analysis.spaces import Analysis, Space, Symmetry, analyze
from graphopt.analysis.spaces.flow import RULES
from graphopt.ir import Program
from graphopt.ir.program import Signature

LETTERS = dict(zip("psdogc", Symmetry, strict=True))
N = 8


@dataclass(frozen=True)
class Sample:
    """One use of an operator.

    Attributes:
        name: the overload, `mean.dim`; a dialect's with its namespace. free: letters of what the writer may undergo.
        call: computes the operator's output, given the overload, x and the weights. shape: of x, its first axis 2.
        axis: of x whose coordinates the writer writes. out: the axis of the result that a linear layer contracts.
        weights: shapes of weights that the call gets after x.
    """

    name: str
    free: str
    call: Callable[..., Any]
    shape: tuple[int, ...] = (2, 3, N)
    axis: int = -1
    out: int = -1
    weights: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def target(self) -> Any:
        namespace, _, name = self.name.rpartition("::")
        packet, _, overload = name.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace or "aten"), packet), overload or "default")


aten = torch.ops.aten


class _Module(nn.Module):
    """The writer, the operator, and a reader for each floating tensor that it returns."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.sample = sample
        self.random = torch.Generator().manual_seed(0)
        self.add("up", (sample.shape[sample.axis], 6))
        for index, shape in enumerate(sample.weights):
            self.add(f"w{index}", shape)

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        self.register_parameter(name, nn.Parameter(torch.rand(shape, generator=self.random) + 0.2))

    def written(self, x: Any) -> Any:
        """Return `up` x with its coordinates on the sample's axis."""
        return _moved(aten.linear.default(x, self.up), len(self.sample.shape), -1, self.sample.axis)

    def made(self, x: Any) -> Any:
        weights = [getattr(self, f"w{index}") for index in range(len(self.sample.weights))]
        return self.sample.call(self.sample.target, self.written(x), *weights)

    def forward(self, x: Any) -> list[Any]:
        made = self.made(x)
        parts = [made[index] for index in range(self.count)] if self.count else [made]
        return [self.read(index, part) for index, part in enumerate(parts)]

    def read(self, index: int, part: Any) -> Any:
        rank = self.ranks[index]
        if not rank:
            return part
        part = aten._to_copy.default(_moved(part, rank, self.sample.out, -1), dtype=torch.float32)
        return aten.linear.default(part, getattr(self, f"down{index}"))

    def look(self, x: Tensor) -> None:
        """Find out what the operator returns, and make weights for its readers."""
        made = self.made(x)
        self.count = len(made) if isinstance(made, tuple | list) else 0
        self.ranks = []
        for index, part in enumerate(made if self.count else [made]):
            self.ranks.append(part.dim())
            if self.ranks[-1]:
                self.add(f"down{index}", (3, part.shape[self.sample.out]))


def _moved(x: Any, rank: int, source: int, target: int) -> Any:
    order = list(range(rank))
    order.insert(target % rank, order.pop(source % rank))
    return x if order == list(range(rank)) else aten.permute.default(x, order)


class _Values(fx.Interpreter):
    """Notes each node's value where capture notes a fake one."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def program_of(sample: Sample) -> Program:
    """Build the program of a sample, its operator as it is."""
    module = _Module(sample).eval()
    axis = sample.axis % len(sample.shape)
    outer = [size for index, size in enumerate(sample.shape) if index != axis]
    example = torch.rand(*outer, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        module.look(example)
    traced = fx.GraphModule(module, fx.Tracer().trace(module))
    (end,) = [node for node in traced.graph.nodes if node.op == "output"]
    end.args = (tuple(end.args[0]),)
    traced.recompile()
    with torch.no_grad():
        _Values(traced).run(example)
    _, in_spec = tree_flatten(((example,), {}))
    _, out_spec = tree_flatten(end.args[0])
    return Program(traced, Signature(in_spec, out_spec, ("x",), ("x",)), ((example,), {}))


def _made(x: Any, op: Any, *args: Any) -> Any:
    """Call an operator of numbers alone, as a node where the sample is traced (x is what tells)."""
    return x.tracer.create_proxy("call_function", op, args, {}) if isinstance(x, fx.Proxy) else op(*args)


def samples() -> Iterator[Sample]:
    """Yield a sample of every operator in the table."""

    def each(names: str, free: str, call: Callable[..., Any] = lambda op, x: op(x), **rest: Any) -> Iterator[Sample]:
        for name in names.split():
            yield Sample(name, free, call, **rest)

    image, shape4 = {"axis": 1, "out": 1}, (2, N, 4, 6)
    whole = lambda x: aten._to_copy.default(aten.mul.Tensor(x, 9), dtype=torch.int64)  # noqa: E731
    # pointwise
    yield from each("alias clone contiguous detach neg lift_fresh lift_fresh_copy positive", "psdog")
    yield from each("conj real", "psdog")
    yield from each("_to_copy", "psdog", lambda op, x: op(x, dtype=torch.float64))
    yield from each("to.dtype", "psdog", lambda op, x: op(x, torch.float64))
    yield from each("dropout", "psdog", lambda op, x: op(x, 0.5, False))
    yield from each("type_as", "psdog", lambda op, x: op(x, x))
    yield from each("relu leaky_relu", "pd")
    yield from each("abs", "pd")
    yield from each("prelu", "pd", lambda op, x, w: op(x, w), shape=shape4, weights=((N,),), **image)
    yield from each("tanh sin sinh asinh atan asin erf tan sign sgn", "ps")
    yield from each(
        "silu gelu sigmoid exp exp2 expm1 log log1p log2 sqrt rsqrt reciprocal cos cosh acos acosh atanh ceil floor "
        "round trunc frac hardswish hardsigmoid softplus mish elu selu celu log_sigmoid hardshrink softshrink erfc "
        "square nan_to_num logit relu6 hardtanh isnan isinf isfinite logical_not",
        "p",
    )
    yield from each("threshold", "p", lambda op, x: op(x, 0.3, 0.0))
    yield from each("bitwise_not", "p", lambda op, x: op(whole(x)))
    yield from each("clamp", "p", lambda op, x: op(x, 0.1, 0.5))
    yield from each("clamp_min", "pd", lambda op, x: op(x, 0))
    yield from each("clamp_max", "p", lambda op, x: op(x, 0.3))
    yield from each("add.Tensor sub.Tensor", "p", lambda op, x: op(x, 1.5))
    yield from each("add.Tensor sub.Tensor", "psdog", lambda op, x, w: op(x, w), weights=((N,),))
    yield from each("rsub.Scalar", "p", lambda op, x: op(x, 1.5))
    yield from each("mul.Tensor div.Tensor true_divide.Tensor", "psdog", lambda op, x: op(x, 1.5))
    yield from each("mul.Tensor", "psd", lambda op, x, w: op(x, w), weights=((N,),))
    yield from each("div.Tensor", "psd", lambda op, x, w: op(x, w), weights=((N,),))
    yield from each("mul.Tensor", "p", lambda op, x: op(x, x))
    yield from each("maximum minimum atan2", "p", lambda op, x, w: op(x, w), weights=((N,),))
    yield from each("pow.Tensor_Scalar", "p", lambda op, x: op(x, 3))
    yield from each("eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar", "p", lambda op, x: op(x, 0.4))
    yield from each("remainder.Scalar floor_divide.Scalar fmod.Scalar", "p", lambda op, x: op(x, 0.4))
    yield from each("logical_and logical_or logical_xor isclose", "p", lambda op, x, w: op(x, w), weights=((N,),))
    yield from each(
        "bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor __and__.Tensor __or__.Tensor __xor__.Tensor", "p",
        lambda op, x: op(whole(x), whole(x)),
    )  # fmt: skip
    yield from each("addcmul addcdiv", "p", lambda op, x, w: op(x, w, w), weights=((N,),))
    yield from each("where.self", "psdog", lambda op, x: op(aten.ones.default([3, 1], dtype=torch.bool), x, x))
    yield from each("masked_fill.Scalar", "p", lambda op, x: op(x, aten.gt.Scalar(x, 0.4), 0.0))
    yield from each("masked_fill.Scalar", "psdog", lambda op, x: op(x, aten.ones.default([3, 1], dtype=torch.bool), 0))
    yield from each("full_like", "psd", lambda op, x: aten.mul.Tensor(x, op(x, 0.5)))
    yield from each("new_full", "psd", lambda op, x: aten.mul.Tensor(x, op(x, [N], 0.5)))
    yield from each("zeros_like ones_like", "psdogc", lambda op, x: aten.mul.Tensor(op(x), 0.0))
    # What lies in memory may be infinite, and that times zero is no number.
    yield from each("empty_like", "psdogc", lambda op, x: aten.mul.Tensor(aten.nan_to_num.default(op(x)), 0.0))
    yield from each("new_zeros new_ones", "p", lambda op, x: aten.add.Tensor(x, op(x, [N])))
    yield from each("zeros ones", "p", lambda op, x: aten.add.Tensor(x, _made(x, op, [N])))
    yield from each(
        "empty.memory_format", "p", lambda op, x: aten.add.Tensor(x, aten.gt.Scalar(_made(x, op, [N]), 1e9))
    )
    yield from each("full", "psd", lambda op, x: aten.mul.Tensor(x, _made(x, op, [N], 0.5)))
    yield from each("scalar_tensor", "psdog", lambda op, x: aten.mul.Tensor(x, _made(x, op, 0.5)))
    yield from each("graphopt::fake_quantize", "p", lambda op, x, s: op(x, s, None), weights=((),))
    yield from each("graphopt::quantize", "p", lambda op, x, s: op(x, s, None), weights=((),))
    yield from each("graphopt::dequantize", "p", lambda op, x, s: op(whole(x), s, None), weights=((),))
    # contractions
    yield from each("linear", "psdog", lambda op, x, w: op(x, w), weights=((5, N),))
    yield from each("matmul", "psdog", lambda op, x, w: op(x, w), weights=((N, 5),))
    yield from each("mm", "psdog", lambda op, x, w: op(x, w), shape=(2, N), weights=((N, 5),))
    yield from each("bmm", "psdog", lambda op, x, w: op(x, w), weights=((2, N, 5),))
    yield from each("mv", "psdog", lambda op, x, w: op(x, w), shape=(2, N), weights=((N,),))
    yield from each("dot", "psdog", lambda op, x, w: op(aten.select.int(x, 0, 0), w), shape=(2, N), weights=((N,),))
    yield from each(
        "outer", "psdog", lambda op, x, w: op(aten.select.int(x, 0, 0), w), shape=(2, N), out=0, weights=((3,),)
    )
    yield from each("addmm", "psdog", lambda op, x, w, b: op(b, x, w), shape=(2, N), weights=((N, 5), (5,)))
    yield from each("addmv", "psdog", lambda op, x, w, b: op(b, x, w), shape=(2, N), weights=((N,), (2,)))
    yield from each("baddbmm", "psdog", lambda op, x, w, b: op(b, x, w), weights=((2, N, 5), (2, 3, 5)))
    yield from each("einsum", "psdog", lambda op, x, w: op("bij,jk->bik", [x, w]), weights=((N, 5),))
    for dims, name in ((1, "conv1d"), (2, "conv2d"), (3, "conv3d")):
        space = {"shape": (2, N, *(4,) * dims), "axis": 1, "out": 1}
        yield from each(name, "psdog", lambda op, x, w: op(x, w), weights=((5, N, *(3,) * dims),), **space)
        transposed = name.replace("conv", "conv_transpose")
        if dims == 1:
            yield Sample(transposed, "psdog", lambda op, x, w: op(x, w), weights=((N, 5, 3),), **space)
        else:
            yield Sample(
                f"{transposed}.input", "psdog", lambda op, x, w: op(x, w), weights=((N, 5, *(3,) * dims),), **space
            )
    yield from each(
        "conv2d",
        "psd",
        lambda op, x, w: op(x, w, None, [1, 1], [1, 1], [1, 1], N),
        shape=shape4,
        weights=((N, 1, 3, 3),),
        **image,
    )
    yield from each("embedding", "p", lambda op, x, w: op(w, whole(x)), out=2, weights=((40, 5),))
    yield from each(
        "scaled_dot_product_attention", "psdog", lambda op, x, q, k: op(q, k, x), weights=((2, 4, N), (2, 3, N))
    )
    # layout
    yield from each("permute permute_copy", "psdog", lambda op, x: op(x, [2, 0, 1]), out=0)
    yield from each("transpose.int", "psdog", lambda op, x: op(x, 1, 2), out=1)
    yield from each("t", "psdog", shape=(2, N), out=0)
    yield from each("reshape view _unsafe_view view_copy", "psdog", lambda op, x: op(x, [6, N]))
    yield from each("_reshape_alias", "psdog", lambda op, x: op(x, [6, N], [N, 1]))
    yield from each("flatten.using_ints", "psdog", lambda op, x: op(x, 0, 1))
    yield from each("unflatten.int", "psdog", lambda op, x: op(x, 1, [3, 1]))
    yield from each("unsqueeze", "psdog", lambda op, x: op(x, 0))
    yield from each("squeeze.dim", "psdog", lambda op, x: op(x, 1), shape=(2, 1, N))
    yield from each("expand expand_copy broadcast_to", "psdog", lambda op, x: op(x, [4, 2, 3, N]))
    yield from each("repeat tile", "psdog", lambda op, x: op(x, [1, 2, 1]))
    yield from each("repeat_interleave.self_int", "psdog", lambda op, x: op(x, 2, 1))
    yield from each("slice.Tensor slice_copy.Tensor", "psdog", lambda op, x: op(x, 1, 0, 2))
    yield from each("narrow", "psdog", lambda op, x: op(x, 1, 0, 2))
    yield from each("select.int select_copy.int", "psdog", lambda op, x: op(x, 1, 0))
    yield from each("split.Tensor split_copy.Tensor", "psdog", lambda op, x: op(x, 2, 1))
    yield from each("split_with_sizes split_with_sizes_copy", "psdog", lambda op, x: op(x, [1, 2], 1))
    yield from each("chunk", "psdog", lambda op, x: op(x, 3, 1))
    yield from each("tensor_split.sections", "psdog", lambda op, x: op(x, 3, 1))
    yield from each("unbind.int unbind_copy.int", "psdog", lambda op, x: op(x, 1))
    yield from each("cat concat stack", "psdog", lambda op, x: op([x, x], 1))
    yield from each("flip", "psdog", lambda op, x: op(x, [1]))
    yield from each("flip", "", lambda op, x: op(x, [2]))
    yield from each("roll", "psdog", lambda op, x: op(x, [1], [1]))
    yield from each("roll", "", lambda op, x: op(x, [1], [2]))
    yield from each("constant_pad_nd", "psdog", lambda op, x: op(x, [0, 0, 1, 1]))
    yield from each("pad", "psdog", lambda op, x: op(x, [0, 0, 1, 1]))
    yield from each("reflection_pad1d replication_pad1d", "psdog", lambda op, x: op(x, [1, 1]), axis=1, out=1)
    yield from each(
        "reflection_pad2d replication_pad2d", "psdog", lambda op, x: op(x, [1, 1, 1, 1]), shape=shape4, **image
    )
    yield from each("pixel_shuffle", "psdog", lambda op, x: op(x, 2), shape=(2, N, 4, 4), **image)
    yield from each("pixel_unshuffle", "psdog", lambda op, x: op(x, 2), shape=(2, N, 4, 4), **image)
    yield from each("channel_shuffle", "psdog", lambda op, x: op(x, 2), shape=(2, N, 4, 4), **image)
    yield from each("index_select", "psdog", lambda op, x: op(x, 1, aten.arange.default(2)))
    yield from each("index.Tensor _unsafe_index.Tensor", "psdog", lambda op, x: op(x, [None, aten.arange.default(2)]))
    yield from each("gather", "p", lambda op, x: op(x, 1, aten.argmax.default(x, 1, True)))
    yield from each("take_along_dim", "p", lambda op, x: op(x, aten.argmax.default(x, 1, True), dim=1))
    yield from each("tril triu", "", lambda op, x: op(x))
    yield from each("arange", "psdog", lambda op, x: aten.mul.Tensor(x, aten.unsqueeze.default(_made(x, op, 3), 1)))
    yield from each(
        "linspace", "psdog", lambda op, x: aten.mul.Tensor(x, aten.unsqueeze.default(_made(x, op, 0, 1, 3), 1))
    )
    yield from each("eye", "psdog", lambda op, x: aten.matmul.default(_made(x, op, 3), x))
    # reductions
    yield from each("mean.dim sum.dim_IntList", "psdog", lambda op, x: op(x, [1]))
    yield from each("amax amin", "pd", lambda op, x: op(x, [1]))
    yield from each("max.dim min.dim", "pd", lambda op, x: op(x, 1))
    yield from each("prod.dim_int any.dim all.dim argmax argmin", "p", lambda op, x: op(x, 1))
    yield from each("var.dim std.dim var_mean.dim logsumexp", "p", lambda op, x: op(x, [1]))
    yield from each("linalg_vector_norm", "p", lambda op, x: op(x, 2, [1]))
    yield from each("norm.ScalarOpt_dim", "p", lambda op, x: op(x, 2, [1]))
    yield from each("median.dim", "p", lambda op, x: op(x, 1))
    yield from each("kthvalue", "p", lambda op, x: op(x, 1, 1))
    yield from each("softmax.int log_softmax.int _safe_softmax", "p", lambda op, x: op(x, -1))
    yield from each("_softmax _log_softmax", "p", lambda op, x: op(x, -1, False))
    yield from each("topk", "p", lambda op, x: op(x, 2, 1))
    yield from each("sort", "p", lambda op, x: op(x, 1))
    yield from each("cumsum", "psdog", lambda op, x: op(x, 1))
    yield from each("cumprod logcumsumexp", "p", lambda op, x: op(x, 1))
    yield from each("layer_norm", "pc", lambda op, x: op(x, [N]))
    yield from each("layer_norm", "pc", lambda op, x, w: op(x, [N], w), weights=((N,),))
    yield from each("rms_norm", "pso", lambda op, x: op(x, [N]))
    yield from each("rms_norm", "p", lambda op, x, w: op(x, [N], w), weights=((N,),))
    norm = {"weights": ((N,), (N,), (N,), (N,)), "shape": shape4, **image}
    yield from each("batch_norm", "p", lambda op, x, *w: op(x, *w, False, 0.1, 1e-5, False), **norm)
    yield from each(
        "instance_norm", "", lambda op, x: op(x, None, None, None, None, True, 0.1, 1e-5, False), shape=shape4, **image
    )
    yield from each("group_norm", "p", lambda op, x: op(x, 2), shape=shape4, **image)
    yield from each("avg_pool1d adaptive_avg_pool1d", "psdog", lambda op, x: op(x, 2), shape=(2, N, 4), **image)
    yield from each("max_pool1d max_pool1d_with_indices", "pd", lambda op, x: op(x, 2), shape=(2, N, 4), **image)
    for dims in (2, 3):
        space = {"shape": (2, N, *(4,) * dims), "axis": 1, "out": 1}
        size = [2] * dims
        pools = f"avg_pool{dims}d adaptive_avg_pool{dims}d _adaptive_avg_pool{dims}d"
        yield from each(pools, "psdog", lambda op, x, size=size: op(x, size), **space)
        yield from each(
            f"max_pool{dims}d max_pool{dims}d_with_indices", "pd", lambda op, x, size=size: op(x, size), **space
        )
    yield from each("adaptive_max_pool2d", "pd", lambda op, x: op(x, [2, 2]), shape=shape4, **image)
    yield from each("upsample_nearest1d", "psdog", lambda op, x: op(x, [8]), shape=(2, N, 4), **image)
    yield from each("upsample_linear1d", "psdog", lambda op, x: op(x, [8], False), shape=(2, N, 4), **image)
    yield from each(
        "upsample_nearest2d _upsample_nearest_exact2d", "psdog", lambda op, x: op(x, [8, 8]), shape=shape4, **image
    )
    yield from each(
        "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa", "psdog",
        lambda op, x: op(x, [8, 8], False), shape=shape4, **image,
    )  # fmt: skip
    volume = {"shape": (2, N, 4, 4, 4), **image}
    yield from each("upsample_nearest3d", "psdog", lambda op, x: op(x, [8, 8, 8]), **volume)
    yield from each("upsample_trilinear3d", "psdog", lambda op, x: op(x, [8, 8, 8], False), **volume)
    yield from each("graphopt::hadamard", "", lambda op, x: op(x, None, None, 0, False))


SAMPLES = tuple(samples())


def test_the_table_has_a_sample_of_every_operator() -> None:
    assert set(RULES) == {_name(sample) for sample in SAMPLES}


def _name(sample: Sample) -> str:
    namespace, _, name = sample.name.rpartition("::")
    base = name.partition(".")[0]
    return f"{namespace}.{base}" if namespace else base


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_what_the_rule_frees(sample: Sample) -> None:
    program = program_of(sample)
    analysis = analyze(program)
    free = "".join(
        letter
        for letter, symmetry in LETTERS.items()
        if any(space.free for space in _of_writer(analysis, symmetry))
    )
    assert free == sample.free
    assert_free(program, analysis)


def _of_writer(analysis: Analysis, symmetry: Symmetry) -> list[Space]:
    """Return the spaces in which the axis that `up` writes lies: several where an operator splits it."""
    places = [(space, member) for space in analysis.under(symmetry) for member in space.members]
    return [space for space, member in places if member.weight == "up" and member.axis == 0]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("log_sigmoid_forward", lambda op, x: op(x)[0]),
        ("take_along_dim", lambda op, x: op(x, aten.argmax.default(x))),
        ("repeat_interleave.self_int", lambda op, x: aten.reshape.default(op(x, 2), [2, 6, N])),
        ("max", lambda op, x: aten.mul.Tensor(x, op(x))),
    ],
)
def test_a_form_that_no_rule_was_written_for_pins(name: str, call: Callable[..., Any]) -> None:
    program = program_of(Sample(name, "", call))
    analysis = analyze(program)
    assert not any(space.free for space in _of_writer(analysis, Symmetry.DIAGONAL))
    assert_free(program, analysis)


def test_a_rule_that_fails_or_returns_too_little_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(Sample("neg", "", lambda op, x: op(x)))
    for broken in (lambda flow, node, named: flow.of(named["nothing"]), lambda flow, node, named: []):
        monkeypatch.setitem(RULES, "neg", broken)
        analysis = analyze(program)
        (space,) = _of_writer(analysis, Symmetry.DIAGONAL)
        assert "neg_default is neg, in a form that its rule does not know" in map(str, space.pins)
