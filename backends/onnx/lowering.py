"""Lower a Program to an ONNX model.

Through torch.onnx with a translation table for the dialect, not straight to onnx-ir: the exporter knows several hundred
ATen operators at every opset, and Q/DQ are already where they belong, so all that is ours is a handful of operators
(`translation`), names (`naming`) and the clean-up (`cleanup`). The exporter's optimizer runs after our clean-up, as it
would fold the transposed weights under names nobody knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.backends.onnx import packing
from graphopt.backends.onnx.cleanup import clean
from graphopt.backends.onnx.cleanup.editor import constant
from graphopt.backends.onnx.naming import forget_metadata, mark, marked, name_after, name_merged
from graphopt.backends.onnx.translation import refuse, single_out_global_pools, translation_table
from graphopt.backends.onnx.trim import share_zero_points, trim
from graphopt.errors import NotExpressible, first_line
from graphopt.exclusive import TRACING
from graphopt.ir import Program, is_tensor, operator, source_line, to_exported

PLAIN_OPSET = 20  # Gelu is an operator from 20 on; Q/DQ of 8 bits need 13


def lower(program: Program) -> ir.Model:
    """Return the ONNX model of `program`.

    Raises GraphoptError naming the operator and the user's line where ONNX has no form for it.
    """
    refuse(program)
    model = _export(program, needed_opset(program))
    name_after(program, model)
    clean(model)
    packing.pack(program, model)
    share_zero_points(model)
    with _quiet():
        onnxscript.optimizer.optimize_ir(model, onnx_shape_inference=False, should_fold=_may_fold)
    forget_metadata(model)
    name_merged(model)
    trim(model)
    model.producer_name = "graphopt"
    model.producer_version = None
    return model


def _may_fold(node: ir.Node) -> bool | None:
    """Keep what would make the file larger when folded.

    The transpose of a weight that is read both ways would be there twice; numbers in float16 would be float32.
    """
    if not constant(node.inputs[0] if node.inputs else None):
        return None
    half = node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT16
    return False if half or node.op_type == "Transpose" else None


def needed_opset(program: Program) -> int:
    """Return the smallest opset that has everything the program needs."""
    uses = [packing.needed_opset(node) for node in program.graph.nodes if operator(node) == "graphopt.dequantize"]
    return max([PLAIN_OPSET, *uses])


def _export(program: Program, opset: int) -> ir.Model:
    exported = to_exported(_tensors_only(program))
    _free_of_strides(exported)
    mark(exported)
    single_out_global_pools(exported)
    _decompose_at_need(exported)
    try:
        with _quiet(), _translations_read_once():
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                optimize=False,
                verbose=False,
                custom_translation_table=translation_table(opset),
            )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the exporter wraps whatever goes wrong inside it
        raise NotExpressible(_why(program, error)) from error
    assert made is not None
    return made.model


def _free_of_strides(exported: ExportedProgram) -> None:
    """Write every view as a reshape: the exporter traces again, with other strides, and what was lawful may not be."""
    for node in exported.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


@contextlib.contextmanager
def _translations_read_once() -> Iterator[None]:
    """Let the exporter remember its translations, whose source it would parse for every export: most of a small one.

    Where the exporter is built otherwise, nothing is changed.
    """
    try:
        apis: Any = importlib.import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
        original = apis.get_torchlib_ops
    except (ImportError, AttributeError):
        yield
        return
    apis.get_torchlib_ops = functools.partial(_remembered, original)
    try:
        yield
    finally:
        apis.get_torchlib_ops = original


@functools.cache
def _remembered(read: Callable[[], Any]) -> Any:
    return read()


def _decompose_at_need(exported: ExportedProgram) -> None:
    """Let `exported` skip a decomposition that would find nothing to do.

    The exporter decomposes what it has no translation for, which traces the whole program again: a quarter of an
    export's time. A Program has been decomposed when it was captured, so mostly nothing is left.
    """
    decompose: Callable[..., ExportedProgram] = exported.run_decompositions

    def at_need(table: Any = None, *args: Any, **kwargs: Any) -> ExportedProgram:
        if table is None or any(node.target in table for node in exported.graph.nodes):
            decomposed = decompose(table, *args, **kwargs)
            _free_of_strides(decomposed)
            return decomposed
        return exported

    exported.run_decompositions = at_need


def _tensors_only(program: Program) -> Program:
    """Return the program without the outputs that are no tensors: a file has no place for numbers and None."""
    if all(is_tensor(value) for value in program.outputs):
        return program
    kept = program.clone()
    outputs = tuple(value for value in kept.outputs if is_tensor(value))
    kept.graph.output_node().args = (outputs,)
    _, spec = pytree.tree_flatten(outputs)
    kept.signature = dataclasses.replace(kept.signature, out_spec=spec)
    return kept


def _why(program: Program, error: Exception) -> str:
    """Return one sentence for the exporter's failure: which operator, and where the user wrote it."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    node = _failed(program, chain)
    line = source_line(node) if node is not None else ""
    if node is not None and any("No ONNX function found" in str(each) for each in chain):
        place = f" at {line}" if line else ""
        return f"ONNX has no form for the operator {node.target}{place}; replace it by operators that ONNX has"
    first = first_line(chain[-1])
    place = f" at {node.name}{f' ({line})' if line else ''}" if node is not None else ""
    return f"torch.onnx could not export the program{place}: {first}"


def _failed(program: Program, chain: list[BaseException]) -> fx.Node | None:
    """Return the operator that the exporter was at: the innermost one that its frames hold."""
    names = [
        marked(str(value.meta.get("stack_trace")))
        for error in chain
        for frame, _ in traceback.walk_tb(error.__traceback__)
        for value in frame.f_locals.values()
        if isinstance(value, fx.Node)
    ]
    known = {node.name: node for node in program.graph.nodes}
    return next((known[name] for name in reversed(names) if name in known), None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines, warnings and log; what matters comes back as an exception."""
    with TRACING:
        yield from _silenced()


def _silenced() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level, disabled = logger.level, logging.root.manager.disable
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(disabled)
        logger.setLevel(level)
