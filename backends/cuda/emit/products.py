"""What kernels of matrix products have in common: who computes what, adding up slices, and the end of every output.

    block (bx, by), warp w:  tiles of 16 outputs      ((bx div token blocks)·row_warps + w mod row_warps)·rows + 0 …
    rows-1
                             tokens in eights         ((bx mod token blocks)·column_warps + …)·columns + 0 … columns-1
                             slice of the inputs      by·k_warps + w div (row_warps·column_warps)

Blocks that read the same weights are neighbours, so that the second finds them in the cache. A lane keeps four sums of
each tile and eight tokens: of outputs g and g + 8 for tokens 2t and 2t + 1. The slices of a block meet in shared
memory, those of several blocks in the workspace, where the block that comes last adds them; each time in their order,
so that the same inputs give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from graphopt.backends.cuda.emit.kernel import Parameter, Writer
from graphopt.backends.cuda.expressions import emitted
from graphopt.backends.cuda.layouts import TILE
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, is_vector

AnyPlan = TypeVar("AnyPlan", LinearPlan, Int8Plan)


class Products(ABC, Generic[AnyPlan]):
    """The body of a kernel: `written` gives it."""

    kind: ClassVar[str]  # of a sum, in C

    def __init__(self, plan: AnyPlan) -> None:
        self.plan: AnyPlan = plan
        self.layout: Any = plan.layout
        self.out = Writer()
        self.letter = "h" if plan.dtype == "float16" else "b"
        self.units: int = self.layout.padded_k // self.layout.unit

    def written(self) -> str:
        self._places()
        pointers = self._sources()
        self.out(*(f"{name} += first * {step};" for name, step in pointers))
        self.out(f"{self.kind} acc[{self.plan.rows}][{self.plan.columns}][4] = {{}};")
        self._buffers()
        self._load_ahead()
        self._loop(pointers)
        if self.plan.k_warps > 1:
            self._add_warps()
        if self.plan.k_blocks > 1:
            self._add_blocks()
        self._store()
        return str(self.out)

    @abstractmethod
    def _sources(self) -> list[tuple[str, int]]:
        """Declare pointers to this lane's parts of chunk 0 of what it reads.

        Returns their names, and by how much they move from chunk to chunk.
        """

    @abstractmethod
    def _buffers(self) -> None:
        """Declare what chunks are loaded into."""

    @abstractmethod
    def _load(self, d: int, ahead: int) -> None:
        """Load the chunk `ahead` of where the pointers are into place d."""

    @abstractmethod
    def _chunk(self, d: int) -> None:
        """Multiply the chunk in place d, d ahead of where the pointers are; `_load_next` once its place is free."""

    @abstractmethod
    def _before_outputs(self) -> None:
        """Prepare for the end: the sums are complete."""

    @abstractmethod
    def _sum(self, i: str, half: int) -> str:
        """Return a sum as the float `acc` of the epilogue: of token i of two, of output g or g + 8."""

    # Where this lane works ------------------------------------------------------------------------------------------

    def _places(self) -> None:
        plan, layout = self.plan, self.layout
        across = plan.row_warps * plan.column_warps
        self.out(
            "const int lane = go_thread() % 32, warp = go_thread() / 32;",
            "const int g = lane / 4, t = lane % 4;",
            f"const int row_warp = warp % {plan.row_warps}, k_warp = warp / {across}, place = warp % {across};",
        )
        row, column = "go_block()", f"place / {plan.row_warps}"
        if plan.token_blocks:
            self.out(f"const int along = (tokens + {plan.tokens_of_block - 1}) / {plan.tokens_of_block};")
            row, column = "go_block() / along", f"go_block() % along * {plan.column_warps} + {column}"
        self.out(
            f"const int tile0 = (({row}) * {plan.row_warps} + row_warp) * {plan.rows};",
            f"const int token0 = ({column}) * {8 * plan.columns};",
        )
        self.out(f"const int slice = go_block_y() * {plan.k_warps} + k_warp;")
        per_unit = layout.unit // layout.chunk
        self.out(
            f"const int first = {self.units} * slice / {plan.slices} * {per_unit};",
            f"const int last = {self.units} * (slice + 1) / {plan.slices} * {per_unit};",
            f"int tile[{plan.rows}];",
        )
        beyond = layout.tiles % plan.tiles_of_block != 0
        for r in range(plan.rows):
            # Tiles beyond the last compute the last one again; nobody stores them.
            inside = f"tile0 + {r} < {layout.tiles} ? tile0 + {r} : {layout.tiles - 1}"
            self.out(f"tile[{r}] = {inside if beyond else f'tile0 + {r}'};")

    def _rows_of_x(self, type: str, quarter: int) -> None:
        """Name where a lane's inputs begin, `x{column}`: `quarter` of each span belong to it.

        Tokens beyond the last read the last one again: columns of a product know nothing of each other, and nobody
        stores theirs.
        """
        for c in range(self.plan.columns):
            self.out(f"const int token{c + 1} = token0 + {8 * c} + g < tokens ? token0 + {8 * c} + g : tokens - 1;")
            self.out(f"const {type}* x{c} = x + (u64)token{c + 1} * {self.plan.k} + {quarter} * t;")

    # Going through the inputs ---------------------------------------------------------------------------------------

    def _load_ahead(self) -> None:
        self.out("int base = first;  // the chunk at the pointers")
        for d in range(self.plan.depth):
            self.out(f"if (base + {d} < last) {{")
            self._load(d, d)
            self.out("}")

    def _load_next(self, d: int) -> None:
        ahead = d + self.plan.depth
        self.out(f"if (base + {ahead} < last) {{")
        self._load(d, ahead)
        self.out("}")

    def _loop(self, pointers: list[tuple[str, int]]) -> None:
        depth = self.plan.depth
        self.out(f"for (; base < last; base += {depth}) {{")
        for d in range(depth):
            self.out("{" if d == 0 or self._even else f"if (base + {d} < last) {{")
            self._chunk(d)
            self.out("}")
        self.out(*(f"{name} += {depth * step};" for name, step in pointers), "}")

    @property
    def _even(self) -> bool:
        """Whether every slice is a whole number of rounds of the loop."""
        chunks: int = self.units // self.plan.slices * (self.layout.unit // self.layout.chunk)
        return self.units % self.plan.slices == 0 and chunks % self.plan.depth == 0

    def _words(self, target: str, first: int, count: int, source: str, how: str, guard: str = "") -> None:
        """Load words into places of an array."""
        if count == 1:
            self.out(f"{guard}{target}[{first}] = go_{how}1({source});")
            return
        parts = " ".join(f"{target}[{first + i}] = v.{'xyzw'[i]};" for i in range(count))
        self.out(f"{guard}{{ u32x{count} v = go_{how}{count}({source}); {parts} }}")

    def _read_row(self, target: str, row: str, start: str, count: int, size: int) -> None:
        """Read `count` inputs of `size` bytes into words, by the widest loads that all rows allow, none beyond the row.

        `row`: the address of the first, which is input `start`. What is beyond the row is 0: times the code that stands
        for zero anything else could be NaN.
        """
        guarded = self.layout.padded_k != self.plan.k
        self.out(f"u32 {target}[{count * size // 4}]{' = {}' if guarded or self.plan.k % (4 // size) else ''};")
        k = self.plan.k
        each = 4 // size  # inputs of a word
        width = next(width for width in (16, 8, 4, 2, 1) if k % width == 0 and width <= min(count, 4 * each))
        for first in range(0, count, width):
            guard = f"if ({start} + {first} < {k}) " if guarded else ""
            if width >= each:
                self._words(target, first // each, width // each, f"(const u32*)({row} + {first})", "load", guard)
                continue
            load = "go_load_u16" if width * size == 2 else "go_load_u8"
            pointer = "u16" if width * size == 2 else "u8"
            shift = 8 * size * (first % each)
            self.out(f"{guard}{target}[{first // each}] |= {load}((const {pointer}*)({row} + {first})) << {shift};")

    # Adding up ------------------------------------------------------------------------------------------------------

    def _each(self, statement: str) -> None:
        """Write a statement for all sums of a lane, numbered by e."""
        plan = self.plan
        self.out("GO_UNROLL", f"for (int e = 0; e < {plan.fragment}; e++) {{")
        self.out(f"{self.kind}& sum = acc[e / {4 * plan.columns}][e / 4 % {plan.columns}][e % 4];", statement, "}")

    def _plus(self, a: str, b: str) -> str:
        return f"go_add({a}, {b})" if self.kind == "float" else f"{a} + {b}"

    def _add_warps(self) -> None:
        plan = self.plan
        across = plan.row_warps * plan.column_warps
        self.out(f"GO_SHARED({self.kind}, slices, {(plan.k_warps - 1) * across * plan.fragment * 32});")
        at = f"((({{}}) * {across} + place) * {plan.fragment} + e) * 32 + lane"
        self.out("if (k_warp > 0) {")
        self._each(f"GO_PUT(slices, {at.format('k_warp - 1')}, sum);")
        self.out("}", "GO_SYNC();", "if (k_warp == 0) {")
        self.out(f"for (int other = 0; other < {plan.k_warps - 1}; other++) {{")
        other = f"GO_GET(slices, {at.format('other')})"
        self._each(f"sum = {self._plus('sum', other)};")
        self.out("}", "}")

    def _add_blocks(self) -> None:
        plan = self.plan
        across = plan.row_warps * plan.column_warps
        at = f"((((u64){{}} * go_blocks() + go_block()) * {across} + place) * {plan.fragment} + e) * 32 + lane"
        bits, back = ("go_bits(sum)", "go_float({})") if self.kind == "float" else ("(u32)sum", "(int){}")
        self.out("GO_SHARED(u32, ticket, 1);", "if (k_warp == 0) {")
        self._each(f"go_store1(partial + {at.format('go_block_y()')}, {bits});")
        self.out("}", "GO_SYNC();", "if (go_thread() == 0) {", "GO_PUT(ticket, 0, go_ticket(tickets + go_block()));")
        self.out("}", "GO_SYNC();", f"if (GO_GET(ticket, 0) != {plan.k_blocks - 1}) return;")
        self.out("if (go_thread() == 0) go_store1(tickets + go_block(), 0);  // as the next launch finds it")
        self.out("if (k_warp == 0) {")
        self._each("sum = 0;")
        self.out(f"for (int other = 0; other < {plan.k_blocks}; other++) {{")
        other = back.format(f"go_load_fresh(partial + {at.format('other')})")
        self._each(f"sum = {self._plus('sum', other)};")
        self.out("}", "}")

    # The end --------------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        plan = self.plan
        self.out("if (k_warp > 0) return;")
        self._before_outputs()
        self.out("GO_UNROLL", f"for (int r = 0; r < {plan.rows}; r++) {{")
        for half in (0,) if plan.paired else (0, 1):
            n = "(tile0 + r) * 8 + g" if plan.paired else f"(tile0 + r) * {TILE} + g + {8 * half}"
            self.out(f"if (tile0 + r < {self.layout.tiles} && {n} < {plan.outputs}) {{", f"const int n = {n};")
            self.out(*self._of_output(half))
            self.out(
                "GO_UNROLL",
                f"for (int c = 0; c < {plan.columns}; c++) {{",
                "GO_UNROLL",
                "for (int i = 0; i < 2; i++) {",
            )
            self.out("const int token = token0 + 8 * c + 2 * t + i;", "if (token < tokens) {")
            self.out(f"const u64 at = (u64)token * {plan.outputs} + n;", *self._of_token())
            leaves = {"acc": self._sum("i", half), "acc2": self._sum("i", 1)}
            for name in plan.inputs:
                read = f"go_of_{self.letter}(go_load_u16({name} + at))"
                leaves[name] = f"{name}_n" if is_vector(name) else read
            value = emitted(plan.epilogue, leaves, plan.dtype)
            self.out(f"go_store_u16(y + at, go_to_{self.letter}({value}));", "}", "}", "}", "}")
        self.out("}")

    def _of_output(self, half: int) -> list[str]:
        """Return lines that read what all tokens of output n need."""
        vectors = [name for name in self.plan.inputs if is_vector(name)]
        return [f"const float {name}_n = go_of_{self.letter}(go_load_u16({name} + n));" for name in vectors]

    def _of_token(self) -> list[str]:
        """Return lines that read what token `token` needs."""
        return []


def workspace_parameters(plan: LinearPlan | Int8Plan) -> list[Parameter]:
    """Return what the kernel takes behind everything else."""
    found = [Parameter(name, "u16") for name in plan.inputs]
    found += [Parameter("y", "u16", written=True), Parameter("tokens", "int")]
    if plan.k_blocks > 1:
        found += [Parameter("partial", "u32", written=True), Parameter("tickets", "u32", written=True)]
    return found
