"""Let a convolution pad by itself.

    conv(pad(x, [l, l, t, t]), w, b, padding=p)   ->   conv(x, w, b, padding=p + [t, l])        zeros, both sides alike

Exact. Convolutions know one width for both sides of an axis: other paddings stay, as do those of batch or channels. A
padding that others read as well stays for them.
"""

from __future__ import annotations

from torch import fx

from graphopt.ir import Match, Program, Rewriter, arguments, operator, rule
from graphopt.passes.canonicalize.operators import tensor_of

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


def _padded_convolution(node: fx.Node) -> Match | None:
    axes = _CONVOLUTIONS.get(operator(node))
    if axes is None:
        return None
    named = arguments(node)
    pad = named["input"]
    if not isinstance(pad, fx.Node) or operator(pad) not in ("pad", "constant_pad_nd"):
        return None
    width = named.get("padding")
    own = [width] * axes if isinstance(width, int) else list(width) if isinstance(width, list | tuple) else None
    widths = list(arguments(pad)["pad"])
    if own is None or not all(isinstance(each, int) for each in (*own, *widths)):
        return None
    return Match(node, {"pad": pad, "own": own * axes if len(own) == 1 else own, "widths": widths})


def pads_with_zeros(match: Match, program: Program) -> str:
    """The padding is of zeros."""
    named = arguments(match.node("pad"))
    constant = named.get("mode", "constant") == "constant" and named.get("value") in (None, 0)
    return "" if constant else f"{match['pad'].name} pads with something else than zeros"


def pads_space_evenly(match: Match, program: Program) -> str:
    """Only the convolution's axes are padded, none of them cut, and both sides alike."""
    widths, value = match["widths"], tensor_of(match["pad"])
    axes = len(match["own"])
    if value is None or value.dim() != axes + 2 or len(widths) > 2 * axes:
        return f"{match['pad'].name} pads more than the axes of space"
    sides = list(zip(widths[::2], widths[1::2], strict=True))
    if any(first != second or first < 0 for first, second in sides):
        return f"{match['pad'].name} pads one side more than the other"
    return ""


@rule(match=_padded_convolution, needs=[pads_with_zeros, pads_space_evenly])
def merge_padding(match: Match, rewriter: Rewriter) -> None:
    node, pad = match.root, match.node("pad")
    # torch.nn.functional.pad counts axes from the last one.
    more = [*match["widths"][::2], *[0] * len(match["own"])][: len(match["own"])]
    padding = [own + width for own, width in zip(match["own"], reversed(more), strict=True)]
    rewriter.rewire(node, input=arguments(pad)["self"], padding=padding)
    rewriter.touch(node, f"pads {padding} by itself")


RULES = (merge_padding,)
