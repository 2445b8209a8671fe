"""The kernel of `LinearPlan`: few tokens times quantized weights, on tensor cores with the weights as operand A.

Nothing is shared while the inputs go by, so nothing waits: each lane streams its words of the layout into registers,
`depth` chunks ahead, turns codes into halves (`weights.py`), reads its part of x from the cache and multiplies. Sums of
a group stay unscaled in float32, where products of codes and halves are nearly exact; at its end they are scaled and
added to the sums of the slice. See `products.py` for who computes what.
"""

from __future__ import annotations

from typing import ClassVar

from graphopt.backends.cuda.emit.kernel import Parameter
from graphopt.backends.cuda.emit.products import Products, workspace_parameters
from graphopt.backends.cuda.emit.weights import Recipe
from graphopt.backends.cuda.plan import LinearPlan


def linear(plan: LinearPlan) -> tuple[list[Parameter], str]:
    """Return the parameters and the body."""
    weights = [Parameter("weights", "u32"), Parameter("scales", "u32")]
    zeros = [Parameter("zeros", "u16")] if plan.zero_points else []
    return [*weights, *zeros, Parameter("x", "u16"), *workspace_parameters(plan)], _Body(plan).written()


class _Body(Products[LinearPlan]):
    kind: ClassVar[str] = "float"

    def __init__(self, plan: LinearPlan) -> None:
        super().__init__(plan)
        self.recipe = Recipe(plan.bits, self.layout.chunk, plan.dtype, plan.zero_points)
        self.by_group = plan.group > 0
        # Chunks that share a scale, or groups inside a chunk.
        self.chunks_of_group = max(plan.group // self.layout.chunk, 1)
        self.groups_of_chunk = max(self.layout.chunk // plan.group, 1) if self.by_group else 1
        self.group = 0  # of the chunk, whose zero points are at hand

    def _sources(self) -> list[tuple[str, int]]:
        plan, layout = self.plan, self.layout
        wide = 2 if plan.scale_dtype == "float32" else 1
        pointers = [(f"x{c}", layout.chunk) for c in range(plan.columns)]
        for r in range(plan.rows):
            words = f"((u64)tile[{r}] * {layout.chunks * layout.words // layout.vector * 32} + lane) * {layout.vector}"
            scales = f"((u64)tile[{r}] * {plan.groups * 8} + g)"
            self.out(f"const u32* w{r} = weights + {words};")
            self.out(f"const u32* s{r} = scales + {scales} * {wide};")
            pointers.append((f"w{r}", layout.words * 32))
            if plan.zero_points:
                self.out(f"const u16* z{r} = zeros + {scales};")
            if self.by_group and self.chunks_of_group == 1:
                pointers.append((f"s{r}", self.groups_of_chunk * 8 * wide))
                if plan.zero_points:
                    pointers.append((f"z{r}", self.groups_of_chunk * 8))
        self._rows_of_x("u16", layout.span // 4)
        return pointers

    def _buffers(self) -> None:
        plan = self.plan
        if self.by_group:
            self.out(f"float part[{plan.rows}][{plan.columns}][4] = {{}};")
        self.out(f"u32 next[{plan.depth}][{plan.rows}][{self.layout.words}];")
        if self.by_group:
            self.out(f"u32 scale[{plan.depth}][{plan.rows}][{self._scale_words}];")
        if plan.zero_points:
            self.out(f"u32 zero[{plan.depth}][{plan.rows}][{self.groups_of_chunk}];")

    @property
    def _scale_words(self) -> int:
        return self.groups_of_chunk * (2 if self.plan.scale_dtype == "float32" else 1)

    # Streaming ------------------------------------------------------------------------------------------------------

    def _load(self, d: int, ahead: int) -> None:
        layout, plan = self.layout, self.plan
        for r in range(plan.rows):
            for v in range(0, layout.words, layout.vector):
                self._words(f"next[{d}][{r}]", v, layout.vector, f"w{r} + {(ahead * layout.words + v) * 32}", "stream")
            if not self.by_group:
                if plan.zero_points:
                    self.out(f"zero[{d}][{r}][0] = go_load_u16(z{r});")
                continue
            for j in range(self.groups_of_chunk):
                at = str((ahead * self.groups_of_chunk + j) * 8)
                if self.chunks_of_group > 1:
                    at = f"(base + {ahead}) / {self.chunks_of_group} * 8"
                if plan.scale_dtype == "float32":
                    self._words(f"scale[{d}][{r}]", 2 * j, 2, f"s{r} + {at} * 2", "load")
                else:
                    self.out(f"scale[{d}][{r}][{j}] = go_load1(s{r} + {at});")
                if plan.zero_points:
                    self.out(f"zero[{d}][{r}][{j}] = go_load_u16(z{r} + {at});")

    # One chunk ------------------------------------------------------------------------------------------------------

    def _chunk(self, d: int) -> None:
        plan, layout = self.plan, self.layout
        self._copy(d)
        self._load_next(d)
        for j in range(self.groups_of_chunk):
            steps = layout.steps // self.groups_of_chunk
            if j == 0 or plan.zero_points:
                self._offsets(j)
            for s in range(steps * j, steps * (j + 1)):
                if s * 16 % layout.span == 0:
                    self._read_x(d, s)
                self._step(s)
            if self.by_group:
                self._end_of_group(d, j)

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
        self.group = j

    def _offset(self, r: int, half: int) -> dict[int, str]:
        if not self.plan.zero_points:
            return self.recipe.middle()
        return {place: f"o{r}_{half}_{place}_{self.group}" for place in self.recipe.places}

    def _read_x(self, d: int, step: int) -> None:
        """Read this lane's inputs of a span, for each column: `b{column}_{step}`."""
        ahead, quarter = d * self.layout.chunk + step * 16, self.layout.span // 4
        for c in range(self.plan.columns):
            start = f"base * {self.layout.chunk} + {ahead} + {quarter} * t"
            self._read_row(f"b{c}_{step}", f"x{c} + {ahead}", start, quarter, 2)

    def _step(self, step: int) -> None:
        """Multiply 16 inputs."""
        plan, sums = self.plan, "part" if self.by_group else "acc"
        span_step = step * 16 // self.layout.span * (self.layout.span // 16)
        for r in range(plan.rows):

            def word(i: int, shift: int, r: int = r) -> str:
                return f"w{r}_{i}_{shift}" if shift else f"w{r}_{i}"

            registers = [self.recipe.register(4 * step + i, word, self._offset(r, i % 2)) for i in range(4)]
            self.out(f"const u32 a{r}_{step}[4] = {{{', '.join(registers)}}};")
            for c in range(plan.columns):
                b = f"b{c}_{span_step}"
                at = 2 * (step - span_step)
                self.out(f"go_mma_{self.letter}({sums}[{r}][{c}], a{r}_{step}, {b}[{at}], {b}[{at + 1}]);")

    def _end_of_group(self, d: int, j: int) -> None:
        several = self.chunks_of_group > 1
        if several:
            self.out(f"if ((base + {d}) % {self.chunks_of_group} == {self.chunks_of_group - 1}) {{")
        for r in range(self.plan.rows):
            if self.plan.scale_dtype == "float32":
                low, high = f"go_float(s{r}_{2 * j})", f"go_float(s{r}_{2 * j + 1})"
            else:
                low, high = f"go_of_h(s{r}_{j} & 0xffffu)", f"go_of_h(s{r}_{j} >> 16)"
            self.out("{", f"const float low = {low}, high = {high};")
            self.out(
                "GO_UNROLL",
                f"for (int c = 0; c < {self.plan.columns}; c++) {{",
                "GO_UNROLL",
                "for (int i = 0; i < 4; i++) {",
            )
            self.out(f"acc[{r}][c][i] = go_fma(part[{r}][c][i], i < 2 ? low : high, acc[{r}][c][i]);")
            self.out(f"part[{r}][c][i] = 0.0f;", "}", "}", "}")
        if several:
            self.out("}")

    # The end --------------------------------------------------------------------------------------------------------

    def _sum(self, i: str, half: int) -> str:
        return f"acc[r][c][{2 * half} + {i}]"

    def _before_outputs(self) -> None:
        """Scale the sums where a row has one scale."""
        if self.by_group:
            return
        plan = self.plan
        for r in range(plan.rows):
            if plan.scale_dtype == "float32":
                self.out(f"const u32x2 rs{r} = go_load2(s{r});")
                low, high = f"go_float(rs{r}.x)", f"go_float(rs{r}.y)"
            else:
                self.out(f"const u32 rs{r} = go_load1(s{r});")
                low, high = f"go_of_h(rs{r} & 0xffffu)", f"go_of_h(rs{r} >> 16)"
            self.out(
                "GO_UNROLL",
                f"for (int c = 0; c < {plan.columns}; c++) {{",
                "GO_UNROLL",
                "for (int i = 0; i < 4; i++) {",
            )
            self.out(f"acc[{r}][c][i] = go_mul(acc[{r}][c][i], i < 2 ? {low} : {high});", "}", "}")
