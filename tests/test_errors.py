"""What a library's exception becomes inside a sentence."""

from __future__ import annotations

import pytest

from graphopt.errors import GraphoptError, NotExpressible, described, first_line


@pytest.mark.parametrize(
    ("error", "line", "text"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (ValueError("\n  \n  one  \n"), "one", "ValueError: one"),
        (KeyError("name"), "'name'", "KeyError: 'name'"),
        (AssertionError(), "AssertionError", "AssertionError"),
        (RuntimeError(" \n "), "RuntimeError", "RuntimeError"),
        (OSError("x" * 1000), "x" * 297 + "...", "OSError: " + "x" * 297 + "..."),
    ],
)
def test_an_exception_in_one_line(error: Exception, line: str, text: str) -> None:
    assert (first_line(error), described(error)) == (line, text)


def test_what_a_target_cannot_express_is_a_mistake_that_can_be_mended() -> None:
    assert issubclass(NotExpressible, GraphoptError)
