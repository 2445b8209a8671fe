"""Put a linear behind each norm that writes a residual.

    x + norm(y; weight, bias)  ->  x + linear(norm(y), diag(weight), bias)

The linear is a writer like any other, so the residual can be centered and rotated; what it costs at run time is its
product. Linears that read the norm's output keep doing so: they can take its affine in themselves.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.analysis.spaces import Symmetry, analyze
from graphopt.ir import Rewriter, operator
from graphopt.ir.rewriter import module_path
from graphopt.passes.fold.affine import is_linear_operator

aten = torch.ops.aten
_MOVES = {"reshape", "permute", "transpose", "slice", "select", "unsqueeze", "squeeze", "clone", "expand", "_to_copy"}


def put_linears_behind_norms(rewriter: Rewriter) -> None:
    """Give every norm whose output enters a space that norms read an identity linear for what is no linear itself.

    How many multiply-accumulates a token that takes goes into the trace.
    """
    found: dict[fx.Node, None] = {}
    for space in analyze(rewriter.program).under(Symmetry.ORTHOGONAL):
        if space.norms:
            found |= dict.fromkeys(space.norms_before)
    macs = [_put_linear(norm, rewriter) for norm in found]
    rewriter.note(explicit_linears=sum(each > 0 for each in macs), explicit_macs_per_token=sum(macs))


def _put_linear(norm: fx.Node, rewriter: Rewriter) -> int:
    """Return the multiply-accumulates that the linear takes for each token; 0 where none is needed."""
    readers = [user for user in norm.users if not _is_read_by_linears(user)]
    if not readers:
        return 0
    value = norm.meta["val"]
    size = int(value.shape[-1])
    base = f"{module_path(norm) or norm.name}.rotation"
    identity = rewriter.weight(torch.eye(size, dtype=torch.float64), f"{base}.weight", value.dtype, parameter=True)
    linear = rewriter.insert(aten.linear.default, norm, identity, None, before=norm.next, origin=[norm])
    for reader in readers:
        rewriter.redirect(reader, norm, linear)
    rewriter.touch(norm, f"writes the residual: now a linear [{size}, {size}] does, {size * size:,} MACs a token")
    return size * size


def _is_read_by_linears(reader: fx.Node) -> bool:
    """True where only linear operators see the value, after moves of its elements."""
    pending = [reader]
    while pending:
        node = pending.pop()
        if operator(node) in _MOVES:
            pending += node.users
        elif not is_linear_operator(node):
            return False
    return True
