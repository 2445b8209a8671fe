#!/usr/bin/env python3
"""The CUDA backend on a GPU: right first, then how fast, beside the libraries; static gates where there is no GPU.

    tools/bench/cuda.py                         on a GPU: everything, under ten minutes; prints tables, writes JSON
    tools/bench/cuda.py --gates                 without one: registers, spills and instructions of what would be chosen
    tools/bench/cuda.py --docs docs/cuda.md     write the last tables into the page, between its markers

First every kind of kernel is held against its specification on the GPU: to the bit where it is exact, within the stated
bound where tensor cores add. Then the ceilings are measured (a copy, the library's bfloat16 product), then our kernels,
tuned, and every peer that is installed, on the same data, as replays of CUDA graphs that go through more copies of the
weights than the cache holds. What the time does not allow is left out and said.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ENVIRONMENT = _HERE.parents[1] / ".venv" / "bin" / "python"


def _measurements() -> None:
    """Make `gpu` importable without this folder: the package `cuda`, which torch imports, has this script's name."""
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != _HERE]
    spec = importlib.util.spec_from_file_location(
        "gpu", _HERE / "gpu" / "__init__.py", submodule_search_locations=[str(_HERE / "gpu")]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["gpu"])


if __name__ == "__main__":
    if importlib.util.find_spec("torch") is None and _ENVIRONMENT.exists():  # as tools/setup made it
        os.execv(_ENVIRONMENT, [str(_ENVIRONMENT), *sys.argv])
    _measurements()
    from gpu.main import main

    main(__doc__ or "")
