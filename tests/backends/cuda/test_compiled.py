"""`result.compile("cuda")` from end to end, on a machine without a GPU; and what a user may do wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from cached_decoder import CachedDecoder
from torch import Tensor, nn

import graphopt
from graphopt.backends.cuda import nvrtc
from graphopt.backends.cuda.backend import CudaBackend
from graphopt.errors import GraphoptError
from graphopt.passes import QuantizeWeights

_W4 = QuantizeWeights(grid="int4", group_size=32, objective="plain", rounding="nearest")
_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without a GPU")


def _decoder() -> tuple[CachedDecoder, tuple[Any, ...]]:
    model = CachedDecoder().eval()
    return model, (torch.tensor([[3]]), torch.tensor([0]), *model.caches())


@pytest.fixture(scope="module")
def decoding() -> graphopt.Result:
    torch.manual_seed(0)
    model, inputs = _decoder()
    return graphopt.optimize(model, inputs, [_W4], calibration=[inputs])


def _greedy(step: Any, model: CachedDecoder, tokens: int) -> list[int]:
    token, caches, found = torch.tensor([[3]]), model.caches(), []
    for i in range(tokens):
        logits, *caches = step(token, torch.tensor([i]), *caches)
        token = logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(token))
    return found


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_a_decoder_decodes_token_by_token(decoding: graphopt.Result, dtype: str | None) -> None:
    model, inputs = _decoder()
    compiled = decoding.compile("cuda", dtype=dtype, device="cpu")
    logits, keys, _ = compiled(*inputs)
    wanted = decoding(*inputs)
    assert logits.dtype == keys.dtype == torch.float32 and logits.shape == wanted[0].shape
    worst = float((logits - wanted[0]).detach().abs().max() / wanted[0].detach().abs().max())
    assert worst < (2e-2 if dtype == "bfloat16" else 3e-3)
    assert len(_greedy(compiled, model, 8)) == 8
    # All linears but none of attention: norm, qkv, o, norm, gate and up, down, twice; norm and head.
    kernels = [
        node for node in compiled.program.graph.nodes if "cuda_" in str(node.target) and node.op == "call_function"
    ]
    assert len(kernels) == 2 * 6 + 2
    assert not compiled.kept, compiled.kept


def test_in_half_precision_it_says_what_it_does(decoding: graphopt.Result) -> None:
    text = str(decoding.compile("cuda"))
    assert "operators in kernels for" in text and "W4A16 kernel, one product with" in text


@_no_gpu
def test_without_a_gpu_it_says_who_computes(decoding: graphopt.Result) -> None:
    compiled = decoding.compile("cuda")
    assert compiled.device.type == "cpu" and any("there is no GPU here" in note for note in compiled.notes)


def test_the_program_is_left_as_it_is(decoding: graphopt.Result) -> None:
    before = str(decoding.program)
    decoding.compile("cuda")
    assert str(decoding.program) == before


def test_torch_sees_it(decoding: graphopt.Result) -> None:
    _, inputs = _decoder()
    compiled = decoding.compile("cuda", device="cpu")
    half = tuple(value.half() if value.is_floating_point() else value for value in inputs)
    exported = torch.export.export(compiled.program.module(), half)
    assert sum("cuda_" in str(node.target) for node in exported.graph.nodes) == 14
    wanted = compiled(*inputs)[0]
    assert torch.equal(exported.module()(*half)[0].float(), wanted)
    whole = torch.compile(compiled.program.graph_module, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*half)[0].float(), wanted)


def test_saved_and_loaded_it_runs_in_another_process(decoding: graphopt.Result, tmp_path: Any) -> None:
    _, inputs = _decoder()
    compiled = decoding.compile("cuda", device="cpu")
    compiled.program.save(tmp_path / "kernels.pt2")
    torch.save([value.half() if value.is_floating_point() else value for value in inputs], tmp_path / "inputs.pt")
    script = (
        "import sys, torch, graphopt\nimport graphopt.backends.cuda\n"
        f"program = graphopt.Program.load({str(tmp_path / 'kernels.pt2')!r})\n"
        f"inputs = torch.load({str(tmp_path / 'inputs.pt')!r}, weights_only=True)\n"
        f"torch.save(program(*inputs)[0], {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True).float(), compiled(*inputs)[0])


def test_a_network_without_kernels_runs_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    inputs = (torch.randn(2, 3, 8, 8),)
    result = graphopt.optimize(model, inputs, "int8_static", calibration=[inputs])
    compiled = result.compile("cuda", device="cpu")
    assert compiled.dtype is None and torch.equal(compiled(*inputs), result(*inputs))
    assert any("nothing in this program becomes a kernel" in note for note in compiled.notes)
    assert any("convolutions" in site.reason for site in compiled.kept)


def test_any_batch_of_a_program_with_an_open_dimension() -> None:
    model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64))
    x = torch.randn(4, 5, 64)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch},)
    result = graphopt.optimize(model, (x,), [_W4], calibration=[(x,)], dynamic_shapes=shapes)
    compiled = result.compile("cuda", device="cpu")
    assert len(compiled.regions) == 3
    for count in (2, 7, 33):
        y = torch.randn(count, 5, 64)
        assert compiled(y).shape == (count, 5, 64) and (compiled(y) - result(y)).abs().max() < 5e-3


def test_the_demo_network_falls_back_cleanly() -> None:
    """One small linear of it could be a kernel; for that nothing is computed in halves."""
    from graphopt.demo.network import ResidualCNN

    inputs = (torch.rand(2, 3, 16, 16),)
    result = graphopt.optimize(ResidualCNN().eval(), inputs, "int8_static", calibration=[inputs])
    compiled = result.compile("cuda", device="cpu")
    assert torch.equal(compiled(*inputs), result(*inputs)) and compiled.dtype is None and not compiled.regions
    assert any("kernels would compute 0% of what multiplies by weights" in note for note in compiled.notes)


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(30, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("shape", [(30,), (1, 30), (0, 30), (2, 0, 30), (2, 3, 30)])
def test_any_number_of_tokens(shape: tuple[int, ...]) -> None:
    model, x = _Odd(), torch.randn(shape)
    weights = QuantizeWeights(grid="int8", group_size=0, objective="plain", rounding="nearest")
    result = graphopt.optimize(model, (torch.randn(4, 30),), [weights], calibration=[(torch.randn(4, 30),)])
    from graphopt.backends.cuda.operators import LINEAR

    compiled = result.compile("cuda", device="cpu")
    node = next(node for node in compiled.program.graph.nodes if node.target is LINEAR)
    weight = [compiled.program.weight(each) for each in node.args[1:3]]
    zeros = None if node.args[3] is None else compiled.program.weight(node.args[3])
    y = LINEAR(x.half(), *weight, zeros, [compiled.program.weight(each) for each in node.args[4]], node.args[5])
    assert y.shape == (*shape[:-1], 7)


def test_inputs_that_are_not_dense(decoding: graphopt.Result) -> None:
    _, (token, position, keys, values) = _decoder()
    compiled = decoding.compile("cuda", device="cpu")
    turned = keys.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not turned.is_contiguous()
    assert torch.equal(compiled(token, position, turned, values)[0], compiled(token, position, keys, values)[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float32"}, "compute in float16 or bfloat16, not float32"),
        ({"device": "gpu"}, "there is no device called 'gpu'"),
        ({"device": "meta"}, "not on meta"),
        ({"device": "cuda:99"}, "there is no GPU cuda:99: torch sees"),
        ({"speed": "high"}, "does not take these options: .*speed"),
    ],
)
def test_options_that_there_are_not(decoding: graphopt.Result, options: dict[str, str], said: str) -> None:
    with pytest.raises(GraphoptError, match=said):
        decoding.compile("cuda", **options)


def test_backends_that_there_are_not_or_that_compile_nothing(decoding: graphopt.Result) -> None:
    with pytest.raises(GraphoptError, match=r"no backend called 'cude'.*cuda"):
        decoding.compile("cude")
    with pytest.raises(GraphoptError, match="'onnx' writes files; use result"):
        decoding.compile("onnx")


def test_a_call_of_another_form(decoding: graphopt.Result) -> None:
    with pytest.raises(GraphoptError, match="do not have the structure"):
        decoding.compile("cuda")(torch.tensor([[3]]))


def test_memory_that_does_not_suffice(decoding: graphopt.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("graphopt.backends.cuda.backend._moved", full)
    with pytest.raises(GraphoptError, match=r"the weights take .* GB, which .* does not have free"):
        decoding.compile("cuda")


def test_a_gpu_that_cannot_run_kernels_gets_none(decoding: graphopt.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "_unsupported", staticmethod(lambda place: "this GPU has compute capability 7.5"))
    compiled = decoding.compile("cuda")
    _, inputs = _decoder()
    assert compiled.dtype is None and "nothing became a kernel: this GPU has compute capability 7.5" in compiled.notes
    assert torch.equal(compiled(*inputs)[0], decoding(*inputs)[0])


def test_without_nvrtc_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    from graphopt.backends.cuda.emit import emit
    from graphopt.backends.cuda.plan import RowPlan

    assert not nvrtc.available()
    with pytest.raises(GraphoptError, match=r"NVRTC, which is not installed here; pip install 'graphopt\[cuda\]'"):
        nvrtc.cubin(emit(RowPlan(64)))


def test_importing_and_emitting_need_no_cuda() -> None:
    script = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'cuda':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import graphopt, graphopt.backends.cuda\n"
        "from graphopt.backends.cuda.emit import emit\n"
        "from graphopt.backends.cuda.plan import LinearPlan\n"
        "print(len(emit(LinearPlan(64, 64)).device) > 1000)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True"
