"""Structures of inputs and outputs (pytree specs): plain data that an archive can hold, and the classes behind them.

torch.export stores a structure by registered type names and fails in a process where they are not registered. Here a
structure is JSON, the archive's program itself uses tuples and dicts only, and the classes are looked up when loading.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError

# Importing a module of these runs nothing of the archive's author; any other import is the user's decision.
_LIBRARIES = {"collections", "diffusers", "timm", "torch", "torchvision", "transformers"}
_LEAF = pytree.tree_structure(0)


def is_plain_dataclass(cls: type) -> bool:
    """True for a dataclass that pytrees see as one leaf."""
    return dataclasses.is_dataclass(cls) and not issubclass(cls, Tensor) and cls not in pytree.SUPPORTED_NODES


def register_dataclass(cls: type) -> None:
    """Register a dataclass as a pytree under its import path."""
    torch.export.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")


def encode(spec: pytree.TreeSpec) -> Any:
    """Return a structure as JSON data; GraphoptError for a class whose state is not plain data."""
    if spec.is_leaf():
        return None
    children = [encode(child) for child in spec.children()]
    if spec.type in (tuple, list):
        return {spec.type.__name__: children}
    if spec.type in (dict, OrderedDict, defaultdict):
        keys = spec.context[1] if spec.type is defaultdict else spec.context
        kind = "ordered" if spec.type is OrderedDict else "dict"
        return {kind: _plain(list(keys), spec.type), "children": children}
    if pytree.is_namedtuple_class(spec.context):
        return {"namedtuple": _path(spec.context), "children": children}
    return {"class": _path(spec.type), "context": _plain(spec.context, spec.type), "children": children}


def _plain(context: Any, cls: type) -> Any:
    try:
        if json.loads(json.dumps(context)) == context:
            return context
    except (TypeError, ValueError):
        pass
    raise GraphoptError(
        f"cannot save a model whose inputs or outputs hold a {cls.__name__}, whose structure is not plain data; "
        "use tuples, dicts with string keys, or dataclasses"
    )


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def neutral(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Return the structure with every class replaced by a tuple of its children, and every mapping by a dict."""
    if spec.is_leaf():
        return spec
    children = [neutral(child) for child in spec.children()]
    if spec.type is list:
        return pytree.TreeSpec(list, None, children)
    if spec.type in (dict, OrderedDict, defaultdict):
        keys = spec.context[1] if spec.type is defaultdict else spec.context
        return pytree.TreeSpec(dict, list(keys), children)
    return pytree.TreeSpec(tuple, None, children)


def decode(data: Any, trust: bool) -> pytree.TreeSpec:
    """Inverse of `encode`; GraphoptError where a class is not known here. `trust` allows importing its module."""
    if data is None:
        return _LEAF
    for cls in (tuple, list):
        if cls.__name__ in data:
            return pytree.TreeSpec(cls, None, [decode(child, trust) for child in data[cls.__name__]])
    children = [decode(child, trust) for child in data["children"]]
    for kind, mapping in (("dict", dict), ("ordered", OrderedDict)):
        if kind in data:
            return pytree.TreeSpec(mapping, list(data[kind]), children)
    path = str(data.get("namedtuple") or data["class"])
    found = known_class(path, trust)
    if "namedtuple" in data and found is not None and pytree.is_namedtuple_class(found):
        return pytree.TreeSpec(namedtuple, found, children)
    if "class" in data and found is not None and found in pytree.SUPPORTED_NODES:
        return pytree.TreeSpec(found, data["context"], children)
    raise unknown_class(path)


def unknown_class(path: str) -> GraphoptError:
    """The error for a class that an archive names and this process does not know."""
    module, _, name = path.rpartition(":" if ":" in path else ".")
    return GraphoptError(
        f"the model's inputs or outputs hold a {name}, which is not known here; import {module or 'its module'} first, "
        "or pass trust=True to let graphopt import it"
    )


def known_class(path: str, trust: bool) -> type | None:
    """Find the class called `module:Qualified.Name` (or with a dot); a dataclass is registered as a pytree.

    Modules are imported where they belong to a library of models or `trust` is set; else only looked up.
    """
    if ":" in path:
        module_name, _, name = path.partition(":")
        splits = [(module_name, name)]
    else:
        atoms = path.split(".")
        splits = [(".".join(atoms[:i]), ".".join(atoms[i:])) for i in range(len(atoms) - 1, 0, -1)]
    for module_name, name in splits:
        module = _module(module_name, trust)
        found: Any = module
        for atom in name.split("."):
            found = getattr(found, atom, None) if found is not None else None
        if isinstance(found, type):
            if is_plain_dataclass(found):
                register_dataclass(found)
            return found
    return None


def _module(name: str, trust: bool) -> Any:
    if name in sys.modules or not (trust or name.split(".")[0] in _LIBRARIES):
        return sys.modules.get(name)
    try:
        return importlib.import_module(name)
    except Exception:  # a module that is not there, or fails: the class is not known, which is what is reported
        return None
