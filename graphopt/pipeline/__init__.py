"""The pipeline: passes, their registry and recipes, the manager that runs and checks them, and the trace."""

from graphopt.pipeline.context import Context
from graphopt.pipeline.manager import PassError, run_passes
from graphopt.pipeline.passes import Branch, Composite, LossyPass, Pass, parse, site_names
from graphopt.pipeline.recipe import Recipe, as_recipe, builtin, builtin_names, read_yaml
from graphopt.pipeline.registry import backend, make_pass, parse_pass, pass_class, pass_classes, target
from graphopt.pipeline.trace import PassRecord, Trace
from graphopt.pipeline.validation import ValidationError, relative_error, sqnr_db

__all__ = [
    "Branch", "Composite", "Context", "LossyPass", "Pass", "PassError", "PassRecord", "Recipe", "Trace",
    "ValidationError", "as_recipe", "backend", "builtin", "builtin_names", "make_pass", "parse", "parse_pass",
    "pass_class", "pass_classes", "read_yaml", "relative_error", "run_passes", "site_names", "sqnr_db", "target",
]  # fmt: skip
