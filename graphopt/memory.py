"""Memory of the process: the most it has held, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Callable


def peak_bytes() -> int:
    """Return the most memory that the process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_freed() -> None:
    """Give freed memory back to the system, where the C library keeps it: glibc does, in the gaps between live blocks.

    Each pass and each candidate that is tried holds copies of the weights for a while. What they leave is too scattered
    to be used again by the next, so that without this the process grows with every one of them.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], object] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library than glibc has none
