"""A kernel as text, with what it takes, for both halves of the dialect."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, Plan, RowPlan, plan_text

_DIALECT = Path(__file__).parents[1] / "dialect"


@dataclass(frozen=True)
class Parameter:
    """What a kernel takes: a pointer to words, halves or bytes, or a whole number.

    Attributes:
        name: in the kernel. type: `u32`, `u16`, `u8`, or `int` for a number. written: the kernel writes there.
    """

    name: str
    type: Literal["u32", "u16", "u8", "int"]
    written: bool = False

    @property
    def pointer(self) -> bool:
        return self.type != "int"

    def __str__(self) -> str:
        if not self.pointer:
            return f"int {self.name}"
        return f"{'' if self.written else 'const '}{self.type}* {self.name}"


@dataclass(frozen=True)
class Kernel:
    """The text of one kernel.

    Attributes:
        plan: what it was made from. parameters: in order. threads: of a block. body: what stands between the braces.
    """

    plan: Plan
    parameters: tuple[Parameter, ...]
    threads: int
    body: str

    @property
    def name(self) -> str:
        return f"go_{self.plan.kind}"

    @property
    def text(self) -> str:
        """The kernel by itself, in the dialect."""
        takes = ", ".join(str(each) for each in self.parameters)
        return f"GO_KERNEL({self.name}, {self.threads}, 1)({takes}) {{\n{self.body}}}\n"

    @property
    def device(self) -> str:
        """The whole source for NVRTC or nvcc; it includes nothing."""
        return self._source("device.h")

    @property
    def host(self) -> str:
        """The whole source for a C++ compiler, with `go_entry`, which takes a `go_launch`."""
        arguments = [f"({each})launch->args[{i}]" for i, each in enumerate(self._types())]
        entry = (
            'extern "C" int go_entry(const go_launch* launch) {\n'
            f"    return go_execute(*launch, [=] {{ {self.name}({', '.join(arguments)}); }});\n}}\n"
        )
        return self._source("host.h") + entry

    def _types(self) -> Iterable[str]:
        return (str(each).removesuffix(each.name).rstrip() for each in self.parameters)

    def _source(self, half: str) -> str:
        parts = [dialect("types.h"), dialect(half), dialect("functions.h")]
        return "\n".join([*parts, f"// {plan_text(self.plan)}", '#line 1 "kernel"', self.text])


@functools.cache
def dialect(name: str) -> str:
    """Return a part of the dialect."""
    return (_DIALECT / name).read_text()


def emit(plan: Plan) -> Kernel:
    """Return the kernel of a plan."""
    from graphopt.backends.cuda.emit.dequantize import dequantize
    from graphopt.backends.cuda.emit.int8 import int8
    from graphopt.backends.cuda.emit.linear import linear
    from graphopt.backends.cuda.emit.row import row

    match plan:
        case LinearPlan():
            parameters, body = linear(plan)
        case Int8Plan():
            parameters, body = int8(plan)
        case RowPlan():
            parameters, body = row(plan)
        case DequantizePlan():
            parameters, body = dequantize(plan)
    return Kernel(plan, tuple(parameters), plan.threads, body)


class Writer:
    """Lines of a kernel, indented by the blocks that they stand in."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 1

    def __call__(self, *lines: str) -> None:
        """Add lines; one that ends with a brace opens a block, one that begins with one closes it."""
        for line in lines:
            if line.startswith("}"):
                self._depth -= 1
            self._lines.append("    " * self._depth + line if line else "")
            if line.endswith("{"):
                self._depth += 1

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)
