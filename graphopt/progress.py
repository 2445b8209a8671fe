"""Progress of long work: the protocol, bars on standard error where that is a terminal, and silence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Display


class Stage(Protocol):
    """One piece of long work in a progress display."""

    def advance(self, steps: int = 1) -> None: ...


class Progress(Protocol):
    """Shows long work; `stage` opens a piece of `total` steps (0: unknown)."""

    def stage(self, name: str, total: int = 0) -> AbstractContextManager[Stage]: ...


class _SilentStage:
    def advance(self, steps: int = 1) -> None:
        pass


class Silent:
    """A Progress that shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Stage]:
        yield _SilentStage()


@dataclass
class _Bar:
    display: Display
    task: TaskID

    def advance(self, steps: int = 1) -> None:
        self.display.advance(self.task, steps)


class Bars:
    """Nested stages as lines that vanish when they are done."""

    def __init__(self) -> None:
        self._display = Display(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._open = 0

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Stage]:
        if self._open == 0:
            self._display.start()
        self._open += 1
        task = self._display.add_task(name, total=total or 1)
        try:
            yield _Bar(self._display, task)
        finally:
            self._display.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._display.stop()


def default_progress() -> Bars | Silent:
    """Return bars where a person is watching, else nothing."""
    return Bars() if sys.stderr is not None and sys.stderr.isatty() else Silent()
