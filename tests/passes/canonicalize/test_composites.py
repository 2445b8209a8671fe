"""What a decomposition took apart is put back together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import CONTEXT, Example, Function, apply, four_tests, operators
from models import MODELS
from torch import Tensor

import graphopt
from graphopt.passes import Canonicalize
from graphopt.pipeline.validation import Validator

aten = torch.ops.aten
IMAGE = (2, 4, 8, 8)
CHANNELS = {"w": torch.rand(4), "b": torch.rand(4), "buffer_m": torch.rand(4), "buffer_v": torch.rand(4) + 0.5}
KERNEL = torch.rand(6, 4, 3, 3)


def _one(name: str, function: Callable[..., object], shape: tuple[int, ...], golden: str, **weights: Tensor) -> Example:
    # The first name is taken by the operator that goes.
    name_of = golden.partition("(")[0] + ("_1" if "padding" in name else "")
    return Example(
        name,
        lambda: Function(function, **weights),
        shape,
        fires=1,
        golden=f"""
        {name_of} = {golden}
        return {name_of}
        """,
    )


EXAMPLES = [
    _one(
        "batch_norm",
        lambda x, w, b, m, v: aten._native_batch_norm_legit_no_training(x, w, b, m, v, 0.1, 1e-3)[0],
        IMAGE,
        "batch_norm(x, @w, @b, @buffer_m, @buffer_v, training=False, momentum=0.1, eps=0.001, cudnn_enabled=False)",
        **CHANNELS,
    ),
    _one(
        "batch_norm_older",
        lambda x, w, b, m, v: aten.native_batch_norm(x, w, b, m, v, False, 0.1, 1e-3)[0],
        IMAGE,
        "batch_norm(x, @w, @b, @buffer_m, @buffer_v, training=False, momentum=0.1, eps=0.001, cudnn_enabled=False)",
        **CHANNELS,
    ),
    _one(
        "layer_norm",
        lambda x, w, b: aten.native_layer_norm(x, [8], w, b, 1e-3)[0],
        IMAGE,
        "layer_norm(x, [8], @w, @b, eps=0.001)",
        w=torch.rand(8),
        b=torch.rand(8),
    ),
    _one(
        "group_norm",
        lambda x, w, b: aten.native_group_norm(x, w, b, x.shape[0], 4, 64, 2, 1e-3)[0],
        IMAGE,
        "group_norm(x, 2, @w, @b, eps=0.001)",
        w=torch.rand(4),
        b=torch.rand(4),
    ),
    _one(
        "max_pool",
        lambda x: aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])[0],
        IMAGE,
        "max_pool2d(x, [3, 3], stride=[2, 2], padding=[1, 1])",
    ),
    _one(
        "convolution",
        lambda x, w: aten.convolution(x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 2),
        IMAGE,
        "conv2d(x, @w, stride=[2, 2], padding=[1, 1], groups=2)",
        w=KERNEL[:, :2],
    ),
    _one(
        "transposed_convolution",
        lambda x, w: aten.convolution(x, w, None, [2, 2], [1, 1], [1, 1], True, [1, 1], 2),
        IMAGE,
        "conv_transpose2d(x, @w, stride=[2, 2], padding=[1, 1], output_padding=[1, 1], groups=2)",
        w=torch.rand(4, 3, 3, 3),
    ),
    _one(
        "convolution_of_one_axis",
        lambda x, w: aten.convolution(x, w, None, [1], [0], [2], False, [0], 1),
        (2, 4, 8),
        "conv1d(x, @w, dilation=[2])",
        w=torch.rand(6, 4, 3),
    ),
    _one(
        "same_padding",
        lambda x, w: aten.conv2d.padding(x, w, None, [1, 1], "same", [2, 1]),
        IMAGE,
        "conv2d(x, @w, padding=[2, 1], dilation=[2, 1])",
        w=KERNEL,
    ),
    _one(
        "valid_padding",
        lambda x, w: aten.conv2d.padding(x, w, None, [2, 2], "valid"),
        IMAGE,
        "conv2d(x, @w, stride=[2, 2])",
        w=KERNEL,
    ),
    _one("softmax", lambda x: aten._softmax(x, -1, False), IMAGE, "softmax(x, -1)"),
    _one("log_softmax", lambda x: aten._log_softmax(x, 1, False), IMAGE, "log_softmax(x, 1)"),
    _one("adaptive_pool", lambda x: aten._adaptive_avg_pool2d(x, [2, 2]), IMAGE, "adaptive_avg_pool2d(x, [2, 2])"),
    Example(
        "uneven_padding_stays",
        lambda: Function(lambda x, w: aten.conv2d.padding(x, w, None, [1, 1], "same"), w=KERNEL[..., :2, :2]),
        IMAGE,
        fires=0,
    ),
    Example(
        "statistics_of_the_batch",
        lambda: Function(
            lambda x, w, b: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-3)[0],
            w=CHANNELS["w"],
            b=CHANNELS["b"],
        ),
        IMAGE,
        fires=0,
    ),
    Example(
        "indices_are_read",
        lambda: Function(lambda x: aten.max_pool2d_with_indices(x, [2, 2], [2, 2])),
        IMAGE,
        declines="max_pool2d_with_indices is also read by getitem_1",
        fires=0,
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(Canonicalize(), EXAMPLES)


@pytest.mark.parametrize(
    "name", ["residual_cnn", "depthwise_cnn", "unet", "masked_encoder", "grouped_conv_transpose_bn"]
)
def test_a_decomposed_program_becomes_what_capture_makes(name: str) -> None:
    model = MODELS[name]()
    decomposed = graphopt.capture(model.export().run_decompositions())
    after, _ = apply(Canonicalize(), decomposed)
    validator = Validator(decomposed, seed=0)
    assert validator.check(after, {})[0] <= 1e-9
    captured_program = graphopt.capture(model.module, model.example_inputs)
    Canonicalize().run(captured_program, CONTEXT)
    if name == "masked_encoder":  # attention stays in pieces
        for each in ("linear", "layer_norm", "gelu", "embedding"):
            assert operators(after).count(each) == operators(captured_program).count(each)
        extra = set(after.weights) - set(captured_program.weights)
        assert all(after.weight(name).numel() == 1 for name in extra), "no weight is stored twice, or for each batch"
    else:
        assert operators(after) == operators(captured_program)


@pytest.mark.parametrize(("low", "high", "floats"), [(0, 0.5, True), (-1.5, 2, True), (0, 1, False), (0.0, 1.0, False)])
def test_the_bounds_of_a_clamp_get_one_type(low: float, high: float, floats: bool) -> None:
    program, changes = apply(
        Canonicalize(), graphopt.capture(Function(lambda x: x.clamp(low, high)), (torch.randn(4),))
    )
    assert changes.changed == floats
    (clamp,) = [node for node in program.nodes if "clamp" in node.name]
    assert len({type(bound) for bound in clamp.args[1:]}) == 1
