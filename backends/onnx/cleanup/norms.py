"""Sums in front of a layer norm.

    LayerNormalization(Add(a, b))   ->   LayerNormalization(Sum(a, b))

The runtime would merge Add and norm into SkipLayerNormalization, whose CPU kernel adds up one number at a time: at
width 768 it takes 0.57 ms for 128 tokens where the two apart take 0.11. Sum
is the same function, as fast as Add, and merged with nothing.
"""

from __future__ import annotations

from graphopt.backends.onnx.cleanup.editor import Editor, producer

_NORMS = frozenset(("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"))


def keep_norms_apart(editor: Editor) -> None:
    """Rewrite every addition that a norm reads."""
    for node in editor.nodes:
        added = producer(node, 0) if node.op_type in _NORMS else None
        if added is None or added.op_type != "Add":
            continue
        if any(use.node.op_type == "QuantizeLinear" for use in added.outputs[0].uses()):
            continue  # an integer kernel adds
        total = editor.insert(added, "Sum", list(added.inputs), f"{added.name}/Sum", added.outputs[0].dtype)
        editor.take_place(added, total)
