"""Kernel plans as text: one file a kind of kernel."""

from graphopt.backends.cuda.emit.kernel import Kernel, Parameter, emit

__all__ = ["Kernel", "Parameter", "emit"]
