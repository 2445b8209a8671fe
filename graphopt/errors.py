"""The exceptions that a user's mistake raises, each a sentence that says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphoptError(Exception):
    """A mistake that the user can mend; its text is one sentence and the CLI prints it without a stack trace."""


class NotExpressible(GraphoptError):
    """A target has no form for a program: a fact about the two, which `Result.save` notes and goes on from.

    What else goes wrong in an export (a full disk, a file that the runtime refuses) is a plain GraphoptError.
    """


_LONGEST = 300  # characters of a library's message that fit into a sentence


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text that is not blank, else the name of its type."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def described(error: BaseException) -> str:
    """Return `ZeroDivisionError: division by zero`, without the colon where an exception has no text."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the known name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
