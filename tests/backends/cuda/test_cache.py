"""The cache of compiled files: whole files only, whoever else writes there, whatever lies there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.backends.cuda import cache, nvrtc
from graphopt.backends.cuda.emit import emit
from graphopt.backends.cuda.plan import RowPlan


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_made_once(folder: Path) -> None:
    made = []

    def make() -> bytes:
        made.append(1)
        return b"code"

    assert cache.cached_bytes("a", make) == cache.cached_bytes("a", make) == b"code"
    assert len(made) == 1 and sorted(path.name for path in folder.iterdir()) == ["a", "a.sha256"]


@pytest.mark.parametrize("damage", ["cut", "empty", "other hash", "no hash", "a folder"])
def test_what_is_damaged_is_made_again(folder: Path, damage: str) -> None:
    cache.cached_bytes("a", lambda: b"some code")
    path, digest = folder / "a", folder / "a.sha256"
    if damage == "cut":
        path.write_bytes(b"some")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other hash":
        digest.write_text("0" * 64)
    elif damage == "no hash":
        digest.unlink()
    else:
        path.unlink()
        path.mkdir()
    assert cache.cached_bytes("a", lambda: b"some code") == b"some code"


def test_a_folder_that_takes_nothing_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "file" / "below"))
    assert cache.cached_bytes("a", lambda: b"code") == b"code"
    assert cache.cached_file("b", lambda target: target.write_bytes(b"code") and None).read_bytes() == b"code"


def test_a_full_disk_costs_time_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cache.cached_bytes("a", lambda: b"code") == b"code"
    assert not [path for path in folder.iterdir() if path.suffix != ".sha256"]


def test_processes_that_compile_the_same_at_once(folder: Path) -> None:
    script = (
        "from graphopt.backends.cuda import cache\n"
        "for i in range(40):\n"
        "    assert cache.cached_bytes(f'file{i % 4}', lambda: bytes([i % 4]) * 200_000) == bytes([i % 4]) * 200_000\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script], env=dict(os.environ)) for _ in range(2)]
    assert [each.wait(120) for each in running] == [0, 0]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"file{i}{end}" for i in range(4) for end in ("", ".sha256")
    )


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_the_key_is_all_that_a_kernel_is_compiled_from(folder: Path) -> None:
    kernel = emit(RowPlan(64))
    first = nvrtc.cubin(kernel, "90")
    assert nvrtc.cubin(kernel, "90") == first
    assert nvrtc.cubin(kernel, "80").cubin != first.cubin
    nvrtc.ptx(kernel, "90")
    nvrtc.cubin(emit(RowPlan(128)), "90")
    assert len([path for path in folder.iterdir() if path.suffix == ".cubin"]) == 3
