"""Why ONNX Runtime's CPU execution provider leaves a quantized operator in float: one rule, one sentence.

ONNX Runtime replaces `DequantizeLinear -> operator -> QuantizeLinear` by an integer kernel when its selectors
accept the group. The rules below are those selectors' conditions, read from the file as written, plus what
was observed by running (onnxruntime 1.31, x86). They never decide *whether* an operator fused, which
`fusion.py` reads from the executed graph; they only explain one that did not. The first rule that holds is
the explanation.

Sources: onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc and
qdq_selector_action_transformer.cc, qdq_util.cc (pairs), qdq_propagation.cc, graph_transformer_utils.cc.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from graphopt.backends.onnx.qdq_graph import (
    DEQUANTIZE,
    EIGHT_BIT,
    MOVES_DATA,
    QUANTIZE,
    QdqGraph,
    type_name,
    words,
)

NO_16_BIT = frozenset(("MaxPool", "Resize", "ReduceMax", "ReduceMin"))
COMPUTES = words(
    "Add ArgMax AveragePool Concat Conv Gemm GlobalAveragePool LeakyRelu MatMul Mul Sigmoid Softmax Where"
)
HAS_INTEGER_KERNEL = MOVES_DATA | COMPUTES
FLOAT_OUTPUT_ALLOWED = frozenset(("MatMul", "Gemm", "ArgMax"))
CLIPS = frozenset(("Relu", "Clip"))


@dataclass(frozen=True)
class Site:
    """One operator of the file as the selectors see it: its DQs by input position, its Qs, what follows."""

    graph: QdqGraph
    index: int

    @property
    def node(self) -> NodeProto:
        return self.graph.nodes[self.index]

    @property
    def positions(self) -> list[int]:
        """Positions of the inputs that must come from a DQ."""
        present = [position for position, name in enumerate(self.node.input) if name]
        if self.node.op_type in ("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat"):
            return present
        return [1, 2] if self.node.op_type == "Where" else [0]

    @property
    def weight_position(self) -> int | None:
        return 1 if self.node.op_type in ("Conv", "Gemm", "MatMul") else None

    @property
    def bias_position(self) -> int | None:
        return 2 if self.node.op_type in ("Conv", "Gemm") else None

    @property
    def dequantizers(self) -> dict[int, int]:
        """Input position -> index of the DQ that feeds it."""
        found = {
            position: self.graph.dequantizer(self.node.input[position])[0] for position in self.positions
        }
        return {position: index for position, index in found.items() if index is not None}

    @property
    def clip(self) -> int | None:
        """The Relu or Clip that alone reads this operator's output, if any."""
        if self.node.op_type not in COMPUTES - CLIPS:
            return None
        readers = self.graph.consumers.get(self.node.output[0], [])
        if len(readers) == 1 and self.graph.nodes[readers[0]].op_type in CLIPS:
            return readers[0]
        return None

    @property
    def readers(self) -> list[int]:
        """What reads the first output, seen through a redundant Relu or Clip."""
        tail = self.node if self.clip is None else self.graph.nodes[self.clip]
        return self.graph.readers(tail.output[0])

    @property
    def quantizers(self) -> list[int]:
        return [index for index in self.readers if self.graph.nodes[index].op_type == QUANTIZE]


def _operator_without_kernel(site: Site) -> str | None:
    node = site.node
    if node.op_type in HAS_INTEGER_KERNEL and node.domain in ("", "ai.onnx"):
        return None
    if node.op_type in CLIPS:
        for index in site.quantizers:
            if sentence := _clip_kept(site.graph, site.index, index):
                return sentence
    return f"{node.op_type} has no integer kernel on the CPU execution provider"


def _wide_or_narrow_type(site: Site) -> str | None:
    """8 bits is what the integer kernels take; pure data movement also takes 16."""
    allowed: tuple[int, ...] = EIGHT_BIT
    if site.node.op_type in MOVES_DATA - NO_16_BIT - {"Split", "DepthToSpace"}:
        allowed = (*EIGHT_BIT, TensorProto.UINT16, TensorProto.INT16)
    for position, index in site.dequantizers.items():
        kind = site.graph.quantized_type(site.graph.nodes[index])
        if position != site.bias_position and kind is not None and kind not in allowed:
            name = f"{type_name(kind)} ({site.graph.described(index)})"
            return f"input {position} is {name}; integer kernels take 8 bits"
    for index in site.quantizers:
        kind = site.graph.quantized_type(site.graph.nodes[index])
        if kind not in allowed:
            name = f"{type_name(kind)} ({site.graph.described(index)})"
            return f"its output is {name}; integer kernels take 8 bits"
    return None


def _parameters_at_run_time(site: Site) -> str | None:
    for index in [*site.dequantizers.values(), *site.quantizers]:
        node = site.graph.nodes[index]
        for what, name in zip(("scale", "zero point"), node.input[1:3], strict=False):
            if name and not site.graph.is_constant(name):
                source = site.graph.producer_of(name)
                if source is not None and source.op_type == "DynamicQuantizeLinear":
                    return (
                        f"{site.graph.described(index)} takes its {what} from a DynamicQuantizeLinear; "
                        f"dynamic quantization fuses as DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul"
                    )
                return f"the {what} of {site.graph.described(index)} is computed at run time, not a constant"
    return None


def _float_input(site: Site) -> str | None:
    """Every data input must come from a DQ (the bias has a rule of its own)."""
    if not site.dequantizers:
        return "none of its inputs comes from a DequantizeLinear"
    for position in site.positions:
        if position in site.dequantizers or position == site.bias_position:
            continue
        name = site.node.input[position]
        if site.graph.is_constant(name):
            role = "weight" if position == site.weight_position else f"input {position}"
            return f"{role} '{name}' is a float constant, not a DequantizeLinear of an integer initializer"
        source = site.graph.producer.get(name)
        origin = f"graph input '{name}'" if source is None else site.graph.described(source)
        return f"input {position} comes from {origin} in float, not from a DequantizeLinear"
    return None


def _activation_per_channel(site: Site) -> str | None:
    for position, index in site.dequantizers.items():
        if position in (site.weight_position, site.bias_position):
            continue
        scale = site.graph.initializers.get(site.graph.nodes[index].input[1])
        if scale is not None and int(np.prod(scale.dims)) > 1:
            return (
                f"input {position} has {int(np.prod(scale.dims))} scales ({site.graph.described(index)}); "
                f"{site.node.op_type} takes one per tensor"
            )
    return None


def _gemm_factors(site: Site) -> str | None:
    if site.node.op_type == "Gemm":
        for name in ("alpha", "beta"):
            factor = float(site.graph.attribute(site.node, name, 1.0))
            if factor != 1.0:
                return f"Gemm has {name} {factor:g}; the integer kernel needs 1"
    return None


def _operator_version(site: Site) -> str | None:
    node = site.node
    if node.op_type == "MaxPool" and site.graph.opset < 12:
        return f"MaxPool has an 8-bit kernel from opset 12 on; the file is opset {site.graph.opset}"
    if node.op_type == "Resize":
        mode = site.graph.attribute(node, "mode", "nearest")
        if mode != "nearest":
            return f"Resize in mode '{mode}' has no integer kernel; mode 'nearest' has"
    return None


def _outputs(site: Site) -> str | None:
    """As many Qs as outputs, nobody else reads them, and none is a graph output."""
    node, graph = site.node, site.graph
    present = [name for name in node.output if name]
    if node.op_type != "Split" and len(present) > 1:
        return f"its second output '{present[1]}' is used; the integer kernel has one output"
    quantizers, others = site.quantizers, [index for index in site.readers if index not in site.quantizers]
    tail = node if site.clip is None else graph.nodes[site.clip]
    visible = next((name for name in (*present, *tail.output) if name in graph.outputs), None)
    if not quantizers and node.op_type in FLOAT_OUTPUT_ALLOWED:
        return None
    if visible is not None:
        return f"its output '{visible}' is a graph output in float; no QuantizeLinear can take it over"
    if not quantizers:
        reader = graph.described(others[0]) if others else "nothing"
        return f"its output feeds {reader}, not a QuantizeLinear"
    if others:
        quantizer, other = graph.described(quantizers[0]), graph.described(others[0])
        return f"its output feeds both {quantizer} and, in float, {other}"
    if node.op_type == "Split":
        bare = next((name for name in present if not _quantized_only(graph, name)), None)
        return None if bare is None else f"its output '{bare}' does not feed exactly one QuantizeLinear"
    if len(quantizers) > 1:
        names = " and ".join(f"'{graph.label(index)}'" for index in quantizers[:2])
        return f"its output feeds {len(quantizers)} QuantizeLinear ({names}); one must serve all readers"
    return None


def _quantized_only(graph: QdqGraph, tensor: str) -> bool:
    return [graph.nodes[index].op_type for index in graph.readers(tensor)] == [QUANTIZE]


def _clip_kept(graph: QdqGraph, clip: int, quantizer: int) -> str | None:
    """Why the Relu or Clip `clip` in front of `quantizer` does something that the Q does not do already."""
    node, q = graph.nodes[clip], graph.nodes[quantizer]
    kind = graph.quantized_type(q)
    scale, zero = (
        graph.value(q.input[1]),
        graph.value(q.input[2]) if len(q.input) > 2 and q.input[2] else None,
    )
    if kind not in EIGHT_BIT or scale is None or scale.size != 1:
        return None
    bounds = np.iinfo(helper.tensor_dtype_to_np_dtype(kind))
    offset = 0 if zero is None else int(zero.reshape(-1)[0])
    where = f"{graph.described(clip)} in front of {graph.described(quantizer)}"
    if node.op_type == "Relu":
        if offset == bounds.min:
            return None
        least = f"{bounds.min}, the least of {type_name(kind)}"
        return f"{where} is not redundant: the zero point is {offset}, not {least}"
    step = float(scale.reshape(-1)[0])
    lowest, highest = (bounds.min - offset) * step, (bounds.max - offset) * step
    limits = [graph.value(name) if name else None for name in [*node.input[1:3], "", ""][:2]]
    low = -np.inf if limits[0] is None else float(limits[0].reshape(-1)[0])
    high = np.inf if limits[1] is None else float(limits[1].reshape(-1)[0])
    slack = 1e-5 * step
    if low <= lowest + slack and high >= highest - slack:
        return None
    return f"{where} cuts at [{low:g}, {high:g}], inside the quantized range [{lowest:g}, {highest:g}]"


def _clip_not_redundant(site: Site) -> str | None:
    if site.clip is None:
        return None
    for index in site.quantizers:
        if sentence := _clip_kept(site.graph, site.clip, index):
            return sentence
    return None


def _bias(site: Site) -> str | None:
    position = site.bias_position
    if position is None or position not in site.positions:
        return None
    index = site.dequantizers.get(position)
    name = site.node.input[position]
    if index is None:
        return f"bias '{name}' is float, not a DequantizeLinear of an int32 initializer"
    kind = site.graph.quantized_type(site.graph.nodes[index])
    if kind not in (None, TensorProto.INT32):
        return f"bias '{name}' is {type_name(kind)} ({site.graph.described(index)}), not int32"
    return None


def _bias_scale(site: Site) -> str | None:
    """Conv fuses up to 3 % off (seen, onnxruntime 1.31); Gemm fuses at any scale and adds a wrong bias."""
    graph, node = site.graph, site.node
    if node.op_type != "Conv" or not {0, 1, 2} <= site.dequantizers.keys():
        return None
    pairs = [graph.nodes[site.dequantizers[position]] for position in range(3)]
    scales = [graph.value(pair.input[1]) for pair in pairs]
    if any(each is None for each in scales):
        return None
    x, w, b = (np.asarray(each, np.float64).reshape(-1) for each in scales)
    off = float(np.max(np.abs(b - x * w) / (x * w))) if b.size in (1, w.size) or w.size == 1 else np.inf
    if off <= 0.01:
        return None
    return f"the scale of {graph.described(site.dequantizers[2])} is {off:.0%} off input scale x weight scale"


def _pairs_in_a_row(site: Site) -> str | None:
    """DoubleQDQPairsRemover: Q -> DQ -> Q -> DQ becomes one pair over the common range."""
    graph = site.graph
    for position, index in site.dequantizers.items():
        inner = graph.producer_of(graph.nodes[index].input[0])
        before = None if inner is None or inner.op_type != QUANTIZE else graph.producer.get(inner.input[0])
        if before is not None and graph.nodes[before].op_type == DEQUANTIZE:
            return (
                f"ONNX Runtime merges {graph.described(before)} and {graph.described(index)} in front of "
                f"input {position} into a pair of another scale, which the bias does not fit; write one pair"
            )
    return None


def _types_differ(site: Site) -> str | None:
    """On x86 signed activations are shifted to unsigned before the selectors look; elsewhere this bites."""
    graph, kinds = site.graph, {}
    for position, index in site.dequantizers.items():
        if position not in (site.weight_position, site.bias_position) or site.node.op_type in ("Add", "Mul"):
            kinds[position] = graph.quantized_type(graph.nodes[index])
    first = next(iter(kinds.values()), None)
    for position, kind in kinds.items():
        if kind != first:
            return f"input {position} is {type_name(kind)} and input 0 is {type_name(first)}; they must agree"
    for index in site.quantizers:
        kind = graph.quantized_type(graph.nodes[index])
        if None not in (kind, first) and kind != first:
            return f"its output is {type_name(kind)} and its input is {type_name(first)}; they must agree"
    weight = site.dequantizers.get(site.weight_position) if site.weight_position is not None else None
    if weight is not None and first == TensorProto.INT8:
        kind = graph.quantized_type(graph.nodes[weight])
        if kind != TensorProto.INT8:
            return f"its activation is int8 and its weight is {type_name(kind)}; both must be signed"
    return None


def _movement_parameters(site: Site) -> str | None:
    """Q/DQ around data movement are dropped only as a pair of equal, explicit, per-tensor parameters."""
    if site.node.op_type not in MOVES_DATA or 0 not in site.dequantizers:
        return None
    graph = site.graph
    source = graph.nodes[site.dequantizers[0]]
    outputs = [name for name in site.node.output if name]
    for index in [each for name in outputs for each in graph.readers(name)]:
        sink = graph.nodes[index]
        for each in (source, sink):
            if len(each.input) < 3 or not each.input[2]:
                return f"'{each.name or each.output[0]}' ({each.op_type}) does not write its zero point"
        for what, before, after in zip(
            ("scale", "zero point"), source.input[1:3], sink.input[1:3], strict=True
        ):
            old, new = graph.value(before), graph.value(after)
            if old is not None and new is not None and not np.array_equal(old, new):
                return (
                    f"{graph.described(index)} has another {what} than "
                    f"{graph.described(site.dequantizers[0])}; "
                    f"{site.node.op_type} only moves data"
                )
    return None


def _transposed_weight(site: Site) -> str | None:
    position = site.weight_position
    if position in site.dequantizers and position is not None:
        _, transposed = site.graph.dequantizer(site.node.input[position])
        if transposed:
            return "a Transpose follows the weight's DequantizeLinear; store the transposed initializer"
    return None


RULES: tuple[Callable[[Site], str | None], ...] = (
    _operator_without_kernel,
    _wide_or_narrow_type,
    _parameters_at_run_time,
    _float_input,
    _activation_per_channel,
    _gemm_factors,
    _operator_version,
    _outputs,
    _clip_not_redundant,
    _bias,  # behind the outputs: ONNX Runtime makes the int32 bias itself where a Q follows
    _bias_scale,
    _types_differ,
    _movement_parameters,
    _pairs_in_a_row,
    _transposed_weight,
)
UNEXPLAINED = "ONNX Runtime did not fuse it and no known rule explains why"


def explain(graph: QdqGraph, index: int) -> str:
    """Say in one sentence why the operator at `index` does not run on integers, from the file as written."""
    site = Site(graph, index)
    for rule in RULES:
        if sentence := rule(site):
            return sentence
    return UNEXPLAINED
