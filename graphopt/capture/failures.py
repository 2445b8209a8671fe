"""From an exception deep inside torch.export to the user's line and what usually helps.

The exception's traceback passes through the user's forward; the line shown is the deepest one in the user's own files,
or, where the model comes from a library, the deepest one of that library. Data-dependent branches carry the line in
their text.
"""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from graphopt.errors import GraphoptError, described, first_line

_TORCH = str(Path(torch.__file__).parent)
_STANDARD = sysconfig.get_paths()["stdlib"]
_GRAPHOPT = str(Path(__file__).parent.parent)
_FRAME_IN_TEXT = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@dataclass(frozen=True)
class _Cause:
    """`pattern` is searched in `ExceptionType: text`; its groups fill `what`."""

    pattern: str
    what: str
    help: str


_CAUSES = (
    _Cause(
        r"Could not extract specialized (?:integer|float|boolean)|Could not guard on data-dependent expression zuf",
        "forward turns a tensor's value into a Python number",
        "keep it a tensor (leave out .item(), int() and float()), or compute it from shapes",
    ),
    _Cause(
        r"GuardOnDataDependentSymNode|data-dependent|DataDependentOutputException",
        "forward takes a decision that depends on a tensor's value",
        "compute both and choose with torch.where, or export that part on its own",
    ),
    _Cause(
        r"UnsupportedOperatorException: (\S+)",
        "operator {0} has no rule for its output's shape",
        "register one with torch.library.register_fake",
    ),
    _Cause(
        r"(?i)numpy",
        "forward leaves torch for numpy",
        "use the torch function of the same name, or do that step before the model",
    ),
    _Cause(
        r"specialized it to be a constant \((\S+)\)|You marked .* as dynamic but",
        "dynamic_shapes names a dimension that the model fixes at one size",
        "leave that dimension out of dynamic_shapes, or read the size from the tensor's shape in forward",
    ),
    _Cause(
        r"Constraints violated|ConstraintViolationError|Not all values of",
        "dynamic_shapes allows sizes that the model does not take",
        "narrow the range of the dimension with torch.export.Dim(name, min=..., max=...)",
    ),
    _Cause(
        r"(?s)UserError: (.*dynamic_shapes.*)",
        "dynamic_shapes does not fit the inputs",
        "give it one entry for each input, as torch.export.export takes it",
    ),
    _Cause(
        r"(?i)unsupported input type <class '([^']+)'>",
        "an input is a {0}",
        "pass tensors, numbers, and lists, tuples, dicts or dataclasses of these",
    ),
    _Cause(
        r"(?i)(?:type|output) <?.*not a known type|Unsupported output type",
        "forward returns something other than tensors",
        "return tensors in tuples, lists, dicts or dataclasses",
    ),
    _Cause(
        r"(?i)mutat|in-place|inplace",
        "forward changes a tensor that must stay as it is",
        "write y = x + 1 where it says x += 1, and return new state as an output",
    ),
    _Cause(
        r"(?i)TorchScript|torch\.jit|ScriptModule",
        "part of the model is TorchScript",
        "use the nn.Module it was made from",
    ),
)
_OTHERWISE = "write that line with torch operators on the inputs, or leave that part out of the model"


def eager_failure(model: nn.Module, error: Exception) -> GraphoptError:
    """The module raised `error` when run as it is: the inputs or the module are wrong, not the capture."""
    return GraphoptError(
        f"the model itself fails on the example inputs: {_plain(described(error))}{_at(error)}; "
        f"check that {type(model).__name__}(*example_inputs) runs"
    )


def export_failure(model_name: str, error: Exception) -> GraphoptError:
    """torch.export raised `error` for a model that runs."""
    text = f"{type(error).__name__}: {error}"
    for cause in _CAUSES:
        if found := re.search(cause.pattern, text):
            what = cause.what.format(*(group or "" for group in found.groups()))
            detail = _detail(error)
            return GraphoptError(f"cannot capture {model_name}: {what}{_at(error)}{detail}; {cause.help}")
    return GraphoptError(f"cannot capture {model_name}: {_plain(described(error))}{_at(error)}; {_OTHERWISE}")


def _detail(error: Exception) -> str:
    """What torch says about dimensions, in brackets: the constraint and the fix it suggests."""
    text = str(error)
    if "dynamic_shapes" in text and "Constraints violated" not in text:
        return f" ({_plain(first_line(error))})"
    constraint = re.search(r"^\s*- (.+?)(?:\. |$)", text, re.MULTILINE)
    fixes = re.search(r"Suggested fixes:\n((?:[ \t]+\S.*\n?)+)", text)
    if "Constraints violated" not in text or not constraint:
        return ""
    suggested = "; ".join(line.strip() for line in fixes[1].splitlines() if line.strip()) if fixes else ""
    return f" ({constraint[1]}" + (f"; suggested: {suggested}" if suggested else "") + ")"


def _plain(text: str) -> str:
    """Return a line of torch's without the sentence that points to its documentation."""
    return text.split(" For more information about this error")[0].rstrip(".")


def _at(error: BaseException) -> str:
    """` at model.py:12, in forward (`the line`)`, or an empty string."""
    frames = [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)]
    found = _users(frames) or _users([(f, int(n), name) for f, n, name in _FRAME_IN_TEXT.findall(str(error))])
    if found is None:
        return ""
    file, line, function = found
    source = linecache.getline(file, line).strip()
    return f" at {file}:{line}, in {function}" + (f" (`{source}`)" if source else "")


def _users(frames: list[tuple[str, int, str]]) -> tuple[str, int, str] | None:
    outside = [frame for frame in frames if not _internal(frame[0])]
    own = [frame for frame in outside if "site-packages" not in frame[0] and "dist-packages" not in frame[0]]
    chosen = own or outside
    return chosen[-1] if chosen else None


def _internal(file: str) -> bool:
    if file.startswith("<") or file.startswith(_TORCH):
        return True
    if file.startswith(_STANDARD) and "site-packages" not in file:
        return True
    return file.startswith(_GRAPHOPT + "/capture")
