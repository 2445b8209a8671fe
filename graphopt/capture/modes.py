"""The state a module is captured in, and putting it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Hooks too: a model that registers them in its first call, and notes that in an attribute, would do so twice.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_REGISTRIES = ("_parameters", "_buffers", "_modules", *_HOOKS)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module inside `torch.compile`'s and DataParallel's wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def inference(model: nn.Module) -> Iterator[bool]:
    """Hold `model` in eval mode without gradients; yield whether any part of it was in train mode.

    On leaving, every submodule's training flag, attributes, hooks and buffers are what they were: forward may count
    calls in a buffer, and tracing leaves abstract tensors in attributes that forward assigns.
    """
    flags = {module: module.training for module in model.modules()}
    was_training = any(flags.values())
    with _unchanged(model), torch.inference_mode(False), torch.no_grad():
        try:
            _replace_inference_tensors(model)
            if was_training:
                _evaluate(model)
            yield was_training
        finally:
            if was_training and model.__class__.train is not nn.Module.train and flags[model]:
                _train(model)  # a class with its own train() may have to undo what its eval() did
            for module, flag in flags.items():
                module.training = flag


def _replace_inference_tensors(model: nn.Module) -> None:
    """Put ordinary copies in the place of weights made in inference mode, which torch.export does not take."""
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for name, weight in list(registry.items()):
                if weight is None or not weight.is_inference():
                    continue
                if weight not in copies:
                    copy = weight.detach().clone()
                    is_parameter = isinstance(weight, nn.Parameter)
                    copies[weight] = nn.Parameter(copy, weight.requires_grad) if is_parameter else copy
                registry[name] = copies[weight]


def _evaluate(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError:  # an exported program's module has its mode built in
        for module in model.modules():
            module.training = False


def _train(model: nn.Module) -> None:
    try:
        model.train()
    except NotImplementedError:  # as above: there is no mode to give back
        return


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    registries = {module: {key: dict(getattr(module, key)) for key in _REGISTRIES} for module in attributes}
    # Those made in inference mode keep no count of writes, nor can they be written where they are replaced by copies.
    held = [buffer for buffer in model.buffers() if not buffer.is_meta and not buffer.is_inference()]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in held]
    try:
        yield
    finally:
        for module, saved in attributes.items():
            module.__dict__.clear()
            module.__dict__.update(saved)
            for key, entries in registries[module].items():
                registry: dict[str, Any] = getattr(module, key)
                registry.clear()
                registry.update(entries)
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    _restore(buffer, value)


def _restore(buffer: Tensor, value: Tensor) -> None:
    if buffer.shape == value.shape:
        buffer.copy_(value)
    else:
        buffer.set_(value.untyped_storage(), 0, value.shape, value.stride())
