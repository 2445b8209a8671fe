"""Per-channel affine maps y = s * x + t, and the linear operators that can take them in.

A map reaches an operator through what commutes with it: permutations of axes; on the way to a reader also padding that
repeats values and flattening [N, C, ...] -> [N, C * ...], which repeats each channel's s and t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.ir import Program, arguments, operator
from graphopt.passes.canonicalize.operators import permutation

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_REPEATING_PADS = {"reflection_pad", "replication_pad"}


def is_linear_operator(node: object) -> bool:
    """True for a convolution, a transposed one or a linear layer."""
    return operator(node) in _CONVOLUTIONS | _TRANSPOSED | {"linear"}


def channel_axis(node: fx.Node, value: Tensor) -> int:
    """Return the axis of the operator's input or output `value` that its weight contracts or writes."""
    if operator(node) == "linear":
        return value.dim() - 1
    return int(value.dim() - arguments(node)["weight"].meta["val"].dim() + 1)  # 1; 0 where there is no batch axis


@dataclass(frozen=True)
class Producer:
    """The operator that computes a value, up to permutations.

    Attributes:
        node: the operator. path: what is read on the way to the value, the operator included.
        axis: where the map's channels lie in the operator's output.
    """

    node: fx.Node
    path: tuple[fx.Node, ...]
    axis: int

    @property
    def mismatch(self) -> str:
        """Why the channels are not those that the operator writes, or an empty string."""
        written = channel_axis(self.node, self.node.meta["val"])
        if written == self.axis:
            return ""
        return f"{self.node.name} writes axis {written}, the norm works along axis {self.axis}"


def producer_of(value: fx.Node, axis: int) -> Producer | None:
    """Return the linear operator that computes `value`, whose channels lie along `axis`; None where there is none."""
    path = [value]
    while not is_linear_operator(path[-1]):
        found = permutation(path[-1])
        if found is None:
            return None
        path.append(found[0])
        axis = found[1][axis]
    return Producer(path[-1], tuple(path), axis)


@dataclass(frozen=True)
class Reader:
    """An operator that reads a value, up to what commutes with a per-channel map.

    Attributes:
        node: the operator. source: what it reads.
        axis: where the channels lie in that. repeat: how many elements in a row belong to one channel.
    """

    node: fx.Node
    source: fx.Node
    axis: int
    repeat: int

    def refusal(self, program: Program, unshifted: bool) -> str:
        """Return why the operator cannot take the map in (`unshifted`: t is zero), or an empty string."""
        node = self.node
        if node.op == "output":
            return f"the program returns {self.source.name}"
        named = arguments(node)
        if not is_linear_operator(node) or named["input"] is not self.source:
            return f"{self.source.name} is read by {node.name}, which does not take it in"
        for name in ("weight", "bias"):
            part = named.get(name)
            if isinstance(part, fx.Node) and part.op != "get_attr":
                return f"{name} of {node.name} is computed by {part.name}, not a weight"
            if isinstance(part, fx.Node) and not bool(program.weight(part).isfinite().all()):
                return f"weight {part.target} holds NaN or infinity"
        contracted = channel_axis(node, self.source.meta["val"])
        if contracted != self.axis:
            return f"{node.name} contracts axis {contracted}, the norm works along axis {self.axis}"
        if unshifted:
            return ""
        if operator(node) in _TRANSPOSED:
            return f"at the border of {node.name} fewer taps meet, so the shift is no constant there"
        return f"{node.name} pads with zeros, which the shift does not reach" if pads_with_zeros(node) else ""


def pads_with_zeros(node: fx.Node) -> bool:
    """True for a convolution that pads with zeros, which no shift of its input reaches."""
    padding = arguments(node).get("padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(p != 0 for p in padding) if isinstance(padding, list | tuple) else padding != 0


def readers_of(value: fx.Node, axis: int, repeat: int = 1) -> Iterator[Reader]:
    """Yield who reads `value`, whose channels lie along `axis`, through what commutes with a per-channel map."""
    for user in value.users:
        found = permutation(user)
        if found is not None:
            yield from readers_of(user, found[1].index(axis), repeat)
        elif _repeats_values(user, axis):
            yield from readers_of(user, axis, repeat)
        elif count := _flattened(user, value, axis):
            yield from readers_of(user, axis, repeat * count)
        else:
            yield Reader(user, value, axis, repeat)


def _repeats_values(node: fx.Node, axis: int) -> bool:
    """True for padding by values of the same channel."""
    name = operator(node)
    if name == "pad":
        if arguments(node)["mode"] not in ("reflect", "replicate", "circular"):
            return False
    elif name.rstrip("123d") not in _REPEATING_PADS:
        return False
    padded_axes = len(list(arguments(node).values())[1]) // 2
    return bool(axis < node.meta["val"].dim() - padded_axes)


def _flattened(node: fx.Node, source: fx.Node, axis: int) -> int:
    """Return how many elements a channel has where `node` joins the channel axis with all behind it, else 0."""
    before, after = source.meta["val"], node.meta.get("val")
    if operator(node) not in ("reshape", "view", "flatten") or not isinstance(after, Tensor) or after.dim() != axis + 1:
        return 0
    joined = before.shape[axis:]
    if not all(isinstance(size, int) for size in joined) or 0 in joined:
        return 0
    # The axes before are then as they were: their product is the same, and there is at most the batch axis.
    return math.prod(joined[1:]) if axis <= 1 and after.shape[axis] == math.prod(joined) else 0


def _grouped(channels: Tensor, groups: int, repeats: int, rank: int) -> Tensor:
    """Return [groups * repeats, C / groups, 1, ...] of `channels` [C]: the channels of each group, `repeats` times."""
    spread = channels.reshape(groups, 1, -1).expand(groups, repeats, -1).reshape(groups * repeats, -1)
    return spread.reshape(*spread.shape, *[1] * (rank - 2))


def scale_outputs(node: fx.Node, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the operator's weight with its output channels multiplied by `scale` [out]."""
    if operator(node) in _TRANSPOSED:  # [in, out / groups, ...]
        groups = arguments(node)["groups"]
        return weight * _grouped(scale, groups, weight.shape[0] // groups, weight.dim())
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


def spread_over_inputs(node: fx.Node, weight: Tensor, channels: Tensor) -> Tensor:
    """Return `channels` [in] shaped so that it broadcasts against the input axis of the operator's weight."""
    if operator(node) in _TRANSPOSED:
        return channels.reshape(-1, *[1] * (weight.dim() - 1))
    groups = arguments(node).get("groups", 1)  # [out, in / groups, ...]
    return _grouped(channels, groups, weight.shape[0] // groups, weight.dim())


def shift_of_outputs(node: fx.Node, weight: Tensor, shift: Tensor) -> Tensor:
    """Return [out]: what the operator makes of the constant input `shift` [in] where all taps meet."""
    return (weight * spread_over_inputs(node, weight, shift)).flatten(1).sum(1)


def bias_name(weight: fx.Node) -> str:
    """Return the name of the bias beside a weight: `conv.bias` for `conv.weight`."""
    module = str(weight.target).rpartition(".")[0]
    return f"{module}.bias" if module else "bias"


def overflows(value: float, dtype: torch.dtype) -> bool:
    """True where a number is too large for a floating type."""
    return not value <= torch.finfo(dtype).max
