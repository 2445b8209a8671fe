"""The text: Python's standard library, in bytes, cut into files to train on and files to judge by."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_SKIPPED = {"test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__", "encodings"}
_HELD_OUT = 20  # every so many files, by the hash of their name


@dataclass(frozen=True)
class Corpus:
    """Bytes as uint8: what to train on, what to judge by."""

    train: Tensor
    held_out: Tensor

    def batch(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Return random pieces [count, length] of the training text, int64."""
        return pieces(self.train, torch.randint(len(self.train) - length, (count,), generator=generator), length)


def pieces(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length)].long()


def even_pieces(text: Tensor, count: int, length: int) -> Tensor:
    """Return pieces [count, length] at even distances, always the same."""
    return pieces(text, torch.arange(count) * ((len(text) - length) // count), length)


def read() -> Corpus:
    """Read the library of the running interpreter; ValueError where it holds no source."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts))
    parts: tuple[list[bytes], list[bytes]] = [], []
    for path in files:
        name = path.relative_to(root).as_posix()
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % _HELD_OUT == 0
        parts[held_out].append(path.read_bytes())
    if not all(parts):
        raise ValueError(f"{root} holds no source of the standard library; run an interpreter that has it")
    return Corpus(*(torch.frombuffer(bytearray(b"\n".join(each)), dtype=torch.uint8) for each in parts))
