"""Other libraries' kernels for the same product: each a function that makes calls, or says why it is not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Calls = list[Callable[[], object]]
GROUP = 128


def bfloat16(n: int, k: int, tokens: int, copies: int) -> Calls:
    """cuBLAS, as `linear` calls it."""
    x = torch.randn(tokens, k, dtype=torch.bfloat16, device="cuda")
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(max(copies // 4, 2))]
    return [partial(functional.linear, x, w) for w in weights]


def tinygemm(bits: int, n: int, k: int, tokens: int, copies: int) -> Calls:
    """torch's own int4 product."""
    if bits != 4:
        raise NotImplementedError("it has four bits only")
    x = torch.randn(tokens, k, dtype=torch.bfloat16, device="cuda")
    scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
    raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    weights = [torch._convert_weight_to_int4pack(raw, 8) for _ in range(copies)]
    return [partial(torch._weight_int4pack_mm, x, w, GROUP, scales) for w in weights]


def humming(bits: int, n: int, k: int, tokens: int, copies: int) -> Calls:
    """humming-kernels, with the schedule that it chooses itself."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found, unused-ignore]

    x = torch.randn(tokens, k, dtype=torch.float16, device="cuda")
    weight = torch.randn(n, k, dtype=torch.float16, device="cuda")
    layers = []
    for _ in range(copies):
        config = {"dtype": f"uint{bits}", "group_size": GROUP}
        layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.float16).cuda()
        layer.load_from_unquantized(weight)
        layer.transform()
        layers.append(layer)
    return [partial(layer, x) for layer in layers]


def gemlite(bits: int, n: int, k: int, tokens: int, copies: int) -> Calls:
    """GemLite's Triton kernels, tuned by themselves."""
    if bits not in (2, 4, 8):
        raise NotImplementedError(f"it has no {bits} bits")
    from gemlite import DType, GemLiteLinear  # type: ignore[import-not-found, unused-ignore]

    x = torch.randn(tokens, k, dtype=torch.float16, device="cuda")
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device="cuda")
    scales = torch.rand(n * k // GROUP, 1, dtype=torch.float16, device="cuda")
    layers = []
    for _ in range(copies):
        layer = GemLiteLinear(
            bits, group_size=GROUP, in_features=k, out_features=n, input_dtype=DType.FP16, output_dtype=DType.FP16
        )
        layer.pack(codes, scales, torch.full_like(scales, 1 << (bits - 1)), None)
        layers.append(layer)
    return [partial(layer, x) for layer in layers]


def bitsandbytes(bits: int, n: int, k: int, tokens: int, copies: int) -> Calls:
    """bitsandbytes' NF4."""
    if bits != 4:
        raise NotImplementedError("it has four bits only")
    import bitsandbytes as bnb  # type: ignore[import-not-found, unused-ignore]

    x = torch.randn(tokens, k, dtype=torch.float16, device="cuda")
    packed = [
        bnb.functional.quantize_4bit(torch.randn(n, k, dtype=torch.float16, device="cuda"), quant_type="nf4")
        for _ in range(copies)
    ]
    return [partial(bnb.matmul_4bit, x, codes.t(), quant_state=state) for codes, state in packed]


def torchao(bits: int, n: int, k: int, tokens: int, copies: int) -> Calls:
    """torchao's int4 weight-only linear."""
    if bits != 4:
        raise NotImplementedError("it has four bits only")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_  # type: ignore[import-not-found, unused-ignore]

    x = torch.randn(tokens, k, dtype=torch.bfloat16, device="cuda")
    layers = []
    for _ in range(copies):
        layer = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="cuda"))
        quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
        layers.append(layer)
    return [partial(layer, x) for layer in layers]


WEIGHT_ONLY: dict[str, Callable[[int, int, int, int, int], Calls]] = {
    "humming": humming,
    "gemlite": gemlite,
    "tinygemm": tinygemm,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
}


def int_mm(n: int, k: int, tokens: int, copies: int) -> Calls:
    """The library's product of bytes, and a dequantization behind it, as torch writes it."""
    x = torch.randint(-128, 128, (tokens, k), dtype=torch.int8, device="cuda")
    x_scale, scale = torch.rand(tokens, 1, device="cuda"), torch.rand(n, device="cuda")
    weights = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(copies)]
    finish = torch.compile(lambda acc: (acc.float() * x_scale * scale).half(), dynamic=False)

    def call(weight: Tensor) -> Any:
        return finish(torch._int_mm(x, weight.T))

    return [partial(call, w) for w in weights]


def scaled_mm(n: int, k: int, tokens: int, copies: int) -> Calls:
    """cuBLAS' fp8 product with a scale for each row and column."""
    x = torch.randn(tokens, k, device="cuda").to(torch.float8_e4m3fn)
    x_scale, scale = torch.rand(tokens, 1, device="cuda"), torch.rand(1, n, device="cuda")
    weights = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    return [partial(torch._scaled_mm, x, w.T, x_scale, scale, out_dtype=torch.bfloat16) for w in weights]
