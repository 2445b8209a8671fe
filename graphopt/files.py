"""Writing files so that a reader never sees half of one: write beside, fsync, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import GraphoptError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it takes the place of `path`, on failure it is removed.

    An operating-system error (no such folder, no permission, disk full) becomes a GraphoptError.
    """
    temporary: Path | None = None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except OSError as error:
            raise GraphoptError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder_content(folder: Path, names: list[str]) -> Iterator[Path]:
    """Yield a temporary folder; on success its files take the places of those called `names` in `folder`.

    The last name goes first, so that a file never stands without the data file it points to; a name that was not written
    is removed from `folder`, as it belongs to the older content.
    """
    temporary: Path | None = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".graphopt-", dir=folder))
            yield temporary
            for name in reversed(names):
                if (temporary / name).exists():
                    _sync(temporary / name)
                    (temporary / name).replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise GraphoptError(f"cannot write {folder / names[0]}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_folder(path: Path, marker: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes its place, on failure it is removed.

    A folder already there is replaced only where it is empty or holds a file called `marker`, that is, was made here.
    """
    check_replaceable(path, marker)
    temporary: Path | None = None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            old: Path | None = None
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
                path.rename(old / path.name)
            temporary.rename(path)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise GraphoptError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path: Path, marker: str) -> None:
    """Refuse, before any work is done, a folder that is a file, holds somebody else's things or cannot be written."""
    if path.exists() and not path.is_dir():
        raise GraphoptError(f"{path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).exists():
        raise GraphoptError(f"{path} is not empty and holds no {marker}; name a new folder")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise GraphoptError(f"cannot write {path}: {parent} is not a folder you may write to")


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
