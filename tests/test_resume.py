"""An interrupted run goes on where it was and ends in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_models
import pytest
import torch

import graphopt
from graphopt.errors import GraphoptError
from graphopt.pipeline.journal import Journal
from graphopt.pipeline.unfinished import Unfinished, run_key

HERE = Path(__file__).parent
MEASURED = {"seconds", "validation_seconds", "peak_memory_bytes", "latency_ms", "baseline_latency_ms"}


def _run(run_dir: Path, model: str, dies_at: str = "-", seed: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "resumed_run.py"), str(run_dir), model, dies_at, str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def _plain(value: Any) -> Any:
    """A report without what a clock or the memory says."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if key not in MEASURED and "seconds" not in key}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _same(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in files:
        a, b = (one / name).read_bytes(), (other / name).read_bytes()
        if name.suffix == ".json" and name.name != "report.json":
            assert _plain(json.loads(a)) == _plain(json.loads(b)), name
        elif name.suffix not in (".json", ".html"):
            assert a == b, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = _run(folder, "residual_cnn")
    assert done.returncode == 0, done.stderr
    assert list(folder.parent.iterdir()) == [folder]  # no state is left
    return folder


@pytest.mark.parametrize(
    "dies_at",
    [
        "saved 2",
        pytest.param("step 2", marks=pytest.mark.slow),
        pytest.param("saved 1", marks=pytest.mark.slow),
        pytest.param("step 8", marks=pytest.mark.slow),
        pytest.param("saved 3", marks=pytest.mark.slow),
        pytest.param("writing", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(dies_at: str, whole: Path, tmp_path: Path) -> None:
    killed = _run(tmp_path / "run", "residual_cnn", dies_at)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "run").exists()
    done = _run(tmp_path / "run", "residual_cnn")
    assert done.returncode == 0, done.stderr
    assert ("resumed after" in done.stdout) == (dies_at not in ("step 2",))
    if dies_at in ("saved 2", "saved 3", "writing"):
        assert "measured" not in done.stdout  # what was decided by the clock stays decided
    _same(whole, tmp_path / "run")
    assert [path for path in tmp_path.iterdir() if "unfinished" in path.name] == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["residual_cnn", "vision_transformer"])
def test_a_run_killed_at_every_boundary_in_turn(model: str, tmp_path: Path) -> None:
    reference = _run(tmp_path / "whole", model)
    assert reference.returncode == 0, reference.stderr
    steps = int(reference.stdout.split("steps ")[1].split()[0])
    for step in range(1, steps + 1):
        run_dir = tmp_path / f"at-{step}" / "run"
        assert _run(run_dir, model, f"step {step}").returncode == -9
        assert _run(run_dir, model).returncode == 0
        _same(tmp_path / "whole", run_dir)


@pytest.mark.slow
def test_the_state_of_another_run_is_dropped_and_a_damaged_one_ignored(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert _run(run_dir, "residual_cnn", "saved 2").returncode == -9
    other = tmp_path / "other"
    shutil.copytree(tmp_path / ".run.unfinished", tmp_path / ".other.unfinished")
    done = _run(other, "residual_cnn", seed=1)
    assert "an unfinished run to" in done.stdout and "resumed after" not in done.stdout
    program = next((tmp_path / ".run.unfinished").glob("program-*.pt2"))
    program.write_bytes(program.read_bytes()[: program.stat().st_size // 2])
    done = _run(run_dir, "residual_cnn")
    assert done.returncode == 0 and "resumed after" not in done.stdout
    _same(whole, run_dir)


def _calibrated(run_dir: Path, **options: Any) -> Any:
    module, inputs = cli_models.static()
    return graphopt.optimize(
        module, inputs, recipe="int8_static", calibration=[inputs] * 2, run_dir=run_dir, **options
    )


def test_two_runs_to_one_folder_are_one_sentence(tmp_path: Path) -> None:
    held = Unfinished(tmp_path / "run", "key")
    with pytest.raises(GraphoptError, match=r"another run is writing to .*run; wait for it, or name another folder"):
        _calibrated(tmp_path / "run")
    held.close()
    _calibrated(tmp_path / "run")


def test_a_full_disk_costs_the_state_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise GraphoptError("cannot write it: No space left on device")

    monkeypatch.setattr("graphopt.pipeline.trace.Trace.save", full)
    unfinished = Unfinished(tmp_path / "run", "key")
    result = graphopt.optimize(*cli_models.static(), recipe="exact")
    unfinished.save(1, result.program, result.trace)
    assert any("starts anew if it is interrupted" in note for note in result.trace.notes)
    assert unfinished.restore() is None


def test_an_error_of_the_user_leaves_no_folder(tmp_path: Path) -> None:
    def evaluate(module: Any) -> float:
        return float("nan")

    with pytest.raises(GraphoptError, match="NaN"):
        _calibrated(tmp_path / "run", evaluate=evaluate)
    assert list(tmp_path.iterdir()) == []


def test_everything_that_decides_is_in_the_key() -> None:
    def key(scale: float = 1.0, batch: float = 0.0, other: str = "") -> str:
        module = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(module.weight, scale)
        torch.nn.init.constant_(module.bias, 0.5)
        program = graphopt.capture(module, (torch.zeros(1, 2),))
        return run_key(program, iter([[torch.full((1, 2), batch)]]), other)

    assert key() == key()
    assert len({key(), key(scale=2.0), key(batch=1.0), key(other="x")}) == 4


def test_the_journal_remembers_and_forgives_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    assert first.recorded("a", lambda: {"x": 1.5}) == {"x": 1.5}
    assert first.recorded("a", lambda: {"x": 2.5}) == {"x": 1.5}
    with open(path, "a") as file:
        file.write('{"key": "b", "val')
    again = Journal(path)
    assert again.recorded("a", lambda: None) == {"x": 1.5}
    assert again.recorded("b", lambda: 7) == 7
    assert Journal(path).recorded("b", lambda: None) == 7
    assert Journal().recorded("a", lambda: 3) == 3
