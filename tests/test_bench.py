"""The benchmark's own arithmetic: kernels counted, errors, sizes, limits, tables, the commands' manners."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

BENCH = Path(__file__).resolve().parent.parent / "tools" / "bench"
AGAINST_PEERS = {"quantity": "q", "against": "best"}
NAMED, BY_KL = {"quantity": "q", "against": "nncf"}, {"quantity": "q", "against": "kl"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts' modules, imported as the scripts import them, and forgotten afterwards."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "children"))
    names = ("machine", "limits", "methods", "tasks", "records", "table", "protocol", "kernels", "measure")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: importlib.import_module(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return modules


def _record(method: str, figures: dict[str, float], run: str = "r1", vnni: bool = True) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": run,
        "date": "2030-01-01",
        "commit": "abc",
        "task": "resnet50",
        "method": method,
        "machine": {"cpu": "a CPU", "vnni": vnni, "cores": 2},
        "threads": 1,
        "rounds": 10,
        "versions": {"onnxruntime": "1.0"},
        "figures": figures,
        "detail": {},
        "error": None if figures else "it broke",
    }


def _convolution(quantized: bool) -> onnx.ModelProto:
    """x [1, 4, 8, 8] -> conv 1×1 -> y; with Q/DQ on input, weight and output where `quantized`."""
    weight = np.random.default_rng(0).integers(-100, 100, (4, 4, 1, 1)).astype(np.int8)
    constants = [
        numpy_helper.from_array(np.array(0.05, np.float32), "scale"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        numpy_helper.from_array(np.array(0, np.int8), "weight_zero"),
    ]
    if quantized:
        constants.append(numpy_helper.from_array(weight, "codes"))
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "weight_zero"], ["w"]),
            helper.make_node("Conv", ["xd", "w"], ["c"]),
            helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["cq"]),
            helper.make_node("DequantizeLinear", ["cq", "scale", "zero"], ["y"]),
        ]
    else:
        constants.append(numpy_helper.from_array(weight.astype(np.float32) * np.float32(0.05), "w"))
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_a_float_convolution_counts_as_unfused(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    onnx.save(_convolution(quantized=False), tmp_path / "m.onnx")
    assert bench["kernels"].count_kernels(str(tmp_path / "m.onnx")) == {
        "integer_kernels": 0,
        "float_kernels": 1,
        "leftover_qdq": 0,
        "unfused": 1,
    }


def test_a_fused_convolution_counts_as_integer_and_borders_do_not_count(
    bench: dict[str, ModuleType], tmp_path: Path
) -> None:
    onnx.save(_convolution(quantized=True), tmp_path / "m.onnx")
    assert bench["kernels"].count_kernels(str(tmp_path / "m.onnx")) == {
        "integer_kernels": 1,
        "float_kernels": 0,
        "leftover_qdq": 0,
        "unfused": 0,
    }


def test_quantization_that_does_not_fuse_is_counted(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    model = _convolution(quantized=True)
    for node in model.graph.node:  # nothing fuses an output that a float operator reads as well
        if node.op_type == "Conv":
            node.output[0] = "float"
            model.graph.node.append(helper.make_node("Erf", ["float"], ["z"]))
        if node.output[0] == "cq":
            node.input[0] = "float"
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4, 8, 8]))
    onnx.save(model, tmp_path / "m.onnx")
    counts = bench["kernels"].count_kernels(str(tmp_path / "m.onnx"))
    assert counts["float_kernels"] == 1
    assert counts["leftover_qdq"] > 0


def test_sqnr_is_ten_log_of_the_power_ratio(bench: dict[str, ModuleType]) -> None:
    reference = [[np.full((2, 3), 10.0, np.float32), np.arange(3)]]
    other = [[np.full((2, 3), 11.0), np.arange(3) + 1]]
    assert bench["measure"].sqnr_db(reference, other) == pytest.approx(20)
    assert bench["measure"].sqnr_db(reference, reference) is None


def test_stripped_size_leaves_out_metadata_and_counts_external_data(
    bench: dict[str, ModuleType], tmp_path: Path
) -> None:
    plain = _convolution(quantized=False)
    annotated = _convolution(quantized=False)
    annotated.doc_string = "d" * 500
    annotated.graph.node[0].metadata_props.add(key="source", value="v" * 1000)
    onnx.save(plain, tmp_path / "plain.onnx")
    onnx.save(annotated, tmp_path / "annotated.onnx")
    measure = bench["measure"]
    plain_bytes = (tmp_path / "plain.onnx").stat().st_size
    assert measure.file_bytes(str(tmp_path / "annotated.onnx")) > plain_bytes + 1500
    assert measure.stripped_bytes(str(tmp_path / "annotated.onnx")) == plain_bytes
    onnx.save(
        plain, tmp_path / "split.onnx", save_as_external_data=True, location="split.data", size_threshold=0
    )
    both = sum((tmp_path / name).stat().st_size for name in ("split.onnx", "split.data"))
    assert measure.file_bytes(str(tmp_path / "split.onnx")) == both


@pytest.mark.parametrize(
    ("limit", "records", "reached"),
    [
        ({"quantity": "q", "at_most": 2}, {"graphopt": {"q": 2}}, True),
        ({"quantity": "q", "at_most": 2}, {"graphopt": {"q": 2.1}}, False),
        ({"quantity": "q", "at_most": 2}, {"graphopt": {"other": 1}}, False),
        ({"quantity": "q", "at_most": 2}, {"graphopt": {}}, False),
        ({"quantity": "q", "at_most": 2}, {"fp32": {"q": 1}}, None),
        ({**AGAINST_PEERS, "at_most": 1.5}, {"graphopt": {"q": 3}, "a": {"q": 2}, "b": {"q": 9}}, True),
        ({**AGAINST_PEERS, "at_most": 1.4}, {"graphopt": {"q": 3}, "a": {"q": 2}, "b": {"q": 9}}, False),
        ({**AGAINST_PEERS, "at_most": 9}, {"graphopt": {"q": 3}, "fp32": {"q": 2}, "a": {}}, None),
        ({**NAMED, "at_most": 1.5}, {"graphopt": {"q": 3}, "nncf": {"q": 2}, "b": {"q": 1}}, True),
        ({**NAMED, "at_most": 1.4}, {"graphopt": {"q": 3}, "nncf": {"q": 2}, "b": {"q": 9}}, False),
        ({**NAMED, "at_most": 9}, {"graphopt": {"q": 3}, "nncf": {}, "b": {"q": 9}}, None),
        ({**BY_KL, "at_most": 1.5}, {"graphopt": {"q": 3}, "a": {"q": 1, "kl": 2}, "b": {"q": 2, "kl": 1}}, True),
        ({**BY_KL, "at_most": 1.5}, {"graphopt": {"q": 3}, "a": {"q": 1, "kl": 1}, "b": {"q": 2, "kl": 2}}, False),
    ],
)
def test_limits(
    bench: dict[str, ModuleType],
    limit: dict[str, Any],
    records: dict[str, dict[str, float]],
    reached: bool | None,
) -> None:
    group = {method: _record(method, figures) for method, figures in records.items()}
    assert bench["limits"].check(bench["limits"].Limit(**limit), group).reached is reached


def test_a_limit_for_vnni_is_not_checked_without_it(bench: dict[str, ModuleType]) -> None:
    limit = bench["limits"].Limit("q", 1, needs_vnni=True)
    verdict = bench["limits"].check(limit, {"graphopt": _record("graphopt", {"q": 0.5}, vnni=False)})
    assert (verdict.reached, verdict.why) == (None, "this CPU has no VNNI")


def _table(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "table.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_table_shows_the_last_run_and_its_limits(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    others = {"total_seconds": 10.0, "peak_bytes": 1e9}
    for run, ours_ms in (("r1", 99.0), ("r2", 21.0)):
        bench["records"].append(
            results,
            [
                _record("fp32", {"latency_ms": 80.0, "latency_ratio": 1.0}, run),
                _record("graphopt", {"latency_ms": ours_ms, "latency_ratio": ours_ms / 80, **others}, run),
                _record("nncf", {"latency_ms": 20.0, "latency_ratio": 0.25, **others}, run),
                _record("onnxruntime", {}, run),
            ],
        )
    assert [record["run"] for record in bench["records"].read(results)] == ["r1"] * 4 + ["r2"] * 4
    last = _table(results, "--check")
    assert last.returncode == 0, last.stderr
    assert "| graphopt | 21.00 | 0.263 |" in last.stdout
    assert "99.00" not in last.stdout
    assert "- reached: latency_ms ÷ the best peer's ≤ 1.05: 1.050" in last.stdout
    assert "onnxruntime failed: it broke" in last.stdout
    every = _table(results, "--all", "--check")
    assert every.returncode == 1
    assert "- MISSED: latency_ms ÷ the best peer's ≤ 1.05: 4.950" in every.stdout


def test_the_page_needs_a_sentence_for_every_miss(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    results, reasons, page = tmp_path / "results.jsonl", tmp_path / "reasons.toml", tmp_path / "peers.md"
    others = {"total_seconds": 10.0, "peak_bytes": 1e9}
    bench["records"].append(
        results,
        [
            _record("fp32", {"latency_ms": 80.0}),
            _record("graphopt", {"latency_ms": 40.0, **others}),
            _record("nncf", {"latency_ms": 20.0, **others}),
        ],
    )
    command = (results, "--docs", page, "--reasons", reasons)
    reasons.write_text("")
    silent = _table(*command)
    assert silent.returncode == 1 and not page.exists()
    assert "must say why" in silent.stderr and "resnet50: latency_ms ÷ the best peer's" in silent.stderr
    reasons.write_text('[resnet50]\nlatency_ms = "It was a bad day."\n')
    assert _table(*command).returncode == 0
    assert "(nncf: 20). It was a bad day." in page.read_text()
    for text, message in (
        ("[", "is not TOML"),
        ("resnet50 = 1", "a sentence for each quantity"),
        ('[resnet50]\nlatncy = "x"', "resnet50.latncy is no limit"),
    ):
        reasons.write_text(text)
        done = _table(*command)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"), [("{", ":1 is not JSON"), ('{"schema": 0}', ":1 is not a record of schema 1")]
)
def test_a_file_that_is_not_ours_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(text + "\n")
    done = _table(tmp_path / "bad.jsonl")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_runner_lists_tasks_and_methods_without_any_package(bench: dict[str, ModuleType]) -> None:
    # -S: no site-packages, as on a machine where nothing is installed yet.
    command = [sys.executable, "-S", str(BENCH / "run.py")]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in listed for name in (*bench["tasks"].TASKS, *bench["methods"].METHODS))
    unknown = subprocess.run([*command, "--task", "nothing"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "invalid choice: 'nothing'" in unknown.stderr


def test_every_method_has_its_script_and_pinned_requirements(bench: dict[str, ModuleType]) -> None:
    for method in bench["methods"].METHODS.values():
        assert (BENCH / "children" / method.script).exists()
        if method.environment != bench["methods"].OWN:
            lines = (BENCH / "peers" / f"{method.environment}.txt").read_text().splitlines()
            pins = [line for line in lines if line and not line.startswith("#")]
            assert pins
            assert all("==" in line for line in pins)


def test_settled_batch_norms_normalise_the_data(language: dict[str, ModuleType]) -> None:
    large = language["made.large"]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    images = torch.cat(large.textured_images(8, 32, seed=3))
    assert images.shape == (8, 3, 32, 32)
    large.settle_batch_norms(model, [images])
    with torch.no_grad():
        normalised = model(images)
    assert not model.training
    assert math.isclose(float(normalised.std()), 1, abs_tol=0.05)
    assert math.isclose(float(normalised.mean()), 0, abs_tol=0.05)


def test_the_machine_is_described_as_json(bench: dict[str, ModuleType]) -> None:
    described = json.loads(json.dumps(bench["machine"].describe()))
    assert described["cores"] >= 1
    assert described["vnni"] in (True, False, None)


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the outlier and equalization benchmarks."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCH))
    names = (
        "language", "language.model", "language.outliers", "language.corpus", "made", "made.digits", "made.large",
        "made.sentences", "made.kept", "outliers", "scale",
    )  # fmt: skip
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: importlib.import_module(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return modules


def test_planted_outliers_are_there_and_leave_the_function(language: dict[str, ModuleType]) -> None:
    torch.manual_seed(0)
    shape = language["language.model"].Shape(width=32, hidden=48, layers=2, heads=4, groups=2, context=16)
    model = language["language.model"].LanguageModel(shape).eval()
    ids = torch.randint(256, (4, 16))
    planted = language["language.outliers"].plant(model, ids, count=2)
    with torch.no_grad():
        expected, found = model(ids), planted(ids)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    gains = planted.norm.weight
    assert (gains.abs() > 19).sum() == 2 and gains.abs().median() < 2


def test_an_unbalanced_network_computes_the_same(language: dict[str, ModuleType]) -> None:
    torch.manual_seed(0)
    model = language["made.digits"].DepthwiseCNN().eval()
    unbalanced = language["made.digits"].unbalance(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(unbalanced(x), model(x), rtol=1e-4, atol=1e-4)
    ranges = unbalanced.body[0].weight.abs().amax((1, 2, 3)) * unbalanced.body[1].weight.abs()
    assert ranges.max() > 50 * ranges.min()


def test_the_text_is_split_by_file_and_the_same_each_time(language: dict[str, ModuleType]) -> None:
    corpus = language["language.corpus"]
    one, again = corpus.read(), corpus.read()
    assert torch.equal(one.train, again.train) and len(one.held_out) > 10_000
    pieces = corpus.even_pieces(one.held_out, 3, 16)
    assert pieces.shape == (3, 16) and pieces.dtype == torch.int64


@pytest.mark.slow
@pytest.mark.parametrize("command", ["outliers.py --tiny", "scale.py --layers 2 --width 64"])
def test_the_benchmarks_of_spaces_run(command: str) -> None:
    script, *options = command.split()
    done = subprocess.run([sys.executable, str(BENCH / script), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("| ") and done.stdout.count("\n") >= 3


def test_kl_and_cosine_are_what_their_formulas_say(bench: dict[str, ModuleType]) -> None:
    measure = bench["measure"]
    random = np.random.default_rng(0)
    reference, other = ([[random.standard_normal((2, 3, 5))] for _ in range(2)] for _ in range(2))
    exact = torch.log_softmax(torch.tensor(np.stack([each[0] for each in reference])), -1)
    made = torch.log_softmax(torch.tensor(np.stack([each[0] for each in other])), -1)
    wanted = torch.nn.functional.kl_div(made, exact, log_target=True, reduction="sum") / 12
    assert measure.divergence(reference, other) == pytest.approx(float(wanted))
    assert measure.divergence(reference, reference) == 0
    mean, least = measure.cosine(reference, other)
    rows = torch.cosine_similarity(*(torch.tensor(np.stack([x[0] for x in y])) for y in (reference, other)), dim=-1)
    assert mean == pytest.approx(float(rows.mean())) and least == pytest.approx(float(rows.min()))
    assert measure.judge("cosine", reference, reference)["cosine_distance"] == pytest.approx(0, abs=1e-12)


def test_words_of_signatures_and_docstrings(language: dict[str, ModuleType], tmp_path: Path) -> None:
    sentences = language["made.sentences"]
    assert sentences.words("readFile_names HTTPServer2") == ["read", "file", "names", "http", "server", "2"]
    ids = sentences.tokens("open zz", {"open": 300})
    assert ids[:3] == [300, 1 + ord("z"), 1 + ord("z")] and len(ids) == sentences.LENGTH and ids[-1] == 0
    (tmp_path / "m.py").write_text('def f(self, key):\n    """First.\n\n    Second."""\n\n\ndef g(): pass\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    assert sentences.documented(tmp_path) == [("m f key", "First.")]
