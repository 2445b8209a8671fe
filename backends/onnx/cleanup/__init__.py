"""Clean-up of an exported graph, so that the runtime sees the patterns it knows.

    transposed   Gemm(x, w^T), Transpose(DQ(w)), Transpose(w)   ->   the transposed codes are stored
    dynamic      Q(x) with the scale of DynamicQuantizeLinear, products of it   ->   MatMulInteger and its scaling
    products     MatMul(DQ(x), DQ(w)) + b   ->   the forms in which the runtime adds the bias on integers
    pads         Conv(Pad(x))   ->   the convolution pads
    activations  relu(Gemm(x, DQ(w), b))   ->   the form that leaves the product to the packed kernel
    norms        LayerNormalization(Add(a, b))   ->   the form that the runtime does not merge into a slower kernel

Each declines where the result would be another function; what is left then runs as it was written.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.backends.onnx.cleanup.activations import keep_activations_apart
from graphopt.backends.onnx.cleanup.dynamic import join_dynamic_quantize, spell_dynamic_products
from graphopt.backends.onnx.cleanup.editor import Editor
from graphopt.backends.onnx.cleanup.norms import keep_norms_apart
from graphopt.backends.onnx.cleanup.pads import merge_pads
from graphopt.backends.onnx.cleanup.products import shape_products
from graphopt.backends.onnx.cleanup.transposed import open_gemms, store_transposed

__all__ = ["clean"]


def clean(model: ir.Model) -> None:
    """Apply every clean-up in place."""
    editor = Editor(model)
    join_dynamic_quantize(editor)
    open_gemms(editor)
    store_transposed(editor)
    spell_dynamic_products(editor)
    shape_products(editor)
    keep_activations_apart(editor)
    merge_pads(editor)
    keep_norms_apart(editor)
    editor.remove_dead()
