"""Program <-> torch.export.ExportedProgram.

An ExportedProgram passes its weights as lifted inputs; a Program reads them by `get_attr`. The two conversions below
are inverse up to guards and assertions, which a Program does not carry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError
from graphopt.ir.program import Program, Signature, graph_module, storable_name

_LIFTED = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
# Assertions guard the shapes seen while tracing; the verifier and the runtime check shapes themselves.
_ASSERTIONS = ("_assert", "sym_constrain_range", "_check")


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Two names with equal identity are one tensor (tied weights)."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()


def from_exported(exported: ExportedProgram, parameters: Sequence[str] = ()) -> Program:
    """Turn a functional ExportedProgram into a Program.

    Raises GraphoptError where the graph updates a buffer or holds control flow: a Program is a function. An update of
    an input is left out: the Program computes the same outputs and leaves its inputs as they are.
    """
    _refuse_mutation(exported)
    lifted = {
        spec.arg.name: (str(spec.target), _value_of(exported, spec))
        for spec in exported.graph_signature.input_specs
        if spec.kind in _LIFTED and not isinstance(spec.arg, ConstantArgument)
    }
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    by_tensor: dict[tuple[Any, ...], fx.Node] = {}
    values: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    nodes = list(exported.graph.nodes)
    names = {name for name, _ in lifted.values()}
    for node in sorted(nodes, key=lambda n: n.op != "placeholder" or n.name in lifted):
        if node.op == "output":
            continue
        if node.name in lifted:
            name, value = lifted[node.name]
            key = _identity(value) if value.numel() else (name,)
            if key in by_tensor:
                aliases[name] = str(by_tensor[key].target)
                mapping[node] = by_tensor[key]
                continue
            stored = storable_name(name, names)
            if stored != name:
                aliases[name] = stored
            values[stored] = value
            mapping[node] = by_tensor[key] = graph.create_node("get_attr", stored, name=stored.replace(".", "_"))
            mapping[node].meta = {"val": node.meta["val"]}
        elif not node.users and any(part in str(node.target) for part in _ASSERTIONS):
            continue
        else:
            _refuse_control_flow(node)
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    # A graph that overwrites an input returns the new value first; a function has no use for it.
    specs = exported.graph_signature.output_specs
    returned: Any = exported.graph.output_node().args[0]
    outputs = tuple(v for v, spec in zip(returned, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT)
    result = graph.output(fx.map_arg(outputs, lambda n: mapping[n]))
    result.meta = dict(exported.graph.output_node().meta)
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder" and node.op != "output" and not node.users:
            graph.erase_node(node)
    call = exported.module_call_graph[0].signature
    if call is None:
        raise GraphoptError(
            "the exported program carries no calling convention; export it again with torch.export.export"
        )
    args, kwargs = exported.example_inputs or ((), {})
    parameters = tuple(parameters) or _forward_names(exported)
    signature = Signature(call.in_spec, call.out_spec, parameters, flat_names(call.in_spec, parameters))
    return Program(
        graph_module(graph, lambda node: values[str(node.target)]),
        signature,
        (tuple(args), dict(kwargs)),
        aliases,
        dict(exported.range_constraints),
    )


def _value_of(exported: ExportedProgram, spec: InputSpec) -> Tensor:
    name = str(spec.target)
    value = exported.state_dict.get(name)
    if value is None:
        value = exported.constants.get(name)
    if not isinstance(value, Tensor):
        raise GraphoptError(f"the model holds {name!r}, which is not a tensor; graphopt can only capture tensors")
    return value if isinstance(value, nn.Parameter) else value.detach()


def _forward_names(exported: ExportedProgram) -> tuple[str, ...]:
    call = exported.module_call_graph[0].signature
    names = getattr(call, "forward_arg_names", None) if call is not None else None
    if names:
        return tuple(names)
    assert call is not None
    args_spec, kwargs_spec = call.in_spec.children()
    user = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    return (*user[: args_spec.num_children], *(kwargs_spec.context or ()))


def _refuse_mutation(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION):
            raise GraphoptError(
                f"the model updates its buffer {str(spec.target)!r} in forward; return the new value as an output "
                "instead, so that the model is a function of its inputs"
            )


def _refuse_control_flow(node: fx.Node) -> None:
    if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        where = source_line(node)
        raise GraphoptError(
            f"the model uses {node.target}{f' at {where}' if where else ''}, which has no place in a functional "
            "graph; replace data-dependent control flow by torch.where or export that part on its own"
        )


def source_line(node: fx.Node) -> str:
    """Return `file.py:12, in forward` for the user's line that made this node, or an empty string.

    That is the innermost line outside torch: not the one in `torch/nn` that calls the operator, but its caller.
    """
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    frames = [line for line in lines if line.startswith("File ") and "<eval_with_key>" not in line]
    if not frames:
        return ""
    frames = [frame for frame in frames if "-packages/torch/" not in frame] or frames
    file, line, *rest = frames[-1].removeprefix("File ").split(", ")
    function = rest[0].removeprefix("in ") if rest else ""
    return f"{file.strip(chr(34))}:{line.removeprefix('line ')}" + (f", in {function}" if function else "")


def to_exported(program: Program) -> ExportedProgram:
    """Turn a Program back into an ExportedProgram (for `.pt2` files and for torch.onnx)."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    specs: list[InputSpec] = []
    state: dict[str, Tensor] = {}
    weights = [node for node in program.graph.nodes if node.op == "get_attr"]
    taken = {node.name for node in program.graph.nodes if node.op != "get_attr"}
    for node in weights:
        name, value = str(node.target), program.weight(node)
        parameter = isinstance(value, nn.Parameter)
        prefix = ("p_" if parameter else "b_") + re.sub(r"\W", "_", name)
        while prefix in taken:
            prefix += "_"
        taken.add(prefix)
        mapping[node] = graph.create_node("placeholder", prefix, name=prefix)
        mapping[node].meta = dict(node.meta)
        kind = InputKind.PARAMETER if parameter else InputKind.BUFFER
        specs.append(InputSpec(kind, TensorArgument(mapping[node].name), name, None if parameter else True))
        state[name] = value
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "output":
            new = graph.output(fx.map_arg(node.args[0], lambda n: mapping[n]))
            new.meta = dict(node.meta)
            continue
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        if "val" in node.meta:
            mapping[node].meta["val"] = pytree.tree_map_only(FakeTensor, _at_the_start, node.meta["val"])
        if node.op == "placeholder":
            specs.append(InputSpec(InputKind.USER_INPUT, _argument(mapping[node]), None))
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(value), None) for value in graph.output_node().args[0]]  # type: ignore[union-attr]
    signature = program.signature
    call = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=signature.in_spec,
        out_spec=signature.out_spec,
        forward_arg_names=_given_names(signature),
    )
    root = nn.Module()
    exported = ExportedProgram(
        root=root,
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict=state,
        range_constraints=program.range_constraints,
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
        example_inputs=program.example_inputs,
        constants={},
    )
    # What torch wrote down of sizes while it traced: by chance of how often it did, and no promise of the program's.
    exported._guards_code = []
    return exported


def _at_the_start(value: FakeTensor) -> Tensor:
    """Return an abstract tensor that begins its storage.

    torch writes where in its storage a view begins and does not read it back: what is saved, loaded and saved again
    would be another file.
    """
    offset = value.storage_offset()
    if value.layout != torch.strided or (isinstance(offset, int) and offset == 0):
        return value
    with value.fake_mode:
        start = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    return start.requires_grad_(value.requires_grad)


def _given_names(signature: Signature) -> list[str] | None:
    """Return the names of the parameters that the captured call gives; the rest of forward's are at their defaults."""
    args_spec, kwargs_spec = signature.in_spec.children()
    positional = list(signature.parameters[: args_spec.num_children])
    if len(positional) < args_spec.num_children:
        return None
    return [*positional, *(kwargs_spec.context or [])]


def _argument(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return ConstantArgument(name="", value=value)
    known = value.meta.get("val")
    if isinstance(known, Tensor):
        return TensorArgument(value.name)
    if isinstance(known, torch.SymInt):
        return SymIntArgument(value.name)
    if isinstance(known, torch.SymFloat):
        return SymFloatArgument(value.name)
    if isinstance(known, torch.SymBool):
        return SymBoolArgument(value.name)
    return ConstantArgument(name=value.name, value=known)


def flat_names(spec: pytree.TreeSpec, parameters: Sequence[str]) -> tuple[str, ...]:
    """Name each leaf of an `(args, kwargs)` structure as a user would write it: `x`, `features.mask`, `pair.0`."""
    dummy = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names: list[str] = []
    for path, _ in pytree.tree_leaves_with_path(dummy):
        side, first, *rest = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path]
        if side == 0:
            index = int(str(first))
            first = parameters[index] if index < len(parameters) else f"input_{index}"
        names.append(".".join(str(key) for key in (first, *rest)))
    return tuple(names)
