"""QuantizeEmbedding: int8 rows, looked up before they are dequantized."""

from __future__ import annotations

import targets
import torch
from torch import Tensor, nn

from graphopt import capture
from graphopt.ir import operator
from graphopt.passes import QuantizeDynamic, QuantizeEmbedding
from graphopt.pipeline import Context, run_passes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh())


IDS = torch.tensor([[0, 3, 10], [7, 7, 1]])


def test_each_row_is_within_half_a_step() -> None:
    module = nn.Sequential(nn.Embedding(11, 6)).eval()
    program = capture(module, (IDS,))
    after, trace = run_passes(program, [QuantizeEmbedding()], Context(targets.EXACT, strict=True))
    table = module[0].weight.detach()
    step = table.abs().amax(1) / 127
    error = (after(IDS) - program(IDS)).detach().abs().amax(-1)
    assert bool((error <= step[IDS] / 2 * 1.001).all()) and float(error.max()) > 0
    assert after.weights["0.weight"].dtype is torch.int8 and "float32" not in {
        str(v.dtype) for n, v in after.weights.items() if n == "0.weight"
    }
    assert [site.reason for site in trace["quantize_embedding"].touched] == ["table 0.weight on int8 by row"]


def test_a_tied_head_shares_the_codes_when_it_is_quantized_too() -> None:
    program = capture(Tied().eval(), (IDS,))
    after, _ = run_passes(program, [QuantizeEmbedding(), QuantizeDynamic()], Context(targets.EXACT, strict=True))
    codes = [name for name, value in after.weights.items() if value.dtype is torch.int8 and value.dim() == 2]
    assert len(codes) == 1, f"the table is stored once, not as {codes}"


def test_declines_tables_that_are_no_finite_float_weights() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))

        def forward(self, ids: Tensor, gain: Tensor) -> Tensor:
            return nn.functional.embedding(ids, self.weight * gain)

    program = capture(Computed().eval(), (torch.tensor([1, 2]), torch.randn(1)))
    _, trace = run_passes(program, [QuantizeEmbedding()], Context(targets.EXACT))
    record = trace["quantize_embedding"]
    assert not record.changed
    assert [site.reason for site in record.skipped] == ["its table is not a floating-point weight"]


def test_skip_by_module_name_and_idempotence() -> None:
    program = capture(Tied().eval(), (IDS,))
    _, trace = run_passes(program, [QuantizeEmbedding(skip=("table",))], Context(targets.EXACT))
    assert not trace["quantize_embedding"].changed
    after, trace = run_passes(program, [QuantizeEmbedding(), QuantizeEmbedding()], Context(targets.EXACT))
    assert not trace["quantize_embedding#2"].changed
    assert any(operator(node) == "graphopt.dequantize" for node in after.nodes)
