"""The rule table: one entry an operator, by kind of operator."""

from graphopt.analysis.spaces.rules import contraction, layout, pointwise, reduction

__all__ = ["contraction", "layout", "pointwise", "reduction"]
