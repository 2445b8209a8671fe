"""The kernel of `Int8Plan`: bytes times bytes on tensor cores, whole numbers until the epilogue.

As in `linear.py` nothing is shared while the inputs go by; words of the layout are operand A as they are. Bytes of x
are signed for the tensor cores: unsigned ones lose 128, and so do their zero points. Whole numbers do not care in which
order they are added, so every plan gives the same bits.
"""

from __future__ import annotations

from typing import ClassVar

from graphopt.backends.cuda.emit.kernel import Parameter
from graphopt.backends.cuda.emit.products import Products, workspace_parameters
from graphopt.backends.cuda.plan import Int8Plan


def int8(plan: Int8Plan) -> tuple[list[Parameter], str]:
    """Return the parameters and the body."""
    found = [Parameter("weights", "u32"), Parameter("scales", "u32"), Parameter("x", "u8"), Parameter("x_scale", "u16")]
    if plan.zero_points:
        found += [Parameter("x_zero_point", "u8"), Parameter("row_sums", "u32")]
    return [*found, *workspace_parameters(plan)], _Body(plan).written()


class _Body(Products[Int8Plan]):
    kind: ClassVar[str] = "int"

    def _sources(self) -> list[tuple[str, int]]:
        plan = self.plan
        for r in range(plan.rows):
            self.out(f"const u32* w{r} = weights + ((u64)tile[{r}] * {self.layout.chunks * 64} + lane) * 4;")
        self._rows_of_x("u8", 16)
        return [*((f"w{r}", 256) for r in range(plan.rows)), *((f"x{c}", 64) for c in range(plan.columns))]

    def _buffers(self) -> None:
        self.out(f"u32 next[{self.plan.depth}][{self.plan.rows}][8];")

    def _load(self, d: int, ahead: int) -> None:
        for r in range(self.plan.rows):
            for step in range(2):
                self._words(f"next[{d}][{r}]", 4 * step, 4, f"w{r} + {ahead * 256 + step * 128}", "stream")

    def _chunk(self, d: int) -> None:
        plan = self.plan
        for r in range(plan.rows):
            for step in range(2):
                words = ", ".join(f"next[{d}][{r}][{4 * step + i}]" for i in range(4))
                self.out(f"const u32 a{r}_{step}[4] = {{{words}}};")
        self._load_next(d)
        for c in range(plan.columns):
            self._read_row(f"b{c}", f"x{c} + {64 * d}", f"(base + {d}) * 64 + 16 * t", 16, 1)
            if not plan.signed:
                self.out(*(f"b{c}[{i}] ^= 0x80808080u;" for i in range(4)))
            for step in range(2):
                for r in range(plan.rows):
                    self.out(f"go_mma_s8(acc[{r}][{c}], a{r}_{step}, b{c}[{2 * step}], b{c}[{2 * step + 1}]);")

    def _before_outputs(self) -> None:
        pass

    def _of_output(self, half: int) -> list[str]:
        lines = ["const float output_scale = go_float(go_load1(scales + n));", *super()._of_output(half)]
        return [*lines, "const int row_sum = (int)go_load1(row_sums + n);"] if self.plan.zero_points else lines

    def _of_token(self) -> list[str]:
        at = "token" if self.plan.by_token else "0"
        lines = [f"const float token_scale = go_of_{self.letter}(go_load_u16(x_scale + {at}));"]
        if self.plan.zero_points:
            zero = f"go_load_u8(x_zero_point + {at})"
            lines.append(f"const int zero = {f'(int)(s8){zero}' if self.plan.signed else f'(int){zero} - 128'};")
        return lines

    def _sum(self, i: str, half: int) -> str:
        whole = f"acc[r][c][{2 * half} + {i}]" + (" - zero * row_sum" if self.plan.zero_points else "")
        return f"go_mul(go_mul(go_of_int({whole}), token_scale), output_scale)"
