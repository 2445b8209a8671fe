"""Users' mistakes and the machine's refusals: one clear sentence each, status 2, no stack trace, nothing half written.

Each case goes through the API, where it raises GraphoptError, and where the command line can meet it, through that too.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_models
import numpy as np
import pytest
import torch
from cli_models import BATCH, images

import graphopt
from graphopt import Budget, GraphoptError
from graphopt.backends.onnx import backend, latency
from graphopt.cli import main
from graphopt.files import replacing, replacing_folder, write_text
from graphopt.ir import Program
from graphopt.pipeline import Recipe

TESTS = Path(__file__).parent


def everything_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def one_sentence(text: str) -> str:
    """Check that `text` is what a user should see of a mistake, and return it."""
    assert text.startswith("graphopt: "), text
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    assert "defect" not in text, text
    return text


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `graphopt optimize ... -o RUN`, which must fail with one sentence and leave the disk as it was."""

    def run(*arguments: str | Path, output: Path | None = None) -> str:
        before = everything_below(tmp_path)
        capsys.readouterr()
        status = main(["optimize", *(str(each) for each in arguments), "-o", str(output or tmp_path / "run")])
        shown = capsys.readouterr()
        assert status == 2, shown.err
        assert shown.out == ""
        assert everything_below(tmp_path) == before
        return one_sentence(shown.err)

    return run


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured here does not matter, only what happens to it."""
    monkeypatch.setattr(backend, "measure_latency", functools.partial(latency.measure_latency, min_seconds=0.01))


# --- The recipe


@pytest.mark.parametrize(
    ("recipe", "says"),
    [("int9", "there is no recipe called 'int9', did you mean 'int8'?"), ("EXACT!", "there is no recipe called")],
)
def test_unknown_recipe(recipe: str, says: str, refuse: Callable[..., str]) -> None:
    with pytest.raises(GraphoptError) as caught:
        graphopt.optimize(*cli_models.static(), recipe)
    assert says in str(caught.value)
    assert says in refuse("cli_models:static", "--recipe", recipe)


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("quantize_static.obsever=mse", "quantize_static has no option 'obsever', did you mean 'observer'?"),
        ("quantize_static.observer=minmaxx", "quantize_static.observer cannot be 'minmaxx'"),
        ("quantize_statik.observer=mse", "there is no pass called 'quantize_statik', did you mean 'quantize_static'?"),
        ("fold_layer_scale.skip=[a]", "the recipe 'int8' has no pass 'fold_layer_scale'"),
        ("budget.size_ration=1", "a budget has no field 'size_ration', did you mean 'size_ratio'?"),
        ("budget.size_ratio=small", "budget.size_ratio must be a number"),
        ("buget.size_ratio=1", "did you mean 'budget.size_ratio'?"),
        ("sead=1", "--set knows no key 'sead', did you mean 'seed'?"),
        ("seed=many", "--set seed takes a whole number"),
        ("target=3", "--set target takes the name of a target"),
        ("target=onnxruntime-cpux", "there is no target called 'onnxruntime-cpux', did you mean 'onnxruntime-cpu'?"),
        ("seed", "--set takes KEY=VALUE, not 'seed'"),
        ("seed=*a", "anchors and aliases are not allowed"),
        ("seed=[", "the value of --set seed is not valid YAML"),
    ],
)
def test_wrong_settings(assignment: str, says: str, samples: Path, refuse: Callable[..., str]) -> None:
    assert says in refuse("cli_models:static", "--recipe", "int8", "--calibration", samples, "--set", assignment)


def test_wrong_fields_in_python() -> None:
    with pytest.raises(GraphoptError, match=r"has no option 'obsever', did you mean 'observer'\?"):
        Recipe.from_yaml("passes: [quantize_static: {obsever: mse}]")
    with pytest.raises(GraphoptError, match=r"did you mean 'size_ratio'\?"):
        Budget().with_bound("size_ration", 1.0)
    with pytest.raises(GraphoptError, match="call it to construct it"):
        graphopt.optimize(*cli_models.static(), recipe=[graphopt.passes.Canonicalize])
    with pytest.raises(GraphoptError, match="needs calibration"):
        graphopt.optimize(*cli_models.static(), recipe=[graphopt.passes.QuantizeStatic()])


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES = {
    "unknown key": ("passses: [canonicalize]", "unknown key 'passses', did you mean 'passes'?"),
    "unknown pass": ("passes: [canonicalise]", "did you mean 'canonicalize'?"),
    "unknown option": ("passes: [quantize_static: {skipp: [a]}]", "did you mean 'skip'?"),
    "wrong type": ("passes: [quantize_static: {skip: 3}]", "quantize_static.skip cannot be 3"),
    "no passes": ("name: a", "needs `passes`"),
    "a list": ("- canonicalize", "must be a mapping"),
    "a number": ("3", "must be a mapping"),
    "empty": ("", "must be a mapping"),
    "two keys in an entry": ("passes: [{canonicalize: {}, fold_batch_norm: {}}]", "an entry is a pass name"),
    "billion laughs": (BOMB, "anchors and aliases are not allowed"),
    "duplicate key": ("passes: [canonicalize]\npasses: [fold_batch_norm]", "the key 'passes' stands twice"),
    "python object": ("passes: [!!python/object/apply:os.getcwd []]", "is not valid YAML"),
    "broken": ("passes: [canonicalize", "is not valid YAML"),
    "control characters": ("passes: [\x00]", "is not valid YAML"),
    "deep": ("passes: " + "[" * 20_000, "is not valid YAML"),
    "large": ("passes: [canonicalize] #" + "x" * (1 << 20), "is larger than 1 MB"),
    "not UTF-8": (b"passes: [\xff]", "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_file(name: str, tmp_path: Path, refuse: Callable[..., str]) -> None:
    text, says = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GraphoptError) as caught:
        graphopt.optimize(*cli_models.static(), recipe=path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert says in refuse("cli_models:static", "--recipe", path)


def test_a_recipe_file_that_is_not_there(tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "cannot read the recipe" in refuse("cli_models:static", "--recipe", tmp_path / "none.yaml")
    assert "cannot read the recipe" in refuse("cli_models:static", "--recipe", f"{tmp_path}/")


# --- Calibration data


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    np.savez(path, x=images(2 * BATCH).numpy())
    return path


def poisoned(value: float) -> torch.Tensor:
    batch = images(BATCH)
    batch[1, 2, 3, 4] = value
    return batch


BATCHES: dict[str, tuple[Any, str]] = {
    "wrong shape": ([(torch.randn(BATCH, 3, 8, 9),)], "x has shape [4, 3, 8, 9], the model was captured with"),
    "wrong rank": ([(torch.randn(3, 8, 8),)], "x has shape [3, 8, 8]"),
    "wrong batch": ([(torch.randn(7, 3, 8, 8),)], "or capture with dynamic_shapes"),
    "the second one": ([(images(BATCH),), (images(3),)], "calibration batch 1: x has shape [3, 3, 8, 8]"),
    "wrong dtype": ([(images(BATCH).double(),)], "x is torch.float64, the model was captured with torch.float32"),
    "integers": ([(images(BATCH).long(),)], "x is torch.int64"),
    "empty": ([], "the calibration data is empty"),
    "an empty generator": (iter(()), "the calibration data is empty"),
    "no samples": ([(torch.empty(0, 3, 8, 8),)], "x has shape [0, 3, 8, 8]"),
    "NaN": ([(poisoned(float("nan")),)], "x holds NaN or infinity"),
    "infinity": ([(poisoned(float("inf")),)], "x holds NaN or infinity"),
    "labels": ([(images(BATCH), torch.zeros(BATCH))], "leave out labels"),
    "wrong name": ([{"image": images(BATCH)}], "do not have the structure"),
    "no tensor": ([("x",)], "x must be a tensor"),
    "one batch": (images(BATCH), "must be an iterable of batches, not one batch"),
    "a number": (3, "must be an iterable of inputs, not int"),
    "text": ("samples.npz", "must be an iterable of inputs, not str"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_calibration_in_python(name: str) -> None:
    batches, says = BATCHES[name]
    with pytest.raises(GraphoptError) as caught:
        graphopt.optimize(*cli_models.static(), recipe="int8", calibration=batches)
    assert says in str(caught.value)


def archive(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def without_names(path: Path) -> None:
    np.savez(path, images(BATCH).numpy())


def damaged(path: Path) -> None:
    """A changed byte among samples: the archive's checksum tells. The last ones fill no batch and are not used."""
    np.savez(path, x=images(16 * BATCH + 1).numpy())
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    np.savez(path, x=images(BATCH).numpy())
    path.write_bytes(path.read_bytes()[:500])


def short(path: Path) -> None:
    """The header promises more samples than there are."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 3, 8, 8)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", buffer.getvalue() + bytes(100))


def foreign(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


X = images(2 * BATCH).numpy()
ARCHIVES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "there is no file"),
    "text": (lambda path: path.write_text("hello"), "is no readable npz file"),
    "nothing": (lambda path: path.write_bytes(b""), "is no readable npz file"),
    "truncated": (truncated, "is no readable npz file"),
    "damaged": (damaged, "cannot be read (Bad CRC-32"),
    "short": (short, "x ends early"),
    "foreign": (foreign, "holds 'readme.txt', which is no array"),
    "no arrays": (archive(), "holds no arrays"),
    "pickled": (archive(x=np.array([{}, None], dtype=object)), "x holds pickled objects, which are not read"),
    "no samples": (archive(x=X[:0]), "x has no samples (shape [0, 3, 8, 8])"),
    "a scalar": (archive(x=np.float32(1)), "x has no samples (shape [])"),
    "too few": (archive(x=X[:3]), "holds 3 samples of x, fewer than a batch of 4"),
    "wrong shape": (archive(x=X[:, :, :5]), "x has shape [8, 3, 5, 8], the model takes [samples, 3, 8, 8]"),
    "wrong rank": (archive(x=X[:, 0]), "x has shape [8, 8, 8]"),
    "wrong dtype": (archive(x=X.astype("float64")), "x is float64, the model takes float32; save x.astype('float32')"),
    "text array": (archive(x=np.array(["a"] * 8)), "the model takes float32"),
    "NaN": (archive(x=np.where(X > 2, np.nan, X).astype("float32")), "x holds NaN or infinity"),
    "wrong name": (archive(xx=X), "has no array for the input 'x', did you mean 'xx'?"),
    "without names": (without_names, "name them: numpy.savez(path, x=...)"),
    "labels": (archive(x=X, labels=np.zeros(8)), "holds 'labels', which the model does not take; it takes x"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_calibration_file(name: str, tmp_path: Path, refuse: Callable[..., str]) -> None:
    write, says = ARCHIVES[name]
    path = tmp_path / "bad.npz"
    write(path)
    message = refuse("cli_models:static", "--calibration", path)
    assert says in message
    assert "bad.npz" in message or "calibration batch" in message


# --- The model


MODELS = {
    "nan_weights": "conv.weight",
    "not_tensors": "",
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_taken(name: str, refuse: Callable[..., str]) -> None:
    with pytest.raises(GraphoptError) as caught:
        graphopt.optimize(*getattr(cli_models, name)())
    assert MODELS[name] in str(caught.value)
    assert MODELS[name] in refuse(f"cli_models:{name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_in_weights_and_inputs(value: float) -> None:
    model, inputs = cli_models.static()
    with torch.no_grad():
        model.head.bias[0] = value  # type: ignore[index, union-attr, operator]
    with pytest.raises(GraphoptError, match=r"head\.bias"):
        graphopt.optimize(model, inputs)
    if value != float("-inf"):  # which masks are made of
        with pytest.raises(GraphoptError, match="NaN or infinity"):
            graphopt.optimize(cli_models.module(), (poisoned(value),))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("cli_models", "MODEL must be package.module:factory or the path of a .pt2 file"),
        ("cli_models:", "MODEL must be package.module:factory"),
        ("../x:y", "MODEL must be package.module:factory"),
        ("no_such_module:make", "there is no module 'no_such_module'"),
        ("cli_models.no:make", "there is no module 'cli_models.no'"),
        ("cli_models:statik", "cli_models has no 'statik', did you mean 'static'?"),
        ("cli_models:number", "cli_models:number returned int"),
        ("cli_models:nothing", "cli_models:nothing returned NoneType; return an nn.Module"),
        ("cli_models:many", "cli_models:many returned a tuple of 4"),
        ("cli_models:raising", "cli_models:raising failed: ValueError: the weights are gone"),
        ("cli_models:leaving", "cli_models:leaving failed: SystemExit: 0"),
        ("cli_models:images", "cli_models:images failed: TypeError"),
        ("cli_models:module", "Small does not say what it eats"),
        ("nowhere.pt2", "there is no file nowhere.pt2"),
    ],
)
def test_a_model_that_is_not_there(model: str, says: str, refuse: Callable[..., str]) -> None:
    assert says in refuse(model)


@pytest.mark.parametrize("text", ["import no_such_dependency", "1 /", "raise RuntimeError('\\x1b[31mred')", "exit(3)"])
def test_a_module_that_does_not_import(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]
) -> None:
    (tmp_path / "broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    message = refuse("broken_module:make")
    assert "importing broken_module failed" in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cli_models:nothing_here", "cli_models has no 'nothing_here'"),
        ("cli_models:number", "cli_models:number is no function"),
        ("cli_models", "--evaluate must be package.module:function"),
        ("cli_models:failing_metric", "evaluate failed on the original model: RuntimeError: no test set"),
        ("cli_models:nan_metric", "evaluate returned NaN on the original model"),
    ],
)
def test_metrics(name: str, says: str, refuse: Callable[..., str]) -> None:
    assert says in refuse("cli_models:static", "--recipe", "exact", "--evaluate", name)


# --- .pt2 files


@pytest.fixture(scope="module")
def archive_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    torch.export.save(torch.export.export(*cli_models.static()), path)
    return path.read_bytes()


class Spring:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def replaced_member(data: bytes, suffix: str, content: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        assert any(name.endswith(suffix) for name in old.namelist())
        for name in old.namelist():
            new.writestr(name, content if name.endswith(suffix) else old.read(name))
    return target.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["torch.save", "plain pickle"])
def test_a_pt2_that_needs_unpickling(
    kind: str, archive_bytes: bytes, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    sprung = tmp_path / "sprung"
    content = saved(Spring(sprung)) if kind == "torch.save" else pickle.dumps(Spring(sprung))
    path = tmp_path / "model.pt2"
    path.write_bytes(replaced_member(archive_bytes, "data/sample_inputs/model.pt", content))
    with pytest.raises(GraphoptError, match=r"model\.pt2 .*trust"):
        graphopt.optimize(str(path))
    message = refuse(path)
    assert "trust" in message
    assert not sprung.exists()


CORRUPT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "text": lambda data: b"not an archive",
    "truncated": lambda data: data[: len(data) // 2],
    "headless": lambda data: data[100:],
    "another archive": lambda data: replaced_member(data, "models/model.json", b"{}"),
    "no JSON": lambda data: replaced_member(data, "models/model.json", b"{"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_pt2(kind: str, archive_bytes: bytes, tmp_path: Path, refuse: Callable[..., str]) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(CORRUPT[kind](archive_bytes))
    with pytest.raises(GraphoptError, match=r"model\.pt2"):
        graphopt.optimize(path)
    assert "model.pt2" in refuse(path)


# --- The disk


def test_a_folder_that_cannot_be(tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("")
    for output, says in (
        (tmp_path / "file" / "run", "is not a folder you may write to"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(GraphoptError, match=says):
            graphopt.optimize(*cli_models.static(), recipe="exact", run_dir=output)
        assert says in refuse("cli_models:static", "--recipe", "exact", output=output)


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    assert "is not empty and holds no report.json" in refuse("cli_models:static", output=tmp_path / "thesis")


@pytest.mark.parametrize("command", [("optimize", "no_module_of_this_name:model"), ("demo",)])
def test_a_run_directory_with_a_foreign_file_is_refused_before_any_work(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("graphopt.demo.model", lambda steps: pytest.fail("trained"))
    for name in ("report.json", "chapter.tex"):
        (tmp_path / name).write_text("mine")
    assert main([*command, "-o", str(tmp_path)]) == 2
    assert "holds chapter.tex, not written by graphopt" in one_sentence(capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chapter.tex", "report.json"]


def test_a_folder_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]
) -> None:
    """Tests may run as root, whom no permission stops."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "is not a folder you may write to" in refuse("cli_models:static")


def full_at(name: str) -> Callable[..., Any]:
    """Return a stand-in for Path.write_text that finds the disk full when it writes a file called like this."""
    original = Path.write_text

    def write(self: Path, *args: Any, **kwargs: Any) -> int:
        if name in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return original(self, *args, **kwargs)

    return write


@pytest.mark.parametrize("name", ["recipe.yaml", "000_capture", "report.json", "report.html"])
def test_a_full_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]) -> None:
    monkeypatch.setattr(Path, "write_text", full_at(name))
    assert "No space left on device" in refuse("cli_models:static", "--recipe", "exact")


def test_a_full_disk_leaves_the_old_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]
) -> None:
    assert main(["optimize", "cli_models:static", "--recipe", "exact", "-o", str(tmp_path / "run")]) == 0
    before = {path: path.read_bytes() for path in everything_below(tmp_path) if path.is_file()}
    monkeypatch.setattr(Path, "write_text", full_at("report.html"))
    assert "No space left on device" in refuse("cli_models:static", "--recipe", "int8_dynamic")
    assert {path: path.read_bytes() for path in everything_below(tmp_path) if path.is_file()} == before


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")

    def file(error: BaseException) -> None:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error

    def folder(error: BaseException) -> None:
        with replacing_folder(tmp_path / "b", "marker") as temporary:
            (temporary / "marker").write_text("half")
            raise error

    for write in (file, folder):
        for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()):
            with pytest.raises((GraphoptError, type(error))):
                write(error)
            assert everything_below(tmp_path) == {tmp_path / "a"}
            assert (tmp_path / "a").read_text() == "old"


def graphopt_process(*arguments: str | Path, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with its temporary files below `folder` too."""
    (folder / "tmp").mkdir()
    path = os.pathsep.join(each for each in (str(TESTS), os.environ.get("PYTHONPATH")) if each)
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder.parent)  # torch makes one on import, among temporary files
    command = [sys.executable, "-m", "graphopt", *(str(each) for each in arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120, **options)


def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    """Every file ends at 4 kB: what writes in C++ meets that too."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = graphopt_process(
        "optimize", "cli_models:static", "--recipe", "exact", "-o", "run", folder=tmp_path, preexec_fn=limit
    )
    sentence = one_sentence(done.stderr)
    assert "File too large" in sentence or "make room there" in sentence
    assert done.returncode == 2
    assert everything_below(tmp_path) == {tmp_path / "tmp"}


# --- Ctrl-C


def test_interrupt(tmp_path: Path) -> None:
    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what runs in the background ignore it

    done = graphopt_process(
        *("optimize", "cli_models:static", "--evaluate", "cli_models:interrupting_metric", "-o", "run"),
        folder=tmp_path,
        preexec_fn=heed,
    )
    assert "interrupted" in one_sentence(done.stderr)
    assert done.returncode == 2
    assert done.stdout == ""
    assert everything_below(tmp_path) == {tmp_path / "tmp"}


def test_interrupt_while_the_run_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]
) -> None:
    def save(self: Program, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Program, "save", save)
    assert "interrupted" in refuse("cli_models:static", "--recipe", "exact")


# --- Run directories and files for the other commands


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("inspect", "nowhere"), "nowhere is no run directory"),
        (("diff", "nowhere", "nowhere"), "nowhere is no run directory"),
        (("bench", "nowhere"), "there is no file nowhere"),
        (("bench", "."), ". is no run directory"),
        (("bench", "text.onnx"), "text.onnx"),
        (("bench", "text.onnx", "--backend", "onyx"), "there is no backend called 'onyx', did you mean 'onnx'?"),
        (("bench", "text.onnx", "--threads", "0"), "--threads"),
        (("bench",), "missing argument"),
        (("passes", "canonicalise"), "did you mean 'canonicalize'?"),
        (("recipes", "int88"), "did you mean 'int8'?"),
        (("optimise",), "no such command 'optimise', did you mean 'optimize'?"),
        (("optimize", "cli_models:static"), "missing option '-o'"),
        (("optimize", "cli_models:static", "-o", "run", "--recipee", "int8"), "no such option: --recipee"),
        (("optimize", "cli_models:static", "-o", "run", "--set", "seed=x"), "--set seed takes a whole number"),
        ((), "missing command"),
    ],
)
def test_other_commands(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert says in one_sentence(shown.err)
    assert shown.out == ""


@pytest.mark.parametrize("member", ["report.json", "recipe.yaml", "model.pt2", "trace/000_capture.json"])
def test_a_damaged_run_directory(member: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    graphopt.optimize(*cli_models.static(), recipe="exact", run_dir=run)
    (run / member).write_bytes(b"\xff\x00 {")
    with pytest.raises(GraphoptError) as caught:
        graphopt.load(run)
    assert Path(member).name in str(caught.value) or "is damaged" in str(caught.value)
    (run / member).unlink()
    if member != "trace/000_capture.json":
        with pytest.raises(GraphoptError):
            graphopt.load(run)
