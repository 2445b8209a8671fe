"""graphopt: an optimizing compiler for neural networks.

    result = graphopt.optimize(model, example_inputs, calibration=batches)
    result.export("model.onnx")
"""

from graphopt import passes
from graphopt.analysis.spaces import analyze
from graphopt.api import optimize
from graphopt.budget import Budget
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.pipeline import Pass, Recipe
from graphopt.result import Result, load
from graphopt.target import Target

__all__ = [
    "Budget", "GraphoptError", "Pass", "Program", "Recipe", "Result", "Target", "analyze", "capture", "load",
    "optimize", "passes",
]  # fmt: skip
__version__ = "0.1.0"
