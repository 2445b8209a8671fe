"""Let a peer choose the bits of each linear of a decoder; runs in the peer's environment, knows nothing of graphopt.

    choose_bits.py JOB.json

The job names a safetensors file with the decoder's weights under transformers' names and the calibration tokens
[samples, length], the decoder's sizes, a method, the widths to choose from, the group size and the average number of
bits of a code. The result: the bits of each linear, with its name, and the seconds that it took.
"""

from __future__ import annotations

import functools
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

_BESIDE = runpy.run_path(str(Path(__file__).with_name("round_weights.py")))  # our names must not hide the peers'
decoder, linears = _BESIDE["decoder"], _BESIDE["linears"]


def auto_quantize(
    model: Any, tokens: Tensor, widths: list[int], group: int, average: float, folder: Path, *, method: str
) -> dict[str, int]:
    """Model-Optimizer's AutoQuantize; its rules that tie queries to keys and values are off: here nothing is tied."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import algorithms

    algorithms._AutoQuantizeBaseSearcher.quant_grouping_rules = []
    weights = {"type": "static", -1: group}
    formats = [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "block_sizes": weights}},
            ],
            "algorithm": "max",
        }
        for bits in widths
    ]

    def loss(logits: Tensor, batch: Tensor) -> Tensor:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    _, state = mtq.auto_quantize(
        model, {"effective_bits": average}, formats, list(tokens[:, None]),
        forward_step=lambda model, batch: model(input_ids=batch).logits,
        loss_func=loss if method == "gradient" else None,
        num_calib_steps=len(tokens), num_score_steps=_SCORED, method=method,
    )  # fmt: skip
    chosen = state["best"]["recipe"]
    found = {}
    for key, recipe in chosen.items():
        for name in state["candidate_stats"][key]["module_names"]:
            found[name] = round(recipe.num_bits)
    return found


def auto_scheme(
    model: Any, tokens: Tensor, widths: list[int], group: int, average: float, folder: Path
) -> dict[str, int]:
    """AutoRound's AutoScheme: gradients times what rounding changes, then a program over the layers' sums."""
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme

    tokenizer = _bytes_as_letters(folder)
    texts = [{"text": "".join(chr(_FIRST_LETTER + int(each)) for each in row)} for row in tokens]
    dataset = folder / "calibration.json"
    dataset.write_text(json.dumps(texts))
    options = [QuantizationScheme(bits=bits, group_size=group, sym=True, data_type="int") for bits in widths]
    beside = {
        "nsamples": len(tokens), "seqlen": tokens.shape[1], "dataset": str(dataset), "device_map": "cpu",
    }  # fmt: skip
    scheme = AutoScheme(
        average, options, ignore_scale_zp_bits=True, batch_size=8, low_gpu_mem_usage=False, low_cpu_mem_usage=False,
        **beside,
    )  # fmt: skip
    rounder = AutoRound(model, tokenizer=tokenizer, scheme=scheme, iters=0, quant_lm_head=True, **beside)
    rounder.post_init()
    return {name: each["bits"] for name, each in rounder.layer_config.items()}


_SCORED = 32  # samples; by divergence, a sample takes as many forward passes as there are levels of all linears
_FIRST_LETTER = 0x4E00  # letters that no tokenizer puts together, takes apart or strips


def _bytes_as_letters(folder: Path) -> Any:
    """Return a tokenizer whose word for each byte is a letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(_FIRST_LETTER + each): each for each in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=chr(_FIRST_LETTER)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast: Any = PreTrainedTokenizerFast
    made = fast(tokenizer_object=tokenizer, pad_token=chr(_FIRST_LETTER))
    made.save_pretrained(folder)
    return made


METHODS: dict[str, Callable[..., dict[str, int]]] = {
    "gradient": functools.partial(auto_quantize, method="gradient"),
    "divergence": functools.partial(auto_quantize, method="kl_div"),
    "scheme": auto_scheme,
}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    given = load_file(job["weights"])
    tokens, folder = given.pop("calibration"), Path(job["result"]).parent / "config"
    model = decoder(job["sizes"], given, folder)
    known = {*linears(model)}
    started = time.perf_counter()
    bits = METHODS[job["method"]](model, tokens, job["widths"], job["group_size"], job["average_bits"], folder)
    result = {"bits": {name: each for name, each in bits.items() if name in known}}
    Path(job["result"]).write_text(json.dumps(result | {"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
