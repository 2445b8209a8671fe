"""The proof that a QDQ file runs on integer kernels: what ONNX Runtime fused, what it did not, and why.

`check_fusion` loads the file in ONNX Runtime's CPU execution provider with every optimization on, has it
write the graph it will execute, and compares that with the file. Nothing here knows how the file was made.

Nodes are followed through the optimizer by name: a copy of the file gets a unique token as the name of every
node, and every rewrite keeps its target's name, up to a suffix (`/MatMulAddFusion`, `_token_3`,
`/duplicated`). Nodes that ONNX Runtime invents (layout transposes, NCHWc reorders, inlined functions) have no
token; they are followed by the tensors they write, or walked through.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, inliner

from graphopt.backends.onnx.fusion_rules import CLIPS, HAS_INTEGER_KERNEL, Site, explain
from graphopt.backends.onnx.qdq_graph import (
    DEQUANTIZE,
    EIGHT_BIT,
    MOVES_DATA,
    QUANTIZE,
    QdqGraph,
    subgraphs,
    words,
)
from graphopt.errors import GraphoptError, first_line

# Operators whose kernel computes on integers (or unpacks them itself), whatever the types of their outputs.
INTEGER_KERNELS = words(
    "ConvInteger DynamicQuantizeLSTM DynamicQuantizeMatMul GatherBlockQuantized MatMulInteger "
    "MatMulInteger16 MatMulIntegerToFloat MatMulNBits QAttention QEmbedLayerNormalization QGemm QLinearAdd "
    "QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMatMul "
    "QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QMoE"
)
_MOVES_8_BIT = MOVES_DATA | {"NhwcMaxPool", "Concat", "Identity", "Pad", "ArgMax", "SpaceToDepth"}
_FLOAT_OUTPUT = words(
    "ConvInteger DynamicQuantizeLSTM DynamicQuantizeMatMul GatherBlockQuantized MatMulInteger "
    "MatMulInteger16 MatMulIntegerToFloat MatMulNBits QAttention QEmbedLayerNormalization QMoE"
)
# What may lie between a graph input and its Q, or a DQ and a graph output, which are borders all the same.
_BORDER_TRANSPARENT = words("Cast Identity Reshape Transpose Squeeze Unsqueeze Flatten ReorderOutput")
_MERGED = "/MatMulAddFusion"
_TOKEN = re.compile(r"graphopt-(\d+)-")


@dataclass(frozen=True)
class Unfused:
    """A node of the file that keeps the graph in float: an operator, or a Q or DQ left over."""

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What ONNX Runtime executes for one file."""

    fused: dict[str, int]
    """Executed operator type -> number of integer kernels of that type, 8-bit data movement included."""
    entries: tuple[Unfused, ...]
    """What did not fuse; a Q or DQ next to a listed operator is covered by that operator's entry."""
    left_over: tuple[str, ...]
    """Names of every QuantizeLinear and DequantizeLinear still executed, except the borders of the graph."""
    executed: dict[str, int]
    """Operator type -> count of the whole executed graph, layout changes included."""

    @property
    def unfused(self) -> list[tuple[str, str]]:
        """(node, reason) for every entry, in the order of the file."""
        return [(entry.node, entry.reason) for entry in self.entries]


def check_fusion(path: str | Path, signed_activations: bool = False) -> FusionReport:
    """List what ONNX Runtime runs on integer kernels on the CPU of the ONNX file at `path`, and what not.

    `signed_activations` asks for the graph that it executes where int8 activations are allowed: on ARM always, on x86
    only when told so.

    Raises GraphoptError when the file cannot be read or ONNX Runtime refuses it.
    """
    path = Path(path)
    model = _read(path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)
    written = _Written({})
    _name_nodes(model.graph, opset, path.parent, written)
    executed = _optimize(model, path, signed_activations)
    return _Comparison(
        written, [QdqGraph.of(g, opset, path.parent) for g in _all_graphs(executed.graph)]
    ).report()


def has_signed_activations(path: str | Path) -> bool:
    """True where a QuantizeLinear of the file writes int8. Raises GraphoptError when the file cannot be read."""
    path = Path(path)
    graphs = [QdqGraph.of(each, 1, path.parent) for each in _all_graphs(_read(path).graph)]
    return any(
        node.op_type == QUANTIZE and graph.quantized_type(node) == onnx.TensorProto.INT8
        for graph in graphs
        for node in graph.nodes
    )


def _read(path: Path) -> ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise GraphoptError(f"there is no file '{path}'; give the path of an ONNX model") from None
    except Exception as error:  # protobuf raises its own DecodeError, which is no subclass of anything public
        raise GraphoptError(
            f"'{path}' is not an ONNX model ({first_line(error)}); export it again"
        ) from None


def _all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _all_graphs(inner)


@dataclass(frozen=True)
class _Written:
    """The file as written: where each token's node stands (graph, index)."""

    sites: dict[int, Site]

    def writers(self) -> dict[str, int]:
        """Tensor -> token of the node that computes it; names that several graphs use are left out."""
        found: dict[str, int] = {}
        twice: set[str] = set()
        for token, site in self.sites.items():
            for name in site.node.output:
                if name in found:
                    twice.add(name)
                found[name] = token
        return {name: token for name, token in found.items() if name and name not in twice}


def _name_nodes(graph: GraphProto, opset: int, folder: Path, written: _Written) -> None:
    """Index `graph` and its subgraphs under their own names, then overwrite the nodes' names with tokens."""
    copy = GraphProto()
    copy.node.extend(graph.node)
    copy.input.extend(graph.input)
    copy.output.extend(graph.output)
    view = QdqGraph.of(copy, opset, folder)
    view.initializers.update({tensor.name: tensor for tensor in graph.initializer})
    for index, node in enumerate(graph.node):
        token = len(written.sites)
        written.sites[token] = Site(view, index)
        node.name = f"graphopt-{token}-"
        for inner in subgraphs(node):
            _name_nodes(inner, opset, folder, written)


def _optimize(model: ModelProto, path: Path, signed_activations: bool) -> ModelProto:
    """Load `model` with every optimization and return the graph that would be executed."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    entries = {
        "session.model_external_initializers_file_folder_path": str(path.parent.resolve()),
        # Weights go beside the dump: a protobuf cannot hold 2 GB, and the comparison does not read them.
        "session.optimized_model_external_initializers_file_name": "weights.bin",
        "session.optimized_model_external_initializers_min_size_in_bytes": "65536",
    }
    if signed_activations:
        entries["session.qdqisint8allowed"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        dump = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(dump)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exception classes are not public
            message = first_line(error)
            raise GraphoptError(
                f"ONNX Runtime does not load '{path}': {message}; export the model again"
            ) from None
        return onnx.load(dump, load_external_data=False)


class _Comparison:
    """The executed graphs against the file as written."""

    def __init__(self, written: _Written, executed: list[QdqGraph]) -> None:
        self.written = written
        self.executed = executed
        self.writers = written.writers()
        self.token_at = {(id(site.graph), site.index): token for token, site in written.sites.items()}
        self.present = {self.token(graph, index) for graph in executed for index in range(len(graph.nodes))}
        self.operators: dict[int, str] = {}
        self.pairs: dict[int, set[tuple[int, str]]] = {}

    def token(self, graph: QdqGraph, index: int) -> int | None:
        """The node of the file that an executed one stands for; None for nodes that ONNX Runtime invented."""
        node = graph.nodes[index]
        match = _TOKEN.match(node.name)
        if match:
            return int(match[1])
        return next((self.writers[name] for name in node.output if name in self.writers), None)

    def op_type(self, token: int) -> str:
        return self.written.sites[token].node.op_type

    def label(self, token: int) -> str:
        site = self.written.sites[token]
        return site.graph.label(site.index)

    def described(self, token: int) -> str:
        site = self.written.sites[token]
        return site.graph.described(site.index)

    def reason(self, token: int) -> str:
        site = self.written.sites[token]
        return explain(site.graph, site.index)

    def report(self) -> FusionReport:
        fused: Counter[str] = Counter()
        left_over: dict[str, None] = {}
        for graph in self.executed:
            kernels = _integer_kernels(graph)
            fused.update(graph.nodes[index].op_type for index in kernels if self._counts(graph, index))
            borders = _borders(graph)
            rest = [index for index in self._quantizing(graph) if index not in borders]
            for index in rest:
                left_over[self._written_name(graph, index)] = None
            self._explain(graph, rest, kernels)
        entries = {
            token: "; ".join(dict.fromkeys(reason for _, reason in sorted(reasons)))
            for token, reasons in self.pairs.items()
        }
        entries.update(self.operators)
        return FusionReport(
            dict(sorted(fused.items())),
            tuple(
                Unfused(self.label(token), self.op_type(token), entries[token]) for token in sorted(entries)
            ),
            tuple(left_over),
            dict(sorted(Counter(node.op_type for graph in self.executed for node in graph.nodes).items())),
        )

    def _counts(self, graph: QdqGraph, index: int) -> bool:
        """Layout changes that ONNX Runtime put in are not operators of the file."""
        return graph.nodes[index].op_type in INTEGER_KERNELS or bool(_TOKEN.match(graph.nodes[index].name))

    def _quantizing(self, graph: QdqGraph) -> list[int]:
        return [index for index, node in enumerate(graph.nodes) if node.op_type in (QUANTIZE, DEQUANTIZE)]

    def _written_name(self, graph: QdqGraph, index: int) -> str:
        token = self._pair_token(graph, index)
        return graph.label(index) if token is None else self.label(token)

    def _pair_token(self, graph: QdqGraph, index: int) -> int | None:
        """The Q or DQ of the file that an executed one stands for, also where it has moved."""
        node = graph.nodes[index]
        token = self.token(graph, index)
        if token is not None and self.op_type(token) == node.op_type:
            return token
        if node.op_type == DEQUANTIZE:
            tensor = node.input[0]
            while (source := graph.producer_of(tensor)) is not None and tensor not in self.writers:
                tensor = source.input[0]
            for candidate, site in self.written.sites.items():
                if site.node.op_type == DEQUANTIZE and site.node.input[0] == tensor:
                    return candidate
            return None
        readers = graph.consumers.get(node.output[0], [])
        while readers:
            output = graph.nodes[readers[0]].output[0]
            writer = self.writers.get(output)
            if writer is not None and self.op_type(writer) == QUANTIZE:
                return writer
            readers = graph.consumers.get(output, [])
        return None

    def _neighbours(self, graph: QdqGraph, index: int) -> list[int]:
        """Nodes on the float side of a Q or DQ, past those that ONNX Runtime invented."""
        node = graph.nodes[index]
        if node.op_type == QUANTIZE:
            source = graph.producer.get(node.input[0])
            while source is not None and self.token(graph, source) is None and graph.nodes[source].input:
                source = graph.producer.get(graph.nodes[source].input[0])
            return [] if source is None else [source]
        found: list[int] = []
        waiting = list(graph.consumers.get(node.output[0], []))
        while waiting:
            reader = waiting.pop(0)
            if self.token(graph, reader) is None:
                waiting.extend(graph.consumers.get(graph.nodes[reader].output[0], []))
            else:
                found.append(reader)
        return found

    def _float_side(self, graph: QdqGraph, index: int, neighbour: int) -> int | None:
        """The node of the file on the float side of the Q or DQ `index`, executed as (part of) `neighbour`.

        A fused float kernel (BiasGelu) carries the name of its last node; the DQ may feed an absorbed one.
        """
        token = self.token(graph, neighbour)
        pair = self._pair_token(graph, index)
        if token is None or pair is None or graph.nodes[index].op_type == QUANTIZE:
            return token
        if graph.nodes[neighbour].name.endswith(_MERGED):
            return token
        site = self.written.sites[pair]
        readers = [
            self.token_at[(id(site.graph), each)]
            for each in site.graph.consumers.get(site.node.output[0], [])
        ]
        absorbed = [
            each for each in readers if each not in self.present and self.op_type(each) not in MOVES_DATA
        ]
        return token if token in readers or not absorbed else absorbed[0]

    def _explain(self, graph: QdqGraph, rest: list[int], kernels: set[int]) -> None:
        neighbours = {index: self._neighbours(graph, index) for index in rest}
        # Operators first: what stands between DQs and Qs, or could run on integers and has a DQ.
        reads: set[int] = set()
        writes: set[int] = set()
        for index, nodes in neighbours.items():
            for each in nodes:
                token = self._float_side(graph, index, each)
                if token is None or each in kernels or graph.nodes[each].op_type in (QUANTIZE, DEQUANTIZE):
                    continue
                (writes if graph.nodes[index].op_type == QUANTIZE else reads).add(token)
                if graph.nodes[each].name.endswith(_MERGED) and self.op_type(token) == "MatMul":
                    self.operators[token] = self._merged_with_bias(token)
        for token in reads:
            if token in writes or self.op_type(token) in HAS_INTEGER_KERNEL:
                self.operators.setdefault(token, self.reason(token))
        for index, nodes in neighbours.items():
            self._explain_pair(graph, index, nodes, kernels)

    def _merged_with_bias(self, token: int) -> str:
        """MatMul + Add becomes Gemm before Q/DQ are looked at, and Gemm wants its bias quantized."""
        site = self.written.sites[token]
        adds = [
            index
            for index in site.graph.consumers[site.node.output[0]]
            if site.graph.nodes[index].op_type == "Add"
        ]
        rest = self.reason(token)
        if not adds or rest.startswith(("input", "weight", "none", "the ")):
            return rest
        return (
            f"ONNX Runtime merges it with {site.graph.described(adds[0])} into a Gemm, whose bias must be an "
            f"int32 DequantizeLinear; a bias of shape [1, ..., N] keeps them apart"
        )

    def _explain_pair(self, graph: QdqGraph, index: int, nodes: list[int], kernels: set[int]) -> None:
        node = graph.nodes[index]
        pair = self._pair_token(graph, index)
        if not nodes:
            if node.op_type == DEQUANTIZE:
                reason = "nothing reads its output"
            elif node.input[0] in graph.initializers:
                reason = f"it quantizes the constant '{node.input[0]}' in every run; store the integers"
            else:
                reason = f"the graph input '{node.input[0]}' is quantized more than once"
            self._add_pair(pair, 0, reason)
        for each in nodes:
            token = self._float_side(graph, index, each)
            if token is None or token in self.operators:
                continue
            if graph.nodes[each].op_type in (QUANTIZE, DEQUANTIZE):
                if node.op_type == QUANTIZE:
                    self._explain_requantization(pair, token)
                continue
            role = "producer" if node.op_type == QUANTIZE else "consumer"
            neighbour = f"{role} {self.described(token)}"
            if each in kernels:
                kernel = graph.nodes[each].op_type
                reason = f"{neighbour} runs as {kernel}, which is float on this side"
            elif self.op_type(token) in HAS_INTEGER_KERNEL:
                reason = f"{neighbour} runs in float: {self.reason(token)}"
            else:
                reason = f"{neighbour} has no integer kernel"
            self._add_pair(pair, token, reason)

    def _explain_requantization(self, quantizer: int | None, dequantizer: int) -> None:
        """DQ -> Q with nothing between: either written so, or a Relu or Clip between them was redundant."""
        if quantizer is None:
            return
        site = self.written.sites[quantizer]
        between = site.graph.producer.get(site.node.input[0])
        if between is not None and site.graph.nodes[between].op_type in CLIPS:
            self.operators[self.token_at[(id(site.graph), between)]] = (
                f"the Q behind it makes it redundant, which leaves {self.described(dequantizer)} and "
                f"{self.described(quantizer)} as a float round trip; quantize only behind it"
            )
        else:
            self._add_pair(
                quantizer,
                dequantizer,
                f"it only requantizes {self.described(dequantizer)}; share one scale instead",
            )

    def _add_pair(self, token: int | None, neighbour: int, reason: str) -> None:
        """Note a reason for a left-over Q or DQ; several are told in the file's order of neighbours."""
        if token is not None:
            self.pairs.setdefault(token, set()).add((neighbour, reason))


def _integer_kernels(graph: QdqGraph) -> set[int]:
    """The nodes that run on integers: integer kernels, and data movement whose data is 8 bits wide."""
    narrow = {name for name, tensor in graph.initializers.items() if tensor.data_type in EIGHT_BIT}
    found: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if node.op_type in INTEGER_KERNELS:
            found.add(index)
            # QGemm writes float when its output scale and zero point are absent.
            floats = node.op_type in _FLOAT_OUTPUT or (node.op_type == "QGemm" and len(node.input) < 9)
            narrow.update(() if floats else node.output)
        elif node.op_type == QUANTIZE:
            narrow.update(node.output if graph.quantized_type(node) in EIGHT_BIT else ())
        elif node.op_type == "DynamicQuantizeLinear":
            narrow.add(node.output[0])
        elif node.op_type in _MOVES_8_BIT and node.input and node.input[0] in narrow:
            found.add(index)
            narrow.update(node.output[:1] if node.op_type in ("MaxPool", "NhwcMaxPool") else node.output)
    return found


def _borders(graph: QdqGraph) -> set[int]:
    """One Q at each graph input and one DQ at each graph output."""
    found: dict[tuple[str, str], int] = {}
    for index, node in enumerate(graph.nodes):
        if node.op_type == QUANTIZE:
            tensor = node.input[0]
            while (source := graph.producer_of(tensor)) is not None and source.op_type in _BORDER_TRANSPARENT:
                tensor = source.input[0]
            if source is None and tensor not in graph.initializers:
                found.setdefault((QUANTIZE, tensor), index)
        elif node.op_type == DEQUANTIZE and node.input[0] not in graph.initializers:
            tensor = node.output[0]
            while tensor not in graph.outputs:
                readers = graph.consumers.get(tensor, [])
                if len(readers) != 1 or graph.nodes[readers[0]].op_type not in _BORDER_TRANSPARENT:
                    break
                tensor = graph.nodes[readers[0]].output[0]
            # A DQ that writes a graph output and feeds other nodes too is more than a border.
            if tensor in graph.outputs and (tensor != node.output[0] or not graph.consumers.get(tensor)):
                found.setdefault((DEQUANTIZE, tensor), index)
    return set(found.values())
