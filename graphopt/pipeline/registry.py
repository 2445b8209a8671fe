"""Where passes and backends are found: the entry-point groups `graphopt.passes` and `graphopt.backends`.

An entry point names a class, or a module whose `__all__` lists classes; graphopt's own come the same way. A class from
any other module is refused: importing the folder `passes` under its bare name would load a second copy of every class.
"""

from __future__ import annotations

import functools
import types
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from graphopt.errors import GraphoptError, described, nearest
from graphopt.pipeline.passes import Pass, build, parse
from graphopt.target import Target

PASSES = "graphopt.passes"
BACKENDS = "graphopt.backends"


class UnknownPass(GraphoptError):
    """There is no pass of that name in this installation."""


def _classes(entry: EntryPoint) -> list[Any]:
    what = f"the entry point {entry.name!r} ({entry.value})"
    try:
        loaded = entry.load()
        if not isinstance(loaded, types.ModuleType):
            return [loaded]
        if not hasattr(loaded, "__all__"):
            raise GraphoptError(f"{what} names a module without __all__; list its classes there")
        return [getattr(loaded, name) for name in loaded.__all__]
    except GraphoptError:
        raise
    except Exception as error:  # whatever a third party's module raises when it is imported
        reason = described(error)
        raise GraphoptError(f"{what} cannot be imported ({reason}); repair or uninstall its package") from error


def _entries(group: str) -> dict[str, Any]:
    entries = list(entry_points(group=group))
    if not entries:
        raise GraphoptError(
            f"no entry point of the group {group} is installed; install graphopt with pip (pip install -e .)"
        )
    packages = {entry.module.partition(".")[0] for entry in entries}
    found: dict[str, Any] = {}
    for each in (cls for entry in entries for cls in _classes(entry)):
        check_home(each, packages)
        if group == PASSES and not (isinstance(each, type) and issubclass(each, Pass) and _is_own_dataclass(each)):
            raise GraphoptError(
                f"{each.__name__} of {each.__module__} is no pass; derive a frozen dataclass from graphopt.Pass"
            )
        known = found.setdefault(each.name, each)
        if known is not each:
            raise GraphoptError(
                f"{known.__module__} and {each.__module__} both register {each.name!r}; uninstall one of the two"
            )
    return found


def _is_own_dataclass(cls: type) -> bool:
    """True where the class itself is a frozen dataclass: without the decorator its annotations are no options."""
    parameters = vars(cls).get("__dataclass_params__")
    return parameters is not None and parameters.frozen


def check_home(cls: Any, packages: set[str]) -> None:
    """Refuse a class whose module is neither under `graphopt.` nor in a package that an entry point names."""
    home = getattr(cls, "__module__", None) or "?"
    root = home.partition(".")[0]
    if root != "graphopt" and root not in packages:
        name = getattr(cls, "__name__", repr(cls))
        raise GraphoptError(f"{name} comes from {home!r}; passes and backends come from entry points")


@functools.cache
def pass_classes() -> dict[str, type[Pass]]:
    """Every registered pass by name."""
    return dict(sorted(_entries(PASSES).items()))


@functools.cache
def backend_classes() -> dict[str, Any]:
    """Every registered backend by name."""
    return _entries(BACKENDS)


def pass_class(name: str) -> type[Pass]:
    """Return the pass class called `name`; UnknownPass, a GraphoptError, suggests the nearest."""
    known = pass_classes()
    if name not in known:
        raise UnknownPass(f"there is no pass called {name!r}{nearest(name, known)}; `graphopt passes` lists them")
    return known[name]


def make_pass(name: str, options: dict[str, Any] | None = None) -> Pass:
    """Construct a pass by name and plain options."""
    return build(pass_class(name), options or {})


def parse_pass(text: str) -> Pass:
    """The inverse of `str(pass)`."""
    return make_pass(*parse(text))


def backend(name: str) -> Any:
    """Return an instance of the backend called `name`; GraphoptError suggests the nearest."""
    known = backend_classes()
    if name not in known:
        raise GraphoptError(f"there is no backend called {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]()


def targets() -> dict[str, Target]:
    """Every target profile by name, whichever backend offers it."""
    return {each.name: each for cls in backend_classes().values() for each in cls.targets}


def target(name: str) -> Target:
    """Return the target profile called `name`; GraphoptError suggests the nearest."""
    known = targets()
    if name not in known:
        raise GraphoptError(f"there is no target called {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]
