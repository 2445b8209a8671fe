"""Atoms, slots and axes: splitting, aligning and cutting them, against the coordinates that they stand for."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis.strategies import DrawFn, composite, data, integers, lists, sampled_from

from graphopt.analysis.spaces.axes import (
    ONE,
    Atom,
    Axis,
    align,
    atoms_of,
    axis_size,
    concatenated,
    copied,
    cut,
    divide,
    flat,
    fresh,
    leaves,
    piece,
    product,
    split,
    take,
    unify,
    written,
)


def sizes(axis: Axis) -> list[int]:
    return [slot.atom.root.size[0] for slot in written(axis)]


def atom(size: int) -> Atom:
    return Atom((size, ()))


def test_an_axis_of_size_one_has_no_slots() -> None:
    assert fresh(ONE) == []
    assert axis_size([]) == ONE


@pytest.mark.parametrize(
    ("size", "by", "result"),
    [
        ((12, ()), (4, ()), (3, ())),
        ((12, ()), (5, ()), None),
        ((6, ("b", "s")), (2, ("s",)), (3, ("b",))),
        ((6, ("b",)), (2, ("s",)), None),
        ((2, ("s", "s")), (1, ("s",)), (2, ("s",))),
        ((0, ()), (4, ()), None),
        ((4, ()), (0, ()), None),
    ],
)
def test_sizes_divide_as_monomials(size: tuple, by: tuple, result: tuple | None) -> None:
    assert divide(size, by) == result
    if result is not None:
        assert product((result, by)) == (size[0], tuple(sorted(size[1])))


def test_a_split_reaches_every_occurrence() -> None:
    """view(B, T, 12 -> 3, 4) splits the weight that wrote the 12 as well."""
    axis = fresh((12, ()))
    other = copied(axis)
    taken = take(axis, (3, ()))
    assert taken is not None and [sizes(each) for each in taken] == [[3], [4]]
    assert sizes(other) == [3, 4]
    assert not {*written(axis)} & {*written(other)}, "the same atoms, slots of their own"


def test_key_heads_are_found_by_their_repeats() -> None:
    """Keys expanded from 2 to 2 x 3 heads meet the 6 of the queries, which are then 2 x 3."""
    queries, keys, repeats = fresh((6, ())), fresh((2, ())), fresh((3, ()))
    assert align(atoms_of(queries), atoms_of([*keys, *repeats]))
    assert sizes(queries) == [2, 3]
    assert written(queries)[0].atom.root is keys[0].atom.root


def test_a_product_takes_the_finest_common_factors() -> None:
    one, other = fresh((24, ())), fresh((24, ()))
    assert take(one, (4, ())) and take(other, (12, ()))
    assert align(atoms_of(one), atoms_of(other))
    assert sizes(one) == sizes(other) == [4, 3, 2]


def test_factors_that_do_not_divide_do_not_fit() -> None:
    one, other = fresh((6, ())), fresh((6, ()))
    assert take(one, (2, ())) and take(other, (3, ()))
    assert not align(atoms_of(one), atoms_of(other))
    assert take(fresh((6, ())), (4, ())) is None


def test_parts_keep_their_slots_and_come_back_as_the_whole() -> None:
    axis = fresh((12, ()))
    first, second = piece(axis, 0, 4), piece(axis, 4, 12)
    assert first is not None and second is not None
    assert [sizes(first), sizes(second)] == [[4], [8]]
    assert leaves(concatenated([first, second])) == leaves(axis)
    again = concatenated([fresh((4, ())), fresh((8, ()))])
    assert align(atoms_of(axis), atoms_of(again))
    assert [slot.atom.root for slot in leaves(again)] == [slot.atom.root for slot in leaves(axis)]


def test_a_cut_through_heads_cuts_their_number() -> None:
    """Rows 0..8 of 6 heads of 4 are 2 heads; rows 0..6 are none."""
    axis = fresh((24, ()))
    assert take(axis, (6, ()))
    heads = piece(axis, 0, 8)
    assert heads is not None and sizes(heads) == [2, 4]
    assert piece(axis, 0, 6) is None


def test_a_symbolic_axis_is_not_cut() -> None:
    assert piece(fresh((2, ("s",))), 0, 1) is None
    assert not cut(atoms_of(fresh((1, ("s",)))), 1)


def test_a_union_keeps_what_both_know() -> None:
    one, other = atom(12), atom(12)
    assert split(one, (3, ())) and split(other, (6, ()))
    assert unify(one, other)
    assert one.root is other.root
    assert [each.root.size[0] for each in flat([one])] == [3, 2, 2]


@composite
def factorizations(draw: DrawFn) -> tuple[list[int], list[int]]:
    """Two ordered products of the same number that have a common refinement from the left."""
    fine = draw(lists(sampled_from((2, 3, 5)), min_size=1, max_size=5))

    def grouped() -> list[int]:
        out, start = [], 0
        while start < len(fine):
            stop = draw(integers(start + 1, len(fine)))
            out.append(math.prod(fine[start:stop]))
            start = stop
        return out

    return grouped(), grouped()


@given(factorizations())
def test_aligned_products_have_the_same_factors(both: tuple[list[int], list[int]]) -> None:
    left, right = ([atom(size) for size in each] for each in both)
    assert align(left, right)
    factors = [each.root for each in flat(left)]
    assert factors == [each.root for each in flat(right)]
    bounds = {math.prod(each[:i]) for each in both for i in range(len(each) + 1)}
    assert {math.prod(a.size[0] for a in factors[:i]) for i in range(len(factors) + 1)} >= bounds


@given(integers(2, 40), data())
def test_pieces_of_pieces_are_the_pieces_of_the_whole(size: int, draw: data) -> None:
    """Whatever is cut first, coordinates from the same place are the same slots."""
    axis = fresh((size, ()))
    places = sorted({0, size, *draw.draw(lists(integers(0, size), max_size=4))})
    parts = [piece(axis, start, stop) for start, stop in itertools.pairwise(places)]
    assert all(part is not None for part in parts)
    assert leaves(concatenated([part for part in parts if part is not None])) == leaves(axis)
    start, stop = sorted((draw.draw(integers(0, size)), draw.draw(integers(0, size))))
    one = piece(axis, start, stop)
    assert one is not None and axis_size(one)[0] == stop - start
    for (low, high), part in zip(itertools.pairwise(places), parts, strict=True):
        if start <= low and high <= stop:
            assert {*leaves(part or [])} <= {*leaves(one)}
