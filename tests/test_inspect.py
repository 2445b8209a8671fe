"""`graphopt inspect`: the table, the story of a place, where an error came in, JSON, and names that mean harm."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import graphopt
from graphopt.cli import main
from graphopt.errors import GraphoptError
from graphopt.ir.rewriter import Site
from graphopt.passes import Canonicalize, FoldBatchNorm, Prune, QuantizeStatic, QuantizeWeights
from graphopt.pipeline import PassRecord, Trace
from graphopt.report.story import Event, story
from graphopt.report.text import plain, visible

HARM = "\x1b[31m<script>alert(1)</script>"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head((x + self.body(x)).mean((2, 3)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def images() -> tuple[Tensor]:
    return (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def given() -> tuple[nn.Module, tuple[Tensor]]:
    """The model, as the command line is given it."""
    return network(), images()


def near(model: Any) -> float:
    """Minus the largest difference to the original."""
    with torch.no_grad():
        return -float((model(*images()) - network()(*images())).abs().max())


@pytest.fixture(scope="module", name="run")
def fixture_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    coarse = QuantizeWeights(grid="int2", objective="plain", rounding="nearest", only=("body*",))
    passes = [Canonicalize(), FoldBatchNorm(), Prune(ratio=0.5, resolve=False, criterion="magnitude"), coarse]
    folder = tmp_path_factory.mktemp("runs") / "run"
    graphopt.optimize(network(), images(), passes, run_dir=folder)
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def told(run: Path, name: str) -> list[Event]:
    return story(Trace.load(run / "trace"), name)


def test_the_pipeline_is_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, run).splitlines()
    heading = next(line for line in lines if "declined" in line)
    assert heading.split() == ["pass", "kind", "nodes", "bytes", "MACs", "error", "seconds", "fired", "declined"]
    fold = next(line for line in lines if "fold_batch_norm" in line)
    assert re.search(r"exact +-1 .*max rel\. error", fold)
    assert re.search(r"prune +lossy .*-\d.*-\d.*dB", next(line for line in lines if " prune " in line))
    assert json.loads(shown(capsys, run, "--json"))["passes"][2]["key"] == "fold_batch_norm"


def test_the_story_of_an_operator_and_its_weights(run: Path) -> None:
    events = told(run, "conv2d")
    assert [each.index for each in events] == sorted(each.index for each in events)
    assert events[0].kind == "made" and events[0].key == "capture" and "@conv.weight" in events[0].text
    folded = [each for each in events if each.key == "fold_batch_norm"]
    assert {each.name for each in folded if each.kind == "changed"} >= {"conv.weight"}
    assert any(each.kind == "named" and "folded into conv2d" in each.text for each in folded)
    gone = {each.name: each.key for each in told(run, "batch_norm") if each.kind == "gone"}
    assert gone.keys() > {"batch_norm", "norm.running_mean"} and set(gone.values()) == {"fold_batch_norm"}


def test_the_story_of_a_weight_a_module_and_a_space(run: Path) -> None:
    weight = told(run, "body.0.weight")
    assert {"prune", "quantize_weights"} <= {each.key for each in weight}
    module = told(run, "body")
    assert {each.name for each in module} >= {"body.0.weight", "body.2.weight", "conv2d_1", "conv2d_2"}
    assert "head.weight" not in {each.name for each in module}
    space = told(run, "body.0.out")
    assert {each.kind for each in space} == {"named", "figure"} and {each.key for each in space} == {"prune"}
    declined = [each for each in told(run, "linear") if each.kind == "skipped"]
    assert any("not among only" in each.text for each in declined)


def test_why_says_which_names_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "made" in shown(capsys, run, "--why", "conv2d")
    data = json.loads(shown(capsys, run, "--why", "conv2d", "--json"))
    assert data["name"] == "conv2d" and data["events"][0]["key"] == "capture"
    assert main(["inspect", str(run), "--why", "conv2dd"]) == 2
    assert "did you mean 'conv2d'?" in capsys.readouterr().err


def test_bisect_by_what_was_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = Trace.load(run / "trace")
    after_prune, at = trace["prune"].sqnr_db, trace["prune"].index
    assert after_prune is not None
    assert shown(capsys, run, "--bisect", f"sqnr={after_prune + 0.1}") == (
        f"prune (pass {at}) is the first: the SQNR of the outputs is {after_prune:.4g} after it\n"
        "graphopt inspect RUN_DIR --pass prune shows what it did\n"
    )
    assert "no pass crosses it" in shown(capsys, run, "--bisect", "sqnr=-300")
    assert "no pass crosses it" in shown(capsys, run, "--bisect", "error=0.1")
    data = json.loads(shown(capsys, run, "--bisect", f"sqnr={after_prune + 0.1}", "--json"))
    assert data["first"] == {"index": at, "key": "prune"} and len(data["passes"]) == 2


def test_bisect_by_the_metric_runs_the_passes_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ("--model", "test_inspect:given", "--evaluate", "test_inspect:near")
    assert ") crosses it: the metric is -" in shown(capsys, run, "--bisect", "metric=-1e-4", *again)
    assert "no pass crosses it" in shown(capsys, run, "--bisect", "metric=-1e9", *again)
    assert "below it already" in shown(capsys, run, "--bisect", "metric=1", *again)
    assert main(["inspect", str(run), "--bisect", "metric=1"]) == 2
    assert "give --model, --evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bisect", "loss=3"], "error=NUMBER, sqnr=DECIBELS or metric=NUMBER"),
        (["--bisect", "sqnr=high"], "error=NUMBER"),
        (["--why", "conv2d", "--pass", "prune"], "one of --pass, --why, --bisect and --causes"),
        (["--pass", "17"], "it has 0 to 8"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(run), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_names_cannot_steer_the_terminal(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = Trace.load(run / "trace")
    for record in trace:
        record.text = record.text.replace("conv.weight", f"{HARM}.weight")
        record.touched = [dataclasses.replace(site, reason=HARM + site.reason) for site in record.touched]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "report.json").write_text((run / "report.json").read_text())
    trace.save(folder / "trace")
    for arguments in (["--pass", "fold_batch_norm"], ["--why", "conv2d"], ["--pass", "0"], []):
        out = shown(capsys, folder, *arguments)
        assert "\x1b" not in out
    assert "␛[31m<script>" in shown(capsys, folder, "--why", "conv2d")
    assert visible("a\x1b\x9b\x7f\u202eb\n") == "a␛\ufffd␡\ufffdb\n"
    assert "\x1b" not in plain("\x1b[2J")


def test_a_story_over_a_strange_trace() -> None:
    record = PassRecord(0, "capture", "capture", "program()\n  : x\nodd line\n  a: f32[1] = relu(a)\n")
    other = PassRecord(1, "made", "made", record.text, record.text)
    other.touched, other.facts = [Site("", "a"), Site("b", "next to a_1 and aa")], {"t": {"a": [1.0] * 20}, "u": 3}
    events = story(Trace([record, other]), "a")
    assert [each.kind for each in events] == ["made", "named", "figure"]
    assert events[-1].text.endswith("and 12 more")
    with pytest.raises(GraphoptError, match="no program of this run has"):
        story(Trace([record]), "x.y")


@pytest.fixture(scope="module", name="quantized")
def fixture_quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "quantized"
    passes = [Canonicalize(), FoldBatchNorm(), QuantizeStatic()]
    graphopt.optimize(network(), images(), passes, calibration=[images()], run_dir=folder)
    return folder


def test_causes_are_told_place_by_place(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, quantized, "--causes")
    heading = text.splitlines()[0].split()
    assert heading[:4] == ["place", "weights", "inputs", "share"] and "as in torch" in text
    data = json.loads(shown(capsys, quantized, "--causes", "--json"))
    assert {each["node"] for each in data["sites"]} >= {"conv2d", "conv2d_1", "conv2d_2", "linear"}
    assert data["samples"] == 4 and data["sqnr_db"] > 20 and all(each["by"] for each in data["sites"])


def test_causes_are_measured_again_on_the_model_and_on_another_file(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numpy.savez(tmp_path / "data.npz", x=images()[0].numpy())
    model = onnx.load(quantized / "model.onnx")
    scale = next(each for each in model.graph.initializer if each.name == "body.0.weight_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 8, scale.name))
    onnx.save(model, tmp_path / "device.onnx")
    again = ["--causes", "--model", "test_inspect:given", "--calibration", str(tmp_path / "data.npz"), "--json"]
    stored, healthy = (json.loads(shown(capsys, quantized, *each)) for each in (["--causes", "--json"], again))
    assert [each["node"] for each in healthy["sites"]] == [each["node"] for each in stored["sites"]]
    assert not any(each["differ"] for each in healthy["sites"])
    broken = json.loads(shown(capsys, quantized, *again, "--file", str(tmp_path / "device.onnx")))
    assert [each["node"] for each in broken["sites"] if each["differ"]] == ["conv2d_1"]
    assert broken["in_runtime"][0] == "conv2d_1"


def test_mistakes_about_causes_are_one_sentence(
    run: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--causes", "--model", "test_inspect:given", "--file", str(tmp_path / "none.onnx")]
    report = json.loads((run / "report.json").read_text())
    report["causes"] = None
    silent = tmp_path / "silent"
    shutil.copytree(run, silent)
    (silent / "report.json").write_text(json.dumps(report))
    for arguments, said in (
        ([quantized, *missing], "there is no file"),
        ([quantized, "--causes", "--why", "conv2d"], "give one of --pass, --why, --bisect and --causes"),
        ([quantized, "--causes", "--file", "other.onnx"], "give these too"),
        ([silent, "--causes"], "give --model, and --calibration, to measure it now"),
        ([quantized, "--causes", "--model", "nothing_like_it:given"], "nothing_like_it"),
    ):
        assert main(["inspect", *map(str, arguments)]) != 0
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "report.json").unlink(), "report.json"),
        (lambda folder: (folder / "report.json").write_text('{"recipe": '), "report.json"),
        (lambda folder: (folder / "report.json").write_text('{"version": "99.0", "metric": 1}'), "graphopt 99.0"),
        (lambda folder: shutil.rmtree(folder / "trace"), "trace"),
        (lambda folder: (folder / "trace" / "000_capture.json").write_text("[]"), "000_capture.json"),
        (lambda folder: (folder / "trace" / "000_capture.txt").unlink(), "000_capture"),
        (lambda folder: shutil.rmtree(folder), "run"),
    ],
)
def test_a_run_directory_that_is_not_whole_is_one_sentence(
    run: Path, damage: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    damage(folder)
    for more in ([], ["--causes"], ["--why", "conv2d"], ["--pass", "capture"]):
        assert main(["inspect", str(folder), *more]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("graphopt: ") and said in error and "\n" not in error


def test_names_in_causes_mean_no_harm(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(quantized, folder)
    data = json.loads((folder / "report.json").read_text())
    for each in data["causes"]["sites"]:
        each["node"], each["module"], each["misfits"] = HARM, "../../etc", {HARM: 9.0}
    data["causes"]["remedies"] = [
        {"site": HARM, "change": HARM, "how": HARM, "error_ratio": 0.5, "size_ratio": 1.0}
    ]
    (folder / "report.json").write_text(json.dumps(data))
    for more in ([], ["--causes"]):
        assert "\x1b" not in shown(capsys, folder, *more)
    graphopt.report.Report.read(folder).save_html(tmp_path / "report.html")
    found: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append(tag)

    Tags().feed((tmp_path / "report.html").read_text())
    assert found.count("script") == 2 and found.count("a") > 2
