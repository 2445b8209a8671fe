"""What a figure was measured on: read from the system, standard library only."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_VNNI_FLAGS = ("avx512_vnni", "avx_vnni")  # x86: u8·s8 dot products without 16-bit saturation
_DOT_FLAGS = ("asimddp",)  # Arm: the same


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo, or an empty dictionary where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def has_integer_dot_product() -> bool | None:
    """Whether the CPU has VNNI (or Arm's dot product); None where the system does not tell."""
    cpu = _cpuinfo()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    if not flags:
        return None
    return any(flag in flags for flag in (*_VNNI_FLAGS, *_DOT_FLAGS))


def describe() -> dict[str, object]:
    """CPU name, family and model (a hypervisor may hide the name), VNNI, cores, memory, system, Python."""
    cpu = _cpuinfo()
    try:
        memory_bytes: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory_bytes = None
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "vnni": has_integer_dot_product(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
