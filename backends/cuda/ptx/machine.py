"""Running PTX: all threads of all blocks at once, each instruction for those that stand at it, the lowest first.

Threads that go different ways meet again where the later ones wait, since the lowest instruction is always next. Memory
is what the kernel was given: an address outside of it, or not aligned, is a fault, and so is a shuffle, matrix product
or barrier that lanes of a warp or threads of a block do not reach together. All warps going at one pace, a barrier that
is missing does not show: that is what the host executor is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.backends.cuda import arithmetic
from graphopt.backends.cuda.arithmetic import Float16
from graphopt.backends.cuda.emit import Parameter
from graphopt.backends.cuda.ptx.operations import as_typed, function, size_of, unsigned
from graphopt.backends.cuda.ptx.program import Instruction, Operand, Program, parse

Threads = NDArray[np.intp]
_POISON = 0x7FFFDEAD
_REGION = 1 << 40  # addresses of one buffer
_DONE = 1 << 30
_ACCESSES = {"ld", "st", "atom", "red"}
_BYTES = "m16n8k32.row.col.s32.s8.s8.s32"
_HALVES: dict[str, Float16] = {
    "m16n8k16.row.col.f32.f16.f16.f32": "float16",
    "m16n8k16.row.col.f32.bf16.bf16.f32": "bfloat16",
}
_SILENT = {"fence", "membar"}


class PtxFault(AssertionError):
    """The PTX did what no kernel may do."""


@dataclass
class Counts:
    """How many instructions all threads together took, by name, and by line of the PTX."""

    by_name: Counter[str] = field(default_factory=Counter)
    by_line: Counter[int] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


def run(
    text: str,
    parameters: Sequence[Parameter],
    grid: tuple[int, int],
    threads: int,
    arguments: Mapping[str, NDArray[Any] | int],
) -> Counts:
    """Run a kernel on arrays, which it writes into, and numbers, given by the names of its parameters.

    Returns what it took. Raises PtxFault where the kernel does what none may, KeyError for an instruction not known.
    """
    machine = _Machine(parse(text), grid, threads)
    machine.bind(parameters, arguments)
    machine.go()
    return machine.counts


class _Machine:
    def __init__(self, program: Program, grid: tuple[int, int], threads: int) -> None:
        self.program, self.grid, self.threads = program, grid, threads
        blocks = grid[0] * grid[1]
        self.total = blocks * threads
        self.at = np.zeros(self.total, np.int64)
        self.waiting = np.zeros(self.total, bool)
        self.block = np.repeat(np.arange(blocks), threads)
        words = -(-program.shared_bytes // 4) + 4
        self.shared = np.full((blocks, words), _POISON, np.uint32).view(np.uint8)
        self.registers: dict[str, NDArray[Any]] = {}
        self.memory: list[tuple[NDArray[np.uint8], bool, str]] = []
        self.values: dict[str, int] = {}
        self.counts = Counts()
        self._ready: dict[int, Callable[[Threads], None]] = {}

    def bind(self, parameters: Sequence[Parameter], arguments: Mapping[str, NDArray[Any] | int]) -> None:
        for name, parameter in zip(self.program.parameters, parameters, strict=True):
            value = arguments[parameter.name]
            if isinstance(value, np.ndarray):
                self.memory.append((value.reshape(-1).view(np.uint8), parameter.written, parameter.name))
                self.values[name] = len(self.memory) * _REGION
            else:
                self.values[name] = value

    def go(self) -> None:
        while True:
            standing = np.where(self.waiting, _DONE, self.at)
            first = int(standing.min())
            if first == _DONE:
                if not self.waiting.any():
                    return
                self._release()
                continue
            here = np.flatnonzero(standing == first)
            instruction = self.program.instructions[first]
            self._step(first, instruction, here)

    def _step(self, at: int, instruction: Instruction, here: Threads) -> None:
        self.at[here] += 1
        if instruction.guard:
            passes = self._read(Operand(instruction.guard), "pred", here) ^ instruction.negated
            here = here[passes]
            if not len(here):
                return
        self.counts.by_name[instruction.name] += len(here)
        self.counts.by_line[instruction.line] += len(here)
        kind = instruction.op[0]
        if kind == "bra":
            self.at[here] = instruction.target
        elif kind in ("ret", "exit"):
            self.at[here] = _DONE
        elif kind in ("bar", "barrier"):
            self.waiting[here] = True
        elif kind not in _SILENT:
            if at not in self._ready:
                self._ready[at] = self._prepared(instruction)
            self._ready[at](here)

    def _release(self) -> None:
        """Let blocks go on whose threads all wait at one barrier."""
        for block in np.unique(self.block[self.waiting]):
            mine = (self.block == block) & (self.at != _DONE)
            if len(np.unique(self.at[mine])) > 1:
                raise PtxFault(f"threads of block {block} wait at different barriers")
            self.waiting[mine] = False

    # Operands -------------------------------------------------------------------------------------------------------

    def _bank(self, name: str) -> NDArray[Any]:
        if name not in self.registers:
            prefix = name[1:].rstrip("0123456789")
            self.registers[name] = np.zeros(self.total, unsigned(self.program.registers[prefix]))
        return self.registers[name]

    def _read(self, operand: Operand, kind: str, here: Threads) -> NDArray[Any]:
        text = operand.text
        if text.startswith("%"):
            special = _SPECIAL.get(text)
            return special(self, here) if special else self._bank(text)[here]
        if text in self.program.shared:
            return np.full(len(here), self.program.shared[text], np.uint64)
        if text:
            raise KeyError(text)
        if kind == "pred":
            return np.full(len(here), bool(operand.value))
        width = 8 * size_of(kind)
        return np.full(len(here), operand.value & ((1 << width) - 1), unsigned(kind))

    def _write(self, operand: Operand, here: Threads, bits: NDArray[Any]) -> None:
        bank = self._bank(operand.text)
        bank[here] = bits.astype(bank.dtype) if bits.dtype != bank.dtype else bits

    # Instructions ---------------------------------------------------------------------------------------------------

    def _prepared(self, instruction: Instruction) -> Callable[[Threads], None]:
        """Return what the instruction does to some threads."""
        op, operands = instruction.op, instruction.operands
        name = op[0]
        if name in _ACCESSES:
            return lambda here: self._access(instruction, here)
        if name == "mma":
            return lambda here: self._product(instruction, here)
        if name == "shfl":
            return lambda here: self._shuffle(instruction, here)
        if name == "mov" and (operands[0].parts or operands[1].parts):
            return lambda here: self._repack(instruction, here)
        try:
            compute = function(op)
        except KeyError as error:
            raise KeyError(f"line {instruction.line}: the instruction {instruction.name} is not known") from error
        target, *sources = operands
        kinds = _source_kinds(op, len(sources))

        def go(here: Threads) -> None:
            self._write(target, here, compute(*(self._read(s, k, here) for s, k in zip(sources, kinds, strict=True))))

        return go

    def _repack(self, instruction: Instruction, here: Threads) -> None:
        target, source = instruction.operands
        if target.parts:
            whole = self._read(source, instruction.op[-1], here)
            width = 8 * size_of(instruction.op[-1]) // len(target.parts)
            for i, part in enumerate(target.parts):
                if part.text != "_":
                    self._write(part, here, whole >> whole.dtype.type(width * i))
            return
        width = 8 * size_of(instruction.op[-1]) // len(source.parts)
        kind = f"b{width}"
        parts = [
            self._read(part, kind, here).astype(np.uint64) << np.uint64(width * i)
            for i, part in enumerate(source.parts)
        ]
        self._write(target, here, np.bitwise_or.reduce(parts))

    def _address(self, instruction: Instruction, place: Operand, here: Threads, size: int) -> NDArray[np.int64]:
        base = self._read(Operand(place.text), "u64", here).astype(np.int64) + place.value
        if "shared" in instruction.op:
            base &= 0xFFFFFFFF  # 32-bit addresses, which wrap around
        if (base % size).any():
            raise PtxFault(f"line {instruction.line}: an access of {size} bytes is not aligned")
        return base

    def _access(self, instruction: Instruction, here: Threads) -> None:
        op = instruction.op
        kind = op[-1]
        target, place, *rest = instruction.operands
        if op[0] == "st":
            target, place = place, target
        if "param" in op:
            value = self.values[place.text]
            self._write(target, here, np.full(len(here), value, np.int64).astype(unsigned(kind)))
            return
        parts = target.parts or (target,)
        size = size_of(kind)
        address = self._address(instruction, place, here, size * len(parts))
        if op[0] == "atom":
            assert op[-2:] == ("add", "u32"), instruction
            self._add(instruction, target, address, here, self._read(rest[0], kind, here))
            return
        for i, part in enumerate(parts):
            if op[0] == "ld":
                self._write(part, here, self._load(instruction, address + size * i, size, here))
            else:
                self._store(instruction, address + size * i, size, here, self._read(part, kind, here))

    def _buffers(self, instruction: Instruction, address: NDArray[np.int64], size: int, here: Threads) -> Any:
        """Yield (bytes, whether they may be written, places, which threads) of what is accessed."""
        if "shared" in instruction.op:
            limit = self.program.shared_bytes
            if (address < 0).any() or (address + size > limit).any():
                raise PtxFault(f"line {instruction.line}: outside of shared memory")
            flat = self.shared.reshape(-1)
            yield flat, True, self.block[here] * self.shared.shape[1] + address, slice(None)
            return
        region = address // _REGION
        for each in np.unique(region):
            which = np.flatnonzero(region == each)
            places = address[which] % _REGION
            if not 1 <= each <= len(self.memory) or (places + size > len(self.memory[each - 1][0])).any():
                raise PtxFault(f"line {instruction.line}: outside of every buffer")
            data, writable, _name = self.memory[each - 1]
            yield data, writable, places, which

    def _load(self, instruction: Instruction, address: NDArray[np.int64], size: int, here: Threads) -> NDArray[Any]:
        result = np.empty(len(here), unsigned(f"b{8 * size}"))
        for data, _writable, places, which in self._buffers(instruction, address, size, here):
            result[which] = data[places[:, None] + np.arange(size)].view(result.dtype)[:, 0]
        kind = instruction.op[-1]
        return as_typed(result, kind).astype(np.int64) if kind[0] == "s" and size < 4 else result

    def _store(
        self, instruction: Instruction, address: NDArray[np.int64], size: int, here: Threads, bits: NDArray[Any]
    ) -> None:
        raw = np.ascontiguousarray(bits.astype(unsigned(f"b{8 * size}"))).view(np.uint8).reshape(-1, size)
        for data, writable, places, which in self._buffers(instruction, address, size, here):
            if not writable:
                raise PtxFault(f"line {instruction.line}: writes into what is only to be read")
            data[places[:, None] + np.arange(size)] = raw[which]

    def _add(
        self, instruction: Instruction, target: Operand, address: NDArray[np.int64], here: Threads, bits: NDArray[Any]
    ) -> None:
        for i in range(len(here)):  # one after the other
            one = here[i : i + 1]
            old = self._load(instruction, address[i : i + 1], 4, one)
            self._store(instruction, address[i : i + 1], 4, one, old + bits[i : i + 1].astype(np.uint32))
            self._write(target, one, old)

    def _warps(self, instruction: Instruction, here: Threads) -> Threads:
        """Return threads as [warps, 32]; all lanes of a warp must be there."""
        if (
            len(here) % 32
            or (here.reshape(-1, 32) != here[::32, None] + np.arange(32)).any()
            or (here[::32] % 32).any()
        ):
            raise PtxFault(f"line {instruction.line}: only some lanes of a warp are at {instruction.name}")
        return here.reshape(-1, 32)

    def _shuffle(self, instruction: Instruction, here: Threads) -> None:
        assert "bfly" in instruction.op, instruction
        target, source, mask, *_ = instruction.operands
        self._warps(instruction, here)
        values = self._read(source, "b32", here).reshape(-1, 32)
        lanes = np.arange(32) ^ self._read(mask, "b32", here).reshape(-1, 32).astype(np.int64)
        self._write(target, here, np.take_along_axis(values, lanes, axis=1).reshape(-1))

    def _product(self, instruction: Instruction, here: Threads) -> None:
        d, a, b, c = (operand.parts for operand in instruction.operands)
        self._warps(instruction, here)

        def fragment(parts: tuple[Operand, ...]) -> NDArray[np.uint32]:
            return np.stack(
                [self._read(each, "b32", here).astype(np.uint32).reshape(-1, 32) for each in parts], axis=-1
            )

        rows, columns, sums = (fragment(each) for each in (a, b, c))  # [warps, 32, registers]
        form = instruction.name.removeprefix("mma.sync.aligned.")
        if form == _BYTES:
            result = _bytes_product(rows, columns, sums)
        elif form in _HALVES:
            result = _half_product(rows, columns, sums, _HALVES[form])
        else:
            raise KeyError(f"line {instruction.line}: the instruction {instruction.name} is not known")
        for i, each in enumerate(d):
            self._write(each, here, result[..., i].reshape(-1))


def _rows_of(a: NDArray[np.uint32], width: int) -> NDArray[Any]:
    """Return A [warps, 16, k] of a fragment, elements of `width` bytes."""
    each = 4 // width
    parts = a.view(_ELEMENTS[width]).reshape(len(a), 8, 4, 2, 2, each)  # warp, g, t, half of k, row + 8, element
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(len(a), 16, -1)


def _columns_of(b: NDArray[np.uint32], width: int) -> NDArray[Any]:
    """Return B [warps, 8, k], a row for each column."""
    each = 4 // width
    parts = b.view(_ELEMENTS[width]).reshape(len(b), 8, 4, 2, each)
    return parts.transpose(0, 1, 3, 2, 4).reshape(len(b), 8, -1)


_ELEMENTS = {1: np.int8, 2: np.uint16}


def _placed(result: NDArray[Any]) -> NDArray[Any]:
    """Return [warps, 16, 8] as fragments [warps, 32, 4]."""
    parts = result.reshape(len(result), 2, 8, 4, 2)  # row + 8, g, t, column
    return parts.transpose(0, 2, 3, 1, 4).reshape(len(result), 32, 4)


def _gathered(c: NDArray[Any]) -> NDArray[Any]:
    """Inverse of `_placed`."""
    parts = c.reshape(len(c), 8, 4, 2, 2)
    return parts.transpose(0, 3, 1, 2, 4).reshape(len(c), 16, 8)


def _half_product(
    a: NDArray[np.uint32], b: NDArray[np.uint32], c: NDArray[np.uint32], dtype: Float16
) -> NDArray[np.uint32]:
    rows = arithmetic.widened(_rows_of(a, 2), dtype)[:, :, None, :]
    columns = arithmetic.widened(_columns_of(b, 2), dtype)[:, None, :, :]
    total = arithmetic.mma16(np.ascontiguousarray(_gathered(c.view(np.float32))), rows, columns)
    return np.ascontiguousarray(_placed(total)).view(np.uint32)


def _bytes_product(a: NDArray[np.uint32], b: NDArray[np.uint32], c: NDArray[np.uint32]) -> NDArray[np.uint32]:
    rows, columns = _rows_of(a, 1).astype(np.int64), _columns_of(b, 1).astype(np.int64)
    total = _gathered(c.view(np.int32)).astype(np.int64) + rows @ columns.transpose(0, 2, 1)
    return np.ascontiguousarray(_placed(total.astype(np.int32))).view(np.uint32)


def _source_kinds(op: tuple[str, ...], count: int) -> list[str]:
    """Return the type of each source of an instruction: for numbers among them, whose text has none."""
    kind = op[-1]
    if op[0] == "selp":
        return [kind, kind, "pred"]
    if op[0] in ("shl", "shr"):
        return [kind, "u32"]
    if op[0] in ("bfe", "bfi"):
        return [kind] * (count - 2) + ["u32", "u32"]
    if op[0] == "mad" and "wide" in op:
        return [kind, kind, f"{kind[0]}{16 * size_of(kind)}"]
    if op[0] in ("lop3", "prmt", "shf"):
        return ["b32"] * count
    return [kind] * count


_SPECIAL: dict[str, Callable[[_Machine, Threads], NDArray[Any]]] = {
    "%tid.x": lambda m, here: (here % m.threads).astype(np.uint32),
    "%ntid.x": lambda m, here: np.full(len(here), m.threads, np.uint32),
    "%ctaid.x": lambda m, here: (m.block[here] % m.grid[0]).astype(np.uint32),
    "%ctaid.y": lambda m, here: (m.block[here] // m.grid[0]).astype(np.uint32),
    "%nctaid.x": lambda m, here: np.full(len(here), m.grid[0], np.uint32),
}
