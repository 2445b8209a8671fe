"""Kernels of random operands, run by every executor and held against the specification."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from graphopt.backends.cuda import cases, host, nvrtc, ptx
from graphopt.backends.cuda.cases import Arrays
from graphopt.backends.cuda.emit import Kernel
from graphopt.backends.cuda.plan import Plan

ORDERS = (host.FORWARD, host.REVERSE, 2, 3, 4)


class Case(cases.Case):
    """A case that runs without a GPU."""

    def on_host(self, order: int = host.FORWARD, library: Path | None = None) -> Arrays:
        arguments, outputs = self.arguments()
        host.run(self.kernel, self.grid, arguments, order, library)
        assert not arguments.get("tickets", np.zeros(1)).any(), "tickets are not as the next launch needs them"
        return outputs

    def on_ptx(self, architecture: str = "90", text: str = "") -> Arrays:
        arguments, outputs = self.arguments()
        program = text or nvrtc.ptx(self.kernel, architecture)
        ptx.run(program, self.kernel.parameters, self.grid, self.kernel.threads, arguments)
        return outputs


def agree(plan: Plan, tokens: int = 1, orders: Iterable[int] = (), architectures: Iterable[str] = ("90",)) -> None:
    """Assert that every executor gives the specification's bits."""
    case = Case(plan, tokens)
    for architecture in architectures:
        assert not case.differences(case.on_ptx(architecture)), ("PTX", architecture, plan)
    library = host.build(case.kernel) if orders else None
    for order in orders:
        assert not case.differences(case.on_host(order, library)), ("host", order, plan)


def with_body(kernel: Kernel, old: str, new: str) -> Kernel:
    """Return a kernel with a fault: `old`, which must be there, replaced by `new`."""
    assert old in kernel.body, f"{old!r} is not in the kernel"
    return Kernel(kernel.plan, kernel.parameters, kernel.threads, kernel.body.replace(old, new))
