"""What can be said of a kernel's speed without running it on a GPU: gates that every plan must pass.

    no spills, no stack frame        what does not fit the registers goes through memory
    registers, shared memory         what the plan says, so that as many blocks run side by side as the model thinks
    no .approx, no .ftz              results would not be the specified ones
    wide loads                       weights by 16 bytes where their layout has them
    instructions a weight            within what the GPU issues while the memory delivers a weight

Instructions are counted by running the PTX (`ptx`) for two sizes: the difference is the inner loop alone. `mov` does
not
count: in PTX constants and halves of registers need names, in machine code they do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from graphopt.backends.cuda import nvrtc, ptx
from graphopt.backends.cuda.emit import Kernel, emit
from graphopt.backends.cuda.plan import SHARED_BYTES, Int8Plan, LinearPlan, Plan, RowPlan
from graphopt.backends.cuda.schedule import registers

_ISSUED = 132 * 128 * 1.98e9  # lane instructions a second of an H200 at the clock that it boosts to
_COPIED = 4.3e12  # bytes a second that a copy reaches there
ALLOWANCE = 1.0  # of the budget
_MOST_REGISTERS = 255
_INEXACT = re.compile(r"\.(approx|ftz)\b")


@dataclass(frozen=True)
class Gate:
    """What was found of one plan on one architecture.

    Attributes:
        plan, architecture: of what. usage: as ptxas tells it. instructions: a weight or element, mov aside.
        budget: for them; None where there is none. failures: sentences, one for each gate that it does not pass.
    """

    plan: Plan
    architecture: str
    usage: nvrtc.Usage
    instructions: float | None
    budget: float | None
    failures: tuple[str, ...]


def check(plan: Plan, architecture: str) -> Gate:
    """Compile a plan for an architecture and hold it against the gates."""
    kernel = emit(plan)
    usage = nvrtc.cubin(kernel, architecture).usage
    text = nvrtc.ptx(kernel, architecture)
    found, budget = instructions(plan, architecture), _budget(plan)
    failures = []
    if usage.spill_bytes or usage.stack_bytes:
        failures.append(f"{usage.spill_bytes} bytes spilled, a stack of {usage.stack_bytes}")
    limit = min(65536 // kernel.threads, _MOST_REGISTERS)
    if usage.registers > limit:
        failures.append(f"{usage.registers} registers, of {limit} that a block of {kernel.threads} threads may have")
    if usage.shared_bytes > min(SHARED_BYTES, getattr(plan, "shared_bytes", SHARED_BYTES)):
        failures.append(f"{usage.shared_bytes} bytes of shared memory, more than the plan says")
    failures += _linted(kernel, text)
    if found is not None and budget is not None and found > budget:
        failures.append(f"{found:.2f} instructions, over the budget of {budget}")
    return Gate(plan, architecture, usage, found, budget, tuple(failures))


def _budget(plan: Plan) -> float | None:
    """Return how many lane instructions the GPU issues while its memory brings a weight and its share of scales.

    For few tokens, where memory is to be the bound.
    """
    if not isinstance(plan, LinearPlan) or plan.columns > 1:
        return None
    of_group = (32 if plan.scale_dtype == "float32" else 16) + 8 * plan.zero_points
    bits = plan.bits + of_group / (plan.group or plan.k)
    return ALLOWANCE * _ISSUED * bits / 8 / _COPIED


def _linted(kernel: Kernel, text: str) -> list[str]:
    failures = []
    if found := _INEXACT.search(text):
        failures.append(f"an instruction is {found[1]}")
    if "ld.local" in text or "st.local" in text:
        failures.append("something lies in local memory")
    plan = kernel.plan
    if isinstance(plan, LinearPlan) and plan.layout.vector == 4 and not re.search(r"no_allocate(\.\w+)?\.v4", text):
        failures.append("weights are not loaded by 16 bytes")
    return failures


def instructions(plan: Plan, architecture: str = "90") -> float | None:
    """Return instructions that a lane takes for a weight of a product's inner loop, or an element of a row."""
    if isinstance(plan, RowPlan):
        counts = _count(plan, architecture, tokens=1)
        return counts / plan.n
    if not isinstance(plan, LinearPlan | Int8Plan):
        return None
    tile = 16 * plan.tiles_of_block
    unit = plan.layout.unit * plan.slices * plan.depth
    tokens = plan.tokens_of_block
    few, many = (_count(replace(plan, n=tile, k=times * unit), architecture, tokens) for times in (1, 2))
    return (many - few) / (tile * unit) / plan.column_warps


def _count(plan: LinearPlan | Int8Plan | RowPlan, architecture: str, tokens: int) -> float:
    kernel = emit(plan)
    arguments: dict[str, np.ndarray | int] = {}
    for parameter in kernel.parameters:
        if not parameter.pointer:
            arguments[parameter.name] = tokens
            continue
        size = {"u32": 4, "u16": 2, "u8": 1}[parameter.type]
        # Large enough for anything; zeros, so that tickets and addresses are good.
        arguments[parameter.name] = np.zeros(max(_words(plan, tokens) * 4, 16) // size, f"u{size}")
    grid = (tokens, 1) if isinstance(plan, RowPlan) else plan.grid(tokens)
    found = ptx.run(nvrtc.ptx(kernel, architecture), kernel.parameters, grid, kernel.threads, arguments)
    return sum(count for name, count in found.by_name.items() if not name.startswith("mov."))


def _words(plan: LinearPlan | Int8Plan | RowPlan, tokens: int) -> int:
    if isinstance(plan, RowPlan):
        return tokens * plan.n
    partial, tickets = plan.workspace(tokens)
    return max(16 * plan.layout.tiles * plan.layout.padded_k, tokens * max(plan.k, plan.n), partial, tickets)


def table(gates: Iterable[Gate]) -> str:
    """Return gates as a Markdown table."""
    lines = [
        "| kernel | sm | registers | (model) | shared bytes | instructions | budget | gates |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for gate in gates:
        model = str(registers(gate.plan)) if isinstance(gate.plan, LinearPlan | Int8Plan) else ""
        count = "" if gate.instructions is None else f"{gate.instructions:.2f}"
        budget = "" if gate.budget is None else f"{gate.budget:.2f}"
        passed = "; ".join(gate.failures) or "pass"
        cells = [
            title(gate.plan), gate.architecture, str(gate.usage.registers), model, str(gate.usage.shared_bytes), count,
            budget, passed,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def title(plan: Plan) -> str:
    """Return what a plan computes, and how, in a few words."""
    match plan:
        case LinearPlan():
            form = f"W{plan.bits}A16 g{plan.group}{' zp' * plan.zero_points} {plan.dtype} [{plan.n}, {plan.k}]"
            tiles = f"{plan.rows}×{plan.row_warps}×{plan.k_warps}×{plan.k_blocks}, depth {plan.depth}"
            return f"{form}, {plan.tokens_of_block} tokens a block ({tiles})"
        case Int8Plan():
            tiles = (
                f"{plan.rows}×{plan.row_warps} by {plan.columns}×{plan.column_warps}, {plan.k_warps}×{plan.k_blocks}"
            )
            return f"W8A8 [{plan.n}, {plan.k}] ({tiles})"
        case RowPlan():
            steps = [plan.norm * (plan.norm != "none"), f"hadamard {plan.block}" * bool(plan.block), plan.output]
            return f"{' + '.join(step for step in steps if step)} n={plan.n} ({plan.per_thread} a thread)"
    return f"dequantize W{plan.bits} [{plan.n}, {plan.k}]"
