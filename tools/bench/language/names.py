"""The weights of the language model under the names that transformers has for a decoder of its kind."""

from __future__ import annotations

from typing import Any

from language.model import VOCABULARY, Shape

_IN_BLOCK = {
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
}  # fmt: skip


def transformers_names(shape: Shape) -> dict[str, str]:
    """Return each weight's name here and there."""
    names = {"table": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for index in range(shape.layers):
        names |= {f"blocks.{index}.{ours}": f"model.layers.{index}.{theirs}" for ours, theirs in _IN_BLOCK.items()}
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}


def transformers_sizes(shape: Shape) -> dict[str, Any]:
    """Return the sizes as transformers' configuration names them."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": shape.width, "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.groups,
        "head_dim": shape.width // shape.heads, "rms_norm_eps": 1e-5, "max_position_embeddings": shape.context,
        "tie_word_embeddings": False, "rope_theta": 1e4,
    }  # fmt: skip
