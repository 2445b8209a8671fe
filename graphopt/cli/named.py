"""What the command line names in Python: `package.module:name`, found in the current directory too."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from graphopt.errors import GraphoptError, nearest

_REFERENCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")


@dataclass(frozen=True)
class NamedModel:
    """A model as `graphopt.capture` takes it."""

    model: Any
    example_inputs: Any = None
    dynamic_shapes: Any = None


def load_model(text: str) -> NamedModel:
    """Return the model that MODEL means; GraphoptError where there is none, or making it fails."""
    if text.endswith(".pt2"):
        if not Path(text).is_file():
            raise GraphoptError(f"there is no file {text}")
        return NamedModel(Path(text))
    if not _REFERENCE.fullmatch(text):
        raise GraphoptError(f"MODEL must be package.module:factory or the path of a .pt2 file, not {text!r}")
    found = load_object(text)
    if callable(found) and not isinstance(found, nn.Module):
        found = _call(found, text)
    values = found if isinstance(found, tuple) else (found,)
    if not 1 <= len(values) <= 3 or not isinstance(values[0], nn.Module | ExportedProgram):
        what = f"a tuple of {len(values)}" if isinstance(found, tuple) else type(found).__name__
        raise GraphoptError(
            f"{text} returned {what}; return an nn.Module, or (module, example inputs), "
            "or (module, example inputs, dynamic shapes)"
        )
    return NamedModel(*values)


def load_function(text: str, what: str) -> Callable[..., Any]:
    """Return the function that `text` names; GraphoptError where there is none."""
    if not _REFERENCE.fullmatch(text):
        raise GraphoptError(f"{what} must be package.module:function, not {text!r}")
    found = load_object(text)
    if not callable(found):
        raise GraphoptError(f"{text} is no function but {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def load_object(text: str) -> Any:
    """Import what `module:name` names."""
    module_name, _, path = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise GraphoptError(
                f"there is no module {error.name!r}, neither in the current directory nor in the environment"
            ) from None
        raise GraphoptError(f"importing {module_name} failed: {error}") from error
    except (Exception, SystemExit) as error:
        raise GraphoptError(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            known = [each for each in dir(found) if not each.startswith("_")]
            raise GraphoptError(f"{module_name} has no {path!r}{nearest(name, known)}")
        found = getattr(found, name)
    return found


def _call(factory: Callable[[], Any], text: str) -> Any:
    try:
        return factory()
    except GraphoptError:
        raise
    except (Exception, SystemExit) as error:
        raise GraphoptError(f"{text} failed: {type(error).__name__}: {error}") from error
