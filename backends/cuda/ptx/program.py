"""PTX as data: registers, shared variables, instructions with resolved labels."""

from __future__ import annotations

import re
from dataclasses import dataclass

_REGISTERS = re.compile(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>")
_SHARED = re.compile(r"\.shared \.align \d+ \.(\w+) ([\w$]+)(?:\[(\d+)\])?")
_PARAMETER = re.compile(r"\.param \.(\w+)(?: \.\w+(?: \d+)?)* (\w+)")
_LABEL = re.compile(r"^(\$\w+):$")
_INSTRUCTION = re.compile(r"^(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*);$")
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Operand:
    """A register, number, name, memory place `[base + offset]` or a vector of operands.

    Attributes:
        text: register, name, or base of a memory place; empty for a number or vector.
        value: the number, or the offset. parts: of a vector. memory: whether it stands in brackets.
    """

    text: str = ""
    value: int = 0
    parts: tuple[Operand, ...] = ()
    memory: bool = False


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard op operands`; target: where a branch goes."""

    op: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str = ""
    negated: bool = False
    target: int = -1
    line: int = 0

    @property
    def name(self) -> str:
        return ".".join(self.op)


@dataclass(frozen=True)
class Program:
    """One kernel.

    Attributes:
        registers: type by prefix, as in `{"rd": "b64"}`. shared: offset by name. shared_bytes: together.
        parameters: names in order. instructions: in order.
    """

    registers: dict[str, str]
    shared: dict[str, int]
    shared_bytes: int
    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]


def parse(text: str) -> Program:
    """Return the kernel in `text`, which holds one; ValueError where a line is not understood."""
    registers: dict[str, str] = {}
    shared: dict[str, int] = {}
    size, parameters = 0, []
    raw: list[tuple[int, re.Match[str]]] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.split("//")[0].strip()
        if found := _REGISTERS.search(stripped):
            registers[found[2]] = found[1]
        elif found := _SHARED.search(stripped):
            size = -(-size // 16) * 16
            shared[found[2]] = size
            size += _SIZES[found[1].lstrip("bufs")] * int(found[3] or 1)
        elif found := _PARAMETER.match(stripped):
            parameters.append(found[2])
        elif found := _LABEL.match(stripped):
            labels[found[1]] = len(raw)
        elif not stripped or stripped in "{}()" or stripped.startswith((".", ")")):
            continue
        elif found := _INSTRUCTION.match(stripped):
            raw.append((number, found))
        else:
            raise ValueError(f"line {number} of the PTX is not understood: {stripped}")
    instructions = [_instruction(number, found, labels) for number, found in raw]
    size = -(-size // 16) * 16  # loads may reach over the end of an array to where the next one could begin
    return Program(registers, shared, size, tuple(parameters), tuple(instructions))


def _instruction(number: int, found: re.Match[str], labels: dict[str, int]) -> Instruction:
    op = tuple(found[3].split("."))
    guard, negated = found[2] or "", bool(found[1])
    if op[0] == "bra":
        return Instruction(op, (), guard, negated, labels[found[4].strip()], number)
    return Instruction(op, tuple(_operand(each) for each in _split(found[4])), guard, negated, -1, number)


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [each.strip() for each in [*parts, text[start:]] if each.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Operand(parts=tuple(_operand(each) for each in _split(text[1:-1])))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Operand(base.strip(), int(offset or 0), memory=True)
    if text.startswith("0f"):
        return Operand(value=int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Operand(value=int(text.rstrip("U"), 0))
    return Operand(text)
