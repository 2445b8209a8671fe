"""`.pt2` archives: a Program on disk, and the reading of any exported program from untrusted files.

The file is what torch.export.save writes, so torch.export.load reads it; its extra member `graphopt.json` holds what
an ExportedProgram has no place for (ties, notes, names, provenance of weights, the classes of inputs and outputs).
"""

from __future__ import annotations

import io
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError, described, first_line
from graphopt.files import replacing
from graphopt.ir.archive_checks import MODEL, SAMPLE_INPUTS, Refusal, check_members, foreign_types, member_names
from graphopt.ir.exported import from_exported, to_exported
from graphopt.ir.program import Program, Signature
from graphopt.ir.structures import decode, encode, known_class, neutral, unknown_class

RECORD = "graphopt.json"
FORMAT = 1
_NAMESPACES = {"aten", "prims", "graphopt", "torchvision", "quantized_decomposed"}
# What reading data of another shape than expected raises.
_MISFIT = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)
_PYTHON = {"_operator", "math", "torch"}


@dataclass(frozen=True)
class Archive:
    """What a `.pt2` file holds: the exported program and, if graphopt wrote it, graphopt's record."""

    path: Path
    exported: ExportedProgram
    record: dict[str, Any] | None
    trust: bool

    @property
    def by_graphopt(self) -> bool:
        return self.record is not None

    def program(self) -> Program:
        """The Program; GraphoptError where the record is damaged or names a class that is not known here."""
        if self.record is None:
            return from_exported(self.exported.run_decompositions({}))
        try:
            return _program(self.exported, self.record, self.trust)
        except GraphoptError:
            raise
        except Exception as error:  # the parts of a damaged file may be in order and not fit each other
            raise GraphoptError(
                f"{self.path} is damaged: its member extra/{RECORD} does not fit its program"
            ) from error


def save_program(program: Program, path: Path) -> None:
    """Write `program` to `path` atomically.

    Raises GraphoptError where the folder cannot be written, the disk is full, or an input or output is of a class that
    cannot be named in a file.
    """
    signature = program.signature
    in_spec = neutral(signature.in_spec)
    leaves = signature.flatten(*program.example_inputs)
    plain = replace(
        program,
        signature=replace(signature, in_spec=in_spec, out_spec=neutral(signature.out_spec)),
        example_inputs=pytree.tree_unflatten(leaves, in_spec),
    )
    record = json.dumps(_record(program))
    with replacing(path) as temporary, open(temporary, "wb") as file:
        sink = _Sink(file)
        try:
            with _quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.export.save(to_exported(plain), cast(io.BytesIO, sink), extra_files={RECORD: record})
            file.flush()
        except Exception as error:
            if sink.failure is not None:  # torch reports a full disk as a failed assertion
                raise sink.failure from error
            if isinstance(error, OSError | GraphoptError):
                raise
            raise GraphoptError(f"cannot save the program to {path}: {first_line(error)}") from error


class _Sink(io.IOBase):
    """A file that remembers why writing failed: torch's writer loses the reason."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


def _record(program: Program) -> dict[str, Any]:
    signature = program.signature
    weights = {
        str(node.target): {"node": node.name, "custom": node.meta["custom"]}
        for node in program.graph.nodes
        if node.op == "get_attr" and node.meta.get("custom")
    }
    return {
        "format": FORMAT,
        "parameters": list(signature.parameters),
        "inputs": list(signature.inputs),
        "in_spec": encode(signature.in_spec),
        "out_spec": encode(signature.out_spec),
        "aliases": program.aliases,
        "notes": program.notes,
        "dimensions": program.dimension_names,
        "weights": weights,
    }


def _program(exported: ExportedProgram, record: dict[str, Any], trust: bool) -> Program:
    if record["format"] != FORMAT:
        raise GraphoptError(
            f"the archive has format {record['format']} and this version of graphopt reads {FORMAT}; "
            "optimize the model again"
        )
    program = from_exported(exported, tuple(map(str, record["parameters"])))
    signature = Signature(
        decode(record["in_spec"], trust),
        decode(record["out_spec"], trust),
        program.signature.parameters,
        tuple(map(str, record["inputs"])),
    )
    plain = program.signature
    if (
        signature.in_spec.num_leaves != plain.in_spec.num_leaves
        or signature.out_spec.num_leaves != plain.out_spec.num_leaves
    ):
        raise ValueError("the structures do not have the program's number of values")
    for node in program.graph.nodes:
        if node.op == "get_attr" and (known := record["weights"].get(str(node.target))):
            node.meta["custom"] = dict(known["custom"])
    leaves = plain.flatten(*program.example_inputs)
    return replace(
        program,
        signature=signature,
        example_inputs=pytree.tree_unflatten(leaves, signature.in_spec),
        aliases={str(name): str(target) for name, target in record["aliases"].items()},
        notes=[str(note) for note in record["notes"]],
        dimension_names={str(symbol): str(name) for symbol, name in record.get("dimensions", {}).items()},
    )


def load_program(path: Path, trust: bool = False) -> Program:
    """Read a Program from a `.pt2` file, written by graphopt or by torch.export.

    Raises GraphoptError where the file is missing, damaged or, unless `trust`, could run code when loaded.
    """
    return read_archive(path, trust).program()


def read_archive(path: Path, trust: bool = False) -> Archive:
    """Read and check a `.pt2` file; see `graphopt.ir.archive_checks` for what is refused unless `trust`.

    The file is read once and loaded from memory, so what was checked is what is loaded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GraphoptError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        names = member_names(data)
    except GraphoptError as error:
        raise GraphoptError(f"{path} {error}") from error.__cause__
    if not trust:
        _check(path, data, names)
    _make_known(path, data, trust)
    exported, extra = _load(path, data)
    if not trust:
        _check_operators(path, exported)
    record = extra.get(RECORD)
    if record is None:
        return Archive(path, exported, None, trust)
    try:
        parsed = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise GraphoptError(f"{path} is damaged: its member extra/{RECORD} is not valid JSON") from error
    return Archive(path, exported, parsed if isinstance(parsed, dict) else {}, trust)


def _check(path: Path, data: bytes, names: list[str]) -> None:
    missing = [name for name in (MODEL, SAMPLE_INPUTS, "archive_format", "archive_version") if name not in names]
    if missing:
        raise GraphoptError(
            f"{path} holds no exported program ({', '.join(missing)} missing); write it with torch.export.save"
        )
    try:
        # The same reader that torch.export.load uses: another one might see other members in a crafted file.
        reader = torch._C.PyTorchFileReader(cast(Any, io.BytesIO(data)))
        if sorted(reader.get_all_records()) != sorted(names):
            raise GraphoptError(f"{path} is damaged: two readers find different members in it")
        contents: dict[str, bytes] = {}

        def read(name: str) -> bytes:
            if name not in contents:
                contents[name] = reader.get_record(name)
            return contents[name]

        check_members(names, read)
    except Refusal as refusal:
        raise GraphoptError(
            f"{path} is refused because {refusal}; pass trust=True only if you know who wrote it, for loading it may "
            "run code"
        ) from refusal.__cause__
    except (RuntimeError, *_MISFIT) as error:
        raise GraphoptError(f"{path} is damaged: {first_line(error)}") from error


def _make_known(path: Path, data: bytes, trust: bool) -> None:
    """Register the classes that the model's inputs and outputs hold, or say which is not known here."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            root = archive.namelist()[0].partition("/")[0]
            types = foreign_types(archive.read(f"{root}/{MODEL}"))
    except (KeyError, Refusal):  # a trusted file of another form: torch says what is wrong with it
        return
    for name in types:
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            known_class(name, trust)
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            raise unknown_class(name)


def _load(path: Path, data: bytes) -> tuple[ExportedProgram, dict[str, Any]]:
    extra: dict[str, Any] = {RECORD: None}  # torch fills this dict, but not if it is empty
    with _quiet() as logged, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.load(io.BytesIO(data), extra_files=extra), extra
        except Exception as error:  # a file that is not what it says may make the loader raise anything
            # After a first failure torch tries the format before .pt2, whose failure says nothing.
            cause = logged[0] if logged and isinstance(logged[0], Exception) else error
            what = described(cause)
            raise GraphoptError(f"cannot load {path}, which is damaged or of another version: {what}") from cause


def _check_operators(path: Path, exported: ExportedProgram) -> None:
    """Check what the names of operators were resolved to, before any of them runs."""
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            target = node.target
            if node.op != "call_function" or isinstance(target, torch._ops.HigherOrderOperator):
                continue
            if isinstance(target, torch._ops.OpOverload):
                harmless = target.namespace in _NAMESPACES
            else:
                harmless = getattr(target, "__module__", None) in _PYTHON
            if not harmless:
                raise GraphoptError(f"{path} is refused because its graph calls {target}; pass trust=True to load it")


class _Trap(logging.Handler):
    """Keeps the exceptions that torch logs and goes on from."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.errors.append(record.exc_info[1])


@contextmanager
def _quiet() -> Iterator[list[BaseException]]:
    """Keep the tracebacks that torch logs from the user, who reads one sentence instead; yield their exceptions."""
    names = ("torch.export", "torch._export.serde.serialize", "torch.export.pt2_archive._package")
    loggers = [logging.getLogger(name) for name in names]
    saved = [(logger.handlers, logger.propagate) for logger in loggers]
    trap = _Trap()
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [trap], False
        yield trap.errors
    finally:
        for logger, (handlers, propagate) in zip(loggers, saved, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
