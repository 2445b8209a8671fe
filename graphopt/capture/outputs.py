"""What a model returns: tensors in any nesting of tuples, lists, dicts and dataclasses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture.failures import eager_failure
from graphopt.capture.inputs import own_copy
from graphopt.errors import GraphoptError
from graphopt.ir.structures import is_plain_dataclass, register_dataclass


def eager_outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the module as it is, once, and return its outputs, whose dataclasses are registered as pytrees.

    Raises GraphoptError where the module itself fails, or returns anything but tensors, numbers and None.
    """
    fed_args, fed_kwargs = own_copy((args, kwargs))
    try:
        outputs = model(*fed_args, **fed_kwargs)
    except Exception as error:
        raise eager_failure(model, error) from error
    register_dataclasses(outputs)
    tensors = 0
    for path, leaf in pytree.tree_leaves_with_path(outputs):
        if isinstance(leaf, Tensor):
            tensors += 1
        elif not isinstance(leaf, int | float | bool | None):
            where = f" at output{pytree.keystr(path)}" if path else ""
            cached = getattr(getattr(model, "config", None), "use_cache", False) is True
            how = "set model.config.use_cache = False" if cached else "wrap the model in a module that drops the rest"
            raise GraphoptError(
                f"{type(model).__name__} returns a {type(leaf).__name__}{where}; return tensors only, in tuples, "
                f"lists, dicts or dataclasses ({how})"
            )
    if not tensors:
        raise GraphoptError(f"{type(model).__name__} returns no tensor; there is nothing to compute")
    return outputs


def register_dataclasses(tree: Any) -> None:
    """Register every dataclass in `tree` that torch's pytrees do not know, so that torch.export takes it."""
    while True:
        unknown = {type(leaf) for leaf in pytree.tree_leaves(tree) if is_plain_dataclass(type(leaf))}
        if not unknown:
            return
        for cls in unknown:
            register_dataclass(cls)
