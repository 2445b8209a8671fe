"""RetypeFloats: bf16 and fp16 models compute in float32 and keep their interface."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt import capture
from graphopt.backends.onnx.target import ONNXRUNTIME_CPU
from graphopt.passes import RetypeFloats
from graphopt.pipeline import Context, run_passes


class Mixed(nn.Module):
    """Narrow and wide arithmetic, casts in both directions, an integer input, a narrow input that is also an output."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.up, self.norm = nn.Embedding(7, 8), nn.Linear(8, 16), nn.LayerNorm(16)
        self.to(dtype)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.norm(self.up(x + self.table(ids)))
        wide = y.float().softmax(-1)
        return wide.to(x.dtype), wide, x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_between_is_float32_and_the_interface_stays(dtype: torch.dtype) -> None:
    example = (torch.randn(3, 8, dtype=dtype), torch.tensor([1, 2, 6]))
    program = capture(Mixed(dtype).eval(), example)
    after, trace = run_passes(program, [RetypeFloats()], Context(ONNXRUNTIME_CPU, strict=True))
    record = trace["retype_floats"]
    assert record.error is not None and record.error < 1e-12 and record.rounding_error == 0.0
    assert {value.dtype for value in after.weights.values()} == {torch.float32}
    before_out, after_out = program(*example), after(*example)
    assert [each.dtype for each in after_out] == [each.dtype for each in before_out]
    for new, old in zip(after_out, before_out, strict=True):
        torch.testing.assert_close(new.float(), old.float(), atol=3e-2, rtol=3e-2)


def test_a_float32_model_is_left_alone_and_a_second_run_changes_nothing() -> None:
    plain = capture(nn.Linear(3, 3).eval(), (torch.randn(2, 3),))
    _, trace = run_passes(plain, [RetypeFloats()], Context(ONNXRUNTIME_CPU, strict=True))
    assert not trace["retype_floats"].changed
    example = (torch.randn(3, 8, dtype=torch.bfloat16), torch.tensor([1, 2, 6]))
    program = capture(Mixed(torch.bfloat16).eval(), example)
    _, trace = run_passes(program, [RetypeFloats(), RetypeFloats()], Context(ONNXRUNTIME_CPU, strict=True))
    assert not trace["retype_floats#2"].changed


class Returned(nn.Module):
    """Returns one parameter that it also reads, and one that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Parameter(torch.randn(8, dtype=torch.bfloat16))
        self.unread = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * self.read, self.read, self.unread


def test_a_returned_weight_keeps_its_type() -> None:
    model, x = Returned().eval(), torch.randn(3, 8, dtype=torch.bfloat16)
    program = capture(model, (x,))
    after, trace = run_passes(program, [RetypeFloats(), RetypeFloats()], Context(ONNXRUNTIME_CPU, strict=True))
    assert trace["retype_floats"].changed and not trace["retype_floats#2"].changed
    outputs = after(x)
    assert [each.dtype for each in outputs] == [torch.bfloat16] * 3
    assert torch.equal(outputs[1], model.read) and torch.equal(outputs[2], model.unread)
    torch.testing.assert_close(outputs[0], model(x)[0], atol=2e-2, rtol=2e-2)
