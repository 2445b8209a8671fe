"""Writing files so that a reader never sees half of one: write beside, fsync, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from graphopt.errors import GraphoptError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it takes the place of `path`, on failure it is removed.

    A symbolic link stays one: what it points to is replaced. An operating-system error (no such folder, no permission,
    disk full) becomes a GraphoptError.
    """
    temporary: Path | None = None
    made: list[Path] = []
    try:
        try:
            final = _followed(path)
            made = _make_folders(final.parent)
            handle, name = tempfile.mkstemp(prefix=_prefix(final), dir=final.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(final)
            made = []
        except OSError as error:
            raise GraphoptError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        _remove_empty(made)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder_content(folder: Path, names: list[str]) -> Iterator[Path]:
    """Yield a temporary folder; on success its files take the places of those called `names` in `folder`.

    The last name goes first, so that a file never stands without the data file it points to; a name that was not
    written is removed from `folder`, as it belongs to the older content.
    """
    temporary: Path | None = None
    made: list[Path] = []
    try:
        try:
            made = _make_folders(folder)
            temporary = Path(tempfile.mkdtemp(prefix=".graphopt-", dir=folder))
            yield temporary
            for name in reversed(names):
                if (temporary / name).exists():
                    _sync(temporary / name)
                    (temporary / name).replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            made = []
        except OSError as error:
            raise GraphoptError(f"cannot write {folder / names[0]}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)


@contextmanager
def replacing_folder(path: Path, marker: str, names: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes its place, on failure it is removed.

    A folder already there is replaced only as `check_replaceable` allows, and put back where the exchange fails. A
    symbolic link stays one: the folder it points to is replaced.
    """
    check_replaceable(path, marker, names)
    temporary: Path | None = None
    made: list[Path] = []
    try:
        try:
            final = _followed(path)
            made = _make_folders(final.parent)
            temporary = Path(tempfile.mkdtemp(prefix=_prefix(final), dir=final.parent))
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _exchange(temporary, final)
            made = []
        except OSError as error:
            raise GraphoptError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)


def _exchange(new: Path, final: Path) -> None:
    if not final.exists():
        new.rename(final)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{_prefix(final)}old-", dir=final.parent))
    old = aside / "old"
    try:
        final.rename(old)
        new.rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    finally:
        if final.exists():  # else the old content is only to be found aside
            shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(path: Path, marker: str, names: Collection[str] = ()) -> None:
    """Refuse, before any work is done, a folder that cannot be written or holds somebody else's things.

    What may be replaced is an empty folder, or one that holds a file called `marker`, that is, was made here. With
    `names` given, such a folder may hold nothing but these: everything in it goes.
    """
    try:
        final = _followed(path)
        if final.exists() and not final.is_dir():
            raise GraphoptError(f"{path} is a file; name a folder")
        held = sorted(each.name for each in final.iterdir()) if final.is_dir() else []
        if held and marker not in held:
            raise GraphoptError(f"{path} is not empty and holds no {marker}; name a new folder")
        if foreign := [name for name in held if names and name not in names]:
            rest = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise GraphoptError(
                f"{path} holds {foreign[0]}{rest}, not written by graphopt; move it away or name a new folder"
            )
        parent = final.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise GraphoptError(f"cannot write {path}: {parent} is not a folder you may write to")
    except OSError as error:
        raise GraphoptError(f"cannot write {path}: {error.strerror or error}") from error


def _followed(path: Path) -> Path:
    if "\0" in str(path):
        raise GraphoptError(f"cannot write {str(path)!r}: that is no name for a file or folder")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _prefix(path: Path) -> str:
    return f".{path.name[:100]}."  # names end at 255 bytes


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder with its parents; return those that were not there, the innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    if missing:
        missing[0].mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
