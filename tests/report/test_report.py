"""The report as data and as text."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from report_runs import HOSTILE, CodeWeights, Idle, result

import graphopt
from graphopt.errors import GraphoptError
from graphopt.files import write_text
from graphopt.pipeline import Trace
from graphopt.report import Change, Report
from graphopt.report.text import size_text

ELEMENTS = 8 * 16 + 16 + 16 * 4 + 4
MATRICES = 8 * 16 + 16 * 4


def test_counts_are_those_of_the_model() -> None:
    report = Report.of(result())
    assert report.parameters == Change(ELEMENTS, ELEMENTS)
    assert report.parameter_bytes == Change(4 * ELEMENTS, MATRICES + 4 * (16 + 4) + 2 * 4)
    assert report.macs == Change(3 * MATRICES, 3 * MATRICES)
    assert report.metric == Change(90.0, 89.5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_average_bits_count_grid_scales_and_biases(bits: int) -> None:
    """4-bit codes stand in int8 storage and count four bits all the same; biases and scales count 32."""
    report = Report.of(result((CodeWeights(bits=bits),)))
    assert report.average_bits.before == 32
    assert report.average_bits.after == pytest.approx((bits * MATRICES + 32 * (16 + 4) + 2 * 32) / ELEMENTS)


def test_average_bits_of_a_table_whose_codes_are_gathered_first() -> None:
    """Codes [50, 8] in int8 reach dequantize through the gather; one float32 scale a row."""
    table = torch.nn.Embedding(50, 8)
    optimized = graphopt.optimize(table, (torch.tensor([[1, 2]]),), recipe=[graphopt.passes.QuantizeEmbedding()])
    codes, *others = sorted(optimized.program.weights.values(), key=lambda weight: -weight.numel())
    assert (codes.dtype, tuple(codes.shape)) == (torch.int8, (50, 8))
    report = optimized.report
    assert report.parameters == Change(400, 400)
    assert report.average_bits.after == (8 * 400 + sum(8 * each.numel() * each.element_size() for each in others)) / 400
    assert 8 + 32 / 8 <= report.average_bits.after < 8 + 48 / 8


def test_passes_follow_the_trace() -> None:
    rows = Report.of(result()).passes
    assert [row.key for row in rows] == ["capture", "idle", "code_weights"]
    assert [row.changed for row in rows] == [False, False, True]
    idle, coded = rows[1:]
    assert len(idle.skipped) == 1
    assert idle.skipped[0].reason == HOSTILE
    assert len(idle.skipped[0].nodes) == 3
    assert (coded.nodes, coded.bytes) == (2, 2 * 4 - 3 * MATRICES)
    assert [(each.reason, len(each.nodes)) for each in coded.touched] == [("in 4 bits", 2)]
    assert coded.sqnr_db is not None
    assert 10 < coded.sqnr_db < 40
    assert coded.facts == {"bits": 4}


def test_a_budget_that_does_not_hold_is_said_of_every_bound() -> None:
    report = Report.of(result())
    assert report.measured()["metric_drop"] == 0.5
    assert report.measured()["size_ratio"] == 0.4
    assert report.exceeded == [
        "budget.metric_drop ≤ 0.25 does not hold: it is 0.5",
        "budget.latency_ratio ≤ 0.9 does not hold: it is 2",
    ]


def test_a_bound_that_was_not_measured_does_not_pass() -> None:
    report = Report.of(result(exported=False))
    assert "budget.size_ratio ≤ 0.5 was not measured" in report.exceeded


def test_json_is_strict_and_reads_back_equal() -> None:
    report = Report.of(result())
    text = report.to_json()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = Report.from_dict(data)
    assert again == report
    assert again.exported is not None
    assert again.exported.sqnr_db == math.inf
    assert again.to_json() == text


def test_restore_fills_in_a_result() -> None:
    first, second = result(), result(exported=False)
    report = Report.from_dict(json.loads(Report.of(first).to_json()))
    second.notes, second.metric, second.original_metric, second.budget = [], None, None, type(second.budget)()
    report.restore(second)
    assert second.exported == first.exported
    assert second.notes == first.notes
    assert (second.original_metric, second.metric) == (90.0, 89.5)
    assert second.budget == first.budget


@pytest.mark.parametrize("key", [each.name for each in dataclasses.fields(Report) if each.name != "trace"])
def test_a_missing_key_keeps_its_default(key: str) -> None:
    data = json.loads(Report.of(result()).to_json())
    del data[key]
    report = Report.from_dict(data | {"from_a_later_version": 1})
    assert getattr(report, key) == getattr(Report(), key)
    assert report.summary()


def test_what_a_newer_version_wrote_otherwise_is_told_as_such() -> None:
    data = json.loads(Report.of(result()).to_json()) | {"version": "99.1.0", "metric": "high"}
    with pytest.raises(GraphoptError, match=r"written by graphopt 99\.1\.0, and this is .*: install that version"):
        Report.from_dict(data)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ([], "no mapping"),
        ({"metric": "high"}, "metric"),
        ({"passes": [{"index": "first", "key": "a"}]}, "passes.0.index"),
        ({"exported": {"path": "x"}}, "size_bytes"),
        ({"notes": {"a": 1}}, "notes"),
        ({"budget": {"size_ratio": "small"}}, "budget"),
    ],
)
def test_damage_is_named(data: object, where: str) -> None:
    with pytest.raises(GraphoptError, match=r"report\.json is damaged.*run the optimization again") as caught:
        Report.from_dict(data)
    assert where.rpartition(".")[2] in str(caught.value)


def test_read_takes_a_folder_without_its_program(tmp_path: Path) -> None:
    found = result()
    write_text(tmp_path / "report.json", Report.of(found).to_json())
    found.trace.save(tmp_path / "trace")
    report = Report.read(tmp_path)
    assert report == Report.of(found)
    assert report.trace["code_weights"].diff() == found.trace["code_weights"].diff()


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"notes": 1}'])
def test_a_damaged_folder_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(GraphoptError, match="is damaged"):
        Report.read(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"index": 1, "name": 3, "key": "a"}', "nonsense", '{"skipped": [{"a": 1}]}']
)
def test_a_damaged_trace_is_one_sentence(tmp_path: Path, text: str) -> None:
    result().trace.save(tmp_path)
    (tmp_path / "001_idle.json").write_text(text)
    with pytest.raises(GraphoptError, match=r"001_idle\.json is damaged"):
        Trace.load(tmp_path)


def test_a_folder_without_a_report_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match=r"is no run directory: it holds no report\.json"):
        Report.read(tmp_path)


def test_the_summary_says_what_matters() -> None:
    lines = str(Report.of(result())).splitlines()
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 110
    assert any(line.split() == ["metric", "90", "89.5", "-0.5"] for line in lines)
    assert any(line.split() == ["file", "1", "kB", "400", "B", "0.4×"] for line in lines)
    assert any(line.split() == ["latency", "1", "ms", "2", "ms", "2×"] for line in lines)
    assert any(line.startswith("002  code_weights  lossy  +2 nodes") and "2 in 4 bits" in line for line in lines)
    assert "slower than the float export (2.00×)" in text
    assert "node 'a' (Gemm): 1.9 ms (95%)" in text
    assert "its output is no integer" in text
    assert "budget.latency_ratio ≤ 0.9 does not hold" in text


def test_an_empty_report_has_a_summary() -> None:
    assert "passes" in str(Report())


def test_exact_and_rejected_passes_say_so() -> None:
    rows = Report.of(result((Idle(),))).passes
    rejected = dataclasses.replace(rows[1], rejected="it changed the outputs by 1.0e+00 relative", error=1.0)
    text = Report(passes=[rows[0], rejected]).summary()
    assert "rejected: it changed the outputs" in text
    assert "max rel. error 1e+00" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (-1500, "-1.5 kB"),
        (1_120_000, "1.12 MB"),
        (999_600_000, "1 GB"),
        (2.5e12, "2,500 GB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size_text(count) == text
