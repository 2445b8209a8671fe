"""Layouts are bijections, and packer, emitter and `place` mean the same one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.backends.cuda.layouts import BITS, ByteLayout, WeightLayout, chunk_for, fields, span_for


@st.composite
def layouts(draw: st.DrawFn) -> WeightLayout:
    bits = draw(st.sampled_from(BITS))
    group = draw(st.sampled_from([0, 16, 32, 48, 64, 96, 128, 256]).filter(lambda g: chunk_for(bits, g) > 0))
    chunk = chunk_for(bits, group)
    span = min(span_for(group), 32 if chunk % 32 == 0 else 16)
    return WeightLayout(draw(st.integers(1, 50)), draw(st.integers(1, 600)), bits, chunk, span, max(chunk, group))


@given(layouts(), st.integers(0, 2**32 - 1))
def test_codes_come_back(layout: WeightLayout, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << layout.bits, (layout.n, layout.k))
    fill = np.random.default_rng(seed + 1).integers(0, 1 << layout.bits, (layout.n, 1))
    words = layout.pack(codes, fill)
    assert words.size == layout.total_words
    unpacked = layout.unpack(words)
    assert np.array_equal(unpacked[:, : layout.k], codes)
    assert np.array_equal(unpacked[:, layout.k :], np.broadcast_to(fill, (layout.n, layout.padded_k - layout.k)))


@given(layouts())
def test_every_bit_has_a_place_of_its_own_and_packing_puts_it_there(layout: WeightLayout) -> None:
    n, k = np.meshgrid(np.arange(layout.n), np.arange(layout.k), indexing="ij")
    word, bit = layout.place(n, k)
    places = word * 32 + bit
    assert places.min() >= 0 and word.max() < layout.total_words and len(np.unique(places)) == places.size
    codes = np.random.default_rng(0).integers(0, 1 << layout.bits, n.shape)
    words = layout.pack(codes, 0)
    read = sum(((words[word[i]] >> bit[i].astype(np.uint32)) & 1) << np.uint32(i) for i in range(layout.bits))
    assert np.array_equal(read, codes)


@pytest.mark.parametrize("bits", BITS)
def test_fields_of_a_lane_do_not_overlap(bits: int) -> None:
    chunk = chunk_for(bits, 0)
    taken: set[tuple[int, int]] = set()
    for field in fields(bits, chunk):
        assert field.at + field.width <= 16
        mine = {(field.word, field.at + i) for i in range(field.width)}
        assert not mine & taken
        taken |= mine
    assert len(taken) == chunk // 4 * bits


@given(st.integers(1, 40), st.integers(1, 300))
def test_bytes_come_back(n: int, k: int) -> None:
    layout = ByteLayout(n, k)
    codes = np.random.default_rng(0).integers(-128, 128, (n, k)).astype(np.int8)
    words = layout.pack(codes)
    assert np.array_equal(layout.unpack(words)[:, :k], codes)
    rows, inputs = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    word, byte = layout.place(rows, inputs)
    assert np.array_equal(words.view(np.int8).reshape(-1, 4)[word, byte], codes)


@pytest.mark.parametrize(("bits", "group"), [(2, 48), (3, 96), (4, 24), (4, 100)])
def test_groups_that_fit_no_fragment_have_no_chunk(bits: int, group: int) -> None:
    assert chunk_for(bits, group) == 0


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no layout of 5 bits"):
        WeightLayout(16, 64, 5, 64, 32, 64)
    with pytest.raises(ValueError, match="in units of 96"):
        WeightLayout(16, 64, 4, 64, 32, 96)
