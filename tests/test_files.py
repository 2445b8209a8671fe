"""Atomic writing: all or nothing, whatever goes wrong, and nothing of others is touched."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from graphopt import files
from graphopt.errors import GraphoptError
from graphopt.files import check_replaceable, replacing, replacing_folder, replacing_folder_content, write_text

FULL = OSError(errno.ENOSPC, "No space left on device")
FAILURES = [FULL, KeyboardInterrupt(), RuntimeError("x"), GraphoptError("y")]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def failing(error: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


# One file --------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.txt"
    with replacing(path) as temporary:
        assert not path.exists() and temporary.parent == path.parent
        temporary.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["new", "new/deep", "new/deep/a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~files._umask()


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, error: BaseException, exists: bool) -> None:
    path = tmp_path / "new" / "a.txt"
    if exists:
        write_text(path, "old")
    before = names(tmp_path)
    expected = GraphoptError if isinstance(error, OSError) else type(error)

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(expected) as caught:
        write_half()
    if error is FULL:
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert names(tmp_path) == before and (not exists or path.read_text() == "old")


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "tempfile.mkstemp"])
def test_a_full_disk_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(step, failing(FULL))
    with pytest.raises(GraphoptError, match=r"cannot write .*: No space left on device"):
        write_text(tmp_path / "a.txt", "new")
    with pytest.raises(GraphoptError, match="No space left"):
        write_text(tmp_path / "deep" / "er" / "a.txt", "new")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/target")
    write_text(tmp_path / "link", "new")  # dangling at first
    write_text(tmp_path / "link", "newer")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "target").read_text() == "newer"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(GraphoptError, match="cannot write"), replacing(tmp_path / "loop" / "a"):
        pass


@pytest.mark.parametrize("name", ["file/a.txt", "folder", "x" * 300])
def test_names_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    with pytest.raises(GraphoptError, match="cannot write"):
        write_text(tmp_path / name, "new")
    assert names(tmp_path) == before


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 255), "new")
    assert len(names(tmp_path)) == 1


# A folder --------------------------------------------------------------------------------------------------------


def fill(folder: Path, text: str) -> None:
    (folder / "marker").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text(text)


def run_folder(path: Path, text: str) -> Path:
    with replacing_folder(path, "marker") as temporary:
        fill(temporary, text)
    return path


def test_a_folder_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "runs" / "one", "old")
    (path / "sub" / "stale").write_text("")
    with replacing_folder(path, "marker") as temporary:
        assert (path / "marker").read_text() == "old"
        (temporary / "marker").write_text("new")
    assert names(tmp_path) == ["runs", "runs/one", "runs/one/marker"] and (path / "marker").read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~files._umask()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    run_folder(tmp_path / "one", "new")
    assert names(tmp_path / "one") == ["marker", "sub", "sub/a"]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_folder_leaves_what_was_there(tmp_path: Path, error: BaseException, exists: bool) -> None:
    path = tmp_path / "runs" / "one"
    if exists:
        run_folder(path, "old")
    before = names(tmp_path)
    expected = GraphoptError if isinstance(error, OSError) else type(error)

    def write_half() -> None:
        with replacing_folder(path, "marker") as temporary:
            fill(temporary, "half")
            raise error

    with pytest.raises(expected):
        write_half()
    assert names(tmp_path) == before and (not exists or (path / "marker").read_text() == "old")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_exchange_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    path = run_folder(tmp_path / "one", "old")
    before, true, calls = names(tmp_path), Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == at:
            raise error
        return true(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((GraphoptError, KeyboardInterrupt)):
        run_folder(path, "new")
    assert names(tmp_path) == before and (path / "marker").read_text() == "old"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    run_folder(tmp_path / "disk" / "one", "old")
    (tmp_path / "latest").symlink_to("disk/one")
    run_folder(tmp_path / "latest", "new")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "disk" / "one" / "marker").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["one"]


def test_what_may_not_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    run_folder(tmp_path / "mine", "old")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    before = names(tmp_path)

    def sentence(name: str, known: tuple[str, ...] = ()) -> str:
        with pytest.raises(GraphoptError) as caught:
            check_replaceable(tmp_path / name, "marker", known)
        with pytest.raises(GraphoptError), replacing_folder(tmp_path / name, "marker", known):
            pytest.fail("it was opened")
        assert names(tmp_path) == before
        return str(caught.value).replace(f"{tmp_path}/", "")

    assert sentence("file") == "file is a file; name a folder"
    assert sentence("file/below") == "cannot write file/below: file is not a folder you may write to"
    assert sentence("theirs") == "theirs is not empty and holds no marker; name a new folder"
    assert sentence("mine", ("marker",)) == "mine holds sub, not written by graphopt; move it away or name a new folder"
    check_replaceable(tmp_path / "mine", "marker", ("marker", "sub"))
    check_replaceable(tmp_path / "mine", "marker")
    check_replaceable(tmp_path / "not" / "there" / "yet", "marker")
    with pytest.raises(GraphoptError, match="that is no name for a file or folder"):
        check_replaceable(Path("a\0b/c"), "marker")


def test_folders_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be allowed everything
    with pytest.raises(GraphoptError, match="is not a folder you may write to"):
        check_replaceable(tmp_path / "new", "marker")
    monkeypatch.setattr(Path, "iterdir", failing(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(GraphoptError, match=r"cannot write .*: Permission denied"):
        check_replaceable(tmp_path, "marker")


# Files of a folder -----------------------------------------------------------------------------------------------


def test_a_group_of_files_is_replaced_and_the_rest_left(tmp_path: Path) -> None:
    for name in ("a", "a.data", "other"):
        (tmp_path / name).write_text("old")
    with replacing_folder_content(tmp_path, ["a", "a.data"]) as temporary:
        (temporary / "a").write_text("new")
    assert names(tmp_path) == ["a", "other"] and (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failed_group_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("old")

    def write_half(folder: Path) -> None:
        with replacing_folder_content(folder, ["a"]) as temporary:
            (temporary / "a").write_text("half")
            raise error

    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises((GraphoptError, type(error))):
            write_half(folder)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
