"""`capture`: nn.Module, fx.GraphModule, ExportedProgram or `.pt2` file -> Program.

A Program is an inference graph. A module is captured in eval mode, whatever mode it is in: dropout does nothing and
batch norm uses its running statistics, which is what users of an optimized model expect. The module is left as it was.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from graphopt.calibration.batches import call_form
from graphopt.capture.compare import check_same_function
from graphopt.capture.dimensions import dimension_names, written_out
from graphopt.capture.export import functional, notes_of, refuse_training_graph, traced
from graphopt.capture.inputs import check_call, check_tensors, conventional_inputs, forward_parameters, own_copy
from graphopt.capture.modes import inference, unwrapped
from graphopt.capture.outputs import eager_outputs, register_dataclasses
from graphopt.capture.weights import check_exported_weights, check_module_weights
from graphopt.errors import GraphoptError
from graphopt.ir.archive import read_archive
from graphopt.ir.exported import from_exported
from graphopt.ir.program import Program, ProgramModule


def capture(model: Any, example_inputs: Any = None, dynamic_shapes: Any = None, trust: bool = False) -> Program:
    """Capture `model` as a functional Program over ATen.

    Args:
        model: an `nn.Module`, an `fx.GraphModule`, a `torch.export.ExportedProgram`, or the path of a `.pt2` file.
        example_inputs: positional inputs as a tuple or list, keyword inputs as a dict, or one tensor. None takes what
            the model says it eats (`example_input_array`, `dummy_inputs`, `pretrained_cfg["input_size"]`) or, for an
            exported program, the inputs it was exported with.
        dynamic_shapes: as `torch.export.export` takes it; modules only.
        trust: unpickle a `.pt2` file that needs it. This runs code from the file.

    Raises:
        GraphoptError: the model does not run on the inputs, cannot be captured (with the line of the model and what
            usually helps), updates its own state, returns something other than tensors, or has NaN in its weights.
    """
    with torch.random.fork_rng(devices=[]):
        return _capture(model, example_inputs, dynamic_shapes, trust)


def _capture(model: Any, example_inputs: Any, dynamic_shapes: Any, trust: bool) -> Program:
    if isinstance(model, str | Path):
        return _of_archive(Path(model), example_inputs, dynamic_shapes, trust)
    if isinstance(model, ExportedProgram):
        return _of_exported(model, example_inputs, dynamic_shapes)
    if isinstance(model, Program):
        raise GraphoptError("the model is a graphopt Program already; use it as it is, or capture its module()")
    if isinstance(model, ProgramModule):
        return _of_program(model.program, example_inputs, dynamic_shapes)
    if isinstance(model, nn.Module):
        return _of_module(unwrapped(model), example_inputs, dynamic_shapes)
    what = f"the class {model.__name__}; make an instance of it" if isinstance(model, type) else type(model).__name__
    raise GraphoptError(
        f"model must be an nn.Module, a torch.export.ExportedProgram or the path of a .pt2 file, not {what}"
    )


def _of_module(model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> Program:
    check_module_weights(model)
    given = conventional_inputs(model) if example_inputs is None else example_inputs
    args, kwargs = call_form(given)
    parameters = forward_parameters(model, len(args))
    check_call(model, args, kwargs)
    register_dataclasses((args, kwargs))
    check_tensors(args, kwargs, parameters)
    dynamic_shapes = written_out(model, (args, kwargs), dynamic_shapes)
    args, kwargs = own_copy((args, kwargs))
    with inference(model) as was_training:
        reference = eager_outputs(model, args, kwargs)
        exported = traced(model, args, kwargs, dynamic_shapes)
    notes = ["the model was in train mode and was captured in eval mode, as a graph for inference"] * was_training
    program = _finish(exported, parameters, (args, kwargs), notes)
    if dynamic_shapes is not None:
        program.dimension_names = dimension_names(program, dynamic_shapes)
    check_same_function(program, reference)
    return program


def _of_exported(exported: ExportedProgram, example_inputs: Any, dynamic_shapes: Any) -> Program:
    if dynamic_shapes is not None:
        raise GraphoptError(
            "the model is exported already and its shapes are fixed; give dynamic_shapes to torch.export.export instead"
        )
    refuse_training_graph(exported)
    inputs = exported.example_inputs if example_inputs is None else call_form(example_inputs)
    if inputs is None:
        raise GraphoptError("the exported program holds no example inputs; pass example_inputs")
    args, kwargs = own_copy((tuple(inputs[0]), dict(inputs[1])))
    program = _finish(exported, (), None, [])
    program.signature.flatten(args, kwargs)
    check_tensors(args, kwargs, program.signature.parameters)
    program.example_inputs = (args, kwargs)
    return program


def _of_archive(path: Path, example_inputs: Any, dynamic_shapes: Any, trust: bool) -> Program:
    archive = read_archive(path, trust=trust)
    if not archive.by_graphopt:
        try:
            return _of_exported(archive.exported, example_inputs, dynamic_shapes)
        except GraphoptError:
            raise
        except Exception as error:  # the parts of a damaged file may be in order and not fit each other
            raise GraphoptError(f"{path} is damaged: its program cannot be read ({type(error).__name__})") from error
    return _of_program(archive.program(), example_inputs, dynamic_shapes)


def _of_program(program: Program, example_inputs: Any, dynamic_shapes: Any) -> Program:
    if dynamic_shapes is not None:
        raise GraphoptError(
            "the model was captured already and its shapes are fixed; give dynamic_shapes when capturing the original"
        )
    program = program.clone()
    if example_inputs is not None:
        args, kwargs = own_copy(call_form(example_inputs))
        program.signature.flatten(args, kwargs)
        check_tensors(args, kwargs, program.signature.parameters)
        program.example_inputs = (args, kwargs)
    return program


def _finish(
    exported: ExportedProgram,
    parameters: tuple[str, ...],
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None,
    notes: list[str],
) -> Program:
    exported = functional(exported)
    check_exported_weights(exported)
    with torch.no_grad():
        program = from_exported(exported, parameters)
    if example_inputs is not None:
        program = dataclasses.replace(program, example_inputs=example_inputs)
    program.notes.extend([*notes, *notes_of(exported)])
    return program
