"""Activation spaces: which axes hold the same coordinates, and how these may change without changing the function."""

from graphopt.analysis.spaces.analysis import Analysis, analyze
from graphopt.analysis.spaces.relation import Reason
from graphopt.analysis.spaces.selection import Selection, Widths
from graphopt.analysis.spaces.space import Member, Read, Space
from graphopt.analysis.spaces.symmetry import Symmetry

__all__ = ["Analysis", "Member", "Read", "Reason", "Selection", "Space", "Symmetry", "Widths", "analyze"]
