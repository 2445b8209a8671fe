"""The text of a Program: golden, stable, and with digests that follow the bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from graphopt import capture
from graphopt.ir import Program, Rewriter, digest, node_text, operator, type_text

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(11)])
        self.register_buffer("steps", torch.arange(2))

    def forward(self, x: Tensor, scale: float = 0.5) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.conv(x)).mean((2, 3))[:, :2]
        y = self.layers[10](self.layers[2](y)) * scale
        return torch.cat([y, y + self.steps], 1), torch.topk(y, 1)[1]


def block() -> Program:
    torch.manual_seed(0)
    module = Block().eval()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.fill_(index)
    return capture(module, (torch.ones(1, 2, 8, 8), 0.5))


GOLDEN = """\
program(x: f32[1, 2, 8, 8], scale: 0.5)
  conv.bias: f32[3] #1e7cacf3
  conv.weight: f32[3, 2, 3, 3] #1c8fc889
  layers.2.weight: f32[2, 2] #f8bf7854
  layers.10.weight: f32[2, 2] #765fcb59
  steps: i64[2] #3ea97a77
{
  conv2d: f32[1, 3, 4, 4] = conv2d(x, @conv.weight, @conv.bias, stride=[2, 2], padding=[1, 1])          # conv
  relu: f32[1, 3, 4, 4] = relu(conv2d)
  mean: f32[1, 3] = mean(relu, [2, 3])
  slice_1: f32[1, 2] = slice(mean, 1, start=0, end=2)
  linear: f32[1, 2] = linear(slice_1, @layers.2.weight)                                                 # layers.2
  linear_1: f32[1, 2] = linear(linear, @layers.10.weight)                                               # layers.10
  mul: f32[1, 2] = mul(linear_1, 0.5)
  add: f32[1, 2] = add(mul, @steps)
  cat: f32[1, 4] = cat([mul, add], 1)
  topk: (f32[1, 1], i64[1, 1]) = topk(mul, 1)
  getitem_1: i64[1, 1] = getitem(topk, 1)
  return cat, getitem_1
}
"""


def test_golden_text() -> None:
    assert str(block()) == GOLDEN
    # The digest is that of the bytes, computed here without torch.
    steps = np.arange(2, dtype=np.int64).tobytes()
    assert f"steps: i64[2] #{hashlib.blake2b(steps, digest_size=4).hexdigest()}" in GOLDEN


def test_an_edited_program_shows_who_made_what() -> None:
    program = block()
    rewriter = Rewriter(program, "scale_up")
    relu = next(node for node in program.graph.nodes if operator(node) == "relu")
    rewriter.replace(relu, rewriter.insert(aten.mul.Tensor, relu, float("inf"), before=relu.next))
    half = rewriter.insert(aten._to_copy.default, relu, before=relu.next, dtype=torch.float16)
    rewriter.finish()
    lines = str(program).splitlines()
    assert sum(line.endswith("# [scale_up]") for line in lines) == 1
    (line,) = [line for line in lines if "[scale_up]" in line]
    assert line.split("#")[0].strip() == "mul_1: f32[1, 3, 4, 4] = mul(relu, inf)"
    assert half._erased


def dynamic_text() -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(1), nn.Linear(12, 3), nn.Softmax(-1)).eval()
    return str(capture(model, (torch.zeros(2, 3, dtype=torch.long),), ({0: Dim("batch", min=2)},)))


def test_text_is_the_same_in_another_process() -> None:
    """Addresses and the hashes of strings differ from process to process; the text may depend on neither."""
    script = f"import runpy; print(runpy.run_path({__file__!r})['dynamic_text'](), end='')"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert "f32[s" in other.stdout
    assert other.stdout == dynamic_text()


def test_text_is_the_same_for_another_capture() -> None:
    assert str(block()) == str(block())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.randn(3, 4).t(),
        torch.randn(3, 4)[:, ::2],
        torch.ones(1, 3).expand(4, 3),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.randn(3).to(torch.bfloat16),
        torch.randn(3).to(torch.float8_e4m3fn),
        torch.randn(3, dtype=torch.complex64),
        torch.arange(5).to(torch.uint16),
        nn.Parameter(torch.randn(3)),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_digests_of_equal_bytes_are_equal(tensor: Tensor) -> None:
    assert len(digest(tensor)) == 8
    assert digest(tensor) == digest(tensor.detach().clone(memory_format=torch.contiguous_format))


def test_digests_follow_every_byte() -> None:
    tensor = torch.zeros(1000)
    first = digest(tensor)
    for index in (0, 500, 999):
        changed = tensor.clone()
        changed[index] = torch.finfo(torch.float32).tiny
        assert digest(changed) != first
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))


def test_digests_follow_training() -> None:
    """Weights are not overwritten by passes, but their owner may train them."""
    weight = nn.Parameter(torch.ones(3))
    first = digest(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert digest(weight) != first
    with torch.no_grad():
        weight.fill_(1)
    assert digest(weight) == first
    with torch.inference_mode():
        inference = torch.ones(3)
    assert digest(inference) == first


def test_types() -> None:
    assert type_text(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert type_text(torch.zeros(())) == "f32[]"
    assert type_text((torch.zeros(1, dtype=torch.bool), None, 3)) == "(bool[1], none, 3)"
    assert type_text(torch.zeros(1, dtype=torch.float8_e5m2)) == "float8_e5m2[1]"
    program = capture(nn.ReLU(), (torch.ones(4, 3),), ({0: Dim("n", min=2)},))
    size = program.placeholders[0].meta["val"].shape[0]
    assert type_text(program.placeholders[0].meta["val"]) == f"f32[{size}, 3]"


def test_a_missing_weight_is_shown_as_missing() -> None:
    program = block()
    (node,) = [node for node in program.graph.nodes if node.target == "steps"]
    del program.graph_module.steps
    assert node_text(program, node) == "steps: missing"


def test_arguments_that_hold_nodes_are_never_left_out() -> None:
    """`index_put(x, [None, i], v)`: the list is no default although it begins with None."""

    class Put(nn.Module):
        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            return torch.index_put(x, (i,), torch.zeros(())) + x[:, i].sum()

    program = capture(Put(), (torch.ones(3, 3), torch.tensor([0, 2])))
    lines = [node_text(program, node) for node in program.graph.nodes if isinstance(node, fx.Node)]
    text = "\n".join(lines)
    assert "index_put(x, [i], " in text
    assert "index(x, [None, i])" in text
