"""The kernel of `LinearPlan`: few tokens times quantized weights, on tensor cores with the weights as operand A.

    block (bx, by), warp w:  tiles of 16 outputs  (bx·row_warps + w mod row_warps)·rows + 0 … rows-1
                             slice of the inputs  by·k_warps + w div row_warps

Nothing is shared while the inputs go by, so nothing waits: each lane streams its words of the layout into registers,
`depth` chunks ahead, turns codes into halves (`weights.py`), reads its part of x from the cache and multiplies. Sums of
a group stay unscaled in float32, where products of codes and halves are nearly exact; at its end they are scaled and
added to the sums of the slice. The slices of a block meet in shared memory, those of several blocks in the workspace,
where the block that comes last adds them; each time in their order, so that the same inputs give the same bits.
"""

from __future__ import annotations

from graphopt.backends.cuda.emit.kernel import Parameter, Writer
from graphopt.backends.cuda.emit.weights import Recipe
from graphopt.backends.cuda.expressions import emitted
from graphopt.backends.cuda.layouts import TILE
from graphopt.backends.cuda.plan import LinearPlan


def linear(plan: LinearPlan) -> tuple[list[Parameter], str]:
    """Return the parameters and the body."""
    return _parameters(plan), str(_Body(plan).written())


def _parameters(plan: LinearPlan) -> list[Parameter]:
    found = [Parameter("weights", "u32"), Parameter("scales", "u32")]
    if plan.zero_points:
        found.append(Parameter("zeros", "u16"))
    found.append(Parameter("x", "u16"))
    found += [Parameter(name, "u16") for name in plan.inputs]
    found += [Parameter("y", "u16", written=True), Parameter("tokens", "int")]
    if plan.k_blocks > 1:
        found += [Parameter("partial", "u32", written=True), Parameter("tickets", "u32", written=True)]
    return found


class _Body:
    def __init__(self, plan: LinearPlan) -> None:
        self.plan, self.layout, self.out = plan, plan.layout, Writer()
        self.recipe = Recipe(plan.bits, self.layout.chunk, plan.dtype, plan.zero_points)
        self.by_group = plan.group > 0
        # Chunks that share a scale, or groups inside a chunk.
        self.chunks_of_group = max(plan.group // self.layout.chunk, 1)
        self.groups_of_chunk = max(self.layout.chunk // plan.group, 1) if self.by_group else 1
        self.units = self.layout.padded_k // self.layout.unit
        self.sums = "part" if self.by_group else "acc"

    def written(self) -> Writer:
        self._places()
        self._buffers()
        self._load_ahead()
        self._loop()
        if self.plan.k_warps > 1:
            self._add_warps()
        if self.plan.k_blocks > 1:
            self._add_blocks()
        self._store()
        return self.out

    # Where this lane works ------------------------------------------------------------------------------------------

    def _places(self) -> None:
        plan, layout = self.plan, self.layout
        self.out(
            "const int lane = go_thread() % 32, warp = go_thread() / 32;",
            "const int g = lane / 4, t = lane % 4;",
            f"const int row_warp = warp % {plan.row_warps}, k_warp = warp / {plan.row_warps};",
            f"const int tile0 = (go_block() * {plan.row_warps} + row_warp) * {plan.rows};",
            f"const int slice = go_block_y() * {plan.k_warps} + k_warp;",
        )
        per_unit = layout.unit // layout.chunk
        self.out(
            f"const int first = {self.units} * slice / {plan.slices} * {per_unit};",
            f"const int last = {self.units} * (slice + 1) / {plan.slices} * {per_unit};",
        )
        self.out(f"int tile[{plan.rows}];")
        beyond = layout.tiles % plan.tiles_of_block != 0
        for r in range(plan.rows):
            # Tiles beyond the last compute the last one again; nobody stores them.
            inside = f"tile0 + {r} < {layout.tiles} ? tile0 + {r} : {layout.tiles - 1}"
            self.out(f"tile[{r}] = {inside if beyond else f'tile0 + {r}'};")

    def _buffers(self) -> None:
        plan = self.plan
        shape = f"[{plan.rows}][{plan.columns}][4]"
        self.out(f"float acc{shape} = {{}};")
        if self.by_group:
            self.out(f"float part{shape} = {{}};")
        self.out(f"u32 next[{plan.depth}][{plan.rows}][{self.layout.words}];")
        if self.by_group:
            self.out(f"u32 scale[{plan.depth}][{plan.rows}][{self._scale_words}];")
        if plan.zero_points:
            self.out(f"u32 zero[{plan.depth}][{plan.rows}][{self.groups_of_chunk}];")

    @property
    def _scale_words(self) -> int:
        return self.groups_of_chunk * (2 if self.plan.scale_dtype == "float32" else 1)

    # Streaming ------------------------------------------------------------------------------------------------------

    def _load_ahead(self) -> None:
        for d in range(self.plan.depth):
            self.out(f"if (first + {d} < last) {{")
            self._load(d, f"first + {d}")
            self.out("}")

    def _load(self, d: int, chunk: str) -> None:
        """Load a chunk's words, scales and zero points into place d."""
        layout, plan = self.layout, self.plan
        vectors = layout.words // layout.vector
        for r in range(plan.rows):
            start = f"weights + ((tile[{r}] * {layout.chunks} + {chunk}) * {vectors * 32} + lane) * {layout.vector}"
            for v in range(vectors):
                self._words(f"next[{d}][{r}]", v * layout.vector, layout.vector, f"{start} + {v * 32 * layout.vector}", "stream")
            if not self.by_group:
                if plan.zero_points:
                    self.out(f"zero[{d}][{r}][0] = go_load_u16(zeros + tile[{r}] * 8 + g);")
                continue
            group = f"({chunk}) * {self.groups_of_chunk}" if self.chunks_of_group == 1 else f"({chunk}) / {self.chunks_of_group}"
            for j in range(self.groups_of_chunk):
                at = f"(tile[{r}] * {plan.groups} + {group} + {j}) * 8 + g"
                if plan.scale_dtype == "float32":
                    self._words(f"scale[{d}][{r}]", 2 * j, 2, f"scales + ({at}) * 2", "load")
                else:
                    self.out(f"scale[{d}][{r}][{j}] = go_load1(scales + {at});")
                if plan.zero_points:
                    self.out(f"zero[{d}][{r}][{j}] = go_load_u16(zeros + {at});")

    def _words(self, target: str, first: int, count: int, source: str, how: str) -> None:
        if count == 1:
            self.out(f"{target}[{first}] = go_{how}1({source});")
            return
        parts = " ".join(f"{target}[{first + i}] = v.{'xyzw'[i]};" for i in range(count))
        self.out(f"{{ u32x{count} v = go_{how}{count}({source}); {parts} }}")

    def _loop(self) -> None:
        plan = self.plan
        self.out(f"for (int base = first; base < last; base += {plan.depth}) {{")
        for d in range(plan.depth):
            chunk = f"base + {d}"
            guard = d > 0 and not self._even
            if guard:
                self.out(f"if ({chunk} < last) {{")
            else:
                self.out("{")
            self._chunk(d, chunk)
            self.out("}")
        self.out("}")

    @property
    def _even(self) -> bool:
        """Whether every slice is a whole number of rounds of the loop."""
        chunks = self.units // self.plan.slices * (self.layout.unit // self.layout.chunk)
        return self.units % self.plan.slices == 0 and chunks % self.plan.depth == 0

    # One chunk ------------------------------------------------------------------------------------------------------

    def _chunk(self, d: int, chunk: str) -> None:
        plan, layout = self.plan, self.layout
        self._copy(d)
        self.out(f"if ({chunk} + {plan.depth} < last) {{")
        self._load(d, f"{chunk} + {plan.depth}")
        self.out("}")
        for j in range(self.groups_of_chunk):
            steps = layout.steps // self.groups_of_chunk
            if j == 0 or plan.zero_points:
                self._offsets(j)
            for s in range(steps * j, steps * (j + 1)):
                if s * 16 % layout.span == 0:
                    self._read_x(chunk, s)
                self._step(s)
            if self.by_group:
                self._end_of_group(chunk, j)

    def _copy(self, d: int) -> None:
        """Take what was loaded into names of its own, so that the next load may come."""
        for r in range(self.plan.rows):
            for i in range(self.layout.words):
                self.out(f"const u32 w{r}_{i} = next[{d}][{r}][{i}];")
                self.out(*(f"const u32 w{r}_{i}_{shift} = w{r}_{i} >> {shift};" for shift in self.recipe.shifts))
            if self.by_group:
                self.out(*(f"const u32 s{r}_{i} = scale[{d}][{r}][{i}];" for i in range(self._scale_words)))
            if self.plan.zero_points:
                self.out(*(f"const u32 z{r}_{j} = zero[{d}][{r}][{j}];" for j in range(self.groups_of_chunk)))

    def _offsets(self, j: int) -> None:
        """Name what takes magic and zero point off: `o{row of the tile}_{half}_{place}`."""
        kind = "float" if self.recipe.wide else "u32"
        if not self.plan.zero_points:
            return
        for r in range(self.plan.rows):
            for half in (0, 1):
                code = f"z{r}_{j}" if half == 0 else f"(z{r}_{j} >> 8)"
                for place, text in self.recipe.zeros(code).items():
                    self.out(f"const {kind} o{r}_{half}_{place}_{j} = {text};")
        self._group = j

    def _offset(self, r: int, half: int) -> dict[int, str]:
        if not self.plan.zero_points:
            return self.recipe.middle()
        return {place: f"o{r}_{half}_{place}_{self._group}" for place in self.recipe.places}

    def _read_x(self, chunk: str, step: int) -> None:
        """Read this lane's inputs of a span, for each column: `b{column}_{step}[2]`."""
        plan, layout = self.plan, self.layout
        quarter = layout.span // 4
        steps = layout.span // 16
        start = f"k{step}"
        self.out(f"const int {start} = ({chunk}) * {layout.chunk} + {step * 16} + {quarter} * t;")
        for c in range(plan.columns):
            self.out(f"u32 b{c}_{step}[{2 * steps}] = {{}};")
            token = f"{8 * c} + g"
            self.out(f"if ({token} < tokens) {{")
            row = f"x + (u64)({token}) * {plan.k} + {start}"
            self._read_row(f"b{c}_{step}", row, start, quarter)
            self.out("}")

    def _read_row(self, target: str, row: str, start: str, count: int) -> None:
        """Read `count` halves, by the widest loads that all rows allow, and nothing beyond the row."""
        k, padded = self.plan.k, self.layout.padded_k
        width = next(width for width in (8, 4, 2, 1) if k % width == 0 and width <= count)
        for first in range(0, count, width):
            words = width // 2
            source = f"(const u32*)({row} + {first})" if width > 1 else f"{row} + {first}"
            guard = f"if ({start} + {first} < {k}) " if padded != k else ""
            if width == 1:
                self.out(f"{guard}{target}[{first // 2}] |= go_load_u16({source}) << {16 * (first % 2)};")
            elif words == 1:
                self.out(f"{guard}{target}[{first // 2}] = go_load1({source});")
            else:
                parts = " ".join(f"{target}[{first // 2 + i}] = v.{'xyzw'[i]};" for i in range(words))
                self.out(f"{guard}{{ u32x{words} v = go_load{words}({source}); {parts} }}")

    def _step(self, step: int) -> None:
        """Multiply 16 inputs."""
        plan, letter = self.plan, self.recipe.letter
        span_step = step * 16 // self.layout.span * (self.layout.span // 16)
        for r in range(plan.rows):

            def word(i: int, shift: int, r: int = r) -> str:
                return f"w{r}_{i}_{shift}" if shift else f"w{r}_{i}"

            registers = [self.recipe.register(4 * step + i, word, self._offset(r, i % 2)) for i in range(4)]
            self.out(f"const u32 a{r}_{step}[4] = {{{', '.join(registers)}}};")
            for c in range(plan.columns):
                b = f"b{c}_{span_step}"
                at = 2 * (step - span_step)
                self.out(f"go_mma_{letter}({self.sums}[{r}][{c}], a{r}_{step}, {b}[{at}], {b}[{at + 1}]);")

    def _end_of_group(self, chunk: str, j: int) -> None:
        several = self.chunks_of_group > 1
        if several:
            self.out(f"if (({chunk}) % {self.chunks_of_group} == {self.chunks_of_group - 1}) {{")
        for r in range(self.plan.rows):
            if self.plan.scale_dtype == "float32":
                low, high = f"go_float(s{r}_{2 * j})", f"go_float(s{r}_{2 * j + 1})"
            else:
                low, high = f"go_of_h(s{r}_{j} & 0xffffu)", f"go_of_h(s{r}_{j} >> 16)"
            self.out("{", f"const float low = {low}, high = {high};")
            self.out("GO_UNROLL", f"for (int c = 0; c < {self.plan.columns}; c++) {{", "GO_UNROLL", "for (int i = 0; i < 4; i++) {")
            self.out(f"acc[{r}][c][i] = go_fma(part[{r}][c][i], i < 2 ? low : high, acc[{r}][c][i]);")
            self.out(f"part[{r}][c][i] = 0.0f;", "}", "}", "}")
        if several:
            self.out("}")

    # Adding up ------------------------------------------------------------------------------------------------------

    def _each(self, statement: str) -> None:
        """Write a statement for all sums of a lane, numbered by e."""
        plan = self.plan
        self.out("GO_UNROLL", f"for (int e = 0; e < {plan.fragment}; e++) {{")
        self.out(f"float& sum = acc[e / {4 * plan.columns}][e / 4 % {plan.columns}][e % 4];", statement, "}")

    def _add_warps(self) -> None:
        plan = self.plan
        size = (plan.k_warps - 1) * plan.row_warps * plan.fragment * 32
        self.out(f"GO_SHARED(float, slices, {size});")
        self.out("if (k_warp > 0) {")
        at = f"((({{}}) * {plan.row_warps} + row_warp) * {plan.fragment} + e) * 32 + lane"
        self._each(f"GO_PUT(slices, {at.format('k_warp - 1')}, sum);")
        self.out("}", "GO_SYNC();", "if (k_warp == 0) {")
        self.out(f"for (int other = 0; other < {plan.k_warps - 1}; other++) {{")
        self._each(f"sum = go_add(sum, GO_GET(slices, {at.format('other')}));")
        self.out("}", "}")

    def _add_blocks(self) -> None:
        plan = self.plan
        at = (
            f"((((u64){{}} * {plan.blocks} + go_block()) * {plan.row_warps} + row_warp) * {plan.fragment} + e) * 32 + lane"
        )
        self.out("GO_SHARED(u32, ticket, 4);", "if (k_warp == 0) {")
        self._each(f"go_store1(partial + {at.format('go_block_y()')}, go_bits(sum));")
        self.out("}", "GO_SYNC();", "if (go_thread() == 0) {", "GO_PUT(ticket, 0, go_ticket(tickets + go_block()));")
        self.out("}", "GO_SYNC();", f"if (GO_GET(ticket, 0) != {plan.k_blocks - 1}) return;")
        self.out("if (go_thread() == 0) go_store1(tickets + go_block(), 0);  // as the next launch finds it")
        self.out("if (k_warp == 0) {")
        self._each("sum = 0.0f;")
        self.out(f"for (int other = 0; other < {plan.k_blocks}; other++) {{")
        self._each(f"sum = go_add(sum, go_float(go_load_fresh(partial + {at.format('other')})));")
        self.out("}", "}")

    # The end --------------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        plan, letter = self.plan, self.recipe.letter
        self.out("if (k_warp > 0) return;")
        if not self.by_group:
            self._scale_rows()
        halves = (0,) if plan.paired else (0, 1)
        self.out("GO_UNROLL", f"for (int r = 0; r < {plan.rows}; r++) {{")
        for half in halves:
            n = "(tile0 + r) * 8 + g" if plan.paired else f"(tile0 + r) * {TILE} + g + {8 * half}"
            self.out(f"if ((tile0 + r) < {self.layout.tiles} && {n} < {plan.outputs}) {{", f"const int n = {n};")
            for name in plan.inputs:
                if name.startswith("bias"):
                    self.out(f"const float v_{name} = go_of_{letter}(go_load_u16({name} + n));")
            self.out("GO_UNROLL", f"for (int c = 0; c < {plan.columns}; c++) {{", "GO_UNROLL", "for (int i = 0; i < 2; i++) {")
            self.out("const int token = 8 * c + 2 * t + i;", "if (token < tokens) {")
            self.out(f"const u64 at = (u64)token * {plan.outputs} + n;")
            leaves = {"acc": f"acc[r][c][{2 * half} + i]", "acc2": "acc[r][c][2 + i]"}
            for name in plan.inputs:
                vector = name.startswith("bias")
                leaves[name] = f"v_{name}" if vector else f"go_of_{letter}(go_load_u16({name} + at))"
            value = emitted(plan.epilogue, leaves, plan.dtype)
            self.out(f"go_store_u16(y + at, go_to_{letter}({value}));", "}", "}", "}", "}")
        self.out("}")

    def _scale_rows(self) -> None:
        """Scale the sums where a row has one scale."""
        plan = self.plan
        for r in range(plan.rows):
            if plan.scale_dtype == "float32":
                self.out(f"const u32x2 rs{r} = go_load2(scales + (tile[{r}] * 8 + g) * 2);")
                low, high = f"go_float(rs{r}.x)", f"go_float(rs{r}.y)"
            else:
                self.out(f"const u32 rs{r} = go_load1(scales + tile[{r}] * 8 + g);")
                low, high = f"go_of_h(rs{r} & 0xffffu)", f"go_of_h(rs{r} >> 16)"
            self.out("GO_UNROLL", f"for (int c = 0; c < {plan.columns}; c++) {{", "GO_UNROLL", "for (int i = 0; i < 4; i++) {")
            self.out(f"acc[{r}][c][i] = go_mul(acc[{r}][c][i], i < 2 ? {low} : {high});", "}", "}")
