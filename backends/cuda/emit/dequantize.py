"""The kernel of `DequantizePlan`: the layout's words back to a matrix of halves, for products of many tokens.

A warp turns one chunk of one tile. A lane holds runs of neighbouring inputs of two rows, which it stores together.
"""

from __future__ import annotations

from graphopt.backends.cuda.emit.kernel import Parameter, Writer
from graphopt.backends.cuda.emit.weights import Recipe
from graphopt.backends.cuda.plan import DequantizePlan


def dequantize(plan: DequantizePlan) -> tuple[list[Parameter], str]:
    """Return the parameters and the body."""
    layout, out = plan.layout, Writer()
    recipe = Recipe(plan.bits, layout.chunk, plan.dtype, plan.zero_points)
    parameters = [Parameter("weights", "u32"), Parameter("scales", "u32")]
    if plan.zero_points:
        parameters.append(Parameter("zeros", "u16"))
    parameters.append(Parameter("y", "u16", written=True))

    out(
        "const int lane = go_thread() % 32, g = lane / 4, t = lane % 4;",
        f"const int place = go_block() * {plan.threads // 32} + go_thread() / 32;",
        f"if (place >= {layout.tiles * layout.chunks}) return;",
        f"const int tile = place / {layout.chunks}, chunk = place % {layout.chunks};",
        f"u32 w[{layout.words}];",
    )
    for v in range(0, layout.words, layout.vector):
        first = f"place * {layout.words // layout.vector * 32} + {v // layout.vector * 32}"
        at = f"weights + ({first} + lane) * {layout.vector}"
        if layout.vector == 1:
            out(f"w[{v}] = go_stream1({at});")
            continue
        parts = " ".join(f"w[{v + i}] = v.{'xyzw'[i]};" for i in range(layout.vector))
        out(f"{{ u32x{layout.vector} v = go_stream{layout.vector}({at}); {parts} }}")
    groups = max(layout.chunk // plan.group, 1) if plan.group else 1
    for j in range(groups):
        _group(plan, recipe, out, j, groups)
    return parameters, str(out)


def _group(plan: DequantizePlan, recipe: Recipe, out: Writer, j: int, groups: int) -> None:
    """Write the part of a chunk that shares a scale."""
    layout = plan.layout
    inputs_of_group = layout.padded_k // plan.groups
    group = f"(chunk * {layout.chunk} + {j * layout.chunk // groups}) / {inputs_of_group}"
    out("{", f"const int at = (tile * {plan.groups} + {group}) * 8 + g;")
    if plan.scale_dtype == "float32":
        out("const u32x2 s = go_load2(scales + at * 2);", "const float scale[2] = {go_float(s.x), go_float(s.y)};")
    else:
        out("const u32 s = go_load1(scales + at);", "const float scale[2] = {go_of_h(s & 0xffffu), go_of_h(s >> 16)};")
    if plan.zero_points:
        out("const u32 zero = go_load_u16(zeros + at);")
    kind = "float" if recipe.wide else "u32"
    steps = layout.steps // groups
    for half in (0, 1):
        offsets = recipe.zeros("zero" if half == 0 else "(zero >> 8)") if plan.zero_points else recipe.middle()
        out(
            "{",
            f"const int n = {plan.row(f'tile * 16 + g + {8 * half}')};",
            f"if (tile * 16 + g + {8 * half} < {plan.n}) {{",
        )
        named = {}
        for place, text in offsets.items():
            out(f"const {kind} o{place} = {text};")
            named[place] = f"o{place}"
        for first in range(steps * j, steps * (j + 1), layout.span // 16):
            words = [
                recipe.register(
                    4 * step + 2 * h + half, lambda i, shift: f"(w[{i}] >> {shift})" if shift else f"w[{i}]", named
                )
                for step in range(first, first + layout.span // 16)
                for h in (0, 1)
            ]
            _store(plan, recipe.letter, out, words, first, half)
        out("}", "}")
    out("}")


def _store(plan: DequantizePlan, letter: str, out: Writer, words: list[str], first: int, half: int) -> None:
    """Scale and store a run of neighbouring inputs, given as words of two."""
    quarter = plan.layout.span // 4
    out("{", f"const int k = chunk * {plan.layout.chunk} + {16 * first} + {quarter} * t;")
    out(f"const u32 code[{len(words)}] = {{{', '.join(words)}}};", f"float v[{quarter}];")
    out("GO_UNROLL", f"for (int i = 0; i < {quarter}; i++) {{")
    out(f"v[i] = go_mul(go_of_{letter}(code[i / 2] >> 16 * (i % 2) & 0xffffu), scale[{half}]);", "}")
    at = f"y + (u64)n * {plan.k} + k"
    if plan.k % quarter == 0:
        made = [f"go_to_{letter}2(v[{i}], v[{i + 1}])" for i in range(0, quarter, 2)]
        out(f"if (k < {plan.k}) go_store{len(made)}((u32*)({at}), u32x{len(made)}{{{', '.join(made)}}});")
    else:
        out(*(f"if (k + {i} < {plan.k}) go_store_u16({at} + {i}, go_to_{letter}(v[{i}]));" for i in range(quarter)))
    out("}")
