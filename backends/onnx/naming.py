"""Names a user recognises in the ONNX file, and where every operator comes from.

Inputs are called as the model's forward calls them, outputs after the keys of what it returns, weights as in the state
dict, symbolic dimensions as the user called them, nodes and values as in the trace: the operator `linear_3` of the
trace is the node `linear_3`, or, where ONNX needs several nodes for it, `linear_3/MatMul` and so on. Metadata tells
each node's module, and the pass and captured nodes it comes from; no source paths, which would tell the user's
customers about the user's disk.

The exporter traces the graph once more and numbers its nodes anew, so names do not connect its nodes with the
program's. What it carries along faithfully is each node's stack trace, into the file's metadata: `mark` puts the node's
name there.
"""

from __future__ import annotations

import re

import onnx_ir as ir
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.ir import Program, is_tensor, module_path, provenance

_MARK = "graphopt:"
_STACK_TRACE = "pkg.torch.onnx.stack_trace"
_OURS = frozenset({"module", "pass", "from"})
_SYMBOL = re.compile(r"\b[A-Za-z_]\w*\b")


def mark(exported: ExportedProgram) -> None:
    """Put every operator's name where the exporter copies it to the ONNX nodes made from it."""
    for node in exported.graph.nodes:
        if node.op == "call_function":
            node.meta["stack_trace"] = f"{_MARK}{node.name}"


def marked(text: str) -> str:
    """Return the name that `mark` put into `text`, or an empty string."""
    found = re.search(rf"{_MARK}(\w+)", text)
    return found[1] if found else ""


def name_after(program: Program, model: ir.Model) -> None:
    """Give inputs, outputs, nodes, values and dimensions of `model` their names, and set its metadata.

    The model is the export of a program whose operators were `mark`ed.
    """
    sources = {node: marked(node.metadata_props.get(_STACK_TRACE, "")) for node in model.graph}
    forget_metadata(model, keep=frozenset())
    taken: set[str] = set()
    _name_inputs(program, model, taken)
    outputs = [_unique(name, taken) for name in output_names(program)]
    _name_weights(model, taken)
    _name_operators(program, model, sources, taken)
    _name_outputs(model, outputs, taken)
    _name_dimensions(program, model)


def name_merged(model: ir.Model) -> None:
    """Call the nodes that the exporter's optimizer made after what they compute."""
    taken = {node.name for node in model.graph}
    for node in model.graph:
        name = node.outputs[0].name
        if (node.name or "node_").startswith("node_") and name and name not in taken:
            node.name = name
            taken.add(name)


def forget_metadata(model: ir.Model, keep: frozenset[str] = _OURS) -> None:
    """Remove all metadata but ours."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        for key in set(node.metadata_props) - keep:
            node.metadata_props.pop(key)
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()


def _name_inputs(program: Program, model: ir.Model, taken: set[str]) -> None:
    names = input_names(program)
    taken.update(names)
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name


def _name_weights(model: ir.Model, taken: set[str]) -> None:
    """Leave weights their names, but for those that an input or output has."""
    for value in list(model.graph.initializers.values()):
        value.name = _unique(value.name or "weight", taken)


def input_names(program: Program) -> list[str]:
    """Return the names of the tensors that the program eats, in order."""
    pairs = zip(program.signature.inputs, program.placeholders, strict=True)
    taken: set[str] = set()
    return [_unique(name, taken) for name, node in pairs if is_tensor(node)]


def _name_operators(program: Program, model: ir.Model, sources: dict[ir.Node, str], taken: set[str]) -> None:
    known = {node.name: node for node in program.graph.nodes}
    names = {name: _unique(name, taken) for name in dict.fromkeys(sources.values()) if name}
    # Of several nodes with results the last one gets the plain name.
    final: dict[str, ir.Node] = {}
    for node in model.graph:
        if any(_leaves(value, sources[node], sources) for value in node.outputs):
            final[sources[node]] = node
    for node in model.graph:
        source = known.get(sources[node])
        if source is None:
            node.name = _unique(node.name or node.op_type, taken)
            for value in node.outputs:
                value.name = _unique(value.name or node.name, taken)
            continue
        last = final.get(source.name) is node
        node.name = names[source.name] if last else _unique(f"{source.name}/{node.op_type}", taken)
        parts = _parts(source, node) if last else {}
        for index, value in enumerate(node.outputs):
            if len(node.outputs) == 1:
                value.name = node.name
            else:
                value.name = _unique(parts.get(index, f"{node.name}/{index}"), taken)
        if path := module_path(source):
            node.metadata_props["module"] = path
        if last:
            _tell_origin(source, node)


def _leaves(value: ir.Value, source: str, sources: dict[ir.Node, str]) -> bool:
    """True where operators of another source read the value, or the caller does."""
    return value.is_graph_output() or any(sources.get(reader) != source for reader, _ in value.uses())


def _parts(source: fx.Node, node: ir.Node) -> dict[int, str]:
    """Return the names of the program's nodes that take the parts of an operator with several results."""
    users = [user for user in source.users if user.op == "call_function" and user.args[:1] == (source,)]
    if len(node.outputs) == 1 or any(getattr(user.target, "__name__", "") != "getitem" for user in users):
        return {}
    codes = node.op_type == "DynamicQuantizeLinear"  # gives the codes first, which the program computes by itself
    return {int(user.args[1]) + codes: user.name for user in reversed(users)}  # type: ignore[arg-type]


def _tell_origin(source: fx.Node, node: ir.Node) -> None:
    made = provenance(source)
    if made["by"]:
        node.metadata_props["pass"] = made["by"]
        origin = [name for name in made["from"] if name != source.name]
        # What a Q or DQ comes from is what it reads.
        if origin and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            node.metadata_props["from"] = ",".join(origin)


def _name_outputs(model: ir.Model, names: list[str], taken: set[str]) -> None:
    """Call outputs after their keys; one that is an input, a weight or another output gets an Identity."""
    seen: set[ir.Value] = {*model.graph.inputs, *model.graph.initializers.values()}
    for position, name in enumerate(names):
        value = model.graph.outputs[position]
        if value in seen:
            identity = ir.node("Identity", [value], name=_unique(f"{name}/Identity", taken))
            identity.outputs[0].type, identity.outputs[0].shape = value.type, value.shape
            model.graph.append(identity)
            model.graph.outputs[position] = value = identity.outputs[0]
        seen.add(value)
        value.name = name


def output_names(program: Program) -> list[str]:
    """Return a name for each tensor the program returns: a dict's key, a dataclass's field, `output` or `output_0`."""
    spec = program.signature.out_spec
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = []
    for (path, _), value in zip(pytree.tree_leaves_with_path(tree), program.outputs, strict=True):
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        named = bool(keys) and not keys[0].isdigit()
        if is_tensor(value):
            names.append(".".join(keys) if named else "_".join(["output", *keys]))
    return names


def _name_dimensions(program: Program, model: ir.Model) -> None:
    """Replace the exporter's symbols (`s58`) in every shape by the user's names; unnamed ones by `x_dim_0`."""
    names = dimension_names(program)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs), *model.graph.outputs]
    for value in dict.fromkeys(values):
        if value.shape is None or all(isinstance(size, int) for size in value.shape):
            continue
        sizes = [size if isinstance(size, int) else _renamed(size.value, names) for size in value.shape]
        value.shape = ir.Shape(sizes)


def _renamed(expression: str | None, names: dict[str, str]) -> str | None:
    if expression is None:
        return None
    return _SYMBOL.sub(lambda found: names.get(found[0], found[0]), expression)


def dimension_names(program: Program) -> dict[str, str]:
    """Return `symbol -> name` of the symbolic dimensions of the inputs."""
    names = dict(program.dimension_names)
    pairs = zip(program.signature.inputs, program.placeholders, strict=True)
    for name, node in [(name, node) for name, node in pairs if is_tensor(node)]:
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                names.setdefault(str(size.node.expr), f"{name}_dim_{axis}")
    return names


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
