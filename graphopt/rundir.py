"""The run directory: what it holds, and reading its text files."""

from __future__ import annotations

from pathlib import Path

from graphopt.errors import GraphoptError, first_line

MARKER = "report.json"  # a folder that holds it is a run directory
RUN_FILES = frozenset(
    ("model.onnx", "model.onnx.data", "model.pt2", "recipe.yaml", MARKER, "report.html", "trace")
)  # and what else a run directory holds


def check_run_directory(folder: Path) -> None:
    """Raise GraphoptError where `folder` is no run directory."""
    if not (folder / MARKER).is_file():
        raise GraphoptError(f"{folder} is no run directory: it holds no {MARKER}")


def read_text(folder: Path, name: str) -> str:
    """Return a file of a run directory; GraphoptError where it is none, or the file is missing or no text."""
    check_run_directory(folder)
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise damaged(folder / name, getattr(error, "strerror", None) or first_line(error)) from None


def damaged(path: Path, reason: str) -> GraphoptError:
    """Return the error for a file of a run directory that cannot be read."""
    return GraphoptError(f"{path} is damaged ({reason}); run the optimization again")
