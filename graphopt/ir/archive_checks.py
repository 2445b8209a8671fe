"""What a `.pt2` archive may hold before torch.export.load sees it.

torch.export.load trusts its input: it unpickles sample inputs, constants and weights, evaluates symbolic
sizes with sympy, executes guards written as Python, imports modules that the structures of inputs and outputs
name, and loads compiled libraries. Each of these runs code for whoever wrote the file. An archive that passes
`check_members` holds tensors, a graph of known operators under plain names, arithmetic in its sizes, and
structures of known types. Every check is a list of what is allowed; the rest is refused.
"""

from __future__ import annotations

import ast
import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from graphopt.errors import GraphoptError

MODEL = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_MEMBERS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(?:model_weights_config\.json|weight_\d+|model\.pt)"
    r"|data/constants/(?:model_constants_config\.json|tensor_\d+|model\.pt)"
    r"|extra/[\w./-]+|archive_format|archive_version|byteorder|version|\.data/\w+"
)
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+")
# torch writes members uncompressed; a recompressed archive may shrink text, but not by more than this.
_MAX_MEMBERS, _MAX_EXPANSION = 200_000, 20

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_SYMBOL = re.compile(r"[a-z]{1,3}\d{1,6}")
_WEIGHT_NAME = re.compile(r"[^\"'\\\x00-\x1f]*")
_OPERATORS = re.compile(
    r"torch\.ops\.(?:aten|prims|graphopt|torchvision|quantized_decomposed)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(?:wrap_with_set_grad_enabled|wrap_with_autocast|cond|while_loop|scan|map_impl)"
    r"|_operator\.(?:add|sub|mul|floordiv|truediv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|lshift|rshift|getitem)"
    r"|math\.(?:trunc|ceil|floor|sqrt|pow)|torch\._?sym_\w+"
)
_FILE_OPERATORS = ("from_file",)  # of ATen's operators the only ones that open a file

_FUNCTIONS = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv",
    "CleanDiv", "CeilDiv", "ModularIndexing", "Where", "CeilToInt", "FloorToInt", "TruncToFloat", "TruncToInt",
    "RoundToInt", "RoundDecimal", "ToFloat", "Identity", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv",
    "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "Abs", "floor", "ceiling", "Eq", "Ne", "Equality", "Unequality",
    "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan", "And", "Or", "Not", "Piecewise", "ExprCondPair",
}  # fmt: skip
_CONSTANTS = {"true", "false", "True", "False", "oo", "int_oo"}
_GROWING = {"Pow", "PowByNatural", "FloatPow", "LShift"}
_ASSUMPTIONS = {"positive", "nonnegative", "negative", "nonzero", "integer", "real", "finite", "precision", "evaluate"}
_EXPRESSION_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
_GUARD_NODES = (*_EXPRESSION_NODES, ast.Subscript, ast.Attribute)
_GUARD_ATTRIBUTES = {"size", "stride", "storage_offset", "shape", "isnan", "inf"}
_GUARD_NAMES = {"L", "math", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "Eq", "Ne", "And", "Or", "Not", "len"}
_GUARD_TEXT = re.compile(r"[\w .:/-]*")
_METADATA = {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"}
_KEY = re.compile(r"[^\"'\\\x00-\x1f]*")
_PLAIN_TYPES = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.deque"}

Read = Callable[[str], bytes]


class Refusal(Exception):
    """Why an archive is refused; completes the sentence `<file> is refused because ...`."""


def member_names(data: bytes) -> list[str]:
    """Return the members of an archive without their root folder, after checks that need no content.

    Raises GraphoptError with a sentence that completes `<file> ...`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _check_sizes(entries, len(data))
            damaged = archive.testzip()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        ValueError,
        RuntimeError,
        OSError,
        OverflowError,
    ) as error:
        raise GraphoptError(f"is not a .pt2 archive, or is damaged ({error})") from error
    if damaged is not None:
        raise GraphoptError(f"is damaged: the checksum of its member {damaged} is wrong")
    names = [entry.filename for entry in entries if not entry.is_dir()]
    if len(set(names)) != len(names):
        raise GraphoptError("holds two members of one name, which no program of torch.export does")
    root = names[0].partition("/")[0] + "/" if names else ""
    for name in names:
        if not name.startswith(root) or ".." in name.split("/") or "\\" in name:
            raise GraphoptError(
                f"holds a member outside its root folder ({name!r}), which no program of torch.export does"
            )
    return [name.removeprefix(root) for name in names]


def _check_sizes(entries: list[zipfile.ZipInfo], size_bytes: int) -> None:
    total = sum(entry.file_size for entry in entries)
    if len(entries) > _MAX_MEMBERS or total > _MAX_EXPANSION * size_bytes + 2**20:
        raise ValueError(f"{len(entries)} members of {total} bytes in a file of {size_bytes} bytes")


def check_members(names: Iterable[str], read: Read) -> None:
    """Raise Refusal unless loading these members can do no more than build a graph over tensors."""
    present = set(names)
    for name in present:
        if not _MEMBERS.fullmatch(name):
            kind = "a compiled library" if "aotinductor" in name else "an object that needs unpickling"
            raise Refusal(f"its member {name} is or may be {kind}")
    for name in present:
        if name.endswith(".pt"):
            _check_pickle(name, read(name))
    for config in _CONFIGS:
        if config in present:
            _check_payloads(config, read, present)
    model = _json(MODEL, read(MODEL))
    for key, value in _entries(model):
        _check_entry(key, value)


def _json(name: str, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"its member {name} is not valid JSON") from error


def _check_pickle(name: str, content: bytes) -> None:
    if not content:
        return
    try:
        if content[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(content)) as nested:
                _check_sizes(nested.infolist(), len(content))
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a broken or hostile stream makes it raise
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found and isinstance(error, pickle.UnpicklingError) else ""
        raise Refusal(f"its member {name} needs more than torch.load(weights_only=True){what}") from error


def _check_payloads(config: str, read: Read, present: set[str]) -> None:
    """Check each tensor's entry: raw bytes, in a member that is there and not smaller than the tensor says."""
    folder = config.rpartition("/")[0]
    entries = _json(config, read(config))
    entries = entries.get("config") if isinstance(entries, dict) else None
    if not isinstance(entries, dict):
        raise Refusal(f"its member {config} has no entries")
    sizes: dict[str, int] = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise Refusal(f"{config} says use_pickle: true for {name!r}")
        member = f"{folder}/{entry.get('path_name')}"
        if not _PAYLOAD.fullmatch(str(entry.get("path_name"))) or member not in present:
            raise Refusal(f"{config} stores {name!r} in {entry.get('path_name')!r}, which is no tensor of this archive")
        if not _WEIGHT_NAME.fullmatch(name):
            raise Refusal(f"a weight is called {name!r}")
        if member not in sizes:
            sizes[member] = len(read(member))
        _check_extent(name, entry.get("tensor_meta"), sizes[member])


def _check_extent(name: str, meta: Any, size_bytes: int) -> None:
    try:
        sizes = [int(size["as_int"]) for size in meta["sizes"]]
        strides = [int(stride["as_int"]) for stride in meta["strides"]]
        last = int(meta["storage_offset"]["as_int"]) + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"the shape of {name!r} is not plain numbers") from error
    elements = math.prod(sizes)
    if min(sizes, default=0) < 0 or min(strides, default=0) < 0:
        raise Refusal(f"the shape of {name!r} is negative")
    # A stride of zero repeats one value; such a buffer may be larger than its bytes, but not without bound.
    if elements and (last >= size_bytes or elements > 2**12 * size_bytes + 2**20):
        raise Refusal(f"{name!r} is said to have {elements} elements in {size_bytes} bytes")


def _entries(root: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested JSON, the free text of nodes' metadata left out."""
    stack = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                yield key, value
                if not (key == "metadata" and _is_text(value)):
                    stack.append(value)
        elif isinstance(item, list):
            stack.extend(item)


def _is_text(value: Any) -> bool:
    """True for a node's metadata as torch writes it; a tensor may be called `metadata` too, and is checked."""
    return isinstance(value, dict) and all(key in _METADATA and isinstance(v, str) for key, v in value.items())


def _check_entry(key: str, value: Any) -> None:
    if key in ("name", "as_name") and not isinstance(value, dict | None):
        if value != "" and not _IDENTIFIER.fullmatch(str(value)):
            raise Refusal(f"a value of its graph is called {value!r}, which is no name")
    elif key.endswith("_name") and isinstance(value, str):
        if not _WEIGHT_NAME.fullmatch(value):
            raise Refusal(f"a weight is called {value!r}, which is no name")
    elif key in ("target", "as_operator") and isinstance(value, str):
        if not _OPERATORS.fullmatch(value) or any(f".{name}." in value for name in _FILE_OPERATORS):
            raise Refusal(
                f"its graph calls {value}, which is not one of the operators that graphopt knows to be harmless"
            )
    elif key == "expr_str":
        check_expression(str(value))
    elif key in ("in_spec", "out_spec") and isinstance(value, str):
        check_structure(value, keywords=key == "in_spec")
    elif key == "guards_code":
        for guard in value or ():
            check_guard(str(guard))
    elif key == "forward_arg_names":
        for name in value or ():
            _check_entry("name", name)
    elif key == "range_constraints" and isinstance(value, dict):
        for name in value:
            if not _SYMBOL.fullmatch(name):
                raise Refusal(f"a dimension is called {name!r}")
    elif key in ("custom_obj_values", "as_custom_obj", "custom_obj") and value:
        raise Refusal("its graph holds an object that is not a tensor")


def _parse(text: str, allowed: tuple[type, ...], what: str) -> list[ast.AST]:
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval"))) if len(text) <= 20_000 else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        nodes = None
    if nodes is None or not all(isinstance(node, allowed) for node in nodes):
        raise Refusal(f"{what} is more than arithmetic ({text[:80]!r})")
    return nodes


def check_expression(text: str) -> None:
    """Refuse a symbolic size that is anything but arithmetic over symbols: sympy evaluates it as Python."""
    what = "a symbolic size"
    growing = 0
    for node in _parse(text, _EXPRESSION_NODES, what):
        good = True
        if isinstance(node, ast.Call):
            good = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
            if good and node.func.id in _GROWING:  # type: ignore[attr-defined]
                growing += 1
                good = len(node.args) == 2 and _small(node.args[1])
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
            growing += 1
            good = _small(node.right)
        elif isinstance(node, ast.Name):
            good = node.id in _FUNCTIONS or node.id in _CONSTANTS or bool(_SYMBOL.fullmatch(node.id))
        elif isinstance(node, ast.keyword):
            good = node.arg in _ASSUMPTIONS and isinstance(node.value, ast.Constant)
        elif isinstance(node, ast.Constant):
            good = _plain_constant(node.value)
        if not good or growing > 16:
            raise Refusal(f"{what} is more than arithmetic ({text[:80]!r})")


def _plain_constant(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_SYMBOL.fullmatch(value) or re.fullmatch(r"-?\d{1,20}(\.\d{1,30})?(e[+-]?\d{1,3})?", value))
    return isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63)


def _small(exponent: ast.expr) -> bool:
    """An exponent up to 8, so that a chain of powers stays a number one can write."""
    if isinstance(exponent, ast.Call) and len(exponent.args) == 1:
        exponent = exponent.args[0]
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    return isinstance(exponent, ast.Constant) and isinstance(exponent.value, int) and abs(exponent.value) <= 8


def check_guard(text: str) -> None:
    """Refuse a guard that is anything but a comparison of sizes and constants: torch executes it."""
    what = "a guard"
    for node in _parse(text, _GUARD_NODES, what):
        good = True
        if isinstance(node, ast.Name):
            good = node.id in _GUARD_NAMES
        elif isinstance(node, ast.Attribute):
            good = node.attr in _GUARD_ATTRIBUTES
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            good = bool(_GUARD_TEXT.fullmatch(node.value))
        elif isinstance(node, ast.BinOp):
            good = not isinstance(node.op, ast.Pow | ast.LShift) or _small(node.right)
        if not good:
            raise Refusal(f"{what} is more than a comparison of sizes ({text[:80]!r})")


def structure_types(text: str) -> list[str]:
    """Return the registered type names of a serialized structure."""
    return [str(value) for key, value in _entries(_structure(text)) if key == "type" and value is not None]


def _structure(text: str) -> Any:
    return _json("structure of the inputs or outputs", text.encode())


def check_structure(text: str, keywords: bool = False) -> None:
    """Refuse a structure whose loading imports a module, or whose keys are no plain text.

    `keywords`: the structure is that of `(args, kwargs)`, whose keyword names end up in generated code.
    """
    structure = _structure(text)
    for key, value in _entries(structure):
        if key == "context" and value is not None:
            for written in _texts(value):
                if written in ("__enum__", "default_factory_module"):
                    raise Refusal("a structure of its inputs or outputs names a module to import")
                if not _KEY.fullmatch(written):
                    raise Refusal(f"a key of its inputs or outputs is {written[:80]!r}, which is no plain text")
    if keywords and isinstance(structure, list) and len(structure) == 2 and isinstance(structure[1], dict):
        for child in structure[1].get("children_spec", [])[1:]:
            for name in _texts(child.get("context")):
                _check_entry("name", name)


def _texts(context: Any) -> Iterator[str]:
    """Every string in a structure's context: JSON within JSON, or plain text."""
    stack = [context]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                inner = json.loads(item)
            except (ValueError, RecursionError):
                inner = item
            if isinstance(inner, str):
                yield inner
            else:
                stack.append(inner)
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item


def foreign_types(content: bytes) -> list[str]:
    """Return the type names in a model's structures that are not Python's own containers."""
    found: dict[str, None] = {}
    for key, value in _entries(_json(MODEL, content)):
        if key in ("in_spec", "out_spec") and isinstance(value, str) and value:
            found.update(dict.fromkeys(structure_types(value)))
    return [name for name in found if name not in _PLAIN_TYPES]
