"""`--set KEY=VALUE`: KEY is target, seed, budget.FIELD or PASS.FIELD; VALUE is a YAML scalar or list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt.budget import Budget
from graphopt.errors import GraphoptError, nearest
from graphopt.pipeline import Recipe, pass_class, pass_classes, read_yaml


@dataclass
class Settings:
    """What the assignments say, and the defaults where they say nothing; None is the default target."""

    target: str | None = None
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    options: list[tuple[str, str, Any]] = field(default_factory=list)

    @staticmethod
    def parse(assignments: Sequence[str]) -> Settings:
        """Read assignments in order, a later one overrides; GraphoptError suggests the nearest key."""
        settings = Settings()
        for text in assignments:
            key, equals, value = text.partition("=")
            if not equals or not key.strip():
                raise GraphoptError(f"--set takes KEY=VALUE, not {text!r}")
            settings._assign(key.strip(), read_yaml(value, f"the value of --set {key.strip()}"))
        return settings

    def _assign(self, key: str, value: Any) -> None:
        first, dot, name = key.partition(".")
        if key == "target":
            if not isinstance(value, str):
                raise GraphoptError(f"--set target takes the name of a target, not {value!r}")
            self.target = value
        elif key == "seed":
            if not isinstance(value, int) or isinstance(value, bool):
                raise GraphoptError(f"--set seed takes a whole number, not {value!r}")
            self.seed = value
        elif not dot:
            known = ["target", "seed", "budget.FIELD", *(f"{each}.FIELD" for each in pass_classes())]
            near = nearest(key, ["target", "seed"]) or nearest(f"{key}.FIELD", known)
            raise GraphoptError(f"--set knows no key {key!r}{near}; it takes target, seed, budget.FIELD or PASS.FIELD")
        elif first == "budget":
            self.budget = self.budget.with_bound(name, value)
        else:
            self._option(first, name, value)

    def _option(self, pass_name: str, name: str, value: Any) -> None:
        if pass_name not in pass_classes() and nearest(pass_name, ["budget"]):
            raise GraphoptError(f"--set knows no key '{pass_name}.{name}', did you mean 'budget.{name}'?")
        pass_class(pass_name)
        self.options.append((pass_name, name, value))

    def applied(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the options of its passes set."""
        for pass_name, name, value in self.options:
            recipe = recipe.with_option(pass_name, name, value)
        return recipe
