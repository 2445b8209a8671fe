"""Calibration batches: every form, streamed, spooled once, and every mistake in one sentence."""

from __future__ import annotations

import errno
import gc
import warnings
import weakref
from collections import UserDict, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from graphopt.calibration import Batches, call_form
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.ir import Program


class Two(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + ids[:, None]


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.fixture(scope="module")
def two() -> Program:
    batch = Dim("batch", min=2)
    shapes = ({0: batch}, {0: batch})
    return capture(Two().eval(), (torch.randn(4, 3), torch.arange(4)), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def one() -> Program:
    return capture(One().eval(), (torch.randn(4, 3),))


def pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, generator=generator), torch.arange(4) + i) for i in range(count)]


def same(a: list[list[Any]], b: list[list[Any]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


Pair = namedtuple("Pair", ["x", "ids"])
FORMS = {
    "list of tuples": pairs(3),
    "tuple of lists": tuple(list(pair) for pair in pairs(3)),
    "named tuples": [Pair(*pair) for pair in pairs(3)],
    "dicts": [{"x": x, "ids": ids} for x, ids in pairs(3)],
    "dicts in another order": [{"ids": ids, "x": x} for x, ids in pairs(3)],
    "like transformers' BatchEncoding": [UserDict({"x": x, "ids": ids}) for x, ids in pairs(3)],
    "numpy": [(x.numpy(), ids.numpy()) for x, ids in pairs(3)],
    "DataLoader": DataLoader(TensorDataset(*(torch.cat(each) for each in zip(*pairs(3), strict=True))), batch_size=4),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_twice(two: Program, form: str) -> None:
    batches = Batches(FORMS[form], two)
    expected = [list(pair) for pair in pairs(3)]
    assert same(list(batches), expected) and same(list(batches), expected)
    assert len(batches) == 3 and same(batches.first(2), expected[:2])


def test_one_tensor_alone(one: Program) -> None:
    x = torch.randn(4, 3)
    assert same(list(Batches([x, x.numpy(), (x,), [x], {"x": x}], one)), [[x]] * 5)


def spool(batches: Batches) -> Path:
    assert batches._spool is not None
    return Path(batches._spool.name)


def test_a_generator_is_spooled_and_read_again(two: Program) -> None:
    drawn = []

    def generate() -> Iterator[tuple[Tensor, Tensor]]:
        for pair in pairs(4):
            drawn.append(1)
            yield pair

    batches = Batches(generate(), two)
    assert len(batches) == 0 and same(batches.first(1), [list(pairs(1)[0])]) and len(drawn) == 1
    first = list(batches)
    assert same(first, [list(pair) for pair in pairs(4)]) and len(drawn) == 4
    assert same(list(batches), first) and len(batches) == 4
    folder = spool(batches)
    assert len(list(folder.iterdir())) == 4
    del batches
    gc.collect()
    assert not folder.exists()


def test_two_readers_of_a_generator_see_every_batch(two: Program) -> None:
    batches = Batches(iter(pairs(4)), two)
    left, right = iter(batches), iter(batches)
    mixed = [next(left), next(left), next(right), next(right), next(right), next(left), next(left), next(right)]
    expected = [list(pair) for pair in pairs(4)]
    assert same([mixed[i] for i in (0, 1, 5, 6)], expected) and same([mixed[i] for i in (2, 3, 4, 7)], expected)
    assert next(left, None) is None and next(right, None) is None


@pytest.mark.parametrize("one_shot", [True, False])
def test_no_batch_is_kept(one: Program, one_shot: bool) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Source:
        def __iter__(self) -> Iterator[Tensor]:
            for _ in range(20):
                x = torch.randn(4, 3)
                alive.append(weakref.ref(x))
                yield x
                del x

    most = 0
    for flat in Batches(iter(Source()) if one_shot else Source(), one):
        del flat
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == 20 and most <= 2


def test_views_are_spooled_at_their_own_size(one: Program) -> None:
    large = torch.randn(1000, 4, 3)
    batches = Batches((part for part in large), one)
    assert same(list(batches), [[part] for part in large])
    assert max(path.stat().st_size for path in spool(batches).iterdir()) < 4096


def test_one_tensor_given_twice(two: Program) -> None:
    program = capture(nn.Bilinear(3, 3, 2).eval(), (torch.randn(4, 3), torch.randn(4, 3)))
    x = torch.randn(4, 3)
    batches = Batches(iter([(x, x), (x[:, :], x.t().contiguous().t())]), program)
    assert same(list(batches), [[x, x], [x, x]]) and same(list(batches), [[x, x], [x, x]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.uint8, torch.bool, torch.float64])
def test_types_survive_the_spool(dtype: torch.dtype) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1)

    x = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    batches = Batches(iter([x.t()]), capture(Same().eval(), (x,)))
    list(batches)
    ((found,),) = list(batches)
    assert found.dtype == dtype and torch.equal(found, x.t())


def test_a_loader_over_a_stream_has_no_length(one: Program) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield from torch.ones(2, 4, 3)

        def __len__(self) -> int:
            raise TypeError("unknown")

    batches = Batches(DataLoader(Stream(), batch_size=None), one)
    assert len(batches) == 0 and len(list(batches)) == 2


def test_making_batches_draws_nothing_from_the_source(one: Program) -> None:
    class Counting:
        opened = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.opened += 1
            return iter([torch.ones(4, 3)])

    source = Counting()
    batches = Batches(source, one)
    assert source.opened == 0
    list(batches)
    assert source.opened == 1


def test_a_source_that_runs_dry_is_said(one: Program) -> None:
    class Once:
        def __init__(self) -> None:
            self.inner = iter(torch.ones(3, 4, 3))

        def __iter__(self) -> Iterator[Tensor]:
            yield from self.inner

    batches = Batches(Once(), one)
    assert len(list(batches)) == 3
    with pytest.raises(GraphoptError, match="gave 3 batches at first and 0 when read again; give a list"):
        list(batches)


def test_arrays_that_torch_does_not_take_as_they_are(one: Program) -> None:
    fixed = np.ones((4, 3), np.float32)
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(Batches([fixed, fixed[::-1], np.asfortranarray(fixed)], one))
    assert same(found, [[torch.ones(4, 3)]] * 3)
    assert call_form(np.array(1.5, np.float32))[0][0].shape == ()


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (torch.ones(4, 2), "calibration batch 1: x has shape [4, 2], the model was captured with f32[4, 3]"),
        (torch.ones(4, 3, 1), "x has shape [4, 3, 1]"),
        (
            torch.ones(4, 3, dtype=torch.float64),
            "x is torch.float64, the model was captured with torch.float32; convert",
        ),
        (torch.ones(4, 3, dtype=torch.int64), "x is torch.int64"),
        (np.ones((4, 3)), "x is torch.float64"),
        (torch.full((4, 3), float("nan")), "x holds NaN or infinity; remove such samples"),
        (torch.tensor([[1.0, 1.0, float("inf")]] * 4), "x holds NaN or infinity"),
        (torch.ones(4, 3, device="meta"), "x is on meta, the model on cpu; move it with .to('cpu')"),
        ((X, torch.arange(4)), "calibration batch 1 has 2 values, the model takes 1 (x); leave out labels"),
        ({"x": X, "labels": X}, "expected x, got 2 value(s) for x, labels"),
        ({"y": X}, "expected x, got 1 value(s) for y"),
        ({}, "expected x, got 0 value(s) for nothing"),
        ((), "expected x, got 0 value(s) for nothing"),
        ((3.0,), "x must be a tensor f32[4, 3], not float"),
        ((None,), "x must be a tensor f32[4, 3], not NoneType"),
        ("text", "calibration batch 1: inputs must be a tensor, a tuple or a dict of tensors, not str"),
        (3, "not int"),
        (np.array([["a"]]), "calibration batch 1: an array of dtype <U1 cannot become a tensor"),
        (np.array([[None]]), "an array of dtype object cannot become a tensor"),
        (np.ones((4, 3), ">f4"), "an array of another byte order cannot become a tensor; convert it with .astype"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
@pytest.mark.parametrize("one_shot", [False, True])
def test_a_batch_that_does_not_fit(one: Program, batch: Any, sentence: str, one_shot: bool) -> None:
    source = [X, batch]
    with pytest.raises(GraphoptError) as caught:
        list(Batches(iter(source) if one_shot else source, one))
    assert sentence in str(caught.value) and "calibration batch 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_batch(two: Program) -> None:
    with pytest.raises(GraphoptError, match=r"x has no elements \(shape \[0, 3\]\)"):
        list(Batches([(torch.ones(0, 3), torch.ones(0, dtype=torch.int64))], two))


@pytest.mark.parametrize("source", [[], (), iter([]), np.ones((0, 4, 3), np.float32)[:0].tolist()])
def test_no_batches_at_all(one: Program, source: Any) -> None:
    with pytest.raises(GraphoptError, match="the calibration data is empty; give at least one batch"):
        Batches(source, one).first(1)


class MapStyle:
    def __getitem__(self, index: int) -> Tensor:
        return X

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (X, "not one batch; put it in a list: calibration=[batch]"),
        (X.numpy(), "not one batch"),
        ({"x": X}, "not one batch"),
        (UserDict({"x": X}), "not one batch"),
        ("data.npz", "calibration must be an iterable of inputs, not str"),
        (3, "must be an iterable of inputs, not int"),
        (lambda: [X], "not function; call it"),
        (MapStyle(), "not MapStyle; wrap it in a DataLoader"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_stream_of_batches(one: Program, source: Any, sentence: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        Batches(source, one)
    assert sentence in str(caught.value)


def test_a_fixed_input_must_stay_as_captured() -> None:
    class Flag(nn.Module):
        def forward(self, x: Tensor, double: bool = False) -> Tensor:
            return x * 2 if double else x + 1

    program = capture(Flag().eval(), (X, True))
    assert len(list(Batches([(X, True)], program))) == 1
    with pytest.raises(GraphoptError, match="double was captured as True and is fixed, so it cannot be False"):
        list(Batches([(X, False)], program))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("writer failed\nat x")]
)
def test_a_full_disk_while_spooling(one: Program, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*args: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        GraphoptError, match=r"cannot keep the calibration data in .* \((No space left|writer failed)"
    ) as caught:
        list(Batches(iter([X]), one))
    assert "TMPDIR" in str(caught.value) and "\n" not in str(caught.value)


def test_a_spool_that_was_removed(one: Program) -> None:
    batches = Batches(iter([X]), one)
    list(batches)
    (spool(batches) / "0.pt").unlink()
    with pytest.raises(GraphoptError, match="calibration batch 0 is gone"):
        list(batches)


def test_what_the_users_own_iterator_raises_is_told_as_such() -> None:
    program = capture(nn.Linear(2, 2), (torch.zeros(1, 2),))

    def stream() -> Iterator[Any]:
        yield (torch.zeros(1, 2),)
        raise ValueError("boom")

    class Source:
        def __iter__(self) -> Iterator[Any]:
            return stream()

    for source in (stream(), Source()):
        with pytest.raises(GraphoptError, match="reading calibration batch 1 failed: ValueError: boom"):
            list(Batches(source, program))
