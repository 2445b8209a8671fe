"""Target profiles of ONNX Runtime: what its CPU execution provider runs on integers.

Read off the runtime's QDQ selectors and confirmed by dumping optimized graphs; `check_fusion` proves each export.

    onnxruntime-cpu     the machine that graphopt runs on: it is timed, and asked whether its products saturate
    onnxruntime-avx2    any x86 processor: weights are such that products saturate on none
    onnxruntime-arm64   activations in int8, which ARM multiplies by int8 at full width
"""

from __future__ import annotations

import dataclasses

from graphopt.backends.onnx.packing import two_bits_known
from graphopt.backends.onnx.processor import saturates_pairs
from graphopt.target import IntegerOperator, Target

_CONVOLUTION = IntegerOperator("anchor", inputs=("input",))
_LINEAR = IntegerOperator("anchor", inputs=("input",), requires_output=False, dynamic=True)
_BINARY = IntegerOperator("follower", inputs=("self", "other"))
_UNARY = IntegerOperator("follower")
_MOVE = IntegerOperator("transparent")
_CLAMP = IntegerOperator("absorbed")

ONNXRUNTIME_CPU = Target(
    name="onnxruntime-cpu",
    backend="onnx",
    saturates_pairs=saturates_pairs(),
    measurable=True,
    width_multiple=16,
    code_bits=(2, 4, 8) if two_bits_known() else (4, 8),
    activation_format="uint8",
    weight_format="int8",
    bias_format="int32",
    operators={
        "conv1d": _CONVOLUTION,
        "conv2d": _CONVOLUTION,
        "conv3d": _CONVOLUTION,
        "linear": _LINEAR,
        "add": _BINARY,
        "mul": _BINARY,
        "cat": IntegerOperator("follower", inputs=("tensors",)),
        "adaptive_avg_pool1d": _UNARY,
        "adaptive_avg_pool2d": _UNARY,
        "adaptive_avg_pool3d": _UNARY,
        "sigmoid": _UNARY,
        "leaky_relu": _UNARY,
        "max_pool1d": _MOVE,
        "max_pool2d": _MOVE,
        "max_pool3d": _MOVE,
        "view": _MOVE,
        "reshape": _MOVE,
        "_unsafe_view": _MOVE,
        "flatten": _MOVE,
        "permute": _MOVE,
        "transpose": _MOVE,
        "squeeze": _MOVE,
        "unsqueeze": _MOVE,
        "slice": _MOVE,
        "select": _MOVE,
        "expand": _MOVE,
        "pixel_shuffle": _MOVE,
        "pad": _MOVE,
        "constant_pad_nd": _MOVE,
        "upsample_nearest2d": _MOVE,
        "split": _MOVE,
        "split_with_sizes": _MOVE,
        "chunk": _MOVE,
        "relu": _CLAMP,
        "relu6": _CLAMP,
        "hardtanh": _CLAMP,
        "clamp": _CLAMP,
        "clamp_min": _CLAMP,
    },
    reasons={
        "conv_transpose1d": "the CPU provider has no integer transposed convolution",
        "conv_transpose2d": "the CPU provider has no integer transposed convolution",
        "conv_transpose3d": "the CPU provider has no integer transposed convolution",
        "avg_pool1d": "the integer average pool is an order of magnitude slower than the float one",
        "avg_pool2d": "the integer average pool is an order of magnitude slower than the float one",
        "avg_pool3d": "the integer average pool is an order of magnitude slower than the float one",
        "silu": "the runtime's float form is one operator and faster than its integer Sigmoid and Mul",
        "softmax": "the integer softmax is several times slower than the float one",
        "scaled_dot_product_attention": "attention scores stay float: quantizing costs accuracy and the fused operator",
        "matmul": "products of two activations stay float: both ranges would be unknown to the weights",
        "bmm": "products of two activations stay float: both ranges would be unknown to the weights",
    },
)

ONNXRUNTIME_AVX2 = dataclasses.replace(
    ONNXRUNTIME_CPU, name="onnxruntime-avx2", saturates_pairs=True, measurable=False
)
ONNXRUNTIME_ARM64 = dataclasses.replace(
    ONNXRUNTIME_CPU,
    name="onnxruntime-arm64",
    activation_format="int8",
    saturates_pairs=False,
    measurable=False,
    # DynamicQuantizeLinear, the one operator for scales at run time, writes uint8 only.
    operators={
        name: dataclasses.replace(each, dynamic=False) for name, each in ONNXRUNTIME_CPU.operators.items()
    },
)

TARGETS = (ONNXRUNTIME_CPU, ONNXRUNTIME_AVX2, ONNXRUNTIME_ARM64)
