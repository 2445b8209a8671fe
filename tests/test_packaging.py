"""What an installation holds: wheel from the checkout, sdist, wheel from the sdist, editable install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv", ".venvs", ".*_cache", ".cache", ".hypothesis"),
    *("__pycache__", "build", "dist", "runs", "*.egg-info"),
)


def _build(source: Path, output: Path, kind: str) -> Path:
    """Call the build backend's hook `kind` in `source`, without isolation; returns the file it made."""
    output.mkdir()
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(output)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return output / done.stdout.splitlines()[-1]


def _content(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def _top_level(wheel: Path) -> set[str]:
    return {name.split("/")[0] for name in _content(wheel)}


def _expected() -> set[str]:
    """Every module and data file of the checkout under its installed name."""
    files = set()
    for folder in ("graphopt", "passes", "backends"):
        for parent, _, names in os.walk(ROOT / folder):
            relative = Path(parent).relative_to(ROOT)
            installed = relative if folder == "graphopt" else Path("graphopt") / relative
            data = relative.parts[1:] in (("recipes",), ("report", "templates"), ("cuda", "dialect"))
            files |= {
                (installed / name).as_posix()
                for name in names
                if name.endswith(".py") or name == "py.typed" or (data and not name.endswith(".pyc"))
            }
    return files


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, links kept as links, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_COPIED)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(checkout, tmp_path_factory.mktemp("wheel") / "out", "wheel")


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(checkout, tmp_path_factory.mktemp("sdist") / "out", "sdist")


def test_the_wheel_holds_everything_under_one_name(wheel: Path) -> None:
    content = _content(wheel)
    assert _top_level(wheel) == {"graphopt"}
    assert content == _expected()
    assert "graphopt/passes/__init__.py" in content
    assert "graphopt/backends/onnx/__init__.py" in content
    assert "graphopt/py.typed" in content
    assert "graphopt/recipes/int8.yaml" in content


def test_a_second_top_level_name_would_be_seen(checkout: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout, tmp_path / "bad", symlinks=True, ignore=NOT_COPIED)
    project = tmp_path / "bad" / "pyproject.toml"
    text = project.read_text()
    project.write_text(text.replace('include = ["graphopt", ', 'include = ["passes", "graphopt", '))
    assert project.read_text() != text
    assert _top_level(_build(project.parent, tmp_path / "out", "wheel")) == {"graphopt", "passes"}


def test_the_wheel_states_its_licence_command_and_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" in name]
        texts = {name.split(".dist-info/")[1]: archive.read(name).decode() for name in names}
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert texts["licenses/LICENSE"].lstrip().startswith("Apache License")
    assert texts["top_level.txt"].split() == ["graphopt"]
    for entry in (
        "[console_scripts]\ngraphopt = graphopt.cli:main",
        "[graphopt.passes]\nbuiltin = graphopt.passes",
        "[graphopt.backends]\ncuda = graphopt.backends.cuda\nonnx = graphopt.backends.onnx",
    ):
        assert entry in texts["entry_points.txt"]


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (unpacked,) = (tmp_path / "source").iterdir()
    assert (unpacked / "LICENSE").exists()
    assert _content(_build(unpacked, tmp_path / "out", "wheel")) == _content(wheel)


def test_an_editable_install_makes_only_graphopt_importable(checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(_build(checkout, tmp_path / "out", "editable")) as archive:
        archive.extractall(tmp_path / "site")
    # -S leaves out the packages of the running environment, -I the working directory and PYTHONPATH.
    code = (
        "import importlib.util as u, site, sys\n"
        "site.addsitedir(sys.argv[1])\n"
        "print(*u.find_spec('graphopt').submodule_search_locations)\n"
        "print([name for name in ('passes', 'backends', 'tests', 'tools') if u.find_spec(name)])\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    location, others = done.stdout.splitlines()
    assert Path(location) == checkout / "graphopt"
    assert (Path(location) / "passes" / "__init__.py").exists()
    assert others == "[]"
