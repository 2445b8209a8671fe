"""Blocks as text: one line for each run of isomorphic layers, regions nested in them below.

    12 layers of 2 pre-norm branches: [rms_norm → linear×3 → sdpa → linear] [rms_norm → linear×2 → silu → mul → linear]
    23 layers of 1 branch: [+ → + → + → conv2d]
        [conv2d → leaky_relu → conv2d]
    cuts at 49 nodes

A branch is written as the operators on its longest way, `×3` for three at the same place; `+` and `++` are the joins of
branches and of concatenations inside it. Left out are data movement, sums, and factors that are not computed from the
source.
"""

from __future__ import annotations

from itertools import groupby

from torch import fx

from graphopt.analysis.blocks.blocks import Blocks, Branch, Layer, Region
from graphopt.analysis.blocks.flow import is_move, is_pointwise
from graphopt.ir.arguments import operator

_SHORT = {"scaled_dot_product_attention": "sdpa"}
_SILENT = frozenset(("add", "sub", "neg", "clone", "alias"))


def blocks_text(blocks: Blocks) -> str:
    """Return the account that `str(blocks)` prints; it ends without a newline."""
    inner: dict[Region | None, list[Region]] = {}
    for region in (*blocks.branches, *blocks.skips):
        inner.setdefault(region.parent, []).append(region)
    of_group = {layer: i for i, group in enumerate(blocks.groups) for layer in group}
    lines = []
    for _, run in groupby(blocks.layers, key=of_group.__getitem__):
        layers = list(run)
        lines.append(_layer_line(layers, inner))
        lines += _nested_lines(layers[0], inner)
    if not lines:
        lines.append("no residual branches")
    if blocks.skips:
        lines.append(f"{_count(len(blocks.skips), 'skip')} by concatenation")
    lines.append(f"cuts at {_count(len(blocks.cuts), 'node')}")
    return "\n".join(lines)


def _layer_line(layers: list[Layer], inner: dict[Region | None, list[Region]]) -> str:
    branches = layers[0].branches
    kinds = sorted({branch.kind for branch in branches} - {"none"})
    same = len(kinds) == 1 and all(branch.kind == kinds[0] for branch in branches)
    noun = f"{kinds[0]} branch" if same else "branch"
    texts = " ".join(_region_text(branch, inner) for branch in branches)
    return f"{_count(len(layers), 'layer')} of {_count(len(branches), noun)}: {texts}"


def _nested_lines(layer: Layer, inner: dict[Region | None, list[Region]]) -> list[str]:
    lines = []
    queue = [(1, region) for branch in reversed(layer.branches) for region in reversed(inner.get(branch, []))]
    while queue:
        depth, region = queue.pop()
        lines.append("    " * depth + _region_text(region, inner))
        queue += [(depth + 1, each) for each in reversed(inner.get(region, []))]
    return lines


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {noun if number == 1 else plural}"


def _region_text(region: Region, inner: dict[Region | None, list[Region]]) -> str:
    nested = inner.get(region, [])
    hidden = {node for each in nested for node in (*each.body, *each.skip)}
    joins = {each.join: "+" if isinstance(each, Branch) else "++" for each in nested}
    body = set(region.body)
    from_source = {region.source}
    place: dict[fx.Node, int] = {}  # how many operators written down lie on the longest way to a node
    written: dict[tuple[int, str], int] = {}
    for node in region.body:
        reads = [each for each in node.all_input_nodes if each in from_source]
        if reads:
            from_source.add(node)
        name = "" if node in hidden else joins.get(node) or _written(node, len(reads))
        place[node] = max((place[each] for each in node.all_input_nodes if each in body), default=0) + bool(name)
        if name:
            written[place[node], name] = written.get((place[node], name), 0) + 1
    parts = [f"{name}×{times}" if times > 1 else name for (_, name), times in sorted(written.items())]
    skip = [_written(node, 1) for node in region.skip]
    around = " → ".join(name for name in skip if name)
    return f"[{' → '.join(parts)}]" + (f" around [{around}]" if around else "")


def _written(node: fx.Node, activations: int) -> str:
    """Return the name by which a node is written, or nothing."""
    name = operator(node)
    if is_move(node) or name in _SILENT or (is_pointwise(node) and name in ("mul", "div") and activations < 2):
        return ""
    return "" if name.startswith("python.") or name.startswith("sym_") else _SHORT.get(name, name)
