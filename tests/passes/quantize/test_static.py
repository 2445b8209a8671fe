"""QuantizeStatic: fires, declines, agrees with closed forms, leaves the rest alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import targets
import torch
from torch import Tensor, nn

from graphopt import GraphoptError, Program, capture
from graphopt.calibration import Batches
from graphopt.ir import arguments, dialect, operator
from graphopt.passes import QuantizeStatic
from graphopt.pipeline import Context, PassRecord, run_passes


def quantized(
    module: nn.Module, example: tuple[Any, ...], batches: list[Any] | None = None, **options: Any
) -> tuple[Program, Program, PassRecord]:
    program = capture(module.eval(), example)
    context = Context(targets.EXACT, Batches(batches or [example], program), strict=True)
    after, trace = run_passes(program, [QuantizeStatic(**options)], context)
    return program, after, trace["quantize_static"]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).amax((2, 3)))


def test_fires_on_convolution_and_linear() -> None:
    before, after, record = quantized(Small(), (torch.randn(2, 3, 6, 6),))
    assert [(site.node, site.reason) for site in record.touched] == [
        ("conv2d", "conv2d on uint8 x int8"),
        ("linear", "linear on uint8 x int8"),
    ]
    counts = [sum(operator(n) == f"graphopt.{name}" for n in after.nodes) for name in ("quantize", "dequantize")]
    assert counts == [3, 3 + 4], "x, relu and amax are quantized; two weights and two biases are dequantized"
    assert record.sqnr_db is not None and record.sqnr_db > 30
    assert before.weights["conv.weight"].dtype is torch.float32, "the captured program is untouched"


def test_weights_are_symmetric_per_channel_codes_under_their_own_names() -> None:
    before, after, _ = quantized(Small(), (torch.randn(2, 3, 6, 6),))
    weight = before.weights["conv.weight"].detach()
    scale = weight.abs().amax((1, 2, 3)) / 127
    codes = torch.round(weight.double() / scale.double()[:, None, None, None]).to(torch.int8)
    assert torch.equal(after.weights["conv.weight"], codes)
    assert torch.allclose(after.weights["conv.weight_scale"], scale, rtol=1e-7)
    assert int(after.weights["conv.weight"].abs().max()) == 127


def test_bias_is_int32_on_the_grid_of_the_accumulator() -> None:
    before, after, _ = quantized(Small(), (torch.randn(2, 3, 6, 6),))
    conv = next(node for node in after.nodes if operator(node) == "conv2d")
    x_scale = after.weight(arguments(arguments(conv)["input"])["scale"])
    scale = after.weights["conv.bias_scale"]
    assert after.weights["conv.bias"].dtype is torch.int32
    assert torch.allclose(scale, x_scale * after.weights["conv.weight_scale"], rtol=1e-6)
    error = (after.weights["conv.bias"] * scale - before.weights["conv.bias"]).abs()
    assert bool((error <= scale / 2 * 1.001).all()), "never off by more than half a step"


def test_the_emulation_equals_integer_arithmetic() -> None:
    """y = s_x s_w sum (q_x - z)(q_w) + b, computed here in int64."""
    module = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(5, 6)
    _, after, _ = quantized(module, (x,))
    weights = {name: value.numpy() for name, value in after.weights.items()}
    linear = next(node for node in after.nodes if operator(node) == "linear")
    named = arguments(arguments(linear)["input"])
    s, z = after.weight(named["scale"]).numpy(), after.weight(named["zero_point"]).numpy()
    codes = np.clip(np.rint(x.numpy() / s) + z, 0, 255).astype(np.int64)
    total = (codes - int(z)) @ weights["0.weight"].astype(np.int64).T + weights["0.bias"].astype(np.int64)
    np.testing.assert_allclose(after(x).numpy(), total * (s * weights["0.weight_scale"]), rtol=1e-5, atol=1e-6)


def test_ranges_come_from_all_batches_and_cover_zero() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    batches = [(torch.tensor([[1.0, 2.0]]),), (torch.tensor([[3.0, 5.0]]),)]
    _, after, record = quantized(module, batches[0], batches, observer="minmax")
    ((name, (low, high)),) = record.facts["activation_ranges"].items()
    assert (low, high) == (0.0, 5.0)
    assert float(after.weights[f"{name}_scale"]) == pytest.approx(5 / 255)


def test_a_linear_over_three_axes_adds_its_bias_on_integers() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    _, after, _ = quantized(Deep(), (torch.randn(2, 3, 4),))
    assert after.weights["up.bias"].dtype is torch.int32
    assert after.weights["down.bias"].dtype is torch.int32


def test_shared_modules_share_codes_but_not_biases_of_another_scale() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.conv(x)) * 4.0)

    _, after, _ = quantized(Twice(), (torch.randn(1, 3, 4, 4),))
    readers = [node for node in after.nodes if node.op == "get_attr" and node.target == "conv.weight"]
    assert len(readers) == 1 and len(readers[0].users) == 2
    biases = [name for name, value in after.weights.items() if value.dtype is torch.int32 and "zero_point" not in name]
    assert len(biases) == 2


def test_skip_and_only_are_globs_over_node_weight_and_module_names() -> None:
    example = (torch.randn(2, 3, 6, 6),)
    for options in ({"skip": ("head*",)}, {"skip": ("linear",)}, {"only": ("conv.weight",)}):
        _, after, record = quantized(Small(), example, **options)
        assert [site.node for site in record.touched] == ["conv2d"], options
        assert after.weights["head.weight"].dtype is torch.float32
        assert any(site.node == "linear" for site in record.skipped)


def test_the_reason_for_a_float_island_is_recorded() -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    _, _, record = quantized(Island(), (torch.randn(1, 3, 4, 4),))
    assert [(site.node, site.reason) for site in record.skipped] == [
        ("tanh", "onnxruntime-cpu has no integer kernel for tanh")
    ]


def test_without_calibration_it_says_what_it_needs() -> None:
    program = capture(Small().eval(), (torch.randn(2, 3, 6, 6),))
    with pytest.raises(GraphoptError, match="quantize_static needs calibration data"):
        run_passes(program, [QuantizeStatic()], Context(targets.EXACT))


def test_running_it_twice_changes_nothing_more() -> None:
    example = (torch.randn(2, 3, 6, 6),)
    program = capture(Small().eval(), example)
    context = Context(targets.EXACT, Batches([example], program))
    _, trace = run_passes(program, [QuantizeStatic(), QuantizeStatic()], context)
    assert not trace["quantize_static#2"].changed


def test_nothing_to_quantize_is_no_change_and_reads_no_data() -> None:
    class Sort(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(-1).values

    program = capture(Sort().eval(), (torch.randn(4, 4),))
    _, trace = run_passes(program, [QuantizeStatic()], Context(targets.EXACT))
    record = trace["quantize_static"]
    assert not record.changed
    assert [site.node for site in record.skipped] == ["program"] and "no operator" in record.skipped[0].reason


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_each_observer_keeps_a_gaussian_within_forty_decibels(observer: str) -> None:
    module = nn.Sequential(nn.Linear(64, 64, bias=False))
    batches = [(torch.randn(256, 64),) for _ in range(4)]
    _, _, record = quantized(module, batches[0], batches, observer=observer)
    assert record.sqnr_db is not None and record.sqnr_db > (30 if observer == "entropy" else 35)


def test_percentile_beats_minmax_where_one_value_is_far_out() -> None:
    module = nn.Sequential(nn.Linear(64, 64, bias=False))
    x = torch.randn(512, 64)
    x[0, 0] = 60.0
    results = {}
    for observer in ("minmax", "percentile"):
        program, after, _ = quantized(module, (x,), observer=observer, percentile=99.9)
        with torch.no_grad():
            results[observer] = float((after(x) - program(x)).square()[1:].mean())
    assert results["percentile"] < results["minmax"] / 2, "the rows without the outlier"


def test_dequantizes_are_never_stacked() -> None:
    _, after, _ = quantized(Small(), (torch.randn(2, 3, 6, 6),))
    for node in after.nodes:
        if node.target is dialect.quantize:
            assert operator(node.args[0]) != "graphopt.dequantize"


def test_a_channel_of_tiny_weights_keeps_its_bias() -> None:
    """After folding, a channel whose norm is almost dead has weights near zero and an ordinary bias."""
    conv = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        conv.weight[1] = 1e-10
        conv.bias.copy_(torch.tensor([0.5, 1.0, -0.5]))
    example = (torch.randn(1, 2, 4, 4),)
    before, after, _ = quantized(nn.Sequential(conv), example)
    torch.testing.assert_close(after(*example)[:, 1], before(*example)[:, 1], atol=0.02, rtol=0)
    codes = after.weights["0.bias"]
    assert int(codes.abs().max()) <= 2**30, "no code is clamped"
    assert int(after.weights["0.weight"][0].abs().max()) == 127, "the other channels keep their resolution"


def test_no_code_means_more_than_the_bound_of_an_absorbed_clamp() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU6(), nn.Conv2d(3, 1, 1))
    batches = [(torch.randn(1, 2, 8, 8) * 100,)]
    _, after, _ = quantized(module, batches[0], batches, observer="minmax")
    scale = after.weights["hardtanh_scale"]
    assert float(scale * 255) <= 6.0 and float(scale * 255) == pytest.approx(6.0)
