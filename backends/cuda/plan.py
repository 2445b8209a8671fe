"""Kernel plans: everything that decides the text of a kernel, as plain data that can be written down and read back.

A plan holds what is computed (sizes, formats, what is absorbed before and behind) and how (tiles, warps, slices). The
first kind comes from the program; the second is what tuning chooses, and never changes the meaning beyond roundings of
sums.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from graphopt.backends.cuda.arithmetic import Float16
from graphopt.backends.cuda.expressions import names
from graphopt.backends.cuda.layouts import TILE, ByteLayout, WeightLayout, chunk_for, span_for
from graphopt.errors import GraphoptError

SHARED_BYTES = 48 << 10  # what every block may have without asking
MOST_THREADS = 1024
COLUMNS = 8  # tokens that one product of tensor cores takes


class _Product(ABC):
    """What plans of matrix products have in common, made of their fields; see `emit/products.py`.

    Attributes:
        outputs: columns of y. layout: of the weights, in tiles of 16 rows.
        rows: tiles that a warp computes. columns: tokens in eights that it computes.
        row_warps, column_warps, k_warps: of a block, along outputs, tokens and inputs. k_blocks: along the inputs.
        token_blocks: whether several blocks share the tokens. epilogue: of each output.
    """

    rows: Any
    columns: Any
    row_warps: Any
    column_warps: Any = 1
    k_warps: Any
    k_blocks: Any
    token_blocks: bool
    epilogue: str

    @property
    @abstractmethod
    def layout(self) -> Any:
        """Return where the weights lie."""

    @property
    def threads(self) -> int:
        return int(32 * self.row_warps * self.column_warps * self.k_warps)

    @property
    def slices(self) -> int:
        return int(self.k_warps * self.k_blocks)

    @property
    def fragment(self) -> int:
        """Sums that a lane keeps."""
        return int(self.rows * self.columns * 4)

    @property
    def shared_bytes(self) -> int:
        across = self.row_warps * self.column_warps
        return int((self.k_warps - 1) * across * self.fragment * 128 + 16 * (self.k_blocks > 1))

    @property
    def tiles_of_block(self) -> int:
        return int(self.rows * self.row_warps)

    @property
    def tokens_of_block(self) -> int:
        return int(COLUMNS * self.columns * self.column_warps)

    @property
    def blocks(self) -> int:
        """Blocks along the outputs."""
        return int(-(-self.layout.tiles // self.tiles_of_block))

    def grid(self, tokens: int) -> tuple[int, int]:
        """Return the blocks of a launch; ValueError for more tokens than the plan takes."""
        along = -(-tokens // self.tokens_of_block)
        if along > 1 and not self.token_blocks:
            raise ValueError(f"the plan takes up to {self.tokens_of_block} tokens, not {tokens}")
        return self.blocks * along, self.k_blocks

    @property
    def inputs(self) -> list[str]:
        """Names in the epilogue that are not sums, in the order in which the kernel takes them."""
        return sorted(each for each in names(self.epilogue) if not each.startswith("acc"))

    def workspace(self, tokens: int) -> tuple[int, int]:
        """Return how many words `partial` and `tickets` have: where blocks share inputs, else none."""
        if self.k_blocks == 1:
            return 0, 0
        blocks, _ = self.grid(tokens)
        return self.k_blocks * blocks * self.threads // self.k_warps * self.fragment, blocks

    def _check_product(self, sums: set[str]) -> None:
        if self.threads > MOST_THREADS:
            raise ValueError(f"{self.threads} threads are too many for a block")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"the slices of a block take {self.shared_bytes} bytes of shared memory to add up")
        known = [each for each in names(self.epilogue) if each in sums or _is_input(each) or is_vector(each)]
        if strange := [each for each in names(self.epilogue) if each not in known]:
            raise ValueError(f"the epilogue reads {strange[0]}, which a linear does not have")


@dataclass(frozen=True)
class _Codes:
    """What plans have in common that read weights of few bits.

    Attributes:
        n, k: outputs and inputs. bits: of a code. group: inputs that share a scale; 0: all of a row.
        zero_points: whether each group has one; else the middle code, 2**(bits-1), stands for zero.
        dtype: of activations. scale_dtype: of scales, which are read as they are.
        paired: rows come in eights, alternately of two matrices.
    """

    n: Annotated[int, Field(ge=1)]
    k: Annotated[int, Field(ge=1)]
    bits: Literal[2, 3, 4, 8] = 4
    group: Annotated[int, Field(ge=0)] = 128
    zero_points: bool = False
    dtype: Float16 = "float16"
    scale_dtype: Literal["float16", "float32"] = "float16"
    paired: bool = field(default=False, kw_only=True)

    @property
    def layout(self) -> WeightLayout:
        chunk = chunk_for(self.bits, self.group)
        span = min(span_for(self.group), 32 if chunk % 32 == 0 else 16)
        return WeightLayout(self.n, self.k, self.bits, chunk, span, max(chunk, self.group))

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.layout.padded_k // self.group if self.group else 1

    def _check_codes(self) -> None:
        if not chunk_for(self.bits, self.group):
            raise ValueError(f"no layout of {self.bits} bits has groups of {self.group} inputs")
        if self.paired and self.n % TILE:
            raise ValueError(f"{self.n} rows cannot be paired: they are no multiple of {TILE}")


@dataclass(frozen=True)
class LinearPlan(_Codes, _Product):
    """y [m, n] = epilogue(x [m, k] · dequantized(codes [n, k])ᵀ) with weights of 2, 3, 4 or 8 bits, x in halves.

    A block computes 16·rows·row_warps outputs of up to 8·columns tokens. Its inputs are cut into k_warps slices, one
    for each group of warps, and k_blocks blocks share the inputs among themselves; slices are added in their order.

    Attributes:
        n, k, bits, group, zero_points, dtype, scale_dtype: of the weights, see `_Codes`.
        columns: tokens in eights. rows: tiles of 16 outputs that a warp computes. token_blocks: for more tokens.
        row_warps, k_warps, k_blocks: see above. depth: chunks of weights that are on their way at a time.
        paired: rows come in eights, alternately of two matrices: `acc` is of the first, `acc2` of the second, and y has
            n/2 columns.
        epilogue: of each output; reads acc (and acc2), v0, v1, …, vectors of y's columns, and in0, in1, …, like y.
    """

    kind: ClassVar[str] = "linear"

    columns: Literal[1, 2, 4, 8] = 1
    rows: Literal[1, 2, 4] = 1
    row_warps: Literal[1, 2, 4, 8] = 1
    k_warps: Literal[1, 2, 4, 8, 16] = 4
    k_blocks: Annotated[int, Field(ge=1, le=64)] = 1
    depth: Literal[1, 2, 4, 8] = 2
    token_blocks: bool = False
    epilogue: str = "acc"

    def __post_init__(self) -> None:
        self._check_codes()
        self._check_product({"acc", "acc2"} if self.paired else {"acc"})

    @property
    def outputs(self) -> int:
        return self.n // 2 if self.paired else self.n


def _is_input(name: str) -> bool:
    return name.startswith("in") and name[2:].isdecimal()


def is_vector(name: str) -> bool:
    """True for a name in an expression that stands for a vector: v0, v1, …"""
    return name.startswith("v") and name[1:].isdecimal()


@dataclass(frozen=True)
class RowPlan:
    """Rows [m, n] of halves, one after the other: added up, normalized, rotated, quantized; every step may be left out.

        x = prologue(in0, in1, …)            `keep`: also written, as it stands
        x = x / √(mean(x²) + eps)            norm "rms"; "layer" takes the mean off before
        x = affine(x, v0, …)
        x = x · Q                            blocks of `block`, a power of two; Q as in `graphopt::hadamard`
        codes, scale[, zero_point] = x       output "int8" or "uint8"; without zero points for int8 only
        y = x                                output "half"

    with the arithmetic of `graphopt::dynamic_scale` and `graphopt::quantize` by token.

    Attributes:
        n: elements of a row. dtype: of activations and scales.
        prologue: of in0, in1, … like x, and vectors v0, v1, … of n. affine: of x and vectors.
        keep: whether the prologue's value is written too. norm, eps: see above.
        block: of the rotation; 0: none. signs: whether Q has them. transpose: times Qᵀ.
        output, zero_points: see above.
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
    zero_points: bool = False
    per_thread: Annotated[int, Field(ge=1, le=64)] = 8

    def __post_init__(self) -> None:
        for text, own in ((self.prologue, False), (self.affine, True)):
            for each in names(text):
                if not (is_vector(each) or (each == "x" if own else _is_input(each))):
                    raise ValueError(f"{text} reads {each}, which a row does not have there")
        if not math.isfinite(self.eps) or self.eps < 0:
            raise ValueError(f"eps is {self.eps}; it must be a number, and not negative")
        if self.zero_points != (self.output == "uint8") and not (self.zero_points and self.output == "int8"):
            raise ValueError(f"rows of {self.output} {'have no' if self.output == 'half' else 'need'} zero points")
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

        First and last it holds the lowest three, which it loads and stores together; each stage rotates along the
        digits that no stage before it held. Two exchanges do up to 10 digits for 16 elements, 12 for 32 and 15 for 64.
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


@dataclass(frozen=True)
class Int8Plan(_Product):
    """y [m, n] = epilogue((x [m, k] - zero points) · codes [n, k]ᵀ · scales) with x and weights of 8 bits, by integers.

    Sums are whole numbers until the end, where a token's zero point times the sum of the output's codes is taken off,
    and `acc` is the rest times the scale of the token, times that of the output.

    Attributes:
        n, k: outputs and inputs. dtype: of y, of scales of tokens, and of what the epilogue reads.
        signed: whether codes of x are. zero_points: whether there is one, a code of the same type, for each scale.
        by_token: a scale for each token; else one for all.
        columns: tokens in eights that a warp computes. rows: tiles of 16 outputs. token_blocks: for more tokens.
        row_warps, column_warps, k_warps, k_blocks: see `emit/products.py`. depth: chunks of weights on their way.
        epilogue: as in `LinearPlan`.
    """

    kind: ClassVar[str] = "int8"
    paired: ClassVar[bool] = False

    n: Annotated[int, Field(ge=1)]
    k: Annotated[int, Field(ge=1)]
    dtype: Float16 = "float16"
    signed: bool = True
    zero_points: bool = False
    by_token: bool = True
    columns: Literal[1, 2, 4, 8] = 1
    rows: Literal[1, 2, 4] = 1
    row_warps: Literal[1, 2, 4, 8] = 1
    column_warps: Literal[1, 2, 4] = 1
    k_warps: Literal[1, 2, 4, 8, 16] = 4
    k_blocks: Annotated[int, Field(ge=1, le=64)] = 1
    depth: Literal[1, 2, 4, 8] = 2
    token_blocks: bool = True
    epilogue: str = "acc"

    def __post_init__(self) -> None:
        if self.k >= 1 << 16:
            raise ValueError(f"sums of {self.k} products of bytes may be more than 32 bits hold")
        if not self.signed and not self.zero_points:
            raise ValueError("unsigned codes need zero points")
        self._check_product({"acc"})

    @property
    def layout(self) -> ByteLayout:
        return ByteLayout(self.n, self.k)

    @property
    def outputs(self) -> int:
        return self.n


@dataclass(frozen=True)
class DequantizePlan(_Codes):
    """The matrix [n, k] in halves of the weights that a `LinearPlan` reads, as `graphopt::dequantize` gives it.

    Attributes as there; rows of paired matrices come apart again, the first matrix above the second.
    """

    kind: ClassVar[str] = "dequantize"
    threads: ClassVar[int] = 128

    def __post_init__(self) -> None:
        self._check_codes()

    @classmethod
    def of(cls, plan: LinearPlan) -> DequantizePlan:
        """Return the plan for the weights of another."""
        return cls(**{each.name: getattr(plan, each.name) for each in dataclass_fields(cls)})

    def grid(self) -> tuple[int, int]:
        return -(-self.layout.tiles * self.layout.chunks // (self.threads // 32)), 1

    def row(self, packed: str) -> str:
        """Return the row of the result, in C, of a row as it is packed."""
        if not self.paired:
            return packed
        return f"({packed}) / 16 * 8 + ({packed}) % 8 + (({packed}) / 8 % 2) * {self.n // 2}"


Plan = LinearPlan | RowPlan | Int8Plan | DequantizePlan
_CLASSES = (LinearPlan, RowPlan, Int8Plan, DequantizePlan)
_KINDS: dict[str, TypeAdapter[Any]] = {each.kind: TypeAdapter(each) for each in _CLASSES}


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
