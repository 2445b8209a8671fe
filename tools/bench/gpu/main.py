"""The order of measurements, their time, and the tables that come out."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "runs" / "bench" / "cuda.json"
_MARKERS = ("<!-- measured: begin -->", "<!-- measured: end -->")
_SECONDS = 540.0

# (bits, n, k, tokens), what matters most first
_LINEARS: list[tuple[Literal[2, 3, 4, 8], int, int, int]] = [
    (4, 28672, 8192, 1), (2, 8192, 8192, 1), (3, 8192, 8192, 1), (4, 8192, 8192, 1), (4, 8192, 8192, 16),
    (2, 28672, 8192, 1), (4, 28672, 8192, 16), (4, 4096, 4096, 1), (4, 6144, 4096, 1), (4, 4096, 14336, 1),
    (4, 8192, 8192, 64), (2, 8192, 8192, 16), (3, 8192, 8192, 16), (8, 8192, 8192, 1), (4, 10240, 8192, 1),
    (4, 57344, 8192, 1), (4, 8192, 28672, 1), (4, 28672, 4096, 1), (4, 8192, 8192, 32), (4, 8192, 8192, 8),
    (4, 8192, 8192, 4), (4, 8192, 8192, 2),
]  # fmt: skip
_BYTES = [
    (4096, 4096, 32), (4096, 512, 512), (8192, 1024, 512), (4096, 4096, 128), (4096, 4096, 512), (8192, 8192, 4096),
    (4096, 4096, 1), (4096, 4096, 16),
]  # fmt: skip
_ROW_TOKENS = 4096
_GATED: list[tuple[Literal[2, 3, 4, 8], int, int]] = [
    (4, 28672, 8192), (4, 8192, 8192), (3, 8192, 8192), (2, 8192, 8192), (8, 8192, 8192),
]  # fmt: skip
_HALVES: list[tuple[Literal["float16", "bfloat16"], ...]] = [("float16", "bfloat16"), ("float16",)]


def main(described: str) -> None:
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", action="store_true", help="print the static gates; needs no GPU")
    parser.add_argument("--docs", type=Path, help="write the last tables into a page; measure nothing")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help="when to begin nothing new (default %(default)s)"
    )
    parser.add_argument("--tuned", type=int, default=8, help="schedules tried of each product (default %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="JSON to write (default %(default)s)")
    given = parser.parse_args()
    if given.gates:
        print(gates_table())
        return
    if given.docs:
        _write_docs(given.docs, given.output, parser)
        return
    import torch

    if not torch.cuda.is_available():
        parser.error("there is no GPU here; --gates says what can be said without one")
    found = Measuring(given.seconds, given.tuned, given.output).everything()
    print(tables(found))


def gates_table() -> str:
    """Return the static gates of what would be chosen, for sm_80 and sm_90, as Markdown."""
    from graphopt.backends.cuda.gates import check, table
    from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, RowPlan
    from graphopt.backends.cuda.schedule import fitting, ranked

    found = []
    for architecture in ("80", "90"):
        linears = [
            (LinearPlan(n, k, bits, dtype=dtype), tokens)
            for bits, n, k in _GATED
            for tokens in (1, 16, 64)
            for dtype in _HALVES[n != k]
        ]
        bytes_of = [(Int8Plan(4096, 4096), tokens) for tokens in (1, 32, 512)]
        found += [check(next(fitting(ranked(plan, tokens), architecture)), architecture) for plan, tokens in linears]
        found += [check(next(fitting(ranked(plan, tokens), architecture)), architecture) for plan, tokens in bytes_of]
        others = (
            RowPlan(4096, norm="rms", affine="mul(x, v0)", output="int8", per_thread=16),
            RowPlan(8192, block=8192, signs=True, output="int8", per_thread=64),
            DequantizePlan(8192, 8192),
        )
        found += [check(plan, architecture) for plan in others]
    return table(found)


class Measuring:
    """Everything, in order, until the time is over; written after each step."""

    def __init__(self, seconds: float, tuned: int, output: Path) -> None:
        self.deadline, self.tuned, self.output = time.monotonic() + seconds, tuned, output
        self.found: dict[str, Any] = {"left out": []}

    def everything(self) -> dict[str, Any]:
        for step in (self.machine, self.correct, self.ceilings, self.linears, self.rows, self.bytes, self.layer):
            step()
            self.write()
        return self.found

    def write(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        new = self.output.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1))
        new.replace(self.output)

    def _time_for(self, what: str) -> bool:
        if time.monotonic() < self.deadline:
            return True
        self.found["left out"].append(what)
        return False

    def machine(self) -> None:
        import torch

        from graphopt.backends.cuda import nvrtc

        index = torch.cuda.current_device()
        query = ["nvidia-smi", f"--id={index}", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown"
        version = ".".join(str(part) for part in nvrtc._nvrtc().nvrtcVersion()[1:])
        self.found["machine"] = {
            "gpu": torch.cuda.get_device_name(index), "driver": driver, "torch": torch.__version__, "nvrtc": version,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip

    def correct(self) -> None:
        from gpu.checks import checked
        from graphopt.backends.cuda.gates import title

        results = [(title(plan), said, good) for plan, said, good in checked()]
        self.found["correct"] = results
        for name, said, good in results:
            print(f"{'ok ' if good else 'BAD'} {name}: {said}", flush=True)

    def ceilings(self) -> None:
        import torch

        from graphopt.backends.cuda.timing import replayed

        halves = [torch.randn(1 << 28, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        target = torch.empty_like(halves[0])
        seconds = replayed([partial(target.copy_, x) for x in halves], replays=20)
        self.found["copy bytes a second"] = 2 * halves[0].nbytes / seconds

    def _peer(self, make: Callable[[], Any]) -> float | str:
        from graphopt.backends.cuda.timing import replayed

        try:
            return replayed(make(), replays=30)
        except Exception as error:  # not installed, not for this shape, not for this GPU: all the same here
            return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"

    def linears(self) -> None:
        import torch

        from gpu.clock import eager
        from gpu.peers import WEIGHT_ONLY, bfloat16
        from gpu.tasks import linear, schedule
        from graphopt.backends.cuda.timing import copies_of, replayed

        rows = self.found["linears"] = []
        for bits, n, k, tokens in _LINEARS:
            if not self._time_for(f"W{bits}A16 {n}×{k}, {tokens} tokens"):
                continue
            best, calls, moved = linear(bits, n, k, tokens, self.tuned)
            copies = copies_of(n * k * bits / 8)
            row: dict[str, Any] = {
                "bits": bits, "n": n, "k": k, "tokens": tokens, "schedule": schedule(best), "bytes": moved,
                "seconds": replayed(calls), "again": replayed(calls), "eager": eager(calls),
                "bfloat16": replayed(bfloat16(n, k, tokens, copies)),
            }  # fmt: skip
            del calls
            for name, peer in WEIGHT_ONLY.items():
                row[name] = self._peer(partial(peer, bits, n, k, tokens, copies))
                torch.cuda.empty_cache()
            rows.append(row)
            self.write()
            print(f"W{bits}A16 {n}×{k} M={tokens}: {row['seconds'] * 1e6:.1f} µs", flush=True)

    def rows(self) -> None:
        import torch

        from gpu.tasks import norm_by_torch, rows
        from graphopt.backends.cuda.gates import title
        from graphopt.backends.cuda.plan import RowPlan
        from graphopt.backends.cuda.timing import copies_of, replayed

        found = self.found["rows"] = []
        plans = [
            RowPlan(4096, norm="rms", output="int8", per_thread=16),
            RowPlan(8192, norm="rms", output="int8", per_thread=32),
            RowPlan(4096, norm="rms", prologue="round(add(in0, in1))", keep=True, output="int8", per_thread=16),
            RowPlan(8192, block=8192, signs=True, output="int8", per_thread=64),
            RowPlan(4096, block=4096, signs=True, output="int8", per_thread=32),
        ]
        for plan in plans:
            if not self._time_for(title(plan)):
                continue
            calls, moved = rows(plan, _ROW_TOKENS)
            size = _ROW_TOKENS * plan.n * 2
            x = [torch.randn(size // 2, dtype=torch.bfloat16, device="cuda") for _ in range(copies_of(size))]
            row = {
                "title": title(plan), "tokens": _ROW_TOKENS, "bytes": moved, "seconds": replayed(calls),
                "clone": replayed([each.clone for each in x]),
            }  # fmt: skip
            if plan.norm == "rms" and not plan.keep:
                row["torch.compile"] = self._peer(partial(norm_by_torch, plan, _ROW_TOKENS))
            found.append(row)

    def bytes(self) -> None:
        import torch

        from gpu.peers import bfloat16, int_mm, scaled_mm
        from gpu.tasks import int8, schedule
        from graphopt.backends.cuda.timing import copies_of, replayed

        found = self.found["bytes"] = []
        for n, k, tokens in _BYTES:
            if not self._time_for(f"W8A8 {n}×{k}, {tokens} tokens"):
                continue
            copies = copies_of(n * k)
            library = self._peer(partial(int_mm, n, k, tokens, copies))
            known = library if isinstance(library, float) else None
            best, calls, moved = int8(n, k, tokens, self.tuned, known)
            found.append({
                "n": n, "k": k, "tokens": tokens, "schedule": schedule(best), "bytes": moved,
                "seconds": replayed(calls), "_int_mm": library, "bfloat16": replayed(bfloat16(n, k, tokens, copies)),
                "_scaled_mm": self._peer(partial(scaled_mm, n, k, tokens, copies)),
            })  # fmt: skip
            del calls
            torch.cuda.empty_cache()

    def layer(self) -> None:
        from gpu.tasks import decode_layer
        from graphopt.backends.cuda.timing import replayed

        if self._time_for("a decoder layer"):
            plain, kernels = decode_layer()
            self.found["layer"] = {"bfloat16": replayed(plain), "seconds": replayed(kernels)}


# Tables ---------------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    """Return what was measured as Markdown, with the goals beside."""
    copy = found.get("copy bytes a second", float("nan"))
    machine = found.get("machine", {})
    checks = found.get("correct", ())
    bad = [name for name, _, good in checks if not good]
    on = ", ".join(f"{key} {machine.get(key)}" for key in ("driver", "torch", "nvrtc", "date"))
    head = (
        f"{machine.get('gpu')}, {on}. Copy: {copy / 1e12:.2f} TB/s. {len(checks) - len(bad)} of {len(checks)} checks "
        f"against the specification hold{f'; NOT: {bad}' if bad else ''}."
    )
    parts = [head, _linear_table(found.get("linears", []), copy), _row_table(found.get("rows", []), copy)]
    parts.append(_byte_table(found.get("bytes", [])))
    if layer := found.get("layer"):
        parts.append(
            f"A decoder layer's norms and linears, one token: {_ratio(layer['bfloat16'], layer['seconds'])} bfloat16."
        )
    if found.get("left out"):
        parts.append(f"Left out, the time being over: {'; '.join(found['left out'])}.")
    return "\n\n".join(parts)


def _ratio(theirs: Any, ours: float) -> str:
    return f"{theirs / ours:.2f}×" if isinstance(theirs, float) else "–"


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(['---'] + ['---:'] * (len(heads) - 1))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _linear_table(rows: list[dict[str, Any]], copy: float) -> str:
    peers = ("humming", "gemlite", "tinygemm", "torchao", "bitsandbytes")
    return _table(
        ["weights", "µs", "again", "eager µs", "GB/s", "of copy", "× bfloat16", *(f"× {peer}" for peer in peers)],
        (
            [
                f"W{row['bits']}A16 {row['n']}×{row['k']}, M={row['tokens']}", f"{row['seconds'] * 1e6:.1f}",
                f"{row['again'] * 1e6:.1f}", f"{row['eager'] * 1e6:.1f}", f"{row['bytes'] / row['seconds'] / 1e9:.0f}",
                f"{row['bytes'] / row['seconds'] / copy:.0%}", _ratio(row["bfloat16"], row["seconds"]),
                *(_ratio(row.get(peer), row["seconds"]) for peer in peers),
            ]
            for row in rows
        ),
    )  # fmt: skip


def _row_table(rows: list[dict[str, Any]], copy: float) -> str:
    return _table(
        ["rows", "tokens", "µs", "of copy", "× clone", "× torch.compile"],
        (
            [
                row["title"], str(row["tokens"]), f"{row['seconds'] * 1e6:.1f}",
                f"{row['bytes'] / row['seconds'] / copy:.0%}", _ratio(row["clone"], row["seconds"]),
                _ratio(row.get("torch.compile"), row["seconds"]),
            ]
            for row in rows
        ),
    )  # fmt: skip


def _byte_table(rows: list[dict[str, Any]]) -> str:
    return _table(
        ["W8A8", "µs", "× _int_mm + dequantization", "× _scaled_mm", "× bfloat16"],
        (
            [
                f"{row['n']}×{row['k']}, M={row['tokens']}", f"{row['seconds'] * 1e6:.1f}",
                *(_ratio(row.get(peer), row["seconds"]) for peer in ("_int_mm", "_scaled_mm", "bfloat16")),
            ]
            for row in rows
        ),
    )  # fmt: skip


def _write_docs(page: Path, results: Path, parser: argparse.ArgumentParser) -> None:
    begin, end = _MARKERS
    text = page.read_text()
    if begin not in text or end not in text:
        parser.error(f"{page} has no markers {begin} and {end}")
    if results.exists():
        measured = tables(json.loads(results.read_text()))
    else:
        measured = (
            "No GPU was measured yet. What can be said without one, of the schedules that the model chooses:\n\n"
            + gates_table()
        )
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{measured}\n\n{end}{after}")
