"""Where passes and backends are found: the entry-point groups `graphopt.passes` and `graphopt.backends`.

An entry point names a class, or a module whose `__all__` lists classes; graphopt's own come the same way. A class from any
other module is refused: importing the folder `passes` under its bare name would load a second copy of every class.
"""

from __future__ import annotations

import functools
import types
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from graphopt.errors import GraphoptError, nearest
from graphopt.pipeline.passes import Pass, build, parse

PASSES = "graphopt.passes"
BACKENDS = "graphopt.backends"


def _classes(entry: EntryPoint) -> list[Any]:
    try:
        loaded = entry.load()
    except ImportError as error:
        raise GraphoptError(f"the entry point {entry.name!r} ({entry.value}) cannot be imported: {error}") from error
    if isinstance(loaded, types.ModuleType):
        return [getattr(loaded, name) for name in loaded.__all__]
    return [loaded]


def _entries(group: str) -> list[Any]:
    found = [each for entry in entry_points(group=group) for each in _classes(entry)]
    if not found:
        raise GraphoptError(f"no entry point of the group {group} is installed; install graphopt with pip (pip install -e .)")
    for each in found:
        check_home(each, {entry.module.partition(".")[0] for entry in entry_points(group=group)})
    return found


def check_home(cls: Any, packages: set[str]) -> None:
    """Refuse a class whose module is neither under `graphopt.` nor in a package that an entry point names."""
    root = cls.__module__.partition(".")[0]
    if root != "graphopt" and root not in packages:
        raise GraphoptError(f"{cls.__name__} comes from {cls.__module__!r}; passes and backends come from entry points")


@functools.cache
def pass_classes() -> dict[str, type[Pass]]:
    """Every registered pass by name."""
    classes = {cls.name: cls for cls in _entries(PASSES)}
    return dict(sorted(classes.items()))


@functools.cache
def backend_classes() -> dict[str, Any]:
    """Every registered backend by name."""
    return {cls.name: cls for cls in _entries(BACKENDS)}


def pass_class(name: str) -> type[Pass]:
    """Return the pass class called `name`; GraphoptError suggests the nearest."""
    known = pass_classes()
    if name not in known:
        raise GraphoptError(f"there is no pass called {name!r}{nearest(name, known)}; `graphopt passes` lists them")
    return known[name]


def make_pass(name: str, options: dict[str, Any] | None = None) -> Pass:
    """Construct a pass by name and plain options."""
    return build(pass_class(name), options or {})


def parse_pass(text: str) -> Pass:
    """The inverse of `str(pass)`."""
    return make_pass(*parse(text))


def backend(name: str) -> Any:
    """Return an instance of the backend called `name`."""
    known = backend_classes()
    if name not in known:
        raise GraphoptError(f"there is no backend called {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]()


def target(name: str) -> Any:
    """Return the target profile called `name`, whichever backend offers it."""
    known = {each.name: each for cls in backend_classes().values() for each in cls.targets}
    if name not in known:
        raise GraphoptError(f"there is no target called {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]
