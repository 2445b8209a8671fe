"""Files that were compiled before, by the hash of everything that they were compiled from.

They lie in $GRAPHOPT_CACHE, or `graphopt/cuda` under the user's folder for caches. A file is written beside its place
and renamed, so that two processes that compile the same at once leave one whole file; whoever reads checks it and
throws it away where it is not what was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def folder() -> Path:
    """Return the folder of compiled files, made now where it can be; else a temporary one of this process."""
    base = os.environ.get("GRAPHOPT_CACHE")
    place = (
        Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt" / "cuda"
    )
    try:
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    except OSError:
        pass
    return _own_folder()


_OWN: list[tempfile.TemporaryDirectory[str]] = []


def _own_folder() -> Path:
    if not _OWN:
        _OWN.append(tempfile.TemporaryDirectory(prefix="graphopt-cuda-"))
    return Path(_OWN[0].name)


def cached_file(name: str, make: Callable[[Path], None]) -> Path:
    """Return the file called `name`, made by `make(path)` where it is not there whole.

    Beside it stands its hash, written last: a file without the right one is made again. Where the folder takes no more,
    the file is made in a temporary one.
    """
    path = folder() / name
    if _whole(path):
        return path
    try:
        return _made(path, make)
    except OSError:  # full, or taken away meanwhile
        return _made(_own_folder() / name, make)


def cached_bytes(name: str, make: Callable[[], bytes]) -> bytes:
    """Return the contents of the file called `name`, or what `make` gives, which is then kept there where it can be."""
    path = folder() / name
    try:
        if _whole(path):
            return path.read_bytes()
    except OSError:
        pass
    content = make()
    with contextlib.suppress(OSError):  # a cache that cannot be written to is no reason to fail
        _made(path, lambda target: _write(target, content))
    return content


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        made = Path(scratch) / path.name
        make(made)
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        _write(_digest(made), digest.encode())
        os.replace(made, path)
        os.replace(_digest(made), _digest(path))
    return path


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _whole(path: Path) -> bool:
    try:
        return _digest(path).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False
