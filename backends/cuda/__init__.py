"""CUDA kernels, generated from a program, for NVIDIA GPUs."""

from graphopt.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
