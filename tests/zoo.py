"""Tiny models of real architectures, on which a transformation that claims to be exact has to prove it.

`MODELS[name].build()` is a model and its inputs, `capture(name)` its program. The architectures are transformers' own
code; their values are `redraw`'s. Sizes are odd on purpose (heads of 12, intermediate widths of 56, a vocabulary of
67), so that no axis is taken for another because their sizes happen to agree.

`python tests/zoo.py` prints what the zoo holds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from honest_values import Inputs, branch_contributions, redraw
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import graphopt
from graphopt.ir import Program

__all__ = ["CAPTURED", "FEW", "MODELS", "Entry", "branch_contributions", "built", "capture", "redraw"]

# Fast, and as different as can be: gated with rotated positions, post-norm, fused and transposed, patches, batch norms.
FEW = ("Llama", "BERT", "GPT2", "ViT", "MobileNetV2")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: what it is called.
        make: builds the module with whatever values its class starts from.
        inputs: builds keyword inputs of a batch size and a length; a model of fixed length ignores the latter.
        branches: pattern of the full names of the modules that write a residual branch.
        branch_count: how many of them there are.
        dynamic_shapes: as torch.export takes it.
        note: what is particular about it.
        refused: the end of the sentence with which capture refuses it; empty where it does not.
        gain: of its weights, as `redraw` takes it.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    branches: str
    branch_count: int = 4
    dynamic_shapes: Any = None
    note: str = ""
    refused: str = ""
    gain: float = 1.2

    def build(self) -> tuple[nn.Module, Inputs]:
        """Return the redrawn model in eval mode, float32, and its example inputs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
        return redraw(model, 1, self.gain).eval(), self.inputs(2, 9)

    def second_inputs(self) -> Inputs:
        """Return inputs of another size along every dynamic dimension."""
        return self.inputs(3, 14)


@functools.cache
def built(name: str) -> tuple[nn.Module, Inputs]:
    """Return `MODELS[name].build()`, once; do not change it."""
    return MODELS[name].build()


@functools.cache
def capture(name: str) -> Program:
    """Return the program of a model, once; clone it before changing it."""
    model, inputs = built(name)
    return graphopt.capture(model, inputs, dynamic_shapes=MODELS[name].dynamic_shapes)


def _transformers(kind: str, head: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    """Build a model out of the classes `<kind>Config` and `<kind><head>`."""

    def make() -> nn.Module:
        model: nn.Module = getattr(hf, kind + head)(getattr(hf, f"{kind}Config")(**options))
        return model

    return make


# --- Inputs

VOCABULARY = 67
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

_BATCH = Dim("batch")
_LENGTH = Dim("length", min=2, max=32)
_IDS = {"input_ids": {0: _BATCH, 1: _LENGTH}}
_MASKED = _IDS | {"attention_mask": {0: _BATCH, 1: _LENGTH}}
_TARGET = {"decoder_input_ids": {0: _BATCH, 1: Dim("target_length", min=2, max=32)}}
_PIXELS = {"pixel_values": {0: _BATCH}}


def _ids(batch: int, length: int) -> Inputs:
    """input_ids: int64 [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(2)
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}


def _masked(batch: int, length: int) -> Inputs:
    """input_ids and attention_mask: int64 [batch, length]. Texts end with an end token and are padded after it."""
    ids = _ids(batch, length)["input_ids"]
    places, ends = torch.arange(length), torch.arange(length - 4, length - 4 + 2 * batch, 2).clamp(max=length - 1)
    ids[places == ends[:, None]] = SPECIAL["eos_token_id"]
    ids[places > ends[:, None]] = SPECIAL["pad_token_id"]
    return {"input_ids": ids, "attention_mask": (places <= ends[:, None]).long()}


def _target(batch: int, length: int) -> Inputs:
    return {"decoder_input_ids": _ids(batch, length - 3)["input_ids"].flip(1)}


def _normal(name: str, *shape: int) -> Callable[[int, int], Inputs]:
    """Normal numbers [batch, *shape]."""

    def make(batch: int, length: int) -> Inputs:
        return {name: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2))}

    return make


# --- Decoders

_GATED: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
}
_TOWER: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
_PLAIN: dict[str, Any] = {**_TOWER, "max_position_embeddings": 64}


def _decoder(
    kind: str,
    options: dict[str, Any],
    note: str = "",
    branches: str = r"model\.layers\.\d\.(self_attn|mlp)",
    *,
    name: str = "",
    head: str = "ForCausalLM",
    attention: str = "sdpa",
    mask: bool = False,
    refused: str = "",
) -> Entry:
    """A causal language model; with a mask where texts are padded."""
    general = {"vocab_size": VOCABULARY, **SPECIAL, "use_cache": False, "attn_implementation": attention}
    inputs, shapes = (_masked, _MASKED) if mask else (_ids, _IDS)
    return Entry(name or kind, _transformers(kind, head, general | options), inputs, branches, 4, shapes, note, refused)


def _decoders() -> Iterator[Entry]:
    tied = {**_GATED, "tie_word_embeddings": True}
    yield _decoder("Llama", {**_GATED, "tie_word_embeddings": False})
    yield _decoder("Mistral", {**_GATED, "sliding_window": 5}, "sliding window of 5", mask=True)
    yield _decoder("Qwen2", {**tied, "head_dim": 10}, "biases on q, k and v; tied", attention="eager")
    yield _decoder("Qwen3", tied, "norms on q and k; tied")
    yield _decoder(
        "Gemma2",
        {**tied, "sliding_window": 5, "query_pre_attn_scalar": 12},
        "gains used as 1 + w; sandwich norms; soft caps; every other layer with a window of 5; tied",
        r"model\.layers\.\d\.post_(attention|feedforward)_layernorm",
        attention="eager",
        mask=True,
    )
    yield _decoder("Phi3", {**_GATED, "hidden_size": 48}, "q, k and v fused, gate and up fused")
    yield _decoder(
        "GPT2",
        {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 56, "n_positions": 64},
        "q, k and v fused; weights [in, out]; table of positions; tied",
        r"transformer\.h\.\d\.(attn|mlp)",
        head="LMHeadModel",
    )
    yield _decoder(
        "OPT",
        {**_PLAIN, "ffn_dim": 56, "word_embed_proj_dim": 48},
        "ReLU; positions counted by the mask; tied",
        r"model\.decoder\.layers\.\d\.(self_attn|fc2)",
        mask=True,
    )
    yield _decoder(
        "GPTNeoX",
        {**_PLAIN, "rotary_pct": 0.5},
        "attention beside the MLP; half of each head rotated; q, k and v fused head by head",
        r"gpt_neox\.layers\.\d\.(attention|mlp)",
        attention="eager",
    )
    yield _decoder(
        "Bloom",
        {"hidden_size": 48, "n_layer": 2, "n_head": 4},
        "ALiBi; norm after the embedding; q, k and v fused head by head; tied",
        r"transformer\.h\.\d\.(self_attention\.dense|mlp\.dense_4h_to_h)",
        name="BLOOM",
        attention="eager",
        mask=True,
    )
    experts = {**_GATED, "num_local_experts": 3, "num_experts_per_tok": 2}
    note = "three experts, two a token, whose weights are gathered"
    yield _decoder("Mixtral", {**experts, "experts_implementation": "batched_mm"}, note)
    yield _decoder(
        "Mixtral",
        {**experts, "experts_implementation": "eager"},
        "the same, looping over the experts",
        name="MixtralLoop",
        refused="compute both and choose with torch.where, or export that part on its own",
    )


# --- Encoders; encoders with decoders


def _encoder(
    name: str, kind: str, head: str, options: dict[str, Any], branches: str, attention: str, note: str
) -> Entry:
    general = {"vocab_size": VOCABULARY, "pad_token_id": SPECIAL["pad_token_id"], "attn_implementation": attention}
    return Entry(name, _transformers(kind, head, general | options), _masked, branches, 4, _MASKED, note)


def _encoders() -> Iterator[Entry]:
    layers = r".*encoder\.layer\.\d\.(attention\.)?output\.dense"
    yield _encoder("BERT", "Bert", "ForMaskedLM", _PLAIN, layers, "sdpa", "tied")
    options = {**_PLAIN, "num_labels": 5}
    note = "positions counted from the padding"
    yield _encoder("RoBERTa", "Roberta", "ForSequenceClassification", options, layers, "eager", note)
    note = "embeddings of 20, projected"
    options |= {"embedding_size": 20}
    yield _encoder("ELECTRA", "Electra", "ForTokenClassification", options, layers, "sdpa", note)
    options = {"dim": 48, "hidden_dim": 56, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
    layers = r".*layer\.\d\.(attention|ffn)"
    yield _encoder("DistilBERT", "DistilBert", "ForMaskedLM", options, layers, "sdpa", "tied")


def _sequence_to_sequence() -> Iterator[Entry]:
    general = {"vocab_size": VOCABULARY, **SPECIAL, "decoder_start_token_id": 0, "use_cache": False}
    t5 = {"d_model": 40, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    yield Entry(
        "T5",
        _transformers("T5", "ForConditionalGeneration", general | t5),
        lambda batch, length: _ids(batch, length) | _target(batch, length),
        r"(en|de)coder\.block\.\d\.layer\.\d\.(SelfAttention|EncDecAttention|DenseReluDense)",
        10,
        _IDS | _TARGET,
        "relative positions shared by the layers; attention not scaled; tied",
    )
    whisper = {
        **{"d_model": 48, "num_mel_bins": 10, "max_source_positions": 16, "max_target_positions": 40},
        **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 56},
        **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 56},
    }
    sound = _normal("input_features", 10, 32)
    yield Entry(
        "Whisper",
        _transformers("Whisper", "ForConditionalGeneration", general | whisper),
        lambda batch, length: sound(batch, length) | _target(batch, length),
        r"model\.(en|de)coder\.layers\.\d\.(self_attn|encoder_attn|fc2)",
        10,
        {"input_features": {0: _BATCH}} | _TARGET,
        "convolutions in front; k without bias; 32 frames, always; tied",
    )


# --- Vision


def _vision(
    kind: str,
    size: int,
    options: dict[str, Any],
    branches: str,
    branch_count: int,
    note: str = "",
    *,
    name: str = "",
    head: str = "ForImageClassification",
    gain: float = 1.2,
) -> Entry:
    """A model of square images of `size`."""
    make, inputs = _transformers(kind, head, {"num_labels": 5} | options), _normal("pixel_values", 3, size, size)
    return Entry(name or kind, make, inputs, branches, branch_count, _PIXELS, note, gain=gain)


def _vision_transformers() -> Iterator[Entry]:
    patches = {**_TOWER, "image_size": 20, "patch_size": 5}
    layers = r".*layers\.\d\.(attention|mlp)"
    yield _vision("ViT", 20, {**patches, "attn_implementation": "sdpa"}, layers, 4)
    options = {**patches, "attn_implementation": "eager"}
    note = "a second class token with its own head"
    yield _vision("DeiT", 20, options, layers, 4, note, head="ForImageClassificationWithTeacher")
    options = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "window_size": 4}
    yield _vision(
        "Swin",
        32,
        {**options, "depths": [2, 2], "num_heads": [2, 4]},
        r".*blocks\.\d\.(attention|mlp)",
        8,
        "windows, every second block's shifted; relative positions; patches merged by a concatenation",
    )
    options = {"hidden_sizes": [12, 20, 24, 36], "num_attention_heads": [1, 2, 2, 3], "depths": [1, 1, 1, 1]}
    yield _vision(
        "Segformer",
        64,  # below that the last stages attend to a single place, and queries and keys mean nothing
        {**options, "decoder_hidden_size": 28},
        r".*blocks\.\d\.(attention|mlp)",
        8,
        "keys and values of fewer places; depthwise convolution in the MLP; batch norm in the head",
        name="SegFormer",
        head="ForSemanticSegmentation",
    )
    text = {**_TOWER, **SPECIAL, "vocab_size": VOCABULARY, "max_position_embeddings": 40}
    images, texts = _normal("pixel_values", 3, 20, 20), {0: Dim("texts"), 1: _LENGTH}
    yield Entry(
        "CLIP",
        _transformers("CLIP", "Model", {"text_config": text, "vision_config": patches, "projection_dim": 28}),
        lambda batch, length: _masked(batch + 1, length) | images(batch, length),
        r"(text|vision)_model\.encoder\.layers\.\d\.(self_attn|mlp)",
        8,
        {"input_ids": texts, "attention_mask": texts} | _PIXELS,
        "two towers that meet in a product; quick GELU; the end token is looked for",
    )


def _convolutional() -> Iterator[Entry]:
    options: dict[str, Any] = {"num_stages": 3, "patch_size": 2, "hidden_sizes": [12, 20, 28], "depths": [2, 2, 1]}
    note = "layer scale; channels last inside a block"
    yield _vision("ConvNext", 32, options, r".*layers\.\d\.pwconv2", 5, note, name="ConvNeXt")
    options = {"embedding_size": 12, "hidden_sizes": [16, 24, 32], "depths": [2, 2, 1]}
    yield _vision("ResNet", 32, options, r".*layers\.\d\.layer", 5, "bottlenecks", gain=1.4)
    options |= {"groups_width": 8}
    note = "grouped convolutions; squeeze and excitation"
    yield _vision("RegNet", 32, options, r".*layers\.\d\.layer", 5, note, gain=1.4)
    options = {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 8, "depth_divisible_by": 4}
    yield _vision(
        "MobileNetV2",
        32,
        {**options, "finegrained_output": False},
        r".*layer\.\d+\.reduce_1x1",
        16,
        "ReLU6, both of whose bounds bind; depthwise convolutions",
        gain=1.6,
    )
    options = {
        **{"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320},
        **{"in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "kernel_sizes": [3, 3, 5]},
        **{"strides": [1, 2, 2], "num_block_repeats": [1, 2, 2], "expand_ratios": [1, 6, 6]},
    }
    note = "squeeze and excitation; padded on one side"
    yield _vision("EfficientNet", 32, options, r".*blocks\.\d+\.projection", 5, note, gain=1.7)
    note = "skips concatenated; group and batch norms; upsampled in two ways"
    yield Entry("UNet", UNet, _normal("x", 3, 16, 16), r".*\.body", 5, {"x": {0: _BATCH}}, note)


class ResidualBlock(nn.Module):
    """Two normalized convolutions beside a 1x1 convolution. x: [batch, in, height, width]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(groups, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + self.body(x)
        return y


class UNet(nn.Module):
    """Two levels down by strided convolutions; up by repetition and by a transposed convolution."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down1, self.down2 = ResidualBlock(width, width, 3), ResidualBlock(width, 2 * width, 3)
        self.halve1 = nn.Conv2d(width, width, 3, 2, 1)
        self.halve2 = nn.Conv2d(2 * width, 2 * width, 3, 2, 1)
        self.bottom = ResidualBlock(2 * width, 3 * width, 4)
        self.up2 = ResidualBlock(5 * width, 2 * width, 5)
        self.double1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.up1 = ResidualBlock(2 * width, width, 4)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(self.stem(x))
        coarse = self.down2(self.halve1(fine))
        x = functional.interpolate(self.bottom(self.halve2(coarse)), scale_factor=2, mode="nearest")
        x = self.up2(torch.cat([coarse, x], dim=1))
        x = self.up1(torch.cat([fine, self.double1(x)], dim=1))
        y: Tensor = self.head(x)
        return y


_GROUPS = (_decoders, _encoders, _sequence_to_sequence, _vision_transformers, _convolutional)
MODELS: dict[str, Entry] = {entry.name: entry for group in _GROUPS for entry in group()}
CAPTURED = tuple(name for name, entry in MODELS.items() if not entry.refused)


def main() -> None:
    print(f"{'name':<12} {'nodes':>5} {'params':>7} {'export s':>8} {'min branch':>10}  {'dynamic':<28} note")
    for name, entry in MODELS.items():
        model, inputs = built(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        least = min(branch_contributions(model, inputs, entry.branches).values())
        start = time.perf_counter()
        try:
            program = capture(name)
        except graphopt.GraphoptError as error:
            print(f"{name:<12} {'-':>5} {parameters:>7} {'-':>8} {least:>10.3f}  {error}")
            continue
        seconds = time.perf_counter() - start
        nodes = sum(node.op == "call_function" for node in program.graph.nodes)
        dynamic = ", ".join(sorted(program.dimension_names.values()))
        print(f"{name:<12} {nodes:>5} {parameters:>7} {seconds:>8.1f} {least:>10.3f}  {dynamic:<28} {entry.note}")


if __name__ == "__main__":
    main()
