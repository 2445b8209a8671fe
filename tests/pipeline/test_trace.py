"""The trace: records as data, on disk and back."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import made_up_passes as made
import numpy as np
import pytest
import torch

from graphopt.errors import GraphoptError
from graphopt.ir.rewriter import Site
from graphopt.pipeline import PassRecord, Trace, run_passes


def trace() -> Trace:
    return run_passes(made.net(), (made.MoveScale(), made.Nothing(), made.Coarse(), made.LieByRelu()), made.context())[
        1
    ]


def test_a_trace_reads_back_equal(tmp_path: Path) -> None:
    before = trace()
    before.save(tmp_path / "trace")
    after = Trace.load(tmp_path / "trace")
    assert [dataclasses.asdict(record) for record in after] == [dataclasses.asdict(record) for record in before]
    assert [record.diff() for record in after] == [record.diff() for record in before]
    names = sorted(path.name for path in (tmp_path / "trace").iterdir())
    assert names[:4] == ["000_capture.json", "000_capture.txt", "001_move_scale.json", "001_move_scale.txt"]
    assert all(re.fullmatch(r"\d{3}_\w+\.(txt|json)", name) for name in names)


def test_infinities_and_odd_facts_survive_json(tmp_path: Path) -> None:
    record = PassRecord(0, "capture", "capture", "text\n", "text\n", sqnr_db=float("inf"), error=float("nan"))
    record.rounding_error = float("-inf")
    record.facts = {
        "a": torch.tensor([1.0, 2.0]),
        "b": np.float32(0.5),
        "c": {1: {2}},
        "d": (1, None),
        "e": torch.float32,
    }
    Trace([record]).save(tmp_path)
    json.loads((tmp_path / "000_capture.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    (found,) = Trace.load(tmp_path)
    assert found.sqnr_db == float("inf") and found.rounding_error == float("-inf")
    assert found.error is not None and found.error != found.error
    assert found.facts == {"a": [1.0, 2.0], "b": 0.5, "c": {"1": "{2}"}, "d": [1, None], "e": "torch.float32"}


def test_names_are_safe_for_paths(tmp_path: Path) -> None:
    record = PassRecord(0, "../../etc/passwd", "../../etc/passwd#2", "x", "x")
    assert record.stem == "000__etc_passwd_2"
    Trace([record]).save(tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_thousand_records_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    Trace([PassRecord(i, "a", f"a#{i + 1}", f"{i}", "") for i in range(1002)]).save(tmp_path)
    assert [record.text for record in Trace.load(tmp_path)] == [str(i) for i in range(1002)]


def test_a_shorter_trace_replaces_a_longer_one(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    trace().save(tmp_path)
    shorter = run_passes(made.net(), (made.Nothing(),), made.context())[1]
    shorter.save(tmp_path)
    assert [record.key for record in Trace.load(tmp_path)] == ["capture", "nothing"]
    assert len(list(tmp_path.iterdir())) == 5 and (tmp_path / "mine.json").exists()


@pytest.mark.parametrize("name", ["002_nothing.json", "002_nothing.txt", "000_capture.json"])
def test_a_missing_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    trace().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(GraphoptError, match=r"is damaged \(.*\); run the optimization again"):
        Trace.load(tmp_path)


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "3", '{"index": "x"}', '{"index": 7}', "[" * 100_000, "\udc80"])
def test_a_damaged_record_is_one_sentence(tmp_path: Path, text: str) -> None:
    trace().save(tmp_path)
    (tmp_path / "002_nothing.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(GraphoptError, match=r"002_nothing\.json is damaged") as caught:
        Trace.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_trace_at_all(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="holds no records"):
        Trace.load(tmp_path / "nowhere")


def test_records_of_a_later_version_are_read(tmp_path: Path) -> None:
    trace().save(tmp_path)
    path = tmp_path / "000_capture.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"invented_later": 1}))
    assert len(Trace.load(tmp_path)) == 5


def test_diff_shows_the_lines_that_changed() -> None:
    diff = trace()["move_scale"].diff(context=0)
    assert diff.startswith("--- before\n+++ after move_scale\n")
    changed = [line for line in diff.splitlines()[2:] if line[0] in "+-"]
    weights = [line for line in changed if re.match(r"[+-]  (body\.0|head)\.(weight|bias): f32", line)]
    calls = [line for line in changed if re.match(r"[+-]  linear(_1)?: f32", line)]
    assert (len(weights), len(calls), len(changed)) == (6, 4, 10)
    assert all("[move_scale]" in line for line in calls if line[0] == "+")
    assert trace()["nothing"].diff() == ""


def test_access_by_name_and_position() -> None:
    found = trace()
    assert found["capture"] is found[0] is next(iter(found)) and found[-1].key == "lie_by_relu"
    assert len(found) == 5 and found["nothing"].skipped == [Site("relu", "it is good as it is")]
    with pytest.raises(GraphoptError, match="the trace has no pass 'movescale', did you mean 'move_scale'"):
        found["movescale"]
    with pytest.raises(IndexError):
        found[9]
