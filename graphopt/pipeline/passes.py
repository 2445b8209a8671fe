"""What a pass is: a frozen dataclass whose fields are its options, and a function from Program to Changes."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import fx

from graphopt.errors import GraphoptError, nearest
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Changes, Rewriter, module_path
from graphopt.ir.rules import Rule, apply_rules

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.trace import PassRecord

NEEDS = ("calibration", "evaluate", "loss")  # arguments of `optimize` that a pass may ask for
_OF_NEEDS = f"{', '.join(NEEDS[:-1])} or {NEEDS[-1]}"


@dataclass(frozen=True)
class Pass:
    """Base of every pass; subclasses are frozen dataclasses and inherit their name from the class name.

    Class attributes:
        name: `FoldBatchNorm` is called `fold_batch_norm`, unless the class says otherwise.
        exact: whether the function stays the same over the reals; exact passes are validated every time.
        tolerance: largest relative output change that an exact pass may show in float64.
        rules: the rewrites; a pass with rules need not define `run`.
        requires: names of passes that must have run before; the manager inserts what is missing.
        needs: what must be given: any of NEEDS.
        quantizes: whether it takes places out of floating point; it then has an option `skip`, to which
            `Recipe.keeping_float` adds.
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-9
    rules: ClassVar[tuple[Rule, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    needs: ClassVar[frozenset[str]] = frozenset()
    quantizes: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for need in vars(cls).get("needs", ()):
            if need not in NEEDS:
                raise GraphoptError(f"{cls.__name__} needs {need!r}{nearest(need, NEEDS)}; a pass may need {_OF_NEEDS}")
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    def __post_init__(self) -> None:
        """Check every option against its type; GraphoptError names the pass, the option and what is allowed."""
        for field, adapter in _adapters(type(self)).items():  # type: ignore[arg-type]  # a class hashes
            given = getattr(self, field)
            try:
                value = adapter.validate_python(given)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise self._refused(field, given, reason[:1].lower() + reason[1:]) from None
            if _has_bool(given) and not _has_bool(value):  # pydantic and YAML would have `yes` be 1
                raise self._refused(field, given, "a truth value is no number")
            object.__setattr__(self, field, value)

    def _refused(self, field: str, given: Any, reason: str) -> GraphoptError:
        return GraphoptError(f"{self.name}.{field} cannot be {given!r}: {reason}")

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
class Step:
    """A pass that ran and is still to be checked."""

    each: Pass
    before: Program
    after: Program
    changes: Changes
    record: PassRecord


@dataclass(frozen=True)
class Branch:
    """What some passes made of a program, their records in the trace, and which of them are still to be checked."""

    program: Program
    records: list[PassRecord]
    unchecked: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Composite(Pass):
    """A pass that runs others on branches and keeps one branch, or none. It rewrites nothing itself."""

    def compose(
        self, program: Program, branch: Callable[[Sequence[Pass], Context], Branch], context: Context
    ) -> tuple[Branch | None, Changes]:
        """Return the branch to go on with, None for the program as it is, and what to record.

        `branch(passes, context)` runs passes on the program, recorded as if the recipe listed them. Those of the branch
        that is returned are checked like any pass; checking what is thrown away would cost more than trying it.
        """
        raise NotImplementedError


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
        return self.refusal_of(site_names(program, node)) if self.only or self.skip else ""

    def refusal_of(self, names: Sequence[str]) -> str:
        """Return why a place that goes by these names is out of bounds, or an empty string."""
        if self.only and not any(fnmatch.fnmatchcase(name, glob) for name in names for glob in self.only):
            return f"not among only={list(self.only)}"
        for glob in self.skip:
            if any(fnmatch.fnmatchcase(name, glob) for name in names):
                return f"kept by skip={glob!r}"
        return ""


def site_names(program: Program, node: fx.Node) -> list[str]:
    """Return every name a glob may mean by this node: the node, its module path with parents, its weights.

    A weight that reaches the node through operators on weights alone (a transpose, a dequantize) is one of its weights.
    """
    names = [node.name]
    path = module_path(node)
    while path:
        names.append(path)
        path = path.rpartition(".")[0]
    weights = dict.fromkeys(name for source in node.all_input_nodes for name in _weights_behind(source) or ())
    for weight in weights:
        names.append(weight)
        names += [alias for alias, target in program.aliases.items() if target == weight]
    return names


def _weights_behind(node: fx.Node) -> list[str] | None:
    """Return the weights that a value is computed from, None where it is computed from anything else."""
    found: dict[str, None] = {}
    seen, stack = {node}, [node]
    while stack:
        each = stack.pop()
        if each.op == "get_attr":
            found[str(each.target)] = None
        elif each.op != "call_function" or not each.all_input_nodes:
            return None
        for source in reversed(each.all_input_nodes):
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return list(found)


@functools.cache
def _adapters(cls: type[Pass]) -> dict[str, TypeAdapter[Any]]:
    # include_extras: `Annotated[float, Field(gt=0)]` keeps its bounds. NaN and infinity have no literal.
    hints = get_type_hints(cls, include_extras=True)
    config = ConfigDict(allow_inf_nan=False)
    return {
        field.name: TypeAdapter(hints[field.name], config=None if _has_config(hints[field.name]) else config)
        for field in dataclasses.fields(cls)
    }


def _has_config(hint: Any) -> bool:
    """True for types that bring a configuration of their own, beside which pydantic takes none."""
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "__pydantic_config__"))


def _has_bool(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_bool(each) for each in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(_has_bool(each) for each in value)
    return isinstance(value, bool)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def build(cls: type[Pass], options: dict[str, Any]) -> Pass:
    """Construct a pass from plain data; unknown options raise GraphoptError with the nearest known one."""
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            choices = f"it has {', '.join(known)}" if known else "it has none"
            raise GraphoptError(f"{cls.name} has no option {option!r}{nearest(str(option), known)}; {choices}")
    for field in dataclasses.fields(cls):
        if field.name not in options and _default(field) is dataclasses.MISSING:
            raise GraphoptError(f"{cls.name} needs the option {field.name!r}; give {cls.name}({field.name}=...)")
    return cls(**options)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Parse `name` or `name(option=value, ...)`, the form that `str(pass)` writes, into name and options."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            options = {each.arg: ast.literal_eval(each.value) for each in tree.keywords if each.arg is not None}
            if len(options) == len(tree.keywords):  # neither `**` nor an option twice
                return tree.func.id, options
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    raise GraphoptError(f"{text!r} is no pass; write name or name(option=value, ...)")
