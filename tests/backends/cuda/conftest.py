"""Kernels compiled in tests go to a folder of the run, not to the user's cache."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    # One for all processes of a run: the cache is made for that.
    folder = tmp_path_factory.getbasetemp().parent / "cuda-cache"
    patch = pytest.MonkeyPatch()
    patch.setenv("GRAPHOPT_CACHE", str(folder))
