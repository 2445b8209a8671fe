"""What stands around a launch, on the CPU: kernels are run by the PTX interpreter in the place of a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_kernels import Case

from graphopt.backends.cuda import arithmetic, launch, nvrtc, ptx, tuning
from graphopt.backends.cuda.emit import emit
from graphopt.backends.cuda.operands import Bytes
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, Plan, RowPlan
from graphopt.backends.cuda.schedule import H200, ranked
from graphopt.errors import GraphoptError
from graphopt.progress import Silent

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Let launches run here; returns the plans that are launched."""
    launched: list[Plan] = []

    def run(plan: Plan, grid: tuple[int, int], arguments: dict[str, Any], device: torch.device) -> None:
        kernel = emit(plan)
        launched.append(plan)
        arrays = {
            name: _array(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        ptx.run(nvrtc.ptx(kernel, "90"), kernel.parameters, grid, kernel.threads, arrays)

    def workspace(words: int, blocks: int, index: int, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((words,), 0x7FFDEAD, dtype=torch.int32), torch.zeros(blocks, dtype=torch.int32)

    monkeypatch.setattr(launch, "launch", run)
    monkeypatch.setattr(launch, "gpu_of", lambda index: H200)
    monkeypatch.setattr(launch, "_architecture", lambda index: "90")
    monkeypatch.setattr(launch, "_index", lambda device: 0)
    monkeypatch.setattr(launch, "_workspace", workspace)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=0))
    return launched


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory."""
    kinds = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
    kind, wanted = kinds[tensor.element_size()]
    return tensor.view(kind).numpy().view(wanted)


def _half(array: np.ndarray, plan: Plan) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int16)).view(torch.float16 if plan.dtype == "float16" else torch.bfloat16)


def _words(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int32 if array.dtype == np.uint32 else np.int16))


@needs_nvrtc
@pytest.mark.parametrize(
    ("plan", "tokens"),
    [
        (LinearPlan(64, 512, epilogue="add(silu(add(acc, v0)), in0)"), 1),
        (LinearPlan(48, 640, 3, 64, True, "bfloat16", paired=True, epilogue="mul(acc, acc2)"), 17),
        (LinearPlan(40, 130, 2, 0, scale_dtype="float32"), 64),
    ],
    ids=str,
)
def test_few_tokens(plan: LinearPlan, tokens: int, interpreted: list[Plan]) -> None:
    """The schedule that is chosen gives the specification's bits, up to the order of its own sums."""
    case = Case(dataclasses.replace(plan, token_blocks=True), tokens)
    given = case.given
    zeros = _words(given["zeros"]) if plan.zero_points else None
    x, inputs = _half(given["x"], plan), [_half(given[name], plan) for name in plan.inputs]
    got = launch.linear(plan, x, _words(given["weights"]), _words(given["scales"]), zeros, inputs)
    assert len(interpreted) == 1 and got.shape == (tokens, plan.outputs)
    wanted = arithmetic.widened(case.wanted["y"], plan.dtype)
    step = 2.0**-10 if plan.dtype == "float16" else 2.0**-7
    assert np.abs(got.float().numpy() - wanted).max() <= step * np.abs(wanted).max()


@needs_nvrtc
@pytest.mark.parametrize("paired", [False, True])
def test_many_tokens_are_the_librarys(paired: bool, interpreted: list[Plan]) -> None:
    epilogue = "mul(silu(add(acc, v0)), acc2)" if paired else "add(acc, in0)"
    plan = LinearPlan(48, 130, 4, 64, paired=paired, epilogue=epilogue)
    case = Case(dataclasses.replace(plan, token_blocks=True), 70)
    given = case.given
    inputs = [_half(given[name], plan) for name in plan.inputs]
    x = _half(given["x"], plan).reshape(7, 10, 130)
    got = launch.linear(plan, x, _words(given["weights"]), _words(given["scales"]), None, inputs)
    assert [each.kind for each in interpreted] == ["dequantize"] and got.shape == (7, 10, plan.outputs)
    wanted = arithmetic.widened(case.wanted["y"], plan.dtype)
    assert np.abs(got.float().numpy().reshape(wanted.shape) - wanted).max() <= 2e-3 * np.abs(wanted).max()


@needs_nvrtc
def test_bytes_and_rows(interpreted: list[Plan]) -> None:
    plan = Int8Plan(40, 640, zero_points=True, epilogue="add(acc, v0)")
    case = Case(plan, 5)
    given = case.given
    operands = Bytes(
        torch.from_numpy(given["x"]).view(torch.int8),
        _half(given["x_scale"], plan)[:, None],
        torch.from_numpy(given["x_zero_point"]).view(torch.int8)[:, None],
        _words(given["weights"]),
        _words(given["scales"]),
        _words(given["row_sums"]),
    )
    got = launch.int8(plan, operands, [_half(given["v0"], plan)])
    assert np.array_equal(_array(got), case.wanted["y"])
    rotated = RowPlan(
        256, norm="rms", affine="mul(x, v0)", block=64, signs=True, output="uint8", zero_points=True, per_thread=16
    )
    case = Case(rotated, 3)
    inputs = [_half(case.given[name], rotated) for name in rotated.inputs]
    codes, scale, zero = launch.rows(rotated, inputs, torch.from_numpy(case.given["signs"]))
    assert np.array_equal(codes.numpy(), case.wanted["codes"]) and scale.shape == zero.shape == (3, 1)
    assert np.array_equal(_array(scale).reshape(-1), case.wanted["scale"])
    assert np.array_equal(zero.numpy().reshape(-1), case.wanted["zero_point"])
    assert [each.kind for each in interpreted] == ["int8", "row"]


@needs_nvrtc
def test_no_tokens_launch_nothing(interpreted: list[Plan]) -> None:
    plan = LinearPlan(32, 64)
    given = Case(plan).given
    weights = [_words(given[name]) for name in ("weights", "scales")]
    assert launch.linear(plan, torch.zeros(0, 64).half(), *weights, None, []).shape == (0, 32)
    assert launch.rows(RowPlan(64), [torch.zeros(2, 0, 64).half()], None)[0].shape == (2, 0, 64)
    assert interpreted == []


@pytest.mark.parametrize(
    "plan",
    [
        Int8Plan(40, 64),
        Int8Plan(40, 64, zero_points=True, epilogue="add(relu(acc), v0)"),
        Int8Plan(40, 64, signed=False, zero_points=True, epilogue="mul(acc, in0)"),
        Int8Plan(40, 64, "bfloat16", by_token=False),
    ],
    ids=str,
)
def test_bytes_by_the_library(plan: Int8Plan) -> None:
    case = Case(plan, 24)
    given, kind = case.given, torch.int8 if plan.signed else torch.uint8
    half = torch.float16 if plan.dtype == "float16" else torch.bfloat16
    count = (24, 1) if plan.by_token else ()
    zero = torch.from_numpy(given["x_zero_point"]).view(kind).reshape(count) if plan.zero_points else None
    sums = torch.from_numpy(given["row_sums"].view(np.int32)) if plan.zero_points else None
    halves = {
        name: torch.from_numpy(each.view(np.int16)).view(half) for name, each in given.items() if each_is_half(each)
    }
    operands = Bytes(
        torch.from_numpy(given["x"]).view(kind),
        halves["x_scale"].reshape(count),
        zero,
        torch.from_numpy(given["weights"].view(np.int32)),
        torch.from_numpy(given["scales"].view(np.int32)),
        sums,
    )
    got = launch.int8_by_library(plan, operands, [halves[name] for name in plan.inputs])
    wanted = arithmetic.widened(case.wanted["y"], plan.dtype)
    step = 2.0**-10 if plan.dtype == "float16" else 2.0**-7
    assert np.abs(got.float().numpy() - wanted).max() <= step * np.abs(wanted).max()


def each_is_half(each: object) -> bool:
    return isinstance(each, np.ndarray) and each.dtype == np.uint16


def test_operands_are_made_dense_and_aligned() -> None:
    x = torch.arange(64, dtype=torch.float16).reshape(8, 8)
    assert launch._ready(x, "x").data_ptr() == x.data_ptr()
    assert launch._ready(x.T, "x").is_contiguous()
    off = torch.arange(65, dtype=torch.float16)[1:]
    assert off.data_ptr() % 16 and launch._ready(off, "x").data_ptr() % 16 == 0
    with pytest.raises(GraphoptError, match=r"x is torch.float32; the kernel was generated for torch.float16"):
        launch._ready(x.float(), "x", torch.float16)


@needs_nvrtc
@pytest.mark.parametrize(
    "plan",
    [
        LinearPlan(48, 256, 2, 64, True, "bfloat16", "float32", epilogue="add(mul(acc, in0), v0)"),
        LinearPlan(48, 256, 8, 0, paired=True, epilogue="mul(acc, acc2)"),
        Int8Plan(48, 256, signed=False, zero_points=True, epilogue="add(acc, in0)"),
        Int8Plan(48, 256, by_token=False),
    ],
    ids=str,
)
def test_trials_give_kernels_what_they_take(plan: LinearPlan | Int8Plan, interpreted: list[Plan]) -> None:
    trial = tuning.Trial(plan, 3, torch.device("cpu"))
    for each in ranked(plan, 3)[:2]:
        calls = trial.calls(each)
        assert len(calls) > 1
        calls[0]()
        assert interpreted[-1] == each
    assert trial.given["y"].isfinite().all() and trial.bytes > 48 * 256 * 2 / 8


def test_each_product_is_tuned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, int]] = []
    monkeypatch.setattr(tuning, "tuned", lambda plan, tokens, device: seen.append((plan, tokens)))
    small, other = LinearPlan(32, 64), LinearPlan(48, 64)
    products: list[tuple[LinearPlan | Int8Plan, int]] = [(small, 1), (small, 1), (small, 3), (small, 8), (other, 1)]
    assert tuning.tune_products(products, torch.device("cpu"), Silent()) == 3
    assert seen == [(small, 1), (small, 8), (other, 1)]


@needs_nvrtc
def test_where_no_schedule_runs_it_says_why(
    interpreted: list[Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuses(*args: Any) -> float:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "replayed", refuses)
    monkeypatch.setattr(tuning, "gpu_of", lambda index: H200)
    with pytest.raises(GraphoptError, match=r"no schedule of a linear product runs on this GPU: .*illegal memory"):
        tuning.tuned(LinearPlan(32, 64), 1, torch.device("cpu"), 2)


def test_a_fault_inside_a_backend_is_no_mistake_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import graphopt

    x = (torch.randn(2, 8),)
    result = graphopt.optimize(torch.nn.Linear(8, 8), x, "exact")
    monkeypatch.setattr("graphopt.backends.cuda.backend._with_kernels", lambda *given: len(5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has no len"):
        result.compile("cuda", device="cpu")
