"""An interpreter for the PTX that NVRTC makes of our kernels: what it computes, and how many instructions it takes."""

from graphopt.backends.cuda.ptx.machine import Counts, PtxFault, run

__all__ = ["Counts", "PtxFault", "run"]
