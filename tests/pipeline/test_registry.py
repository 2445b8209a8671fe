"""The registry: entry points of our own and of others, and what is refused."""

from __future__ import annotations

import importlib
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_up_passes as made
import pytest

from graphopt import passes
from graphopt.errors import GraphoptError
from graphopt.pipeline import backend, make_pass, parse_pass, pass_class, pass_classes, registry, target
from graphopt.pipeline.registry import UnknownPass

PASS = """
from dataclasses import dataclass
from graphopt import Pass

@dataclass(frozen=True)
class Foreign(Pass):
    '''Does nothing, elsewhere.'''
    level: int = 3

    def run(self, program, context):
        from graphopt.ir import Rewriter
        return Rewriter(program, self.name).finish()
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a distribution: `install(entry, module=source, ...)`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def clear() -> None:
        importlib.invalidate_caches()
        registry.pass_classes.cache_clear()
        registry.backend_classes.cache_clear()

    def make(entry: str, group: str = "graphopt.passes", **modules: str) -> None:
        info = tmp_path / f"foreign_{len(list(tmp_path.glob('*.dist-info')))}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.stem[:-4]}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        clear()

    yield make
    monkeypatch.undo()
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
    clear()


def test_the_built_in_passes_come_by_entry_point() -> None:
    assert set(pass_classes().values()) == {getattr(passes, name) for name in passes.__all__}
    assert list(pass_classes()) == sorted(pass_classes())


def test_a_third_party_registers_a_class(install: Install) -> None:
    install("anything = foreign_passes:Foreign", foreign_passes=PASS)
    assert pass_class("foreign").__module__ == "foreign_passes"
    assert str(parse_pass("foreign(level=4)")) == "foreign(level=4)"
    assert "canonicalize" in pass_classes()


def test_a_third_party_registers_a_module(install: Install) -> None:
    install("anything = foreign_module", foreign_module=PASS + "\n__all__ = ['Foreign']\n")
    assert make_pass("foreign", {"level": 2}).options == {"level": 2}


def test_a_third_party_runs_in_a_recipe(install: Install) -> None:
    from graphopt.pipeline import Recipe, run_passes

    install("anything = foreign_in_recipe:Foreign", foreign_in_recipe=PASS)
    recipe = Recipe.from_yaml("{name: mine, passes: [{foreign: {level: 1}}]}")
    _, trace = run_passes(made.net(), recipe.passes, made.context())
    assert [record.key for record in trace] == ["capture", "canonicalize", "foreign"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("from graphopt import Pass", "names a module without __all__"),
        ("import nothing_of_this_name", r"ModuleNotFoundError: .*repair or uninstall"),
        ("1 / 0", r"ZeroDivisionError.*repair or uninstall"),
        ("__all__ = ['Missing']", r"AttributeError.*repair or uninstall"),
        ("__all__ = ['Plain']\nclass Plain: name = 'plain'", "Plain of foreign_broken is no pass"),
        (
            PASS.replace("@dataclass(frozen=True)", "") + "\n__all__ = ['Foreign']",
            "Foreign of foreign_broken is no pass; derive a frozen dataclass",
        ),
        ("from made_up_passes import Nothing\n__all__ = ['Nothing']", "Nothing comes from 'made_up_passes'"),
        (
            "from passes.retype.floats import RetypeFloats\n__all__ = ['RetypeFloats']",
            "RetypeFloats comes from 'passes",
        ),
        (
            PASS.replace("class Foreign", "class Canonicalize") + "\n__all__ = ['Canonicalize']",
            "both register 'canonicalize'; uninstall one of the two",
        ),
    ],
)
def test_what_is_refused(install: Install, monkeypatch: pytest.MonkeyPatch, source: str, sentence: str) -> None:
    if "from passes" in source:  # as it would be with the repository's root on the path
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    install("broken = foreign_broken", foreign_broken=source)
    try:
        with pytest.raises(GraphoptError, match=sentence):
            pass_classes()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("passes", "foreign_broken")]:
            del sys.modules[name]


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    with pytest.raises(GraphoptError, match=r"no entry point of the group graphopt\.passes is installed"):
        registry._entries("graphopt.passes")


def test_a_backend_brings_its_targets(install: Install) -> None:
    source = """
        from graphopt.target import Target
        class Slow:
            name = "slow"
            targets = (Target("abacus", "slow"),)
    """
    install("slow = foreign_backend:Slow", "graphopt.backends", foreign_backend=source)
    assert target("abacus").backend == "slow"
    assert type(backend("slow")).__name__ == "Slow"
    assert target("onnxruntime-cpu").backend == "onnx"


@pytest.mark.parametrize(
    ("find", "name", "sentence"),
    [
        (pass_class, "fold_batchnorm", "there is no pass called 'fold_batchnorm', did you mean 'fold_batch_norm'?"),
        (pass_class, "xyz", "there is no pass called 'xyz'; `graphopt passes` lists them"),
        (backend, "onx", "there is no backend called 'onx', did you mean 'onnx'?"),
        (target, "onnxruntime", "there is no target called 'onnxruntime', did you mean 'onnxruntime-cpu'?"),
    ],
)
def test_the_nearest_name_is_suggested(find: Callable[[str], Any], name: str, sentence: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        find(name)
    assert str(caught.value).startswith(sentence)
    assert isinstance(caught.value, UnknownPass) == (find is pass_class)


def test_modules_are_told_from_classes() -> None:
    entry = types.SimpleNamespace(name="x", value="y", load=lambda: made.Nothing)
    assert registry._classes(entry) == [made.Nothing]  # type: ignore[arg-type]
