"""Names a user recognises in the ONNX file, and where every operator comes from.

Inputs are called as the model's forward calls them, outputs after the keys of what it returns, weights as in the state
dict, nodes and values as in the trace. Metadata tells each node's module, and the passes and captured nodes it comes from;
no source paths, which would tell the user's customers about the user's disk.
"""

from __future__ import annotations

import onnx_ir as ir
from torch.utils import _pytree as pytree

from graphopt.ir import Program, is_tensor, module_path, provenance


def name_after(program: Program, model: ir.Model) -> None:
    """Rename inputs, outputs and nodes of `model` and replace its metadata."""
    nodes = {node.name: node for node in program.graph.nodes}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        first = node.outputs[0].name or ""
        source = nodes.get(first)
        if source is not None:
            node.name = first
            path, made = module_path(source), provenance(source)
            if path:
                node.metadata_props["module"] = path
            if made["by"]:
                node.metadata_props["pass"] = made["by"]
                origin = [name for name in made["from"] if name != first]
                if origin:
                    node.metadata_props["from"] = ",".join(origin)
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    taken: set[str] = {value.name or "" for value in model.graph.initializers.values()}
    tensors = [name for name, node in zip(program.signature.inputs, program.placeholders, strict=True) if is_tensor(node)]
    for value, name in zip(model.graph.inputs, tensors, strict=True):
        value.name = _unique(name, taken)
    _name_outputs(program, model, taken)


def _name_outputs(program: Program, model: ir.Model, taken: set[str]) -> None:
    """Call outputs after their keys; an output that is an input or another output already gets an Identity of its own."""
    names = [name for name, value in zip(output_names(program), program.outputs, strict=True) if hasattr(value, "op")]
    seen: set[int] = {id(value) for value in model.graph.inputs} | {id(v) for v in model.graph.initializers.values()}
    for position, name in enumerate(names):
        value = model.graph.outputs[position]
        if id(value) in seen:
            identity = ir.node("Identity", [value])
            identity.outputs[0].type, identity.outputs[0].shape = value.type, value.shape
            model.graph.append(identity)
            model.graph.outputs[position] = value = identity.outputs[0]
        seen.add(id(value))
        value.name = _unique(name, taken)


def output_names(program: Program) -> list[str]:
    """Return a name for each flat output: the key of a dict, the field of a dataclass, `output` or `output_0`."""
    spec = program.signature.out_spec
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = []
    for path, _ in pytree.tree_leaves_with_path(tree):
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        named = any(not key.isdigit() for key in keys)
        names.append(".".join(keys) if named else "_".join(["output", *keys]))
    return names


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
