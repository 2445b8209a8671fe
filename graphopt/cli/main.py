"""The entry point: runs a command and turns whatever ends it into an exit status.

0   done
1   a defect of graphopt; the stack trace is written to a file, `--debug` shows it
2   a mistake of the user, or Ctrl-C: one sentence on standard error, nothing half written
3   what was compared is beyond a bound that was given
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import typer

from graphopt.cli.app import app
from graphopt.errors import GraphoptError

# typer brings its own click or uses the installed one, depending on its version, and exports this class.
_ClickException: Any = typer.BadParameter.__mro__[2]
_DEFECT, _MISTAKE = 1, 2
# What the machine refuses, and the user can mend.
_REFUSALS = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EMFILE,
        errno.ENFILE,
        errno.EFBIG,
    )
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show × gets a question mark
            stream.reconfigure(errors="replace")
    context: Any = None
    try:
        with _quiet():
            command = typer.main.get_command(app)
            # Not command.main(): it prints usage errors on several lines and a blank line at Ctrl-C.
            context = command.make_context("graphopt", given)
            with context:
                command.invoke(context)
            sys.stdout.flush()
        return 0
    except typer.Exit as end:
        return int(end.exit_code)
    except BrokenPipeError:  # the reader of our output has seen enough, as in `graphopt inspect run | head`
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        debug = context is not None and bool(context.params.get("debug"))
        return _failed(error, debug)


def _failed(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return _say("interrupted; nothing is left half written, and the same command goes on where this one was")
    if isinstance(error, _ClickException):
        return _say(_usage(error))
    if isinstance(error, GraphoptError):
        return _say(str(error))
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        where = f" {error.filename}" if error.filename else ""
        return _say(f"the system refused{where}: {error.strerror}")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return _say("there is not enough memory for this; take smaller batches, or a machine with more")
    if not isinstance(error, Exception):
        raise error
    where = "" if debug else f"; {_write_trace(error)}"
    _say(f"this is a defect of graphopt, please report it: {type(error).__name__}: {error}{where}")
    return _DEFECT


def _write_trace(error: Exception) -> str:
    try:
        handle, name = tempfile.mkstemp(prefix="graphopt-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return "graphopt --debug shows the stack trace"
    return f"the stack trace is in {Path(name)}, and graphopt --debug shows it"


def _usage(error: Any) -> str:
    """Return click's complaint as one sentence."""
    text = str(error.format_message()).strip()
    for full, short in (
        (". Did you mean", ", did you mean"),
        (" Did you mean", ", did you mean"),
        (". (Possible", " (possible"),
    ):
        text = text.replace(full, short)
    text = text.rstrip(".")
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "graphopt"
    return f"{text[:1].lower()}{text[1:]}; see `{command} --help`"


def _say(sentence: str) -> int:
    """Print one line on standard error; names in it come from files, so control characters are left out."""
    line = " ".join(sentence.split())
    print("graphopt: " + "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    return _MISTAKE


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of libraries off the terminal; graphopt's own become one line each."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _say(str(message))

    torch_log = logging.getLogger("torch")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"graphopt(\..*)?$")
            warnings.showwarning = show
            yield
    finally:
        torch_log.setLevel(level)
