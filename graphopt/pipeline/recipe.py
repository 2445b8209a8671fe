"""Recipes: an ordered list of passes with options, in Python or YAML.

    name: mine
    description: what it is for
    passes:
      - recipe: exact                    # another recipe's passes, in place
      - fold_batch_norm
      - quantize_static: {observer: mse, skip: ["head*"]}

Recipe files are untrusted: they are read by YAML's safe loader, without anchors, up to a megabyte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from graphopt.errors import GraphoptError, first_line, nearest
from graphopt.pipeline.passes import Pass, build
from graphopt.pipeline.registry import make_pass

_MAX_BYTES = 1 << 20
_KEYS = ("name", "description", "passes")


@dataclass(frozen=True)
class Recipe:
    """Passes in the order in which they run."""

    name: str
    passes: tuple[Pass, ...]
    description: str = ""

    def to_yaml(self) -> str:
        """Return the recipe as YAML with every pass written out; `Recipe.from_yaml` reads it back equal."""
        passes: list[Any] = [{each.name: each.options} if each.options else each.name for each in self.passes]
        data = {"name": self.name, "description": self.description, "passes": passes}
        return yaml.safe_dump(data, sort_keys=False, width=100, allow_unicode=True)

    @staticmethod
    def from_yaml(text: str, source: str = "the recipe") -> Recipe:
        """Read a recipe; GraphoptError says what is wrong and where."""
        data = read_yaml(text, source)
        if not isinstance(data, dict):
            raise GraphoptError(f"{source} must be a mapping with the keys {', '.join(_KEYS)}")
        for key in data:
            if key not in _KEYS:
                raise GraphoptError(
                    f"{source} has an unknown key {key!r}{nearest(str(key), _KEYS)}; it takes {', '.join(_KEYS)}"
                )
        entries = data.get("passes")
        if not isinstance(entries, list):
            raise GraphoptError(f"{source} needs `passes`, a list of passes")
        passes: list[Pass] = []
        for position, entry in enumerate(entries, start=1):
            try:
                passes += _entry(entry)
            except GraphoptError as error:
                raise type(error)(f"{source}, entry {position}: {error}") from None
        name, description = (data.get(key) for key in ("name", "description"))
        return Recipe(
            "unnamed" if name is None else str(name), tuple(passes), "" if description is None else str(description)
        )

    def with_option(self, name: str, field: str, value: Any) -> Recipe:
        """Return the recipe with one option of every pass called `name` set."""
        if all(each.name != name for each in self.passes):
            known = [each.name for each in self.passes]
            raise GraphoptError(
                f"the recipe {self.name!r} has no pass {name!r}{nearest(name, known)}; it has {', '.join(known)}"
            )
        return self._map(lambda each: _set(each, field, value) if each.name == name else each)

    def keeping_float(self, globs: Sequence[str]) -> Recipe:
        """Return the recipe with `globs` added to `skip` of every quantizing pass."""

        def keep(each: Pass) -> Pass:
            if each.quantizes:
                return _set(each, "skip", (*getattr(each, "skip", ()), *globs))
            return each

        return self._map(keep) if globs else self

    def _map(self, change: Any) -> Recipe:
        return dataclasses.replace(self, passes=tuple(change(each) for each in self.passes))


def _set(each: Pass, field: str, value: Any) -> Pass:
    own = {option.name: getattr(each, option.name) for option in dataclasses.fields(each)}
    return build(type(each), own | {field: value})


def _entry(entry: Any) -> Iterable[Pass]:
    if isinstance(entry, str):
        return [make_pass(entry)]
    if not isinstance(entry, dict) or len(entry) != 1:
        raise GraphoptError(f"an entry is a pass name, or one `name: {{option: value}}`, not {entry!r}")
    (name, options), *_ = entry.items()
    if name == "recipe":
        return builtin(str(options)).passes
    if options is not None and not isinstance(options, dict):
        raise GraphoptError(f"the options of {name} must be a mapping, not {options!r}")
    return [make_pass(str(name), {str(key): value for key, value in (options or {}).items()})]


class _Loader(yaml.SafeLoader):
    """The safe loader without anchors: a few lines of nested aliases can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call,unused-ignore]  # typed by types-PyYAML only
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed in a recipe", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)  # type: ignore[no-any-return,unused-ignore]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} stands twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, source: str) -> Any:
    """Read untrusted YAML as plain data, without anchors, up to a megabyte; GraphoptError says what is wrong, where."""
    if len(text.encode("utf-8", "replace")) > _MAX_BYTES:
        raise GraphoptError(f"{source} is larger than {_MAX_BYTES >> 20} MB; a recipe is a short list of passes")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise GraphoptError(f"{source} is not valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = type(error).__name__ if isinstance(error, RecursionError) else first_line(error)
        raise GraphoptError(f"{source} is not valid YAML: {reason}") from None


def builtin_names() -> list[str]:
    """Return the names of the built-in recipes."""
    folder = resources.files("graphopt") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def builtin(name: str) -> Recipe:
    """Return a built-in recipe; GraphoptError suggests the nearest name."""
    known = builtin_names()
    if name not in known:
        raise GraphoptError(f"there is no recipe called {name!r}{nearest(name, known)}; built-in: {', '.join(known)}")
    text = (resources.files("graphopt") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return Recipe.from_yaml(text, f"the built-in recipe {name}")


def as_recipe(recipe: str | Path | Recipe | Sequence[Pass]) -> Recipe:
    """Turn a built-in name, a YAML file, a Recipe or a list of passes into a Recipe."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or (isinstance(recipe, str) and (recipe.endswith((".yaml", ".yml")) or "/" in recipe)):
        path = Path(recipe)
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)  # read_yaml refuses what is longer
            return Recipe.from_yaml(data.decode("utf-8"), str(path))
        except OSError as error:
            raise GraphoptError(f"cannot read the recipe {path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise GraphoptError(f"the recipe {path} is not UTF-8 text") from None
        except ValueError as error:  # a NUL in the name
            raise GraphoptError(f"cannot read the recipe {str(path)!r}: {error}") from None
    if isinstance(recipe, str):
        return builtin(recipe)
    given: Any = recipe
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        for each in given:
            if not isinstance(each, Pass):
                hint = "; call it to construct it" if isinstance(each, type) else ""
                hint = "; construct it, as in graphopt.passes.Canonicalize()" if isinstance(each, str) else hint
                raise GraphoptError(f"a recipe given as a list holds passes, not {each!r}{hint}")
        return Recipe("custom", tuple(given))
    raise GraphoptError(
        f"recipe must be a name, a YAML file, a Recipe or a list of passes, not {type(recipe).__name__}"
    )
