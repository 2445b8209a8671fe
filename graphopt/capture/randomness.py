"""Which operators draw random numbers."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.arguments import arguments


def draws(node: fx.Node) -> bool:
    """True where two runs of the operator may differ; a dropout of probability zero, or in eval mode, is no draw."""
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    named = arguments(node)
    if named.get("train") is False or named.get("training") is False:
        return False
    probability = next((named[name] for name in ("dropout_p", "dropout") if name in named), None)
    return probability != 0
