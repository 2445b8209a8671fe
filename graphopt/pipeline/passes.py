"""What a pass is: a frozen dataclass whose fields are its options, and a function from Program to Changes."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import fx

from graphopt.errors import GraphoptError, nearest
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Changes, Rewriter, module_path
from graphopt.ir.rules import Rule, apply_rules

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context


@dataclass(frozen=True)
class Pass:
    """Base of every pass; subclasses are frozen dataclasses and inherit their name from the class name.

    Class attributes:
        name: `FoldBatchNorm` is called `fold_batch_norm`.
        exact: whether the function stays the same over the reals; exact passes are validated every time.
        tolerance: largest relative output change that an exact pass may show in float64.
        rules: the rewrites; a pass with rules need not define `run`.
        requires: names of passes that must have run before; the manager inserts what is missing.
        needs: what must be given: any of `calibration`, `evaluate`, `loss`.
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-9
    rules: ClassVar[tuple[Rule, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def __post_init__(self) -> None:
        """Check every option against its type; GraphoptError names the pass, the option and what is allowed."""
        for field, adapter in _adapters(type(self)).items():
            try:
                value = adapter.validate_python(getattr(self, field))
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                given = getattr(self, field)
                raise GraphoptError(f"{self.name}.{field} cannot be {given!r}: {reason[:1].lower()}{reason[1:]}") from None
            object.__setattr__(self, field, value)

    def run(self, program: Program, context: Context) -> Changes:
        """Rewrite `program` in place through a Rewriter and return the record; the default applies `rules`."""
        rewriter = Rewriter(program, self.name)
        apply_rules(self.rules, rewriter, functools.partial(self.refusal, program))
        return rewriter.finish()

    def refusal(self, program: Program, node: fx.Node) -> str:
        """Return why the user's options put `node` out of bounds, or an empty string."""
        return ""

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain data."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != _default(field)
        }

    def __str__(self) -> str:
        return self.name + (f"({', '.join(f'{k}={v!r}' for k, v in self.options.items())})" if self.options else "")


@dataclass(frozen=True)
class LossyPass(Pass):
    """A pass that changes the function; `only` and `skip` bound where.

    Attributes:
        only: globs over node, weight and module names; with any given, other places are left alone.
        skip: globs of places to leave alone.
    """

    exact: ClassVar[bool] = False

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def refusal(self, program: Program, node: fx.Node) -> str:
        names = site_names(program, node)
        if self.only and not any(fnmatch.fnmatchcase(name, glob) for name in names for glob in self.only):
            return f"not among only={list(self.only)}"
        for glob in self.skip:
            if any(fnmatch.fnmatchcase(name, glob) for name in names):
                return f"kept by skip={glob!r}"
        return ""


def site_names(program: Program, node: fx.Node) -> list[str]:
    """Return every name a glob may mean by this node: the node, its module path with parents, its weights."""
    names = [node.name]
    path = module_path(node)
    while path:
        names.append(path)
        path = path.rpartition(".")[0]
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            names.append(str(source.target))
            names += [alias for alias, target in program.aliases.items() if target == source.target]
    return names


@functools.cache
def _adapters(cls: type[Pass]) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(cls)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(cls)}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def build(cls: type[Pass], options: dict[str, Any]) -> Pass:
    """Construct a pass from plain data; unknown options raise GraphoptError with the nearest known one."""
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            choices = f"it has {', '.join(known)}" if known else "it has none"
            raise GraphoptError(f"{cls.name} has no option {option!r}{nearest(str(option), known)}; {choices}")
    return cls(**options)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Parse `name` or `name(option=value, ...)`, the form that `str(pass)` writes, into name and options."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {str(each.arg): ast.literal_eval(each.value) for each in tree.keywords}
    except (SyntaxError, ValueError):
        pass
    raise GraphoptError(f"{text!r} is no pass; write name or name(option=value, ...)")
