"""Kernel plans: everything that decides the text of a kernel, as plain data that can be written down and read back.

A plan holds what is computed (sizes, formats, what is absorbed before and behind) and how (tiles, warps, slices). The
first kind comes from the program; the second is what tuning chooses, and never changes the meaning beyond roundings of
sums.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from graphopt.backends.cuda.arithmetic import Float16
from graphopt.backends.cuda.expressions import names
from graphopt.backends.cuda.layouts import TILE, WeightLayout, chunk_for, span_for
from graphopt.errors import GraphoptError

SHARED_BYTES = 48 << 10  # what every block may have without asking
MOST_THREADS = 1024
COLUMNS = 8  # tokens that one product of tensor cores takes


@dataclass(frozen=True)
class LinearPlan:
    """y [m, n] = epilogue(x [m, k] · dequantized(codes [n, k])ᵀ) with weights of 2, 3, 4 or 8 bits, x in halves.

    A block computes 16·rows·row_warps outputs of up to 8·columns tokens. Its inputs are cut into k_warps slices, one for
    each group of warps, and k_blocks blocks share the inputs among themselves; slices are added in their order.

    Attributes:
        n, k: outputs and inputs. bits: of a code. group: inputs that share a scale; 0: all of a row.
        zero_points: whether each group has one; else the middle code, 2**(bits-1), stands for zero.
        dtype: of activations. scale_dtype: of scales, which are read as they are.
        columns: tokens in eights. rows: tiles of 16 outputs that a warp computes.
        row_warps, k_warps, k_blocks: see above. depth: chunks of weights that are on their way at a time.
        paired: rows come in eights, alternately of two matrices: `acc` is of the first, `acc2` of the second, and y has
            n/2 columns.
        epilogue: of each output; reads acc (and acc2), bias (bias2), vectors of y's columns, and in0, in1, …, like y.
    """

    kind: ClassVar[str] = "linear"

    n: Annotated[int, Field(ge=1)]
    k: Annotated[int, Field(ge=1)]
    bits: Literal[2, 3, 4, 8] = 4
    group: Annotated[int, Field(ge=0)] = 128
    zero_points: bool = False
    dtype: Float16 = "float16"
    scale_dtype: Literal["float16", "float32"] = "float16"
    columns: Literal[1, 2, 4, 8] = 1
    rows: Literal[1, 2, 4] = 1
    row_warps: Literal[1, 2, 4, 8] = 1
    k_warps: Literal[1, 2, 4, 8, 16] = 4
    k_blocks: Annotated[int, Field(ge=1, le=64)] = 1
    depth: Literal[1, 2, 4, 8] = 2
    paired: bool = False
    epilogue: str = "acc"

    def __post_init__(self) -> None:
        if not chunk_for(self.bits, self.group):
            raise ValueError(f"no layout of {self.bits} bits has groups of {self.group} inputs")
        if self.threads > MOST_THREADS:
            raise ValueError(f"{self.threads} threads are too many for a block")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"the slices of a block take {self.shared_bytes} bytes of shared memory to add up")
        if self.paired and self.n % TILE:
            raise ValueError(f"{self.n} rows cannot be paired: they are no multiple of {TILE}")
        known = {"acc", "bias"} | ({"acc2", "bias2"} if self.paired else set())
        if strange := [each for each in names(self.epilogue) if each not in known and not _is_input(each)]:
            raise ValueError(f"the epilogue reads {strange[0]}, which a linear does not have")

    @property
    def layout(self) -> WeightLayout:
        chunk = chunk_for(self.bits, self.group)
        span = min(span_for(self.group), 32 if chunk % 32 == 0 else 16)
        return WeightLayout(self.n, self.k, self.bits, chunk, span, max(chunk, self.group))

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.layout.padded_k // self.group if self.group else 1

    @property
    def outputs(self) -> int:
        return self.n // 2 if self.paired else self.n

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.k_warps

    @property
    def slices(self) -> int:
        return self.k_warps * self.k_blocks

    @property
    def fragment(self) -> int:
        """Sums that a lane keeps."""
        return self.rows * self.columns * 4

    @property
    def shared_bytes(self) -> int:
        return (self.k_warps - 1) * self.row_warps * self.fragment * 128 + 16 * (self.k_blocks > 1)

    @property
    def tiles_of_block(self) -> int:
        return self.rows * self.row_warps

    @property
    def blocks(self) -> int:
        """Blocks along the outputs."""
        return -(-self.layout.tiles // self.tiles_of_block)

    @property
    def grid(self) -> tuple[int, int]:
        return self.blocks, self.k_blocks

    @property
    def most_tokens(self) -> int:
        return self.columns * COLUMNS

    @property
    def inputs(self) -> list[str]:
        """Names in the epilogue that are not sums, in the order in which the kernel takes them."""
        return sorted(each for each in names(self.epilogue) if not each.startswith("acc"))

    @property
    def workspace_words(self) -> int:
        """Words for the sums of blocks that share inputs; 0 where none do. Tickets not counted."""
        if self.k_blocks == 1:
            return 0
        return self.k_blocks * self.blocks * self.tiles_of_block * self.columns * 4 * 32


def _is_input(name: str) -> bool:
    return name.startswith("in") and name[2:].isdecimal()


def _is_vector(name: str) -> bool:
    return name.startswith("v") and name[1:].isdecimal()


@dataclass(frozen=True)
class RowPlan:
    """Rows [m, n] of halves, one after the other: added up, normalized, rotated, quantized; every step may be left out.

        x = prologue(in0, in1, …)            `keep`: also written, as it stands
        x = x / √(mean(x²) + eps)            norm "rms"; "layer" takes the mean off before
        x = affine(x, v0, …)
        x = x · Q                            blocks of `block`, a power of two; Q as in `graphopt::hadamard`, no small matrix
        codes, scale[, zero_point] = x       output "int8": the middle code is zero; "uint8": with zero points
        y = x                                output "half"

    with the arithmetic of `graphopt::dynamic_scale` and `graphopt::quantize` by token.

    Attributes:
        n: elements of a row. dtype: of activations and scales.
        prologue: of in0, in1, … like x, and vectors v0, v1, … of n. affine: of x and vectors.
        keep: whether the prologue's value is written too. norm, eps: see above.
        block: of the rotation; 0: none. signs: whether Q has them. transpose: times Qᵀ.
        output: see above.
        per_thread: elements of a thread. Rotations take 8, 16, 32 or 64, which decides how often threads exchange them.
    """

    kind: ClassVar[str] = "row"

    n: Annotated[int, Field(ge=1)]
    dtype: Float16 = "float16"
    prologue: str = "in0"
    keep: bool = False
    norm: Literal["none", "rms", "layer"] = "none"
    eps: float = 1e-6
    affine: str = "x"
    block: Annotated[int, Field(ge=0)] = 0
    signs: bool = False
    transpose: bool = False
    output: Literal["half", "int8", "uint8"] = "half"
    per_thread: Annotated[int, Field(ge=1, le=64)] = 8

    def __post_init__(self) -> None:
        for text, own in ((self.prologue, False), (self.affine, True)):
            for each in names(text):
                if not (_is_vector(each) or (each == "x" if own else _is_input(each))):
                    raise ValueError(f"{text} reads {each}, which a row does not have there")
        if not math.isfinite(self.eps) or self.eps < 0:
            raise ValueError(f"eps is {self.eps}; it must be a number, and not negative")
        if self.per_thread % self.width:
            raise ValueError(f"{self.per_thread} elements of a thread are no whole loads of {self.width}")
        if self.block:
            fits = self.block & (self.block - 1) == 0 and self.n % self.block == 0 and self.per_thread <= self.block
            if not fits or self.per_thread not in (8, 16, 32, 64):
                raise ValueError(f"no rotation of {self.n} in blocks of {self.block}, {self.per_thread} to a thread")
        if self.threads > MOST_THREADS:
            raise ValueError(f"a row of {self.n} takes {self.threads} threads; {MOST_THREADS} are the most")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"a row of {self.n} takes {self.shared_bytes} bytes of shared memory to rotate")

    @property
    def width(self) -> int:
        """Elements of one load."""
        return math.gcd(self.n, 8)

    @property
    def repeats(self) -> int:
        """Loads of a thread."""
        return self.per_thread // self.width

    @property
    def workers(self) -> int:
        """Threads that hold elements."""
        return -(-self.n // self.per_thread)

    @property
    def threads(self) -> int:
        return -(-self.workers // 32) * 32

    @property
    def warps(self) -> int:
        return self.threads // 32

    @property
    def bits(self) -> int:
        """Binary digits of a place in a block of the rotation."""
        return self.block.bit_length() - 1

    @property
    def held(self) -> int:
        """Binary digits of a place among the elements of a thread."""
        return self.per_thread.bit_length() - 1

    @property
    def stages(self) -> list[tuple[int, ...]]:
        """Which digits of a place in its block a thread holds from one exchange to the next, lowest first.

        First and last it holds the lowest three, which it loads and stores together; each stage rotates along the digits
        that no stage before it held. Two exchanges do up to 10 digits for 16 elements, 12 for 32 and 15 for 64.
        """
        lowest, upper = (0, 1, 2), tuple(range(self.bits - self.held + 3, self.bits))
        left = tuple(range(3, self.bits - self.held + 3))
        found = [self._with_spare((*lowest, *upper))]
        while len(left) > self.held - 3:
            found.append(self._with_spare(left[: self.held]))
            left = left[self.held :]
        return found if len(found) == 1 and not left else [*found, self._with_spare((*lowest, *left))]

    def _with_spare(self, digits: tuple[int, ...]) -> tuple[int, ...]:
        """Return the digits, and as many of the highest others as a thread still has room for."""
        others = [digit for digit in reversed(range(self.bits)) if digit not in digits]
        return tuple(sorted([*digits, *others[: self.held - len(digits)]]))

    @property
    def shared_bytes(self) -> int:
        exchange = 4 * (self.n + self.n // 32) if self.block and len(self.stages) > 1 else 0
        return exchange + 16 * 4 * 32 * (self.norm != "none") + 32 * 32

    @property
    def inputs(self) -> list[str]:
        """in0, in1, …, v0, v1, … as the kernel takes them."""
        return sorted({each for text in (self.prologue, self.affine) for each in names(text)} - {"x"})


Plan = LinearPlan | RowPlan
_KINDS: dict[str, TypeAdapter[Any]] = {each.kind: TypeAdapter(each) for each in (LinearPlan, RowPlan)}


def plan_text(plan: Plan) -> str:
    """Return a plan as one line of JSON, the same for equal plans."""
    fields = _KINDS[plan.kind].dump_python(plan, mode="json")
    return json.dumps({"kind": plan.kind, **fields}, sort_keys=True, separators=(",", ":"))


def read_plan(text: str) -> Plan:
    """Return the plan of `plan_text`; GraphoptError where it is none."""
    try:
        fields = json.loads(text)
        kind = fields.pop("kind")
        found: Plan = _KINDS[kind].validate_python(fields, extra="forbid")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise GraphoptError(f"this is no plan of a kernel: {reason}") from error
    return found
