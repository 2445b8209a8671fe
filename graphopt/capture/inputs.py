"""Example inputs: what a module says it eats, and whether what was given can be fed to it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError

_HOW = "pass example_inputs: a tuple of positional tensors or a dict of keyword tensors"


def conventional_inputs(model: nn.Module) -> Any:
    """Return example inputs from a convention the module follows.

    `example_input_array` (Lightning), `dummy_inputs` (transformers), `pretrained_cfg["input_size"]` or `default_cfg`
    (timm: [1, channels, height, width], seeded normal values in the type of the weights). An entry that does not fit
    the module's forward is passed over. Raises GraphoptError where nothing fits.
    """
    for attribute in ("example_input_array", "dummy_inputs"):
        try:
            found = getattr(model, attribute, None)
        except Exception:  # a property of the user's class, which may raise anything where it does not apply
            continue
        if found is not None and not callable(found) and _fits(model, found):
            return found
    for attribute in ("pretrained_cfg", "default_cfg"):
        size = _input_size(getattr(model, attribute, None))
        if size is not None:
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            return (torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(dtype),)
    names = ", ".join(_required(model))
    raise GraphoptError(
        f"{type(model).__name__} does not say what it eats; {_HOW}" + (f" for forward({names})" if names else "")
    )


def _input_size(config: Any) -> tuple[int, ...] | None:
    size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    if isinstance(size, tuple | list) and size and all(isinstance(n, int) and n > 0 for n in size):
        return tuple(size)
    return None


def _fits(model: nn.Module, inputs: Any) -> bool:
    args: tuple[Any, ...] = (inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, tuple | list):
        args = tuple(inputs)
    elif isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    # What only a `**kwargs` would take is no input of this model: a convention is inherited, an input is named.
    if not set(kwargs) <= set(forward_parameters(model, 0)):
        return False
    try:
        check_call(model, args, kwargs)
    except GraphoptError:
        return False
    return True


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def _required(model: nn.Module) -> list[str]:
    signature = _signature(model)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = signature.parameters.values() if signature else ()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def forward_parameters(model: nn.Module, given: int) -> tuple[str, ...]:
    """Return the names of forward's parameters in order; `*rest` is `rest_0`, `rest_1` ... up to `given` inputs."""
    signature = _signature(model)
    names: list[str] = []
    for parameter in signature.parameters.values() if signature else ():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(max(0, given - len(names)))]
        elif parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return tuple(names)


def check_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise GraphoptError where the inputs do not bind to forward's parameters."""
    signature = _signature(model)
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        raise GraphoptError(
            f"the example inputs do not fit {type(model).__name__}.forward({takes}): {error}; {_HOW}"
        ) from None


def check_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any], parameters: tuple[str, ...]) -> None:
    """Refuse inputs without elements, without values, with NaN or infinity, or of a kind that no graph takes."""
    found = 0
    for path, value in pytree.tree_leaves_with_path((args, dict(kwargs))):
        name = input_name(path, parameters)
        if isinstance(value, Tensor):
            found += 1
            _check_tensor(value, name)
        elif not isinstance(value, int | float | bool | str | complex | None):
            raise GraphoptError(
                f"example input {name} is a {type(value).__name__}, which no graph takes; pass tensors, numbers, and "
                "lists, tuples, dicts or dataclasses of these"
            )
    if not found:
        raise GraphoptError(f"the example inputs hold no tensor; {_HOW}")


def _check_tensor(value: Tensor, name: str) -> None:
    if value.is_meta:
        raise GraphoptError(f"example input {name} is on the meta device and has no values; make it on the cpu")
    if value.numel() == 0:
        raise GraphoptError(
            f"example input {name} has no elements (shape {list(value.shape)}); give at least one sample"
        )
    # Minus infinity is what a mask hides places with.
    if value.is_floating_point() and not bool((value < torch.inf).all()):
        raise GraphoptError(f"example input {name} holds NaN or infinity; give finite values")


def input_name(path: tuple[Any, ...], parameters: tuple[str, ...]) -> str:
    """Name a leaf of `(args, kwargs)` as a user would write it: `x`, `features.mask`, `pair.0`."""
    keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path]
    first = keys[1]
    if keys[0] == 0:
        first = parameters[first] if first < len(parameters) else f"input {first}"
    return ".".join(str(key) for key in (first, *keys[2:]))


def own_copy(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy every tensor out of the user's reach, without gradients: forward may write to its inputs."""
    with torch.inference_mode(False):
        copied: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
            lambda value: value.detach().clone() if isinstance(value, Tensor) else value, inputs
        )
    return copied
