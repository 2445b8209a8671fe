"""Write quantized weights into a program: codes in the place of a weight, side information behind its readers.

    linear(x, w, b)   ->   linear(x, dequantize(codes, scale, zero_point?, table?), b)
                           [+ linear(index_select(x, -1, kept), columns)]  [+ linear(linear(x, B), A)]
    embedding(w, i)   ->   dequantize(embedding(codes, i), embedding(scale, i), embedding(zero_point, i)?)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir import Rewriter, arguments, dialect, operator
from graphopt.ir.arguments import positional
from graphopt.quantization.solve import Quantized

aten = torch.ops.aten


def put_codes(weight: fx.Node, sites: list[fx.Node], made: Quantized, rewriter: Rewriter) -> None:
    """Put the codes in the place of a weight, and its side information behind its readers."""
    shape = list(rewriter.program.weight(weight).shape)
    parts, axis, group = stored_parts(weight, made, rewriter)
    name = made.coding.grid.name
    for site in sites:
        value = rewriter.insert(dialect.dequantize, *parts, axis, group, name, before=site)
        if group and len(shape) > 2:
            value = rewriter.insert(aten.view.default, value, shape, before=site, origin=[site])
        if made.outliers is not None:
            value = _with_outliers(value, weight, made, shape, site, rewriter)
        rewriter.rewire(site, weight=value)
        where = f" in groups of {group}" if group > 0 else ""
        rewriter.touch(site, f"{operator(site)} on {name}{where}{_besides(made)}")
        _correct(site, weight, made, rewriter)
    for node in [user for user in weight.users if operator(user) == "embedding"]:
        look_up(node, parts, group, name, rewriter)


def stored_parts(weight: fx.Node, made: Quantized, rewriter: Rewriter) -> tuple[list[fx.Node | None], int, int]:
    """Return codes, scale, zero point and table as weights of the program, and their axis and group size."""
    name, original = str(weight.target), rewriter.program.weight(weight)
    storage = made.coding.grid.storage
    codes, scale, zero, axis, group = stored(made, list(original.shape))
    table = made.coding.table
    parts: list[fx.Node | None] = [
        rewriter.weight(codes, name, storage, weight),
        rewriter.weight(scale, f"{name}_scale", original.dtype),
        None if zero is None else rewriter.weight(zero, f"{name}_zero_point", storage),
        None if table is None else rewriter.weight(table.flatten(0, 1), f"{name}_table", original.dtype),
    ]
    return parts, axis, group


def _correct(site: fx.Node, weight: fx.Node, made: Quantized, rewriter: Rewriter) -> None:
    """Add what the inputs that are kept, and the correction of low rank, give to an operator's output."""
    if not len(made.columns) and made.left is None:
        return
    named, name = arguments(site), str(weight.target)
    source, total, behind = named["input"], site, site.next

    def half(value: Tensor, what: str) -> fx.Node:
        """A weight in float16, widened where it is read."""
        key = f"{what} beside codes"
        stored = rewriter.once(weight, key, lambda: rewriter.weight(value, f"{name}_{what}", torch.float16))
        dtype = site.meta["val"].dtype
        return rewriter.insert(aten._to_copy.default, stored, before=behind, origin=[site], dtype=dtype)

    def call(target: Any, *args: Any) -> fx.Node:
        return rewriter.insert(target, *args, before=behind, origin=[site])

    added: list[fx.Node] = []
    if len(made.columns):
        which = rewriter.once(
            weight, "columns", lambda: rewriter.weight(made.columns, f"{name}_columns", torch.int32)
        )
        kept = call(aten.index_select.default, source, source.meta["val"].dim() - 1, which)
        added.append(call(aten.linear.default, kept, half(made.column_values.mT.flatten(0, 1), "column_values")))
    if made.left is not None and made.right is not None:
        down, up = half(_kernel(made.left[0].mT, weight), "down"), half(made.right[0].mT, "up")
        if operator(site) == "linear":
            added.append(call(aten.linear.default, call(aten.linear.default, source, down), up))
        else:
            ones = [1] * (named["weight"].meta["val"].dim() - 2)
            args, kwargs = positional(site, {"weight": down, "bias": None})
            inner = rewriter.insert(site.target, *args, before=behind, origin=[site], **kwargs)
            wide = call(aten.view.default, up, [*made.right[0].mT.shape, *ones])
            added.append(call(site.target, inner, wide))
    for each in added:
        total = call(aten.add.Tensor, total, each)
    rewriter.replace(site, total)


def stored(made: Quantized, shape: list[int]) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """Return codes, scale, zero point, axis and group size as the dialect takes them.

    Codes have the shape of the weight, unless groups run through several of its axes: then [R, K].
    """
    coding, (parts, channels, inputs) = made.coding, made.codes.shape
    rows, count = parts * channels, coding.scale.shape[1]
    codes = made.codes.reshape(rows, inputs)
    scale = coding.scale.mT.reshape(rows, count)
    zero = None if coding.zero_point is None else coding.zero_point.mT.reshape(rows, count).to(coding.grid.storage)
    group = int((coding.groups == 0).sum()) if count > 1 else 0
    if coding.grid.block:
        group = coding.grid.block
    if made.single_scale:
        return codes.reshape(shape), scale[0, 0], None if zero is None else zero[0, 0], 0, 0
    if not group:
        return codes.reshape(shape), scale[:, 0], None if zero is None else zero[:, 0], 0, 0
    return codes, scale, zero, 1, group


def _kernel(matrix: Tensor, weight: fx.Node) -> Tensor:
    """Return the first factor [r, K] in the shape of a weight of r channels."""
    return matrix.reshape(len(matrix), *weight.meta["val"].shape[1:])


def _with_outliers(
    value: fx.Node, weight: fx.Node, made: Quantized, shape: list[int], site: fx.Node, rewriter: Rewriter
) -> fx.Node:
    """Add single weights to dequantized ones: scatter_add at their flat places."""
    assert made.outliers is not None
    flat = made.outliers.mT.reshape(-1)
    (places,) = torch.nonzero(flat, as_tuple=True)
    name, dtype = str(weight.target), value.meta["val"].dtype

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return rewriter.insert(target, *args, before=site, origin=[site], **kwargs)

    where = rewriter.once(weight, "places", lambda: rewriter.weight(places, f"{name}_places", torch.int32))
    what = rewriter.once(weight, "outliers", lambda: rewriter.weight(flat[places], f"{name}_outliers", torch.float16))
    index = call(aten._to_copy.default, where, dtype=torch.int64)
    source = call(aten._to_copy.default, what, dtype=dtype)
    added = call(aten.scatter_add.default, call(aten.view.default, value, [-1]), 0, index, source)
    return call(aten.view.default, added, shape)


def _besides(made: Quantized) -> str:
    """Return what besides codes there is, for a message."""
    found = []
    if len(made.columns):
        found.append(f"{len(made.columns)} inputs in float16")
    if made.outliers is not None:
        found.append(f"{int((made.outliers != 0).sum())} weights in float16")
    if made.left is not None:
        found.append(f"a correction of rank {made.left.shape[-1]}")
    return "".join(f", {each}" for each in found)


def look_up(node: fx.Node, parts: list[fx.Node | None], group: int, name: str, rewriter: Rewriter) -> None:
    """Make an embedding look up codes, scales and zero points: dequantized is what was looked up."""
    named = arguments(node)
    indices = named["indices"]
    columns: list[fx.Node | None] = []
    for part in parts[:3]:
        if part is None or part.meta["val"].dim() == 0:
            columns.append(part)
            continue
        source = part
        if part is not parts[0] and part.meta["val"].dim() == 1:
            source = rewriter.insert(aten.unsqueeze.default, part, -1, before=node)
        columns.append(rewriter.insert(node.target, source, indices, before=node))
    whole = parts[1] is not None and parts[1].meta["val"].dim() == 0
    where = (0, 0) if whole else (-1, group or -1)
    value = rewriter.insert(dialect.dequantize, *columns, None, *where, name, before=node)
    rewriter.replace(node, value)
    groups = f" in groups of {group}" if group else ""
    rewriter.touch(node, f"table {named['weight'].target} on {name} by row{groups}")
