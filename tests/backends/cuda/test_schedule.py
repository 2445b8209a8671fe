"""Schedules: what may be chosen, what the model prefers, and measurements that have the last word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.backends.cuda import nvrtc, schedule
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, plan_text
from graphopt.backends.cuda.schedule import H200, bucket, candidates, chosen, estimate, ranked, tune

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    for each in (schedule._measured, schedule._chosen):
        each.cache_clear()
    return tmp_path


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 33, 64])
@pytest.mark.parametrize("plan", [LinearPlan(4096, 4096), LinearPlan(17, 40, 2, 0), Int8Plan(300, 200)], ids=str)
def test_candidates_compute_the_same_and_take_the_tokens(plan: LinearPlan | Int8Plan, tokens: int) -> None:
    found = candidates(plan, tokens)
    assert found and len({plan_text(each) for each in found}) == len(found)
    for each in found:
        each.grid(tokens)  # takes them
        assert (each.n, each.k, each.dtype, each.epilogue) == (plan.n, plan.k, plan.dtype, plan.epilogue)
        assert each.layout == plan.layout, "the packed weights must fit every schedule"


def test_buckets() -> None:
    assert [bucket(tokens) for tokens in (1, 2, 8, 9, 64, 65, 5000)] == [1, 8, 8, 16, 64, 128, 4096]


def test_the_model_knows_bytes_and_starvation() -> None:
    few, many = (LinearPlan(8192, 8192, bits, k_warps=8) for bits in (2, 8))
    assert estimate(few, 1) < estimate(many, 1)
    hungry, fed = LinearPlan(4096, 4096, k_warps=1), LinearPlan(4096, 4096, k_warps=8)
    assert estimate(fed, 1) < estimate(hungry, 1)
    best = ranked(LinearPlan(28672, 8192), 1)[0]
    floor = 28672 * 8192 / 2 / H200.bandwidth
    assert floor < estimate(best, 1) < 1.5 * floor
    assert ranked(LinearPlan(28672, 8192), 1)[0] == best


@needs_nvrtc
def test_what_was_measured_decides(folder: Path) -> None:
    plan = LinearPlan(4096, 4096)
    by_model = chosen(plan, 1, H200, "90")
    favourite = ranked(plan, 1)[3]
    times = {plan_text(each): 2.0 for each in candidates(plan, 1)} | {plan_text(favourite): 1.0}
    best, time = tune(plan, 1, H200, "90", lambda each: times[plan_text(each)], most=6)
    assert (best, time) == (favourite, 1.0) and by_model != favourite
    assert chosen(plan, 1, H200, "90") == favourite
    assert chosen(plan, 16, H200, "90") != favourite, "another number of tokens is another question"
    kept = json.loads((folder / "tuned-NVIDIA-H200.json").read_text())
    assert len(next(iter(kept.values()))) == 6


@needs_nvrtc
def test_plans_that_do_not_run_are_not_kept(folder: Path) -> None:
    plan = LinearPlan(256, 256)
    tune(plan, 1, H200, "90", lambda each: float("inf") if each.k_warps == 8 else each.depth, most=8)
    assert chosen(plan, 1, H200, "90").k_warps != 8


@needs_nvrtc
@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"b": "c"}}', "\x00"])
def test_damaged_measurements_are_none(folder: Path, content: str) -> None:
    (folder / "tuned-NVIDIA-H200.json").write_text(content)
    assert chosen(LinearPlan(256, 256), 1, H200, "90")


def test_the_library_multiplies_many_bytes() -> None:
    plan = Int8Plan(8192, 8192)
    assert not schedule.prefers_library(plan, 16, H200)
    assert schedule.prefers_library(plan, 4096, H200)
    assert not schedule.prefers_library(Int8Plan(8190, 8192), 4096, H200), "it takes multiples of 8 only"


@needs_nvrtc
def test_measured_the_faster_of_library_and_kernel_is_taken(folder: Path) -> None:
    plan = Int8Plan(256, 256)
    for library in (0.5, 2.0):
        tune(plan, 64, H200, "90", lambda each: 1.0, most=2, library=library)
        assert schedule.prefers_library(plan, 64, H200) is (library < 1)
