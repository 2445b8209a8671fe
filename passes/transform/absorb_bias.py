"""Move what an activation holds at least into the biases of its readers.

    linear2(relu(linear1(x)))     b1 -> b1 - c,   b2 -> b2 + W2 c           c_i = max(0, mean_i - k·deviation_i)

Where linear1 writes c_i or more, relu(y - c) + c = relu(y): equalized weights can leave biases so large that the ranges
of activations are mostly offset, and an integer grid spends its levels on it.

Lossy: what is below c is cut off there instead of at 0. How often that happens falls with k; means and deviations are
those of calibration data. Every reader must take the shift in: zeros that pad a convolution are not shifted.
Source: "Data-Free Quantization Through Weight Equalization and Bias Correction" (high bias absorption).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, fx

from graphopt.calibration import Channels, observe
from graphopt.ir import Changes, Program, Rewriter, arguments, operator
from graphopt.passes.fold.affine import Producer, Reader, bias_name, producer_of, readers_of, shift_of_outputs
from graphopt.pipeline import Context, LossyPass


@dataclass(frozen=True)
class _Site:
    """A relu between a linear operator and linear operators; `axis` is where its channels lie."""

    relu: fx.Node
    axis: int
    producer: Producer
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class AbsorbBias(LossyPass):
    """Move the constant part of activations behind a ReLU into the next layer's bias.

    Attributes:
        deviations: how many standard deviations below its mean an activation may still go unharmed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    deviations: Annotated[float, Field(ge=0)] = 3.0

    def run(self, program: Program, context: Context) -> Changes:
        batches = context.needed_calibration(self.name)
        rewriter = Rewriter(program, self.name)
        sites = []
        for node in program.graph.nodes:
            if operator(node) == "relu":
                found = _site(node, program)
                reason = self.refusal(program, node) or (found if isinstance(found, str) else "")
                if isinstance(found, _Site) and not reason:
                    sites.append(found)
                else:
                    rewriter.decline(node, reason)
        channels = {site.relu: Channels((site.axis,)) for site in sites}
        observers = {arguments(site.relu)["self"]: channels[site.relu] for site in sites}
        if sites:
            observe(program, observers, batches, context.progress)
        for site in sites:
            self._absorb(site, channels[site.relu], rewriter)
        return rewriter.finish()

    def _absorb(self, site: _Site, channels: Channels, rewriter: Rewriter) -> None:
        if channels.largest is None or len(channels.rows) < 2:
            rewriter.decline(site.relu, "no calibration data came by")
            return
        rows = channels.rows.double()
        least = (rows.mean(0) - self.deviations * rows.std(0)).clamp_min(0)
        if not bool(least.any()):
            rewriter.decline(site.relu, f"no channel stays {self.deviations:g} deviations above 0")
            return
        _shift(site.producer.node, -least, f"less {site.relu.name}", rewriter)
        for reader in site.readers:
            weight = rewriter.value(arguments(reader.node)["weight"])
            shift = shift_of_outputs(reader.node, weight, least.repeat_interleave(reader.repeat))
            _shift(reader.node, shift, f"plus {site.relu.name}", rewriter)
        count = int((least > 0).sum())
        rewriter.touch(site.relu, f"absorbed the bias of {count} of {len(least)} channels")


def _site(relu: fx.Node, program: Program) -> _Site | str:
    """Return the site, or why there is none."""
    source = arguments(relu)["self"]
    if source.meta["val"].dim() < 2:
        return "its input has no channels beside a batch"
    axis = 1 if source.meta["val"].dim() > 2 and operator(source) != "linear" else source.meta["val"].dim() - 1
    producer = producer_of(source, axis)
    if producer is None or producer.mismatch:
        return f"no linear operator writes what it reads: {source.name}"
    if any(len(node.users) > 1 for node in producer.path):
        return f"others read what {producer.node.name} writes"
    named = arguments(producer.node)
    for part in (named["weight"], named["bias"]):
        if isinstance(part, fx.Node) and (part.op != "get_attr" or len(part.users) > 1):
            return f"{producer.node.name} shares its weights or computes them"
    readers = tuple(readers_of(relu, axis))
    for reader in readers:
        if reason := reader.refusal(program, unshifted=False):
            return reason
    return _Site(relu, axis, producer, readers)


def _shift(node: fx.Node, shift: Tensor, key: str, rewriter: Rewriter) -> None:
    """Add `shift` [out] to the bias of a linear operator."""
    named = arguments(node)
    weight, bias = named["weight"], named["bias"]

    def make() -> fx.Node:
        dtype = rewriter.program.weight(weight if bias is None else bias).dtype
        value = shift if bias is None else rewriter.value(bias) + shift
        return rewriter.weight(value, bias_name(weight), dtype, bias)

    rewriter.rewire(node, bias=rewriter.once(weight if bias is None else bias, f"{key} of {node.name}", make))
