"""The command line: what each command does, through `main`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from cli_models import BATCH, images
from report_runs import result

import graphopt
from graphopt.backends.onnx import backend, latency
from graphopt.cli import demo, main
from graphopt.cli.samples import SampleFile
from graphopt.cli.settings import Settings
from graphopt.demo import TrainingConfig, task
from graphopt.errors import GraphoptError
from graphopt.pipeline import builtin, builtin_names, pass_classes


def succeed(*arguments: str | Path) -> None:
    assert main([str(each) for each in arguments]) == 0


@pytest.fixture(scope="module", autouse=True)
def short_measurements() -> Iterator[None]:
    """How long the models take does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "measure_latency", functools.partial(latency.measure_latency, min_seconds=0.01))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    np.savez(path, x=images(18).numpy())
    return path


@pytest.fixture(scope="module")
def static_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """One run with everything that can be given."""
    folder = tmp_path_factory.mktemp("runs") / "static"
    succeed(
        *(
            "optimize",
            "cli_models:static",
            "--recipe",
            "int8",
            "--calibration",
            data,
            "--evaluate",
            "cli_models:metric",
            "-o",
            folder,
        ),
        *("--set", "budget.metric_drop=100", "--set", "budget.size_ratio=0.001", "--set", "seed=3"),
    )
    return folder


@pytest.fixture(scope="module")
def dynamic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dynamic"
    succeed("optimize", "cli_models:dynamic", "--keep-float", "head*", "--keep-float", "haed*", "-o", folder)
    return folder


# --- optimize


def test_a_run_directory_holds_what_it_should(static_run: Path) -> None:
    assert {each.name for each in static_run.iterdir()} == {
        *("model.onnx", "model.pt2", "recipe.yaml", "report.json", "report.html", "trace")
    }
    report = json.loads((static_run / "report.json").read_text())
    assert report["recipe"] == "int8"
    assert report["metric"]["before"] == 100
    assert report["exported"]["path"] == str(static_run / "model.onnx")
    assert report["exported"]["unfused"] == []
    assert sum(report["exported"]["fused"].values()) >= 2
    assert report["average_bits"]["after"] < 32
    assert report["exceeded"] == [each for each in report["exceeded"] if "size_ratio" in each] != []
    session = onnxruntime.InferenceSession(static_run / "model.onnx", providers=["CPUExecutionProvider"])
    loaded = graphopt.load(static_run)
    emulated = loaded(images(BATCH)).detach().numpy()
    (found,) = session.run(None, {session.get_inputs()[0].name: images(BATCH).numpy()})
    assert np.abs(found - emulated).max() < 0.1 * np.abs(emulated).max()


def test_nothing_else_is_left_beside_it(static_run: Path) -> None:
    assert [each.name for each in static_run.parent.iterdir()] == [static_run.name]


def test_samples_left_over_are_noted(static_run: Path) -> None:
    notes = json.loads((static_run / "report.json").read_text())["notes"]
    assert "2 of 18 calibration samples do not fill a batch of 4 and are left out" in notes


def test_without_data_it_is_dynamic_and_says_so(dynamic_run: Path) -> None:
    report = json.loads((dynamic_run / "report.json").read_text())
    assert report["recipe"] == "int8_dynamic"
    assert "recipe int8_dynamic was chosen because no calibration data was given" in report["notes"]
    assert [note for note in report["notes"] if "matches no" in note] == [
        "skip='haed*' matches no node, weight or module"
    ]


def test_keep_float_reaches_every_quantizing_pass(dynamic_run: Path) -> None:
    entries = yaml.safe_load((dynamic_run / "recipe.yaml").read_text())["passes"]
    quantizing = [entry for entry in entries if "quantize" in str(entry)]
    assert quantizing
    for entry in quantizing:
        assert isinstance(entry, dict)
        assert next(iter(entry.values()))["skip"] == ["head*", "haed*"]


def test_a_run_replaces_a_run(dynamic_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "deep" / "run"
    for recipe in ("exact", "int8_dynamic"):
        succeed("optimize", "cli_models:alone", "--recipe", recipe, "-o", folder)
        assert json.loads((folder / "report.json").read_text())["recipe"] == recipe
    shown = capsys.readouterr()
    assert str(folder / "report.html") in shown.out
    assert shown.err == ""


def test_a_pt2_and_a_recipe_file(dynamic_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\npasses: [canonicalize]\n")
    succeed(
        *(
            "optimize",
            dynamic_run / "model.pt2",
            "--recipe",
            tmp_path / "mine.yaml",
            "--set",
            "target=onnxruntime-cpu",
        ),
        *("-o", tmp_path / "run"),
    )
    assert json.loads((tmp_path / "run" / "report.json").read_text())["recipe"] == "mine"


def test_a_model_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_and_nowhere_else.py").write_text("from cli_models import static as made\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    succeed("optimize", "here_and_nowhere_else:made", "--recipe", "exact", "-o", "run")
    assert (tmp_path / "run" / "model.onnx").is_file()


# --- inspect, diff, bench, passes, recipes


def test_inspect_shows_the_passes(static_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("inspect", static_run)
    text = capsys.readouterr().out
    for key in graphopt.pipeline.Trace.load(static_run / "trace"):
        assert key.key in text
    assert "\x1b" not in text


def test_inspect_shows_a_pass(static_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = graphopt.pipeline.Trace.load(static_run / "trace")
    for name in ("quantize_static", str(trace["quantize_static"].index)):
        succeed("inspect", static_run, "--pass", name)
        assert trace["quantize_static"].diff() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"), [("quantize_statik", "did you mean 'quantize_static'?"), ("99", "no pass 99")]
)
def test_inspect_of_an_unknown_pass(static_run: Path, name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(static_run), "--pass", name]) == 2
    assert says in capsys.readouterr().err


def test_inspect_needs_no_program(static_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run directory from elsewhere is looked at without loading its model."""
    copied = tmp_path / "run"
    (copied / "trace").mkdir(parents=True)
    for each in [static_run / "report.json", *(static_run / "trace").iterdir()]:
        (copied / each.relative_to(static_run)).write_bytes(each.read_bytes())
    succeed("inspect", copied)


def test_diff(static_run: Path, dynamic_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("diff", static_run, dynamic_run)
    text = capsys.readouterr().out
    assert re.search(r"^A .*: int8 for onnxruntime-cpu$", text, re.MULTILINE)
    assert "-name: int8\n" in text.replace("  -", "-")
    assert re.search(r"quantize_static +A +lossy", text)
    assert re.search(r"B +not run", text)
    assert "the programs differ from" in text
    assert re.search(r"^quantize_dynamic +\w+ +.* → ", text, re.MULTILINE | re.DOTALL)


def test_diff_with_bounds(static_run: Path, dynamic_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("diff", static_run, dynamic_run, "--max", "size_ratio=100", "--max", "macs_ratio=1")
    assert "every bound holds" in capsys.readouterr().out
    assert main(["diff", str(static_run), str(dynamic_run), "--max", "size_ratio=0.01", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert len(found["exceeded"]) == 1 and found["exceeded"][0].endswith("more than 0.01")
    assert found["figures"]["parameters"][0] == found["figures"]["parameters"][1]
    assert {"key", "node", "a", "b"} == set(found["decisions"][0])
    assert main(["diff", str(static_run), str(static_run), "--max", "metric_drop=1"]) == (
        3 if found["figures"]["metric"][0] is None else 0
    )
    for odd in ("size=1", "size_ratio=x", "size_ratio=nan"):
        assert main(["diff", str(static_run), str(static_run), "--max", odd]) == 2
        assert "--max takes NAME=NUMBER" in capsys.readouterr().err


def test_diff_of_a_run_with_itself(static_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("diff", static_run, static_run)
    text = capsys.readouterr().out
    assert "every pass reports the same in both" in text
    assert "the programs are equal after every pass" in text


def test_bench(static_run: Path, dynamic_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("bench", static_run, "--threads", "1")
    text = capsys.readouterr().out
    assert "inputs x: float32[4, 3, 8, 8]; 1 thread;" in text
    assert "QLinearConv" in text
    assert str(static_run / "model.onnx") in text
    succeed("bench", static_run / "model.onnx", "--against", static_run)
    assert re.search(r"\d\.\d\d×", capsys.readouterr().out)


def test_bench_of_models_with_other_inputs(
    static_run: Path, dynamic_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(static_run), "--against", str(dynamic_run)]) == 2
    assert "take different inputs" in capsys.readouterr().err


def test_passes_lists_all_and_describes_each(capsys: pytest.CaptureFixture[str]) -> None:
    succeed("passes")
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed if not line.startswith(" ")] == list(pass_classes())
    for name, cls in pass_classes().items():
        succeed("passes", name)
        text = capsys.readouterr().out
        assert text.startswith(f"{name}  (")
        assert all(f"  {each.name}: " in text for each in dataclasses.fields(cls))


def test_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("recipes")
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert listed == builtin_names()
    for name in listed:
        succeed("recipes", name)
        assert graphopt.Recipe.from_yaml(capsys.readouterr().out) == builtin(name)


# --- demo


@pytest.fixture
def quick_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The demo on a network that trains in seconds, with a cache of its own; returns the run directory."""
    config = TrainingConfig(channels=(8, 16), blocks=1, images=1000, epochs=8, threads=1)
    monkeypatch.setattr(task, "TrainingConfig", lambda: config)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs" / "demo"


def table_cells(text: str) -> dict[str, list[str]]:
    rows = [
        [cell.strip() for cell in line.split(line[0])[1:-1]] for line in text.splitlines() if line[:1] in ("│", "┃")
    ]
    return {name: cells for name, *cells in rows}


@pytest.mark.slow
def test_demo(quick_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("demo", "-o", quick_demo)
    shown = capsys.readouterr()
    assert shown.err == ""
    report = json.loads((quick_demo / "report.json").read_text())
    cells = table_cells(shown.out)
    assert cells["accuracy"][0] == f"{report['metric']['before']:.2f} %"
    # The emulation in torch and the file in the runtime may decide a few images in between differently.
    assert abs(float(cells["accuracy"][1].split()[0]) - report["metric"]["after"]) <= demo.LARGEST_GAP
    assert report["metric"]["before"] > 60
    found = report["exported"]
    assert cells["file"][2] == f"{found['size_bytes'] / found['baseline_size_bytes']:.2f}×"
    assert cells["latency"][2] == f"{found['latency_ms'] / found['baseline_latency_ms']:.2f}×"
    for each in report["passes"]:
        assert each["key"] in shown.out
    assert "unfused: 0" in shown.out
    assert shown.out.endswith(f"run directory  {quick_demo}\nreport         {quick_demo / 'report.html'}\n")


@pytest.mark.parametrize(("accuracy", "status"), [(89.4, 0), (89.0, 1)])
def test_demo_does_not_hide_a_file_that_computes_something_else(
    accuracy: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """With a made-up result, whose emulation reaches 89.5."""
    monkeypatch.setattr(demo.demo, "model", lambda progress: (None, None))
    monkeypatch.setattr(demo, "optimize", lambda *args, **options: result())
    monkeypatch.setattr(demo, "runtime_accuracy", lambda result, path: accuracy)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["demo", "-o", str(tmp_path / "run")]) == status
    shown = capsys.readouterr()
    assert table_cells(shown.out) == {
        "": ["fp32", "int8", "int8 / fp32"],
        "accuracy": ["90.00 %", f"{accuracy:.2f} %", f"{accuracy - 90:+.2f} points"],
        "file": ["1 kB", "400 B", "0.40×"],
        "latency": ["1.00 ms", "2.00 ms", "2.00×"],
    }
    assert ("model.onnx reaches 89.00 % in its runtime" in shown.err) == bool(status)


# --- The shell's side


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    succeed("--version")
    assert capsys.readouterr().out == f"graphopt {graphopt.__version__}\n"
    for command in ("optimize", "inspect", "bench", "diff", "passes", "recipes", "demo"):
        succeed(command, "--help")
        assert capsys.readouterr().out.startswith(f"Usage: graphopt {command} ")


def test_the_installed_command_and_the_module_are_one() -> None:
    for command in ([sys.executable, "-m", "graphopt"], [str(Path(sys.executable).with_name("graphopt"))]):
        done = subprocess.run([*command, "recipes"], capture_output=True, text=True, check=True)
        assert "int8_dynamic" in done.stdout


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m graphopt passes | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
    assert done.stderr == ""


def test_a_terminal_that_knows_only_ascii() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "passes", "quantise_×"], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"graphopt: there is no pass called 'quantise_")


def test_a_defect_has_status_1_and_a_trace_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> str:
        raise KeyError("of all things")

    monkeypatch.setattr("graphopt.cli.show.recipes_text", broken)
    assert main(["recipes"]) == 1
    first = capsys.readouterr().err
    assert "this is a defect of graphopt" in first
    path = Path(re.search(r"the stack trace is in (\S+),", first)[1])  # type: ignore[index]
    try:
        assert "of all things" in path.read_text()
        assert "Traceback" not in first
    finally:
        path.unlink()
    assert main(["--debug", "recipes"]) == 1
    assert "Traceback" in capsys.readouterr().err


# --- Pieces


def test_settings() -> None:
    settings = Settings.parse(["seed=4", "target=a", "budget.size_ratio=0.3", "quantize_static.skip=[a, b]", "seed=5"])
    assert (settings.seed, settings.target) == (5, "a")
    assert settings.budget.size_ratio == 0.3
    recipe = settings.applied(builtin("int8"))
    assert next(each for each in recipe.passes if each.name == "quantize_static").options["skip"] == [
        "a",
        "b",
    ]


def test_samples_of_a_free_batch_dimension_are_all_used(tmp_path: Path) -> None:
    from cli_models import dynamic

    program = graphopt.capture(*dynamic())
    np.savez_compressed(tmp_path / "a.npz", x=images(37).numpy())
    batches = SampleFile.open(tmp_path / "a.npz").batches(program)
    for _ in range(2):
        found = [batch[0] for batch in batches]
        assert [len(each) for each in found] == [16, 16, 5]
        assert np.array_equal(np.concatenate([each.numpy() for each in found]), images(37).numpy())
    assert batches.notes == []
    np.savez(tmp_path / "a.npz", x=images(3).numpy())
    assert [len(batch[0]) for batch in SampleFile.open(tmp_path / "a.npz").batches(program)] == [3]


def test_samples_of_nested_and_keyword_inputs(tmp_path: Path) -> None:
    """`features.a` and `features.b` in pairs, `shift` one a batch; columns first and the other byte order too."""
    from cli_models import pair

    model, inputs = pair()
    program = graphopt.capture(model, inputs)
    a = np.arange(24, dtype=np.float32).reshape(6, 4)
    arrays = {
        "features.a": np.asfortranarray(a),
        "features.b": a.astype(">f4"),
        "shift": np.float32([1, 2, 3]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    batches = list(SampleFile.open(tmp_path / "a.npz").batches(program))
    assert [each["shift"].item() for each in batches] == [1, 2, 3]
    for index, batch in enumerate(batches):
        for key in "ab":
            assert np.array_equal(batch["features"][key].numpy(), a[2 * index : 2 * index + 2])
    np.savez(tmp_path / "a.npz", **(arrays | {"shift": np.float32([1, 2])}))
    with pytest.raises(GraphoptError, match="different numbers of samples"):
        SampleFile.open(tmp_path / "a.npz").batches(program)
