"""`graphopt.optimize` and `graphopt.load`: arguments, choices, determinism, and what a saved run gives back."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import made_up_passes as made
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import Budget, GraphoptError, Result, passes
from graphopt.api import choose_recipe
from graphopt.errors import NotExpressible
from graphopt.ir import dialect
from graphopt.pipeline import builtin
from graphopt.rundir import RUN_FILES
from graphopt.target import Target


class Small(nn.Module):
    """A convolution with its batch norm, a linear, and a mask with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        logits = self.head(x) if scale is None else self.head(x) * scale
        return {"logits": logits, "best": logits.argmax(1)}


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


EXAMPLE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def batches(count: int = 4) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, 8, 8, generator=generator),) for _ in range(count)]


@pytest.fixture(scope="module")
def result() -> Result:
    return graphopt.optimize(small(), EXAMPLE, calibration=batches(), evaluate=lambda model: 50.0)


def has_codes(result: Result) -> bool:
    return any(weight.dtype == torch.int8 for weight in result.program.weights.values())


# What comes out --------------------------------------------------------------------------------------------------


def test_the_result_is_called_as_the_model_was(result: Result) -> None:
    (image,) = EXAMPLE
    expected = small()(image)
    for found in (result(image), result(image=image), result.module(image)):
        assert list(found) == ["logits", "best"]
        noise = (found["logits"] - expected["logits"]).square().sum() / expected["logits"].square().sum()
        assert noise < 1e-2
    assert has_codes(result) and isinstance(result.module, nn.Module) and not result.module.training
    assert inspect.signature(Small.forward).parameters.keys() >= set(result.program.signature.parameters)


def test_the_module_can_be_copied_and_run_without_gradients(result: Result) -> None:
    twin = copy.deepcopy(result.module)
    with torch.no_grad():
        assert torch.equal(twin(*EXAMPLE)["logits"], result(*EXAMPLE)["logits"])
    with torch.inference_mode():
        assert torch.equal(twin(*EXAMPLE)["logits"], result(*EXAMPLE)["logits"])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(*EXAMPLE)["logits"], result(*EXAMPLE)["logits"])


def test_two_runs_are_the_same_to_the_bit() -> None:
    model = small()

    def run(calibration: Any) -> Result:
        return graphopt.optimize(model, EXAMPLE, calibration=calibration, seed=3)

    torch.manual_seed(11)
    first = run(batches())
    torch.manual_seed(22)
    state = torch.random.get_rng_state()
    second = run(iter(batches()))
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's generator is left alone
    assert [record.text for record in first.trace] == [record.text for record in second.trace]
    pairs = zip(first.program.weights.items(), second.program.weights.items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert [record.error for record in first.trace] == [record.error for record in second.trace]


def test_the_model_is_left_as_it_was() -> None:
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    graphopt.optimize(model, EXAMPLE, calibration=batches())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_kind_of_model(tmp_path: Path) -> None:
    model = small()
    exported = torch.export.export(model, EXAMPLE)
    torch.export.save(exported, tmp_path / "model.pt2")
    expected = model(*EXAMPLE)["logits"]
    for each in (model, exported, exported.module(), tmp_path / "model.pt2", str(tmp_path / "model.pt2")):
        example = EXAMPLE if isinstance(each, nn.Module) else None
        found = graphopt.optimize(each, example, recipe="exact")
        torch.testing.assert_close(found(*EXAMPLE)["logits"], expected)
        assert found.trace["fold_batch_norm"].changed and found.trace["fold_batch_norm"].error is not None
    program = graphopt.capture(model, EXAMPLE)
    before = str(program)
    found = graphopt.optimize(program, recipe="exact")
    assert str(program) == before != str(found.program) and found.original is program


def test_inference_mode_around_it_changes_nothing() -> None:
    model = small()
    expected = graphopt.optimize(model, EXAMPLE, "int8_static", calibration=batches())
    with torch.inference_mode():
        found = graphopt.optimize(model, EXAMPLE, "int8_static", calibration=batches())
    assert torch.equal(found(*EXAMPLE)["logits"], expected(*EXAMPLE)["logits"])
    assert not any(weight.is_inference() for weight in found.program.weights.values())


# Which recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "calibrated", "name", "notes"),
    [
        (None, True, "int8", ["recipe int8 was chosen because calibration data was given"]),
        (None, False, "int8_dynamic", ["recipe int8_dynamic was chosen because no calibration data was given"]),
        ("int8", True, "int8", []),
        ("int8", False, "int8_dynamic", ["recipe int8 needs calibration data; int8_dynamic was run instead"]),
        ("exact", False, "exact", []),
        (builtin("exact"), True, "exact", []),
        ([passes.Canonicalize()], False, "custom", []),
    ],
)
def test_the_choice_is_said(recipe: Any, calibrated: bool, name: str, notes: list[str]) -> None:
    chosen, found = choose_recipe(recipe, calibrated)
    assert (chosen.name, found) == (name, notes)


def test_int8_without_data_runs_dynamically() -> None:
    found = graphopt.optimize(small(), EXAMPLE, recipe="int8")
    assert "recipe int8 needs calibration data; int8_dynamic was run instead" in found.notes
    assert found.recipe.name == "int8_dynamic" and has_codes(found)
    assert made.calls(found.program, "graphopt.dynamic_scale")


def test_a_list_of_passes_and_an_empty_one() -> None:
    found = graphopt.optimize(small(), EXAMPLE, recipe=[passes.FoldBatchNorm()])
    assert [record.key for record in found.trace] == ["capture", "canonicalize", "fold_batch_norm"]
    assert len(graphopt.optimize(small(), EXAMPLE, recipe=[]).trace) == 1


def test_a_rejected_pass_is_a_note() -> None:
    found = graphopt.optimize(made.net(), recipe=[made.LieByRelu()])
    (note,) = [note for note in found.notes if "rejected" in note]
    assert note.startswith("lie_by_relu was rejected: it changed the outputs by ")


def test_globs_that_mean_nothing_are_notes() -> None:
    found = graphopt.optimize(made.net(), recipe=[made.Coarse(skip=("hed",))])
    assert found.notes == ["skip='hed' matches no node, weight or module"]


# What is refused -------------------------------------------------------------------------------------------------


class NeverRuns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model was run before the arguments were checked")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"recipe": "int9"}, "there is no recipe called 'int9', did you mean 'int8'?"),
        ({"target": "onnx"}, "there is no target called 'onnx'"),
        ({"target": None}, "there is no target called 'None'"),
        ({"budget": {"size_ratio": 0.5}}, "budget must be a graphopt.Budget(...), not dict"),
        ({"evaluate": 0.5}, "evaluate must be a function, not float"),
        ({"loss": "mse"}, "loss must be a function, not str"),
        ({"seed": 1.5}, "seed must be a whole number of 64 bits, not 1.5"),
        ({"seed": 2**70}, "seed must be a whole number of 64 bits"),
        ({"calibration": EXAMPLE[0]}, "put it in a list: calibration=[batch]"),
        ({"calibration": 3}, "calibration must be an iterable of inputs, not int"),
        (
            {"recipe": [passes.QuantizeStatic()]},
            "the pass quantize_static needs calibration; pass calibration= to optimize",
        ),
        ({"run_dir": __file__}, "is a file; name a folder"),
        ({"run_dir": "new", "target": Target("mine", "onyx")}, "there is no backend called 'onyx', did you mean"),
        ({"run_dir": Path(__file__).parent}, "is not empty and holds no report.json"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_any_work(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        graphopt.optimize(NeverRuns(), EXAMPLE, **arguments)
    assert sentence in str(caught.value)


def test_a_program_brings_its_own_inputs() -> None:
    with pytest.raises(GraphoptError, match="a captured Program has its own example inputs and shapes"):
        graphopt.optimize(made.net(), EXAMPLE)


def test_needs_of_required_passes_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Asks(made.Nothing):
        requires: ClassVar[tuple[str, ...]] = ("quantize_static",)

    with pytest.raises(GraphoptError, match="the pass quantize_static, which asks requires, needs calibration"):
        graphopt.optimize(NeverRuns(), EXAMPLE, recipe=[Asks()])


@pytest.mark.parametrize("empty", [[], iter(())], ids=["list", "iterator"])
def test_empty_calibration_data(empty: Any) -> None:
    with pytest.raises(GraphoptError, match="the calibration data is empty"):
        graphopt.optimize(small(), EXAMPLE, calibration=empty)


# The metric ------------------------------------------------------------------------------------------------------


def run_metric(evaluate: Any) -> Result:
    return graphopt.optimize(made.net(), recipe=[made.Coarse()], evaluate=evaluate)


def test_the_metric_is_taken_before_and_after() -> None:
    seen: list[nn.Module] = []

    def evaluate(model: nn.Module) -> Tensor:
        seen.append(model)
        assert not model.training and not torch.is_grad_enabled()
        return torch.tensor(90.0 - len(seen))

    found = run_metric(evaluate)
    assert (found.original_metric, found.metric) == (89.0, 88.0) and len(seen) == 2
    assert found.report.metric.difference == -1.0


@pytest.mark.parametrize(
    ("evaluate", "sentence"),
    [
        (lambda model: float("nan"), "evaluate returned NaN on the original model; return a finite number"),
        (lambda model: float("inf"), "evaluate returned infinity on the original model"),
        (lambda model: None, "evaluate failed on the original model: TypeError: float() argument"),
        (lambda model: torch.ones(2), "evaluate failed on the original model"),
        (lambda model: 1 / 0, "evaluate failed on the original model: ZeroDivisionError: division by zero"),
        (lambda model: model(torch.zeros(1)), "evaluate failed on the original model"),
        (lambda model: model.double() and 1.0, "evaluate changed the weights of the original model; let it"),
        (lambda model: [p.data.add_(1) for p in model.parameters()] and [p.add_(1) for p in model.parameters()] and 1.0,
         "evaluate changed the weights of the original model"),
    ],
)  # fmt: skip
def test_a_metric_that_fails(evaluate: Any, sentence: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        run_metric(evaluate)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_metric_that_draws_numbers_draws_the_same_for_both_models() -> None:
    def run(seed: int) -> Result:
        metric = lambda model: float(torch.rand(()))  # noqa: E731
        return graphopt.optimize(made.net(), recipe=[made.Coarse()], evaluate=metric, seed=seed)

    torch.manual_seed(5)
    first = run(1)
    state = torch.random.get_rng_state()
    again, other = run(1), run(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.original_metric == first.metric == again.metric != other.metric


def test_a_metric_that_fails_later_says_on_what() -> None:
    values: Iterator[float] = iter([1.0, float("nan")])
    with pytest.raises(GraphoptError, match="evaluate returned NaN on the optimized model"):
        run_metric(lambda model: next(values))


def test_a_metric_may_train_a_copy() -> None:
    assert (
        run_metric(lambda model: float(copy.deepcopy(model).double()(torch.zeros(5, 6).double())[0].sum() * 0)).metric
        == 0
    )


def test_interruption_and_our_own_errors_pass_through() -> None:
    def interrupt(model: nn.Module) -> float:
        raise KeyboardInterrupt

    def refuse(model: nn.Module) -> float:
        raise GraphoptError("no data")

    with pytest.raises(KeyboardInterrupt):
        run_metric(interrupt)
    with pytest.raises(GraphoptError, match=r"^no data$"):
        run_metric(refuse)


def test_the_budget_is_judged_in_the_report() -> None:
    values = iter([90.0, 80.0])
    found = graphopt.optimize(
        made.net(),
        recipe=[made.Coarse()],
        evaluate=lambda model: next(values),
        budget=Budget(metric_drop=1, macs_ratio=1),
    )
    assert found.report.exceeded == ["budget.metric_drop ≤ 1 does not hold: it is 10"]


# A run on disk ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for a target without a backend, so that nothing depends on one."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    values = iter([90.0, 89.0])
    graphopt.optimize(
        small(),
        EXAMPLE,
        recipe=[passes.FoldBatchNorm(), passes.QuantizeStatic(observer="minmax", skip=("head",))],
        calibration=batches(),
        evaluate=lambda model: next(values),
        budget=Budget(size_ratio=0.5),
        target=Target("made-up", backend="", operators=graphopt.pipeline.target("onnxruntime-cpu").operators),
        run_dir=folder,
    )
    return folder


def test_a_run_directory_is_complete(run_dir: Path) -> None:
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES - {"model.onnx", "model.onnx.data"}
    assert (run_dir / "trace" / "002_fold_batch_norm.txt").exists()
    data = json.loads((run_dir / "report.json").read_text())
    (note,) = [note for note in data["notes"] if note.startswith("no model.onnx was written: ")]
    assert note.endswith("the target 'made-up' has no backend here that could write a file")


class Lowering:
    """A backend that fails with a given error after it has written half of a file."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def export(self, program: Any, path: Path, baseline: Any, measure: bool) -> Any:
        path.write_bytes(b"half")
        path.with_name("model.onnx.data").write_bytes(b"half")
        raise type(self.error)(str(self.error).replace("PATH", str(path)))


def exact_run(folder: Path | None, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Result:
    """Optimize for a target whose backend fails with `error`."""
    for module in ("api", "result"):
        monkeypatch.setattr(f"graphopt.{module}.backend", lambda name: Lowering(error))
    return graphopt.optimize(made.net(), recipe=[made.Coarse()], run_dir=folder)


def test_what_a_target_cannot_express_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = exact_run(tmp_path / "run", monkeypatch, NotExpressible("no kernel for rfft2 in PATH"))
    assert found.notes[-1] == f"no model.onnx was written: no kernel for rfft2 in {tmp_path / 'run' / 'model.onnx'}"
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES - {"model.onnx", "model.onnx.data"}


@pytest.mark.parametrize("error", [GraphoptError("the checker refuses the file"), RuntimeError("a defect")], ids=str)
def test_any_other_failure_of_an_export_is_raised_and_leaves_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)) as caught:
        exact_run(tmp_path / "run", monkeypatch, error)
    if isinstance(error, GraphoptError):
        assert str(caught.value) == f"the checker refuses the file; the run was not saved to {tmp_path / 'run'}"
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_result_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = exact_run(None, monkeypatch, GraphoptError("the checker refuses the file"))
    found.notes.append("no model.onnx was written: an earlier reason")
    notes = list(found.notes)
    with pytest.raises(GraphoptError):
        found.save(tmp_path / "run")
    assert found.notes == notes and found.exported is None


def test_a_run_reads_back(run_dir: Path) -> None:
    found = graphopt.load(run_dir)
    assert [str(each) for each in found.recipe.passes] == [
        "fold_batch_norm",
        "quantize_static(skip=['head'], observer='minmax')",
    ]
    assert (found.original_metric, found.metric, found.budget) == (90.0, 89.0, Budget(size_ratio=0.5))
    assert found.target.name == "made-up" and any("'made-up' is not installed here" in note for note in found.notes)
    assert found.trace[-1].text == str(found.program)
    with pytest.raises(GraphoptError, match="the target 'made-up' has no backend here"):
        found.export(run_dir.parent / "x.onnx")


def test_outputs_trace_and_report_are_the_same_after_loading(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "run")
    found = graphopt.load(tmp_path / "run")
    for x in (EXAMPLE[0], torch.randn(2, 3, 8, 8)):
        a, b = result(x), found(image=x)
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert found.trace.records == result.trace.records
    assert found.report.to_json() == result.report.to_json()
    assert found.recipe == result.recipe and found.target == result.target and found.notes == result.notes


def test_a_moved_run_knows_where_it_stands(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    found = graphopt.load(tmp_path / "elsewhere")
    assert found.exported is not None and found.exported.path == tmp_path / "elsewhere" / "model.onnx"
    assert found.exported.path.exists()


def test_saving_twice_adds_no_notes(run_dir: Path, tmp_path: Path) -> None:
    found = graphopt.load(run_dir)
    notes = list(found.notes)
    found.save(tmp_path / "again")
    found.save(tmp_path / "again")
    assert sorted(found.notes) == sorted(notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_a_run_directory_with_somebodys_file_is_kept(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "notes.md").write_text("mine")
    with pytest.raises(GraphoptError, match=r"holds notes\.md, not written by graphopt"):
        graphopt.optimize(NeverRuns(), EXAMPLE, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "notes.md").read_text() == "mine"


def test_an_interrupted_save_leaves_the_old_run(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    before = (tmp_path / "run" / "report.json").read_bytes()
    found = graphopt.load(tmp_path / "run")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(found.trace), "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        found.save(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "report.json").read_bytes() == before


@pytest.mark.parametrize("name", ["model.pt2", "recipe.yaml", "report.json", "trace/002_fold_batch_norm.json", "trace"])
@pytest.mark.parametrize("how", ["missing", "empty", "garbage"])
def test_a_damaged_run_is_one_sentence(run_dir: Path, tmp_path: Path, name: str, how: str) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / name
    if path.is_dir():
        shutil.rmtree(path)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "empty" else b"\x00\xffgarbage")
    with pytest.raises(GraphoptError) as caught:
        graphopt.load(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(GraphoptError, match=r"is no run directory: it holds no report\.json"):
            graphopt.load(path)


def test_a_recipe_that_is_not_installed_does_not_hide_the_model(tmp_path: Path) -> None:
    graphopt.optimize(made.net(), recipe=[made.Coarse()], run_dir=tmp_path / "run")
    found = graphopt.load(tmp_path / "run")
    assert found.recipe.passes == () and found.recipe.name == "custom"
    assert any(note.startswith("the recipe cannot be run again here: ") and "'coarse'" in note for note in found.notes)
    assert found(torch.zeros(5, 6))[0].shape == (5, 6)


def test_the_size_of_the_float_file_is_not_lost_by_loading(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "run")
    found = graphopt.load(tmp_path / "run")
    assert found.exported is not None
    size = found.exported.baseline_size_bytes
    assert size is not None and found.export(tmp_path / "new.onnx", measure=False).baseline_size_bytes == size


def test_the_dialect_is_what_runs(result: Result) -> None:
    targets = {node.target for node in result.program.nodes}
    assert {dialect.quantize, dialect.dequantize} <= targets
