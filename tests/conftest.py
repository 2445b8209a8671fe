"""What holds for every test: fixed seeds, no network."""

from __future__ import annotations

import os
import random
import socket

import numpy as np
import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples on every machine and in every run; speed is the time limit's business, not hypothesis's.
settings.register_profile("graphopt", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("graphopt")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches beyond this machine fails, also where there happens to be a network."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        local = isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1", "localhost")
        if self.family in (socket.AF_INET, socket.AF_INET6) and not local:
            raise AssertionError(f"a test tried to reach {address}: tests use no network")
        connect(self, address)  # type: ignore[arg-type]  # socket's own type of addresses is private

    monkeypatch.setattr(socket.socket, "connect", refuse)
