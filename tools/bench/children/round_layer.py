"""Round one matrix with llm-compressor's GPTQ; runs in that environment. round_layer.py INPUT OUTPUT BITS GROUP

INPUT is a safetensors file with `weight` [R, K] and `hessian` [K, K], OUTPUT gets the rounded `weight` and the seconds
that rounding took, scales not counted.
"""

from __future__ import annotations

import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file


def main() -> None:
    source, output, bits, group = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    given = load_file(source)
    weight, hessian = given["weight"], given["hessian"]
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group, actorder="weight"
    )
    blocks = weight.reshape(len(weight), -1, group)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    started = time.perf_counter()
    rounded, _, _ = quantize_weight(weight[None], hessian[None].clone(), scale[None], zero[None], None, args)
    seconds = time.perf_counter() - started
    save_file({"weight": rounded[0].contiguous(), "seconds": torch.tensor(seconds)}, output)


if __name__ == "__main__":
    main()
