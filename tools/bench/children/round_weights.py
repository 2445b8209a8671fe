"""Quantize the weights of a decoder with a peer; runs in the peer's environment, knows nothing of graphopt.

    round_weights.py JOB.json

The job names a safetensors file with the decoder's weights under transformers' names, the calibration and the held-out
tokens [samples, length], its sizes, a method, the bits and the group size. What it writes: the logits of the held-out
tokens [samples, length, vocabulary] as the quantized model gives them, and in the result the bits of each weight beside
its codes, seconds and peak memory.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def decoder(sizes: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> Any:
    """Return the model with the given weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    model = model.float().eval()
    model.config.save_pretrained(folder)  # llm-compressor wants to know where a model comes from
    model.config._name_or_path = model.name_or_path = str(folder)
    missing = model.load_state_dict(weights, strict=False)
    if missing.unexpected_keys or missing.missing_keys:
        raise SystemExit(f"the weights do not fit: {missing}")
    return model


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def hqq(model: Any, tokens: Tensor, bits: int, group: int) -> float:
    """HQQ: scales and zero points are numbers of 16 bits."""
    from hqq.core.quantize import Quantizer

    for module in linears(model).values():
        codes, meta = Quantizer.quantize(
            module.weight.data.float(), nbits=bits, channel_wise=True, group_size=group, optimize=True, axis=1,
            device="cpu", compute_dtype=torch.float32,
        )  # fmt: skip
        module.weight.data = Quantizer.dequantize(codes, meta).reshape(module.weight.shape).float()
    return 32 / group


def llmcompressor(
    model: Any, tokens: Tensor, bits: int, group: int, *, kind: str, symmetric: bool = False, before: str = ""
) -> float:
    """llm-compressor's GPTQ or AutoRound on all linears, layer after layer.

    `before`: what goes before it, SmoothQuant or the rotations of SpinQuant; then activations have as many bits as
    weights, with a scale and a zero point a token.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot

    inputs = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="token", dynamic=True)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group),
        input_activations=inputs if before else None,
    )
    if kind == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        modifier: Any = GPTQModifier(config_groups={"all": scheme}, ignore=[])
    else:
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        modifier = AutoRoundModifier(config_groups={"all": scheme}, ignore=[], iters=200)
    recipe: list[Any] = [modifier]
    if before == "smoothquant":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        recipe.insert(0, SmoothQuantModifier())
    elif before:
        from llmcompressor.modifiers.transform import SpinQuantModifier

        recipe.insert(0, SpinQuantModifier(rotations=before.split("-"), transform_type=_HADAMARD))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(tokens), processor=object())
    return (16 if symmetric else 16 + bits) / group


_HADAMARD = "random-hadamard"  # the plain one wants sizes that are powers of two

METHODS: dict[str, Callable[[Any, Tensor, int, int], float]] = {
    "hqq": hqq,
    "gptq": functools.partial(llmcompressor, kind="gptq", symmetric=True),
    "gptq_asymmetric": functools.partial(llmcompressor, kind="gptq", symmetric=False),
    "smoothquant_gptq": functools.partial(llmcompressor, kind="gptq", before="smoothquant"),
    "r1r2_gptq": functools.partial(llmcompressor, kind="gptq", before="R1-R2"),
    "r1r2r4_gptq": functools.partial(llmcompressor, kind="gptq", before="R1-R2-R4"),
    "autoround": functools.partial(llmcompressor, kind="autoround", symmetric=True),
    "autoround_asymmetric": functools.partial(llmcompressor, kind="autoround", symmetric=False),
}


def peak_bytes() -> int:
    """Return the most memory held since this program started; getrusage counts what forked it, too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    given = load_file(job["weights"])
    tokens, heldout = given.pop("calibration"), given.pop("heldout")
    folder = Path(job["output"]).parent / "config"
    model = decoder(job["sizes"], given, folder)
    started = time.perf_counter()
    beside = METHODS[job["method"]](model, tokens, job["bits"], job["group_size"])
    seconds = time.perf_counter() - started
    if job["method"].startswith("autoround"):  # it leaves hooks behind that spoil the logits, and bfloat16
        made = {f"{name}.weight": module.weight.detach().float() for name, module in linears(model).items()}
        model = decoder(job["sizes"], given | made, folder)
    with torch.no_grad():
        save_file({"logits": torch.cat([model(input_ids=row[None]).logits for row in heldout]).float()}, job["output"])
    result = {"bits_beside": beside, "seconds": seconds, "peak_bytes": peak_bytes()}
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
