"""`graphopt.passes` loads a pass when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graphopt import passes
from graphopt.pipeline import Pass


def test_every_listed_pass_is_a_pass() -> None:
    for name in passes.__all__:
        cls = getattr(passes, name)
        assert issubclass(cls, Pass)
        assert cls.__name__ == name
        assert cls.__module__.startswith("graphopt.passes.")
    assert set(passes.__all__) <= set(dir(passes))


def test_nothing_is_loaded_before() -> None:
    code = (
        "import sys, graphopt; "
        "before = [m for m in sys.modules if m.startswith('graphopt.passes.')]; "
        "graphopt.passes.FoldWeightNorm; "
        "names = ['fold.weight_norm', 'quantize.static']; "
        "print(before, *('graphopt.passes.' + name in sys.modules for name in names))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True False"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'graphopt.passes' has no attribute 'FoldEverything'"):
        _ = passes.FoldEverything  # type: ignore[attr-defined]
