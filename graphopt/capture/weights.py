"""Whether the weights can be optimized at all: there, finite, and tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.nn.parameter import is_lazy

from graphopt.errors import GraphoptError


def check_module_weights(model: nn.Module) -> None:
    """Refuse weights without values: lazy modules that never ran, and the meta device."""
    scripted = next((name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        where = f"its submodule {scripted!r} is" if scripted else "it is"
        raise GraphoptError(f"the model cannot be captured: {where} TorchScript; use the nn.Module it was made from")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise GraphoptError(
                f"parameter {name} has no shape yet; run the model once on a batch to initialise its lazy modules"
            )
        if tensor.is_meta:
            raise GraphoptError(f"weight {name} is on the meta device and has no values; load the weights first")


def check_exported_weights(exported: ExportedProgram) -> None:
    """Refuse NaN in parameters and buffers and infinity in parameters; a buffer may hold infinity, as masks do."""
    for spec in exported.graph_signature.input_specs:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or isinstance(spec.arg, ConstantArgument):
            continue
        name = str(spec.target)
        value = exported.state_dict.get(name, exported.constants.get(name))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        parameter = spec.kind is InputKind.PARAMETER
        found = _flaw(value.detach(), infinity=parameter)
        if found:
            kind = "parameter" if parameter else "buffer"
            raise GraphoptError(
                f"{kind} {name} holds {found}; the model is broken (a diverged training, a damaged checkpoint), "
                "repair it first"
            )


def _flaw(value: Tensor, infinity: bool) -> str:
    if value.itemsize == 1:  # float8 types have no isfinite on every device
        value = value.float()
    # One pass without a temporary of the weight's size: min and max carry NaN along.
    low, high = torch.aminmax(value) if value.numel() else (value.new_zeros(()), value.new_zeros(()))
    if bool(torch.isnan(low)) or bool(torch.isnan(high)):
        return "NaN"
    return "infinity" if infinity and not bool(torch.isfinite(low) & torch.isfinite(high)) else ""
