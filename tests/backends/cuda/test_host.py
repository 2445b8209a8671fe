"""What the host executor finds: each fault that it is for, made on purpose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_kernels import ORDERS, Case, with_body

from graphopt.backends.cuda import host
from graphopt.backends.cuda.emit import Kernel, Parameter
from graphopt.backends.cuda.host import KernelFault
from graphopt.backends.cuda.plan import LinearPlan, RowPlan
from graphopt.errors import GraphoptError

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler")

_LINEAR = LinearPlan(37, 300, group=64, k_warps=4, k_blocks=2)
_ROW = RowPlan(2048, norm="rms", block=2048, output="int8", per_thread=32)
_FROM_AND_TO = (Parameter("x", "u32"), Parameter("y", "u32", written=True))


def _run(body: str, threads: int = 64, grid: tuple[int, int] = (1, 1), order: int = 0, words: int = 64) -> np.ndarray:
    """Run a kernel of x and y, words each."""
    kernel = Kernel(RowPlan(64), _FROM_AND_TO, threads, body)
    y = np.full(words, 7, np.uint32)
    host.run(kernel, grid, {"x": np.arange(words, dtype=np.uint32), "y": y}, order)
    return y


def _fault(body: str, said: str, threads: int = 64, order: int = 0) -> None:
    with pytest.raises(KernelFault, match=said):
        _run(body, threads, order=order)


def test_a_kernel_without_faults() -> None:
    body = """
    GO_SHARED(u32, buffer, 64);
    GO_PUT(buffer, go_thread(), go_load1(x + go_thread()));
    GO_SYNC();
    go_store1(y + go_thread(), go_shuffle_xor(GO_GET(buffer, 63 - go_thread()), 1));
    """
    for order in ORDERS:
        assert np.array_equal(_run(body, order=order), (63 - np.arange(64)) ^ 1)


@pytest.mark.parametrize("old", ["GO_SYNC();\n    if (k_warp == 0) {", "GO_SYNC();\n    if (GO_GET(ticket, 0)"])
def test_a_missing_barrier(old: str) -> None:
    case = Case(_LINEAR, 3)
    case.kernel = with_body(case.kernel, old, old.replace("GO_SYNC();", ""))
    for order in ORDERS:
        with pytest.raises(KernelFault, match=r"shared memory, which thread .* with no barrier between"):
            case.on_host(order)


def test_a_missing_barrier_in_an_exchange() -> None:
    case = Case(_ROW)
    put, got = case.kernel.body.index("GO_PUT(row_of"), case.kernel.body.index("GO_GET(row_of")
    between = case.kernel.body[put:got]
    case.kernel = with_body(case.kernel, between, between.replace("GO_SYNC();", ""))
    for order in ORDERS:
        with pytest.raises(KernelFault, match=r"place .* of shared memory, which thread .* with no barrier between"):
            case.on_host(order)


def test_shared_memory_that_nobody_wrote_is_nan() -> None:
    y = _run("GO_SHARED(float, buffer, 64); go_store1(y + go_thread(), go_bits(GO_GET(buffer, go_thread())));")
    assert np.isnan(y.view(np.float32)).all()


def test_shared_memory_is_poisoned_for_every_block() -> None:
    body = """
    GO_SHARED(u32, buffer, 64);
    const u32 before = GO_GET(buffer, go_thread());
    GO_PUT(buffer, go_thread(), 1u);
    go_store1(y + go_thread(), before);
    """
    assert (_run(body, grid=(3, 1)) == 0x7FFFDEAD).all()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("go_store1(y + go_thread() + 1, 0u);", "line 2: writes 4 bytes outside of every buffer"),
        ("go_store1(y + go_thread(), go_load1(x - 1));", "reads 4 bytes outside of every buffer"),
        ("go_store1((u32*)x + go_thread(), 0u);", "writes into what is only to be read"),
        ("u32x4 v = go_load4(x + go_thread()); go_store1(y, v.x);", "an access of 16 bytes is not aligned"),
        ("GO_SHARED(u32, buffer, 8); GO_PUT(buffer, go_thread(), 0u);", "place 8 of a shared array of 8"),
        ("GO_SHARED(u32, buffer, 60000); GO_PUT(buffer, 0, 0u);", "no more shared memory"),
        ("if (go_thread() < 40) GO_SYNC(); else GO_SYNC();", ""),
        ("if (go_thread() < 8) go_store1(y, go_shuffle_xor(1u, 1));", "waits at line 2 for others .*: 8 of 32"),
        ("if (go_thread() < 32) { while (true) GO_SYNC(); }\nGO_SYNC();\nGO_SYNC();", "is at the barrier of line"),
        ("if (go_thread() & 1)\n go_store1(y, go_shuffle_xor(1u, 1));\nelse\n go_store1(y, go_shuffle_xor(1u, 1));",
         "while lanes of its warp wait at line"),
        ("GO_SHARED(u32, one, 1); GO_PUT(one, 0, (u32)go_thread());", "writes place 0 of shared memory, which thread"),
    ],
)  # fmt: skip
def test_what_the_dialect_forbids(body: str, said: str) -> None:
    if not said:
        # Two barriers in one line are one place of the text.
        _run(body)
        return
    _fault(body, said)


def test_threads_that_have_ended_are_not_waited_for_at_a_barrier() -> None:
    assert (_run("if (go_thread() >= 32) return;\nGO_SYNC();\ngo_store1(y + go_thread(), 3u);")[:32] == 3).all()


def test_what_depends_on_the_order_shows() -> None:
    """Blocks and threads come in the order asked for: who writes last wins."""
    last = {
        order: int(_run("go_store1(y, (u32)(go_block() * 64 + go_thread()));", grid=(3, 1), order=order)[0])
        for order in ORDERS
    }
    assert last[host.FORWARD] == 191 and last[host.REVERSE] == 0 and len(set(last.values())) > 2


def test_a_text_that_is_none_is_one_sentence() -> None:
    with pytest.raises(GraphoptError, match=r"does not take the kernel: .*error"):
        _run("this is no kernel;")


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "compiler", lambda: None)
    with pytest.raises(GraphoptError, match="needs a C\\+\\+ compiler; install g\\+\\+ or set CXX"):
        host.build(Case(_LINEAR).kernel)


@pytest.mark.slow
def test_sanitizers_pass_kernels_and_find_a_wild_write(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers over whole kernels, in a process that has their runtime loaded."""
    runtime = subprocess.run(
        [str(host.compiler()), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    script = tmp_path / "run.py"
    script.write_text(
        """
from cuda_kernels import Case, with_body
from graphopt.backends.cuda import host
from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, RowPlan

for plan, tokens in (
    (LinearPlan(37, 300, 3, group=64, k_blocks=2, zero_points=True, epilogue="silu(acc)"), 3),
    (RowPlan(2048, norm="rms", block=2048, output="int8", per_thread=32), 2),
    (Int8Plan(37, 301, zero_points=True, k_blocks=2), 9),
    (DequantizePlan(33, 131, 2, 32), 1),
):
    case = Case(plan, tokens)
    assert not case.differences(case.on_host(2, host.build(case.kernel, sanitize=True))), plan
print("clean", flush=True)
case = Case(LinearPlan(37, 300))
sums = "float acc[1][1][4] = {};"
case.kernel = with_body(case.kernel, sums, sums + " acc[0][0][go_thread() + 4] = 1;")
case.on_host(0, host.build(case.kernel, sanitize=True))
print("not found")
"""
    )
    tests = Path(__file__).parents[2]
    environment = {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tests)}
    import os

    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert ran.stdout.strip() == "clean" and ran.returncode, ran.stdout + ran.stderr[-2000:]
    assert "kernel:" in ran.stderr
