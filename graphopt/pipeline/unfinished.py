"""What a run leaves behind when it is interrupted, so that the same call goes on where it was.

    .RUN.unfinished/     beside the run directory RUN
        key              digest of everything that decides the result
        journal.jsonl    measurements that decided something
        state.json       how many steps of the schedule are done, and the notes so far
        program-K.pt2    the program after K steps
        trace-K/         its trace
        checkpoint-K.pt  how far long work inside of one step is
        levels/          what a search has computed once
        best.pt2         the best that a search has found so far
        lock             held by the process that writes here

A step is saved when it read the user's data, the others are as quick to run again. Each state is complete before
state.json names it, and the one before goes only then. The folder is gone once the run directory is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.files import write_text
from graphopt.ir.printing import program_text
from graphopt.ir.program import Program
from graphopt.pipeline.journal import Journal
from graphopt.pipeline.trace import Trace

_NAMES = ("key", "journal.jsonl", "state.json", "lock", "best.pt2")


class Unfinished:
    """The state of one run. `key` is of `run_key`; a folder of another key is emptied, and `dropped` says so."""

    def __init__(self, run_dir: Path, key: str) -> None:
        self.run_dir = run_dir
        self.folder = run_dir.parent / f".{run_dir.name[:100]}.unfinished"
        self.dropped = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder / "lock", run_dir)
            if not (self.folder / "key").exists() or (self.folder / "key").read_text(errors="replace") != key:
                self._empty()
                write_text(self.folder / "key", key)
            self.journal = Journal(self.folder / "journal.jsonl")
        except OSError as error:
            raise GraphoptError(
                f"cannot keep the state of the run in {self.folder}: {error.strerror or error}; name another run_dir"
            ) from error

    def _empty(self) -> None:
        if (self.folder / "state.json").exists():
            self.dropped = (
                f"an unfinished run to {self.run_dir} was of another model, recipe, data or version; it was dropped"
            )
        for path in self.folder.iterdir():
            if path.name.startswith("trace-") or path.name == "levels":
                shutil.rmtree(path)
            elif path.name != "lock" and (path.name in _NAMES or path.name.startswith(("program-", "checkpoint-"))):
                path.unlink()

    def restore(self) -> tuple[int, Program, Trace] | None:
        """Return the steps done, the program and the trace of an interrupted run; None where there is none to go on."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
            steps = int(state["steps"])
            program = Program.load(self.folder / f"program-{steps}.pt2")
            trace = Trace.load(self.folder / f"trace-{steps}")
            trace.notes = [str(note) for note in state["notes"]]
        except (OSError, ValueError, KeyError, TypeError, GraphoptError):
            return None  # nothing saved yet, or damaged: from the start
        return steps, program, trace

    def save(self, steps: int, program: Program, trace: Trace) -> None:
        """Remember the program after so many steps. A full disk costs the state, not the run."""
        try:
            program.save(self.folder / f"program-{steps}.pt2")
            trace.save(self.folder / f"trace-{steps}")
            write_text(self.folder / "state.json", json.dumps({"steps": steps, "notes": trace.notes}))
            for path in self.folder.iterdir():
                kind, _, rest = path.name.partition("-")
                if kind in ("program", "trace") and rest.removesuffix(".pt2") != str(steps):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except (GraphoptError, OSError) as error:
            note = f"the run could not be saved on the way, and starts anew if it is interrupted: {error}"
            trace.notes += [note] if note not in trace.notes else []

    def finish(self) -> None:
        """Remove the folder: the run directory holds everything now."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let others at the folder; without a state in it, it goes."""
        self._lock.close()
        if not any(next(self.folder.glob(f"{kind}*"), None) for kind in ("state.json", "journal.jsonl", "checkpoint-")):
            shutil.rmtree(self.folder, ignore_errors=True)


def _locked(path: Path, run_dir: Path) -> IO[bytes]:
    file = open(path, "ab")  # noqa: SIM115 - held open as long as the run
    with contextlib.suppress(ImportError):  # not on every system
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise GraphoptError(f"another run is writing to {run_dir}; wait for it, or name another folder") from None
    return file


def run_key(program: Program, batches: Iterable[list[Any]] | None, *others: object) -> str:
    """Return the digest of a captured program with its weights, the calibration data, and whatever else decides."""
    found = hashlib.sha256(program_text(program).encode())
    for name, weight in sorted(program.weights.items()):
        found.update(name.encode())
        _update(found, weight)
    for flat in batches or ():
        for value in flat:
            _update(found, value) if isinstance(value, Tensor) else found.update(repr(value).encode())
    for other in others:
        found.update(b"\0" + str(other).encode())
    return found.hexdigest()


def _update(found: Any, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    if plain.numel():
        found.update(plain.view(torch.uint8).numpy().data)
