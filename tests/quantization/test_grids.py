"""Every grid: encode against brute force, packing, storable scales, and the values the standards name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.analysis.cost import weight_bits
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.ir import dialect
from graphopt.quantization.grids import (
    CodebookGrid,
    FloatGrid,
    Grid,
    IntegerGrid,
    grid,
    integer_grid,
    known_grids,
)

SMALL = [form for form in known_grids().values() if form.bits <= 8]
NAMES = [form.name for form in SMALL]


def drawn_table(form: Grid, seed: int, rows: int = 0) -> Tensor | None:
    if not form.tabled:
        return None
    generator = torch.Generator().manual_seed(seed)
    shape = [rows, form.code_max + 1] if rows else [form.code_max + 1]
    return torch.randn(shape, generator=generator, dtype=torch.float64).sort(-1).values


def all_codes(form: Grid) -> Tensor:
    """Every code that encode can give."""
    codes = torch.arange(form.code_min, form.code_max + 1).to(form.storage)
    if isinstance(form, FloatGrid):  # patterns that are no number, and minus zero, have no use
        half, numbers = (form.code_max + 1) // 2, len(form.magnitudes)
        codes = torch.cat([codes[:numbers], codes[half + 1 : half + numbers]])
    return codes


@settings(max_examples=200)
@given(
    st.sampled_from(NAMES),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
def test_encode_gives_the_nearest_value(name: str, seed: int, dtype: torch.dtype, shifted: bool) -> None:
    form, generator = grid(name), torch.Generator().manual_seed(seed)
    table = drawn_table(form, seed)
    low, high = form.ends
    x = torch.empty(40, dtype=torch.float64).uniform_(1.4 * low - 0.5, 1.4 * high + 0.5, generator=generator)
    scale = torch.tensor(2.0 ** (seed % 5 - 2), dtype=torch.float64)
    zero = None
    if shifted and form.affine:
        zero = torch.tensor(form.code_min + seed % (form.code_max - form.code_min + 1)).to(form.storage)
    x = (x * scale).to(dtype)
    values = form.decode(form.encode(x, scale, zero, table), scale, zero, table)
    ladder = (form.ladder(table) - (0 if zero is None else int(zero))) * scale
    nearest = (ladder[:, None] - x.double()).abs().amin(0)
    # In float32 a midpoint of two doubles may fall to either side.
    torch.testing.assert_close((values - x.double()).abs(), nearest, rtol=1e-5, atol=1e-6 * float(scale))


@settings(max_examples=100)
@given(st.sampled_from(NAMES), st.integers(0, 2**31))
def test_encode_is_monotone_idempotent_and_within_half_a_step(name: str, seed: int) -> None:
    form, generator = grid(name), torch.Generator().manual_seed(seed)
    table = drawn_table(form, seed)
    ladder = form.ladder(table)
    x = torch.randn(64, generator=generator, dtype=torch.float64).sort().values * float(ladder.abs().max()) / 2
    one = torch.tensor(1.0, dtype=torch.float64)
    values = form.decode(form.encode(x, one, None, table), one, None, table)
    assert bool((values.diff() >= 0).all())
    assert torch.equal(form.decode(form.encode(values, one, None, table), one, None, table), values)
    inside = (x >= ladder[0]) & (x <= ladder[-1])
    widest = ladder.diff().max() if len(ladder) > 1 else 0
    assert bool(((values - x).abs()[inside] <= widest / 2 + 1e-12).all())


@pytest.mark.parametrize("form", SMALL, ids=NAMES)
def test_every_code_comes_back(form: Grid) -> None:
    table, codes = drawn_table(form, 3), all_codes(form)
    one = torch.tensor(1.0, dtype=torch.float64)
    values = form.decode(codes, one, None, table)
    assert torch.equal(form.encode(values, one, None, table), codes)
    torch.testing.assert_close(values.sort().values, form.ladder(table), rtol=0, atol=0)
    assert codes.dtype == form.storage


@settings(max_examples=80)
@given(st.sampled_from([*NAMES, "int16", "uint16"]), st.integers(0, 60), st.integers(0, 2**31))
def test_packing_is_bijective_and_takes_the_bits_it_says(name: str, count: int, seed: int) -> None:
    form = grid(name)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(form.code_min, form.code_max + 1, (count,), generator=generator).to(form.storage)
    packed = form.pack(codes)
    back = form.unpack(packed, count)
    assert back.dtype == form.storage
    assert back.to(torch.int64).tolist() == codes.to(torch.int64).tolist()
    assert form.packed_bits(count) <= 8 * packed.numel() + 1e-9
    assert 8 * packed.numel() - form.packed_bits(count) < 8


def test_five_ternary_codes_are_one_byte() -> None:
    assert grid("ternary").pack(torch.tensor([1, 1, 1, 1, 1], dtype=torch.int8)).tolist() == [242]
    assert grid("ternary").bits == pytest.approx(8 / 5)
    assert grid("ternary").ladder().tolist() == [-1, 0, 1]


def test_halves_go_to_the_even_pattern() -> None:
    """As in IEEE 754: 2.5 lies between 2 (mantissa 0) and 3 (mantissa 1) of e2m1."""
    one = torch.tensor(1.0)
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5, -5.0, 7.0, -0.0, -0.2])
    values = grid("e2m1").decode(grid("e2m1").encode(x, one), one)
    assert values.tolist() == [0, 1, 1, 2, 2, 4, 4, -2, -4, 6, 0, 0]


@pytest.mark.parametrize(
    ("name", "torch_type"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_eight_bit_floats_are_those_of_torch(name: str, torch_type: torch.dtype) -> None:
    form, one = grid(name), torch.tensor(1.0)
    x = torch.cat([torch.randn(4000) * 10 ** torch.empty(4000).uniform_(-6, 4), torch.tensor([0.0])])
    x = x.clamp(*form.ends)
    codes = form.encode(x, one)
    expected = x.to(torch_type)
    assert torch.equal(form.decode(codes, one), expected.float())
    patterns = expected.view(torch.uint8)
    patterns = torch.where(patterns == 128, torch.zeros_like(patterns), patterns)  # minus zero
    assert torch.equal(codes, patterns)


def test_values_the_standards_name() -> None:
    assert grid("e2m1").ladder()[7:].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert grid("e3m2").ends == (-28, 28)
    assert grid("e2m3").ends == (-7.5, 7.5)
    assert grid("e4m3").ends == (-448, 448)
    assert grid("e5m2").ends == (-57344, 57344)
    nf4 = grid("nf4").ladder().tolist()
    for index, value in {0: -1.0, 1: -0.6961928, 7: 0.0, 8: 0.0795803, 14: 0.7229568, 15: 1.0}.items():
        assert nf4[index] == pytest.approx(value, abs=1e-6)


@settings(max_examples=60)
@given(st.sampled_from([n for n in known_grids() if n.startswith("mx")]), st.floats(1e-30, 1e30))
def test_scales_of_mx_are_powers_of_two(name: str, scale: float) -> None:
    form = grid(name)
    stored = form.storable(torch.tensor([scale]))
    mantissa, _ = math.frexp(float(stored))
    assert mantissa == 0.5
    assert 2**-0.51 < float(stored) / scale < 2**0.51
    assert (form.block, form.scale_bits) == (32, 8)


def test_the_standards_scale_of_a_block() -> None:
    """floor(log2(largest)) less the exponent of the largest element: 2 for e2m1, 8 for e4m3."""
    largest = torch.tensor([1.0, 6.0, 7.9, 8.0, 0.3])
    assert grid("mxfp4").scale_for(largest).tolist() == [2.0**-2, 1, 1, 2, 2.0**-4]
    assert grid("mxfp8_e4m3").scale_for(largest).tolist() == [2.0**-8, 2.0**-6, 2.0**-6, 2.0**-5, 2.0**-10]
    assert grid("mxfp4").scale_for(torch.zeros(2)).tolist() == [1, 1]


def test_scales_of_nvfp4_are_small_floats_times_one_number() -> None:
    scales = torch.rand(6, 8) * 3
    scales[0, 0] = 1e-9  # far below what e4m3 reaches beside 3
    stored = grid("nvfp4").storable(scales)
    whole = scales.max() / 448
    ratios = stored / whole
    assert bool((torch.isclose(ratios[..., None], grid("e4m3").ladder().float(), rtol=1e-5).any(-1)).all())
    assert bool((stored > 0).all())
    assert ((stored - scales).abs() / scales)[scales > 0.1].max() < 2**-4
    assert grid("nvfp4").storable(torch.zeros(0)).shape == (0,)


def test_codebooks_read_a_row_for_each_channel() -> None:
    form = grid("codebook2")
    table = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [-8.0, -4.0, 4.0, 8.0]])
    x = torch.tensor([[0.4, 1.6, -9.0], [0.4, 1.6, -9.0]])
    codes = form.encode(x, torch.tensor(1.0), None, table)
    assert codes.tolist() == [[1, 3, 0], [2, 2, 0]]
    values = dialect.dequantize(codes, torch.tensor([1.0, 0.5]), None, table, 0, 0, "codebook2")
    assert values.tolist() == [[0, 2, -1], [2, 2, -4]]
    with pytest.raises(ValueError, match="a row for each"):
        dialect.dequantize(codes, torch.tensor(1.0), None, table[:1], 0, 0, "codebook2")
    with pytest.raises(GraphoptError, match=r"needs a table \[4\] or \[channels, 4\], not \[8\]"):
        form.encode(x, torch.tensor(1.0), None, torch.arange(8.0))
    with pytest.raises(GraphoptError, match="needs a table"):
        dialect.quantize(x, torch.tensor(1.0), None, 0, 0, "codebook2")


@pytest.mark.parametrize("rows", [0, 3])
def test_table_and_scale_gradients(rows: int) -> None:
    table = drawn_table(CodebookGrid(3), 0, rows)
    assert table is not None
    table.requires_grad_()
    scale = (torch.rand(3, 2, dtype=torch.float64) + 0.5).requires_grad_()
    codes = torch.randint(0, 8, (3, 6)).to(torch.uint8)

    def values(table: Tensor, scale: Tensor) -> Tensor:
        return dialect.dequantize(codes, scale, None, table, 1, 3, "codebook3")

    assert torch.autograd.gradcheck(values, (table, scale))


@pytest.mark.parametrize("name", ["e2m1", "nf4", "mxfp4", "ternary", "int4"])
def test_dynamic_scales_bring_the_largest_to_the_end(name: str) -> None:
    x = torch.randn(5, 64)
    block = grid(name).block or -1
    scale, zero = dialect.dynamic_scale(x, -1, block, name)
    values = dialect.fake_quantize(x, scale, zero if grid(name).affine else None, -1, block, name)
    assert float((values - x).abs().max()) <= 0.55 * float(x.abs().max())
    assert zero.dtype == grid(name).storage
    assert bool(dialect.dynamic_scale(torch.tensor([float("nan")]), 0, 0, name)[0].isnan())
    assert dialect.dynamic_scale(torch.zeros(1), 0, 0, name)[0].item() == 1


def test_straight_through_on_a_float_grid() -> None:
    x = torch.tensor([0.3, 7.0, -9.0, 2.4], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    dialect.fake_quantize(x, scale, None, 0, 0, "e2m1").sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [1, 0, 0, 1]
    assert float(scale.grad) == pytest.approx((0.5 - 0.3) + 6 - 6 + (2 - 2.4))


def test_an_unknown_grid_and_a_grid_of_the_wrong_kind() -> None:
    with pytest.raises(GraphoptError, match="did you mean 'e4m3'"):
        grid("e4m33")
    with pytest.raises(GraphoptError, match="nf4 is no integer grid"):
        integer_grid("nf4")
    assert IntegerGrid(4, True) == grid("int4") != grid("uint4")


class Decoded(nn.Module):
    """x + dequantize(codes)."""

    def __init__(self, codes: Tensor, scale: Tensor, table: Tensor | None, axis: int, group: int, format: str) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(grid(format).storage))
        self.register_buffer("scale", scale)
        self.register_buffer("table", table)
        self.where = axis, group, format

    def forward(self, x: Tensor) -> Tensor:
        return x + dialect.dequantize(self.codes, self.scale, None, self.table, *self.where)


def test_bits_count_scales_and_tables_as_they_are_stored() -> None:
    """[8, 32] codes: mxfp4 4 + 8/32; codebook 2 bits + 4 entries of 16 bits a row; int4 with a float32 scale a row."""
    third = torch.full((8,), 1 / 3)

    def bits(scale: Tensor, table: Tensor | None, axis: int, group: int, format: str) -> float:
        module = Decoded(torch.zeros(8, 32), scale, table, axis, group, format)
        return weight_bits(capture(module, (torch.zeros(8, 32),))) / 256

    assert bits(torch.ones(8, 1), None, 1, 32, "mxfp4") == 4 + 8 / 32
    assert bits(torch.ones(8), torch.ones(8, 4), 0, 0, "codebook2") == 2 + 16 * 4 / 32 + 16 / 32
    assert bits(third, None, 0, 0, "int4") == 4 + 32 / 32
    assert bits(third.half().float(), None, 0, 0, "int4") == 4 + 16 / 32
    assert bits(third, None, 0, 0, "ternary") == pytest.approx(1.6 + 1)
