"""What the PTX interpreter finds, most of all wrong device halves of the dialect, which the host never sees."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_kernels import Case

from graphopt.backends.cuda import nvrtc, ptx
from graphopt.backends.cuda.emit import Kernel, kernel
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, Plan, RowPlan
from graphopt.backends.cuda.ptx import PtxFault
from graphopt.backends.cuda.ptx.operations import function
from graphopt.backends.cuda.ptx.program import parse

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")

_LINEAR = LinearPlan(33, 300, group=64, k_warps=2, k_blocks=2, zero_points=True, epilogue="silu(acc)")
_BRAIN = LinearPlan(33, 300, 8, group=64, dtype="bfloat16", k_warps=2)
_ROW = RowPlan(1024, norm="rms", output="int8", per_thread=16)
_INT8 = Int8Plan(33, 300)


@pytest.mark.parametrize(
    ("plan", "old", "new"),
    [
        (_LINEAR, "lop3.b32 %0, %1, %2, %3, 0xEA;", "lop3.b32 %0, %1, %2, %3, 0xE8;"),
        (_LINEAR, '"fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)',
         '"fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(c), "r"(b)'),
        (_LINEAR, '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])', '"r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3])'),
        (_LINEAR, '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)'),
        (_LINEAR, "prmt.b32 %0, %1, %2, %3;", "prmt.b32 %0, %2, %1, %3;"),
        (_LINEAR, "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
        (LinearPlan(1024, 128, group=32), "__fmaf_rn(a, b, c)", "__fadd_rn(__fmul_rn(a, b), c)"),
        (_BRAIN, 'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low))',
         'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(low), "f"(high))'),
        (_ROW, "shfl.sync.bfly.b32 %0, %1, %2, 0x1f", "shfl.sync.bfly.b32 %0, %1, 1, 0x1f"),
        (_ROW, "cvt.rni.s8.f32", "cvt.rzi.s8.f32"),
        (RowPlan(1024, output="int8", zero_points=True), "return __float2int_rn(a);", "return (int)a;"),
        (_INT8, "m16n8k32.row.col.s32.s8.s8.s32", "m16n8k32.row.col.s32.u8.s8.s32"),
    ],
)  # fmt: skip
def test_a_wrong_device_half_shows(plan: Plan, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each primitive's text is what decides: changed in one place, some bit or the interpreter says so."""
    case = Case(plan, 8)
    assert not case.differences(case.on_ptx())
    right = kernel.dialect

    def wrong(name: str) -> str:
        text = right(name)
        assert name != "device.h" or old in text, old
        return text.replace(old, new) if name == "device.h" else text

    monkeypatch.setattr(kernel, "dialect", wrong)
    try:
        found = case.differences(case.on_ptx())
    except KeyError as error:  # an instruction that no kernel of ours has
        found = {"not known": 1} if "is not known" in str(error) else {}
    assert found


def _edited(case: Case, pattern: str, new: str) -> str:
    text = nvrtc.ptx(case.kernel, "90")
    edited, count = re.subn(pattern, new, text, count=1)
    assert count, pattern
    return edited


@pytest.mark.parametrize(
    ("pattern", "new", "said"),
    [
        (r"(st\.global\.u16 \[%rd\d+)\]", r"\1+100000]", "outside of every buffer"),
        (
            r"(ld\.global\.nc\.L1::no_allocate\.v4\.u32 \{[^}]*\}, \[%rd\d+)\]",
            r"\1+4]",
            "an access of 16 bytes is not aligned",
        ),
        (r"(st\.shared[.\w]*\s+\[%r\d+)(?:\+-?\d+)?\]", r"\1+900000]", "outside of shared memory"),
    ],
)
def test_memory_faults(pattern: str, new: str, said: str) -> None:
    case = Case(_LINEAR, 2)
    with pytest.raises(PtxFault, match=said):
        case.on_ptx(text=_edited(case, pattern, new))


def _small(body: str) -> tuple[str, Kernel]:
    from graphopt.backends.cuda.emit import Parameter

    made = Kernel(RowPlan(64), (Parameter("x", "u32"), Parameter("y", "u32", written=True)), 64, body)
    return nvrtc.ptx(made, "90"), made


def _run(body: str) -> np.ndarray:
    text, made = _small(body)
    y = np.zeros(64, np.uint32)
    ptx.run(text, made.parameters, (1, 1), 64, {"x": np.arange(64, dtype=np.uint32), "y": y})
    return y


def test_writes_into_what_is_read_and_lanes_that_are_not_together() -> None:
    with pytest.raises(PtxFault, match="writes into what is only to be read"):
        _run("go_store1((u32*)x + go_thread(), 1u);")
    with pytest.raises(PtxFault, match="only some lanes of a warp"):
        _run("u32 v = go_load1(x + go_thread()); if (v < 40) { go_store1(y + go_thread(), go_shuffle_xor(v, 1)); }")


def test_branches_and_loops_meet_again() -> None:
    body = """
    u32 n = go_load1(x + go_thread()), sum = 0;
    for (u32 i = 0; i < n; i++) { if (i % 3 == 0) sum += i; else sum ^= i; }
    go_store1(y + go_thread(), go_shuffle_xor(sum, 1));
    """
    wanted = []
    for n in range(64):
        total = 0
        for i in range(n):
            total = total + i if i % 3 == 0 else total ^ i
        wanted.append(total)
    assert np.array_equal(_run(body), np.array(wanted)[np.arange(64) ^ 1])


@pytest.mark.parametrize("op", ["ex2.approx.f32", "add.rn.ftz.f32", "wgmma.mma_async", "sin.f32"])
def test_what_has_no_exact_meaning_or_is_not_known(op: str) -> None:
    with pytest.raises(KeyError):
        function(tuple(op.split(".")))


def test_a_line_that_is_no_ptx() -> None:
    with pytest.raises(ValueError, match="line 2 of the PTX is not understood: what is this"):
        parse(".version 8.0\nwhat is this\n")


_A = np.array([0, 1, 5, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 12345678], np.uint32)
_B = np.array([3, 0xFFFFFFFF, 2, 2, 3, 0xFFFFFFFE, 7], np.uint32)


@pytest.mark.parametrize(
    ("op", "compute"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.s32", lambda a, b: a * b >> 32),
        ("mul.wide.s32", lambda a, b: a * b),
        ("div.s32", lambda a, b: int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)),
        ("rem.s32", lambda a, b: a - int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) * b),
        ("min.s32", min),
        ("max.s32", max),
        ("shr.s32", lambda a, b: a >> min(b & 0xFFFFFFFF, 31)),
    ],
)
def test_signed_arithmetic(op: str, compute: object) -> None:
    got = function(tuple(op.split(".")))(_A, _B)
    signed = [(int(a), int(b)) for a, b in zip(_A.view(np.int32), _B.view(np.int32), strict=True)]
    wanted = np.array([compute(a, b) & (1 << 8 * got.dtype.itemsize) - 1 for a, b in signed], np.uint64)  # type: ignore[operator]
    assert np.array_equal(got.astype(np.uint64), wanted)


@pytest.mark.parametrize(
    ("op", "compute"),
    [
        ("mul.wide.u32", lambda a, b: a * b),
        ("shl.b32", lambda a, b: a << b if b < 32 else 0),
        ("shr.u32", lambda a, b: a >> b if b < 32 else 0),
        ("and.b32", lambda a, b: a & b),
        ("xor.b32", lambda a, b: a ^ b),
        ("div.u32", lambda a, b: a // b),
        ("setp.lt.u32", lambda a, b: a < b),
    ],
)
def test_unsigned_arithmetic(op: str, compute: object) -> None:
    got = function(tuple(op.split(".")))(_A, _B)
    pairs = zip(_A.tolist(), _B.tolist(), strict=True)
    mask = (1 << 8 * got.dtype.itemsize) - 1
    assert np.array_equal(got.astype(np.uint64), np.array([int(compute(a, b)) & mask for a, b in pairs], np.uint64))  # type: ignore[operator]


def test_bit_fields_and_selected_bytes() -> None:
    assert function(("bfe", "u32"))(np.uint32([0xABCD1234]), np.uint32([8]), np.uint32([12]))[0] == 0xD12
    assert function(("bfe", "s32"))(np.uint32([0x00000F00]), np.uint32([8]), np.uint32([4]))[0] == 0xFFFFFFFF
    assert function(("bfi", "b32"))(np.uint32([0xF]), np.uint32([0]), np.uint32([4]), np.uint32([4]))[0] == 0xF0
    assert (
        function(("prmt", "b32"))(np.uint32([0x33221100]), np.uint32([0x77665544]), np.uint32([0x7531]))[0]
        == 0x77553311
    )
    assert function(("prmt", "b32"))(np.uint32([0x80]), np.uint32([0]), np.uint32([0x8888]))[0] == 0xFFFFFFFF
    assert function(("shf", "l", "wrap", "b32"))(np.uint32([0x80000000]), np.uint32([1]), np.uint32([1]))[0] == 3
    assert function(("lop3", "b32"))(np.uint32([12]), np.uint32([10]), np.uint32([1]), np.uint32([0xEA]))[0] == 9
