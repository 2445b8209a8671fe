"""Allocation as a search over units with discrete levels: one engine, whatever the levels are."""

from graphopt.search import curvature
from graphopt.search.baselines import greedy, random_search
from graphopt.search.bisection import Step, bisect, sorted_steps, taken
from graphopt.search.choices import GONE, Assembler, Choices, Choosing, Offer, Store, StoredCandidates, gathered
from graphopt.search.evaluator import Candidates, EffectsTask, Evaluator, LossTask, MetricTask
from graphopt.search.evolution import Evolution
from graphopt.search.front import Front, Point
from graphopt.search.integer import integer_program, with_pairs
from graphopt.search.moves import Moves
from graphopt.search.pool import Lost, Pool, Work
from graphopt.search.problem import Assignment, Infeasible, Level, Losses, Problem, Tie, Unit, additive
from graphopt.search.search import Estimate, Search, Solver
from graphopt.search.surrogate import Surrogate, correlation, losses_of, singles_of

__all__ = [
    "GONE",
    "Assembler",
    "Assignment",
    "Candidates",
    "Choices",
    "Choosing",
    "EffectsTask",
    "Estimate",
    "Evaluator",
    "Evolution",
    "Front",
    "Infeasible",
    "Level",
    "LossTask",
    "Losses",
    "Lost",
    "MetricTask",
    "Moves",
    "Offer",
    "Point",
    "Pool",
    "Problem",
    "Search",
    "Solver",
    "Step",
    "Store",
    "StoredCandidates",
    "Surrogate",
    "Tie",
    "Unit",
    "Work",
    "additive",
    "bisect",
    "correlation",
    "curvature",
    "gathered",
    "greedy",
    "integer_program",
    "losses_of",
    "random_search",
    "singles_of",
    "sorted_steps",
    "taken",
    "with_pairs",
]
