"""Memory of the process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from graphopt.memory import _trim, peak_bytes, release_freed

_BLOCK, _COUNT = 1 << 14, 4000  # 16 KiB, which the C library takes from its heap: 64 MB in all


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_peak_holds_what_was_there() -> None:
    before = peak_bytes()
    held = torch.ones(1 << 26, dtype=torch.uint8)
    assert peak_bytes() >= max(before, held.numel())


@pytest.mark.skipif(not sys.platform.startswith("linux") or _trim() is None, reason="only glibc keeps freed memory")
def test_what_lies_between_live_blocks_is_given_back() -> None:
    blocks = [torch.ones(_BLOCK, dtype=torch.uint8) for _ in range(_COUNT)]
    live = blocks[::64]
    del blocks
    held = _resident()
    release_freed()
    assert held - _resident() > 0.5 * _BLOCK * _COUNT
    assert all(int(block[0]) == 1 for block in live)
