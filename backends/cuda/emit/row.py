"""The kernel of `RowPlan`: a block computes a row, which stays in registers from its load to its store.

A thread holds `repeats` runs of `width` neighbouring elements. Sums and maxima over the row go through shuffles and one
word a warp. A rotation is butterflies along each binary digit of an element's place: along digits that a thread holds
they are additions of its own registers; then the block exchanges its elements by shared memory so that every thread
holds other digits (`RowPlan.stages`). One word in 33 is left free there, so that no two lanes meet in a bank.
"""

from __future__ import annotations

import math

from graphopt.backends.cuda.emit.kernel import Parameter, Writer
from graphopt.backends.cuda.expressions import emitted, literal, names
from graphopt.backends.cuda.plan import RowPlan, is_vector


def row(plan: RowPlan) -> tuple[list[Parameter], str]:
    """Return the parameters and the body."""
    return _parameters(plan), str(_Body(plan).written())


def _parameters(plan: RowPlan) -> list[Parameter]:
    found = [Parameter(name, "u16") for name in plan.inputs]
    if plan.signs:
        found.append(Parameter("signs", "u8"))
    if plan.keep:
        found.append(Parameter("kept", "u16", written=True))
    if plan.output == "half":
        found.append(Parameter("y", "u16", written=True))
    else:
        found += [Parameter("codes", "u8", written=True), Parameter("scale", "u16", written=True)]
    if plan.zero_points:
        found.append(Parameter("zero_point", "u8", written=True))
    return found


class _Body:
    def __init__(self, plan: RowPlan) -> None:
        self.plan, self.out = plan, Writer()
        self.letter = "h" if plan.dtype == "float16" else "b"
        self.held = plan.stages[0] if plan.block else ()  # digits that a thread holds by now
        self.shrink = 1 / math.sqrt(plan.block or 1)  # what makes a rotation of butterflies

    def written(self) -> Writer:
        plan = self.plan
        self._places()
        self._load()
        if plan.norm != "none":
            self._normalize()
        if plan.affine != "x":
            self._affine()
        if plan.block:
            self._rotate()
        if plan.output == "half":
            self._store()
        else:
            self._quantize()
        return self.out

    # Elements of a thread -------------------------------------------------------------------------------------------

    def _places(self) -> None:
        plan = self.plan
        self.out(
            "const int thread = go_thread(), lane = thread % 32, warp = thread / 32;",
            f"const u64 row = (u64)go_block() * {plan.n};",
            f"float x[{plan.repeats}][{plan.width}];",
        )
        if plan.block:
            each = plan.block // plan.per_thread
            self.out(f"const bool active = thread < {plan.workers};")
            self.out(f"const int inside = thread % {each}, origin = thread / {each} * {plan.block};")

    def _each(self, *lines: str, active: bool = True) -> None:
        """Write lines for every element `x[r][e]`, at place `at + e` of the row."""
        self._runs("GO_UNROLL", f"for (int e = 0; e < {self.plan.width}; e++) {{", *lines, "}", active=active)

    def _runs(self, *lines: str, active: bool = True) -> None:
        """Write lines for every run r of neighbours, which begins at place `at`; `active`: only where there is one."""
        plan = self.plan
        self.out("GO_UNROLL", f"for (int r = 0; r < {plan.repeats}; r++) {{")
        if plan.block:
            upper = " + ".join(f"(r >> {i} & 1) * {1 << digit}" for i, digit in enumerate(self.held[3:])) or "0"
            self.out(f"const int at = origin + {self._spread('inside', self.held)} + {upper};")
            guard = "active"
        else:
            self.out(f"const int at = (r * {plan.threads} + thread) * {plan.width};")
            guard = f"at < {plan.n}"
        if active:
            self.out(f"if ({guard}) {{")
        self.out(*lines)
        if active:
            self.out("}")
        self.out("}")

    def _spread(self, number: str, held: tuple[int, ...]) -> str:
        """Return the place whose digits other than `held` are those of `number`, in C."""
        others = [digit for digit in range(self.plan.bits) if digit not in held]
        runs: list[tuple[int, int, int]] = []  # digits of the number from i on, how many, where they go
        for i, digit in enumerate(others):
            if runs and digit == runs[-1][2] + runs[-1][1]:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, runs[-1][2])
            else:
                runs.append((i, 1, digit))
        parts = [f"({number} >> {i} & {(1 << count) - 1}) * {1 << digit}" for i, count, digit in runs]
        return " + ".join(parts) or "0"

    # Loading --------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        plan = self.plan
        self._each("x[r][e] = 0.0f;", active=False)
        read = [line for name in names(plan.prologue) for line in self._read(name)]
        value = emitted(plan.prologue, {name: f"{name}_f[e]" for name in names(plan.prologue)}, plan.dtype)
        body = ["GO_UNROLL", f"for (int e = 0; e < {plan.width}; e++) {{", f"x[r][e] = {value};", "}"]
        self._runs(*read, *body, *(self._halves("kept", "row + at", "x") if plan.keep else ()))

    def _read(self, name: str) -> list[str]:
        """Return lines that load a run of an input as floats, `{name}_f[e]`."""
        place = "at" if is_vector(name) else "row + at"
        width, letter = self.plan.width, self.letter
        if width == 1:
            return [f"const float {name}_f[1] = {{go_of_{letter}(go_load_u16({name} + {place}))}};"]
        words, source = width // 2, f"(const u32*)({name} + {place})"
        lines = [f"float {name}_f[{width}];"]
        if words == 1:
            return [*lines, f"go_of_{letter}2(go_load1({source}), {name}_f[0], {name}_f[1]);"]
        lines.append(f"const u32x{words} {name}_v = go_load{words}({source});")
        for i, part in enumerate("xyzw"[:words]):
            lines.append(f"go_of_{letter}2({name}_v.{part}, {name}_f[{2 * i}], {name}_f[{2 * i + 1}]);")
        return lines

    def _halves(self, target: str, place: str, value: str) -> list[str]:
        """Return lines that store a run of floats `value[r][…]` as halves."""
        width, store = self.plan.width, f"{target} + {place}"
        if width == 1:
            return [f"go_store_u16({store}, go_to_{self.letter}({value}[r][0]));"]
        words = [f"go_to_{self.letter}2({value}[r][{i}], {value}[r][{i + 1}])" for i in range(0, width, 2)]
        return [_store_words(store, words)]

    # Over the row ---------------------------------------------------------------------------------------------------

    def _over_row(self, name: str, kind: str, combine: str) -> None:
        """Combine `name` of all threads, in an order that does not depend on anything; `combine` of a and b."""
        plan = self.plan
        back, there = ("go_float({})", "go_bits({})") if kind == "float" else ("{}", "{}")
        self.out("GO_UNROLL", "for (int distance = 16; distance > 0; distance /= 2) {")
        self.out(f"const {kind} a = {name}, b = {back.format(f'go_shuffle_xor({there.format(name)}, distance)')};")
        self.out(f"{name} = {combine};", "}")
        if plan.warps == 1:
            return
        self.out(f"GO_SHARED({kind}, {name}_of, {plan.warps});", f"if (lane == 0) GO_PUT({name}_of, warp, {name});")
        self.out(
            "GO_SYNC();", f"{name} = GO_GET({name}_of, 0);", f"for (int other = 1; other < {plan.warps}; other++) {{"
        )
        self.out(f"const {kind} a = {name}, b = GO_GET({name}_of, other);", f"{name} = {combine};", "}")

    def _normalize(self) -> None:
        plan = self.plan
        count = literal(plan.n)
        if plan.norm == "layer":
            self.out("float total = 0.0f;")
            self._each("total = go_add(total, x[r][e]);")
            self._over_row("total", "float", "go_add(a, b)")
            self.out(f"const float mean = go_div(total, {count});")
            self._each("x[r][e] = go_sub(x[r][e], mean);")
        self.out("float squares = 0.0f;")
        self._each("squares = go_fma(x[r][e], x[r][e], squares);")
        self._over_row("squares", "float", "go_add(a, b)")
        root = f"go_sqrt(go_add(go_div(squares, {count}), {literal(plan.eps)}))"
        self.out(f"const float factor = go_div(1.0f, {root});")
        self._each("x[r][e] = go_mul(x[r][e], factor);")

    def _affine(self) -> None:
        plan = self.plan
        vectors = [name for name in names(plan.affine) if name != "x"]
        leaves = {"x": "x[r][e]", **{name: f"{name}_f[e]" for name in vectors}}
        body = f"x[r][e] = {emitted(plan.affine, leaves, plan.dtype)};"
        read = [line for name in vectors for line in self._read(name)]
        self._runs(*read, "GO_UNROLL", f"for (int e = 0; e < {plan.width}; e++) {{", body, "}")

    # Rotating -------------------------------------------------------------------------------------------------------

    def _rotate(self) -> None:
        plan = self.plan
        if plan.signs and not plan.transpose:
            self._flip()
        stages = plan.stages
        if len(stages) > 1:
            self.out(f"GO_SHARED(float, row_of, {plan.n + plan.n // 32});")
        turned: set[int] = set()
        for i, held in enumerate(stages):
            if i:
                self._exchange(stages[i - 1], held)
            for digit in held:
                if digit not in turned:
                    self._butterflies(held.index(digit))
            turned.update(held)
            self.held = held
        if plan.output == "half":  # else range and divisor tell it, once for all
            self._each(f"x[r][e] = go_mul(x[r][e], {literal(self.shrink)});", active=False)
        if plan.signs and plan.transpose:
            self._flip()

    def _flip(self) -> None:
        flip = "x[r][e] = go_float(go_bits(x[r][e]) ^ (minus << (31 - e) & 0x80000000u));"
        body = ["GO_UNROLL", "for (int e = 0; e < 8; e++) {", flip, "}"]
        self._runs("const u32 minus = go_load_u8(signs + at / 8);", *body)

    def _butterflies(self, i: int) -> None:
        """Add and subtract elements whose places among those of the thread differ in digit i."""
        step = 1 << i
        self.out("GO_UNROLL", f"for (int e = 0; e < {self.plan.per_thread}; e++) {{", f"if (e & {step}) continue;")
        self.out(f"float& low = x[e / 8][e % 8]; float& high = x[(e + {step}) / 8][e % 8 + {step % 8}];")
        self.out("const float a = low, b = high;", "low = go_add(a, b);", "high = go_sub(a, b);", "}")

    def _exchange(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        # No barrier before: a thread writes where it alone read in the exchange before.
        self._pass(before, "GO_PUT(row_of, start + {at}, x[{r}][{e}]);")
        self.out("GO_SYNC();")
        self._pass(after, "x[{r}][{e}] = GO_GET(row_of, start + {at});")

    def _pass(self, held: tuple[int, ...], line: str) -> None:
        self.out("if (active) {", f"const int place = origin + {self._spread('inside', held)};")
        self.out("const int start = place + place / 32;")
        for e in range(self.plan.per_thread):
            # Its digits are not those of `place`, so that both parts may be spaced out by themselves.
            own = sum((e >> i & 1) << digit for i, digit in enumerate(held))
            self.out(line.format(at=own + own // 32, r=e // 8, e=e % 8))
        self.out("}")

    # The end --------------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        self._runs(*self._halves("y", "row + at", "x"))

    def _quantize(self) -> None:
        """As `dynamic_scale` and `quantize` do: the range in float32, the scale rounded to halves, a true division.

        Rotated elements are still √block times too large: their range and divisor are so too.
        """
        plan, letter = self.plan, self.letter
        least, most = (-128, 127) if plan.output == "int8" else (0, 255)
        scaled = f"go_mul({{}}, {literal(self.shrink)})" if plan.block else "{}"
        if not plan.zero_points:
            self.out("u32 largest = 0u;")  # as bits, where NaN is larger than everything
            self._each("const u32 size = go_bits(go_abs(x[r][e]));", "largest = size > largest ? size : largest;")
            self._over_row("largest", "u32", "a > b ? a : b")
            self.out(f"const float range = {scaled.format('go_div(go_float(largest), 127.0f)')};")
            # The smallest normal number is the smallest scale; a row of zeros has 1.
            self.out(
                "float step = range < go_float(0x00800000u) ? 1.0f : range;",
                "step = largest >= 0x7f800000u ? go_float(0x7fffffffu) : step;",
                f"step = go_of_{letter}(go_to_{letter}(step));",
            )
        else:
            self.out("float low = 0.0f, high = 0.0f;")
            self._each("low = go_min(low, x[r][e]);", "high = go_max(high, x[r][e]);")
            self._over_row("low", "float", "go_min(a, b)")
            self._over_row("high", "float", "go_max(a, b)")
            range_of = scaled.format("go_div(go_sub(high, low), 255.0f)")
            self.out(f"float step = go_of_{letter}(go_to_{letter}({range_of}));", "step = step == 0.0f ? 1.0f : step;")
        self.out(f"const float divisor = {f'go_div(step, {literal(self.shrink)})' if plan.block else 'step'};")
        if plan.zero_points:
            start = f"go_sub({literal(least)}, go_div(low, divisor))"
            self.out(f"const int zero = go_clamp(go_to_int({start}), {least}, {most});")
        self.out("const float inverse = go_div(1.0f, divisor);")
        steps = "go_div_by(x[r][{}], divisor, inverse)"
        code = f"(u32)go_to_s8({steps}) & 0xffu"
        if plan.zero_points:  # cut first: no overflow where the scale is too small for x
            code = f"(u32)go_clamp(go_clamp(go_to_int({steps}), -512, 512) + zero, {least}, {most}) & 0xffu"
        self._runs(*self._code_words(code))
        scale = f"go_store_u16(scale + go_block(), go_to_{letter}(step));"
        self.out("if (thread == 0) {", scale)
        if plan.zero_points:
            self.out("go_store_u8(zero_point + go_block(), (u32)zero);")
        self.out("}")

    def _code_words(self, code: str) -> list[str]:
        """Return lines that store a run of codes."""
        width = self.plan.width
        each = [f"({code.format(e)})" for e in range(width)]
        if width == 1:
            return [f"go_store_u8(codes + row + at, {each[0]});"]
        if width == 2:
            return [f"go_store_u16((u16*)(codes + row + at), {each[0]} | {each[1]} << 8);"]
        words = [" | ".join(f"{each[i + j]} << {8 * j}" for j in range(4)) for i in range(0, width, 4)]
        return [_store_words("codes + row + at", words)]


def _store_words(place: str, words: list[str]) -> str:
    if len(words) == 1:
        return f"go_store1((u32*)({place}), {words[0]});"
    return f"go_store{len(words)}((u32*)({place}), u32x{len(words)}{{{', '.join(words)}}});"
