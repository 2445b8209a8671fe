"""Running torch.export, and making its graph functional.

`run_decompositions({})` functionalises, keeps linear, conv, layer_norm and SDPA whole, and inlines regions of no_grad
and autocast, the latter with their casts made explicit. It forgets which line such a region's operators came from;
`functional` puts that back.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind

from graphopt.capture.failures import export_failure
from graphopt.capture.randomness import draws
from graphopt.errors import GraphoptError
from graphopt.exclusive import TRACING
from graphopt.ir.exported import source_line
from graphopt.ir.program import storable_name

_PROVENANCE = ("stack_trace", "nn_module_stack", "torch_fn")
_ASSIGNED = re.compile(r"^\s*(\w+)(?::[^=]*)? = ", re.MULTILINE)
_PLACEHOLDER_STACK = "_empty_nn_module_stack_from_metadata_hook"
_GENERATED = "<eval_with_key>"


def traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    """Export a module in the mode it is in; GraphoptError names the line that cannot be exported."""
    try:
        with _quiet():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the user's forward and its own machinery raise
        raise export_failure(type(model).__name__, error) from error


def functional(exported: ExportedProgram) -> ExportedProgram:
    """Return the program over functional ATen; GraphoptError where it updates a buffer."""
    origins = {
        node.name: node.meta
        for module in exported.graph_module.modules()
        if isinstance(module, fx.GraphModule) and module is not exported.graph_module
        for node in module.graph.nodes
        if node.op == "call_function"
    }
    names = [*exported.state_dict, *exported.constants]
    # torch hangs the weights on a GraphModule, which has no room for one called `graph` or `meta.weight`.
    stored = {name: new for name in names if (new := storable_name(name, names)) != name}
    if stored:
        exported = _renamed(exported, stored)
    try:
        with _quiet(), torch.no_grad():
            decomposed: ExportedProgram = exported.run_decompositions({})
    except Exception as error:
        raise export_failure("the exported program", error) from error
    if stored:
        decomposed = _renamed(decomposed, {new: name for name, new in stored.items()})
    for node in decomposed.graph.nodes:
        _restore_provenance(node, origins)
    _refuse_state(decomposed)
    return decomposed


def _renamed(exported: ExportedProgram, names: dict[str, str]) -> ExportedProgram:
    """Return the program with its weights under other names."""

    def rename(specs: Sequence[Any]) -> list[Any]:
        return [dataclasses.replace(spec, target=names.get(str(spec.target), spec.target)) for spec in specs]

    signature = exported.graph_signature
    return ExportedProgram(
        root=exported.graph_module,
        graph=copy.deepcopy(exported.graph),
        graph_signature=ExportGraphSignature(rename(signature.input_specs), rename(signature.output_specs)),
        state_dict={names.get(name, name): value for name, value in exported.state_dict.items()},
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants={names.get(name, name): value for name, value in exported.constants.items()},
        verifiers=exported.verifiers,
    )


def _restore_provenance(node: fx.Node, origins: dict[str, dict[str, Any]]) -> None:
    trace = str(node.meta.get("stack_trace") or "")
    if _GENERATED in trace and (assigned := _ASSIGNED.search(trace)) and assigned[1] in origins:
        meta = origins[assigned[1]]
        node.meta.update({key: meta[key] for key in _PROVENANCE if key in meta})
    if _PLACEHOLDER_STACK in str(node.meta.get("nn_module_stack")):
        node.meta.pop("nn_module_stack")  # what torch writes for the sizes it reads itself
    node.meta.pop("from_node", None)  # a chain of every trace the node went through; large, and nobody reads it
    custom = node.meta.get("custom")
    if custom:
        node.meta["custom"] = {key: value for key, value in custom.items() if not str(key).startswith("_torchdynamo")}


def _refuse_state(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.BUFFER_MUTATION:
            continue
        writer = next((node for node in exported.graph.nodes if node.name == spec.arg.name), None)
        where = source_line(writer) if writer is not None else ""
        raise GraphoptError(
            f"the model updates its buffer {spec.target} in forward{f' at {where}' if where else ''}, so that a call "
            "depends on those before it; take the old value as an input and return the new one as an output"
        )


def refuse_training_graph(exported: ExportedProgram) -> None:
    """Refuse a program exported in train mode: its batch norms and dropouts are those of training."""
    for module in exported.graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "call_function" and _trains(node):
                where = source_line(node)
                raise GraphoptError(
                    f"the program was exported in train mode ({node.name}{f' at {where}' if where else ''}); "
                    "call model.eval() before torch.export.export"
                )


def _trains(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    for index, argument in enumerate(schema.arguments):
        if argument.name in ("train", "training"):
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if "batch_norm" in schema.name:
                # Without running statistics a batch norm computes them from the batch in every mode.
                return value is True and len(node.args) > 3 and node.args[3] is not None
            return value is True and "dropout" in schema.name
    return False


def notes_of(exported: ExportedProgram) -> list[str]:
    """Return sentences about what the user should know of the captured graph."""
    notes = []
    specs = exported.graph_signature.output_specs
    written = [str(spec.target) for spec in specs if spec.kind is OutputKind.USER_INPUT_MUTATION]
    if written:
        notes.append(
            f"the model overwrites its input {', '.join(written)} in place; "
            "the captured program leaves its inputs as they are"
        )
    random = dict.fromkeys(str(node.target) for node in exported.graph.nodes if draws(node))
    if random:
        notes.append(f"the model draws random numbers ({', '.join(random)}), so that two runs of it may differ")
    return notes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's warnings and logged tracebacks from the user, who reads one sentence instead."""
    loggers = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and (name == "torch" or name.startswith("torch."))
    ]
    disabled = [logger.disabled for logger in loggers]
    # torch.export prints the unfinished graph of a failure; a forward that prints has done so when it was run.
    sink = io.StringIO()
    with (
        TRACING,
        warnings.catch_warnings(),
        contextlib.redirect_stderr(sink),
        contextlib.redirect_stdout(sink),
    ):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.disabled = True
            yield
        finally:
            for logger, was in zip(loggers, disabled, strict=True):
                logger.disabled = was
