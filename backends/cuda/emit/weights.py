"""Codes into halves: from the words that a lane read to the registers of operand A.

A field of `bits` bits that lies at bit p of each half of a word becomes two numbers at once. Its bits are masked in
place and put below a magic exponent, which makes them the last bits of the number B + code·2^p; one fused operation
undoes both:

    (B + code·2^p) · 2^-p - (B·2^-p + zero)  =  code - zero                 B = 1024 in halves, 128 in bfloat16s

exactly, since every number in it is a multiple of 2^-p that the type holds. Only fields that end below bit 10 (7) can
be taken where they lie; the next ones are brought down by one shift for all. Eight bits in bfloat16s, which have no
room for them, go through float32.

(The exponent trick is Y. Kim et al.'s "Who Says Elephants Can't Run", taking fields where they lie that of "Marlin".)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphopt.backends.cuda.arithmetic import Float16
from graphopt.backends.cuda.layouts import Field, fields

_ROOM = {"float16": 10, "bfloat16": 7}  # bits below the exponent
_MAGIC = {"float16": 0x6400, "bfloat16": 0x4300}
_BASE = {"float16": 1024, "bfloat16": 128}
_ONE = {"float16": 0x3C00, "bfloat16": 0x3F80}
_STEP = {"float16": 10, "bfloat16": 7}  # where the exponent begins


@dataclass(frozen=True)
class Recipe:
    """How the pairs of a lane's words become registers.

    Attributes:
        bits: of a code. chunk: inputs of the words, as in the layout. dtype: of the registers.
        zero_points: whether each row has its own in the variables of `zeros`; else the middle code is zero.
    """

    bits: int
    chunk: int
    dtype: Float16
    zero_points: bool

    @property
    def wide(self) -> bool:
        """Whether codes go through float32."""
        return self.bits > _ROOM[self.dtype]

    @property
    def letter(self) -> str:
        return "h" if self.dtype == "float16" else "b"

    @property
    def places(self) -> list[int]:
        """Where fields lie when they are taken, each once."""
        return sorted({self._place(field)[1] for pair in range(self.chunk // 4) if (field := self._whole(pair))} | {0})

    @property
    def shifts(self) -> list[int]:
        """By how much words are shifted, other than not at all."""
        wholes = (self._whole(pair) for pair in range(self.chunk // 4))
        return sorted({self._place(field)[0] for field in wholes if field} - {0})

    def _whole(self, pair: int) -> Field | None:
        """Return the field of a pair, where all of its bits are in one."""
        found = [field for field in fields(self.bits, self.chunk) if field.pair == pair]
        return found[0] if len(found) == 1 else None

    def _place(self, field: Field) -> tuple[int, int]:
        """Return (shift, place after it) of a field; the shifts of a word are the fewest that do."""
        if self.bits == 8:
            return 0, 0  # whole bytes are moved, not masked
        each = _ROOM[self.dtype] // self.bits * self.bits
        return field.at // each * each, field.at % each

    def zeros(self, code: str) -> dict[int, str]:
        """Return, by place, what to add to B·2^-p + codes, in C, for a row whose zero point is the text `code`.

        `code` is a word that holds it in its lowest byte.
        """
        if self.wide:
            return {0: f"go_sub(-8388608.0f, go_of_int({code} & 0xffu))"}
        magic = _word(_MAGIC[self.dtype])
        splat = f"go_bytes({code}, {magic}, 0x5050u)"
        return {place: self._offset(splat, place) for place in self.places}

    def _offset(self, splat: str, place: int) -> str:
        """Return -(B·2^-p + zero), from B + zero in both halves."""
        base = _BASE[self.dtype]
        minus_one = _word(_ONE[self.dtype] | 0x8000)
        return f"go_fma_{self.letter}2({splat}, {minus_one}, {self.constant(base - base * 2.0**-place)})"

    def middle(self) -> dict[int, str]:
        """The same where the middle code stands for zero."""
        zero = 1 << (self.bits - 1)
        if self.wide:
            return {0: f"{-8388608.0 - zero:.1f}f"}
        base = _BASE[self.dtype]
        return {place: self.constant(-(base * 2.0**-place + zero)) for place in self.places}

    def constant(self, value: float) -> str:
        """Return a word with a number that the type holds in both halves."""
        if value == 0:
            return "0u"
        mantissa, exponent = abs(value), 0
        while mantissa >= 2:
            mantissa, exponent = mantissa / 2, exponent + 1
        while mantissa < 1:
            mantissa, exponent = mantissa * 2, exponent - 1
        step = _STEP[self.dtype]
        bias = 15 if self.dtype == "float16" else 127
        fraction = (mantissa - 1) * (1 << step)
        assert fraction == int(fraction), f"{value} is no {self.dtype}"
        return _word((exponent + bias) << step | int(fraction) | (0x8000 if value < 0 else 0))

    def register(self, pair: int, word: Callable[[int, int], str], offsets: dict[int, str]) -> str:
        """Return a pair in C; `word(i, shift)` names the lane's i-th word, shifted right."""
        if self.bits == 8:
            return self._bytes(pair, word, offsets)
        found = [field for field in fields(self.bits, self.chunk) if field.pair == pair]
        if len(found) == 1:
            shift, place = self._place(found[0])
            mask, source = ((1 << self.bits) - 1) << place, word(found[0].word, shift)
            magic = f"go_and_or({source}, {_word(mask)}, {_word(_MAGIC[self.dtype])})"
        else:
            place, magic = 0, _word(_MAGIC[self.dtype])
            for field in found:
                mask = ((1 << field.width) - 1) << field.low
                magic = f"go_and_or({word(field.word, 0)} >> {field.at - field.low}, {_word(mask)}, {magic})"
        power = (_ONE[self.dtype] >> _STEP[self.dtype]) - place << _STEP[self.dtype]
        return f"go_fma_{self.letter}2({magic}, {_word(power)}, {offsets[place]})"

    def _bytes(self, pair: int, word: Callable[[int, int], str], offsets: dict[int, str]) -> str:
        (field,) = (field for field in fields(self.bits, self.chunk) if field.pair == pair)
        first, source = field.at // 8, word(field.word, 0)
        if not self.wide:
            magic = f"go_bytes({source}, 0x64646464u, 0x{0x4040 | first | first + 2 << 8:04x}u)"
            return f"go_fma_{self.letter}2({magic}, {_word(_ONE[self.dtype])}, {offsets[0]})"
        low, high = (
            f"go_add(go_float(go_bytes({source}, 0x4b000000u, 0x{0x7440 | each:04x}u)), {offsets[0]})"
            for each in (first, first + 2)
        )
        return f"go_to_b2({low}, {high})"


def _word(half: int) -> str:
    return f"0x{half << 16 | half:08x}u"
