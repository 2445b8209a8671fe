"""Zeros around the input of a convolution.

    Conv(DQ(Q(Pad(DQ(x)))), w)   ->   Conv(DQ(x), w)  with the widths among its pads        all with one scale
    Conv(DQ(Q(Pad(x))), w)       ->   Conv(DQ(Q(x)), w)
    Conv(Pad(x), w)              ->   Conv(x, w)

Zero is a code of every grid. An ONNX convolution pads each side by a width of its own, and no runtime has an integer
Pad worth having.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.backends.onnx.cleanup.editor import Editor, producer


def merge_pads(editor: Editor) -> None:
    """Let every convolution do the padding in front of it where that is by constant zeros in its own axes."""
    for node in editor.nodes:
        if node.op_type != "Conv" or _pads_automatically(node):
            continue
        chain = _padding_before(node)
        pads = _spatial_pads(chain[-1]) if chain else None
        if pads is None:
            continue
        own = list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else [0] * len(pads)
        if len(own) == len(pads):
            node.replace_input_with(0, _unpadded(editor, node, chain))
            node.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, pads, strict=True)])
    editor.remove_dead()


def _pads_automatically(node: ir.Node) -> bool:
    return "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() != "NOTSET"


def _padding_before(node: ir.Node) -> list[ir.Node]:
    """Return what pads the input: [Pad], or [DQ, Q, Pad] of one scale; empty where nothing does."""
    chain: list[ir.Node] = []
    reader = node
    for kinds in (("Pad", "DequantizeLinear"), ("QuantizeLinear",), ("Pad",)):
        maker = producer(reader, 0)
        if maker is None or maker.op_type not in kinds:
            return []
        chain.append(maker)
        if maker.op_type == "Pad":
            break
        reader = maker
    return chain if len(chain) == 1 or _same_scale(chain[0], chain[1]) else []


def _same_scale(one: ir.Node, other: ir.Node) -> bool:
    return len(one.inputs) == len(other.inputs) and all(
        a is b for a, b in zip(one.inputs[1:], other.inputs[1:], strict=True)
    )


def _unpadded(editor: Editor, node: ir.Node, chain: list[ir.Node]) -> ir.Value:
    """Return what the convolution reads instead: the value before the padding, rounded as it was behind it."""
    value = chain[-1].inputs[0]
    assert value is not None and value.dtype is not None
    if len(chain) == 1:
        return value
    back, rounding, pad = chain
    before = producer(pad, 0)
    if before is not None and before.op_type == "DequantizeLinear" and _same_scale(before, back):
        codes = before.inputs[0]
        assert codes is not None
    else:
        dtype = rounding.outputs[0].dtype
        codes = editor.insert(node, "QuantizeLinear", [value, *rounding.inputs[1:]], rounding.name or "", dtype)
    return editor.insert(node, "DequantizeLinear", [codes, *back.inputs[1:]], back.name or "", value.dtype)


def _spatial_pads(pad: ir.Node) -> list[int] | None:
    """Return the widths [*begins, *ends] over the axes of space; None where it is another padding."""
    value = pad.inputs[0]
    mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"
    if mode != "constant" or value is None or value.shape is None or len(pad.inputs) < 2:
        return None
    widths = _constant(pad.inputs[1])
    filler = _constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else [0]
    axes = _constant(pad.inputs[3]) if len(pad.inputs) > 3 and pad.inputs[3] is not None else None
    rank = len(value.shape)
    if widths is None or filler != [0] or axes is not None or len(widths) != 2 * rank or min(widths) < 0:
        return None
    begins, ends = widths[:rank], widths[rank:]
    if any((*begins[:2], *ends[:2])):
        return None
    return [int(width) for width in (*begins[2:], *ends[2:])]


def _constant(value: ir.Value | None) -> list[float] | None:
    if value is None:
        return None
    if value.const_value is not None:
        return [float(each) for each in value.const_value.numpy().reshape(-1)]
    maker = value.producer()
    if maker is not None and maker.op_type == "Constant" and "value" in maker.attributes:
        return [float(each) for each in maker.attributes["value"].as_tensor().numpy().reshape(-1)]
    return None
