"""Look into ONNX Runtime while it computes a file: what each site gives, on the kernels that the file really runs on.

A site that is fused with the Q behind it shows at that Q: asking for the float value in between would break up what the
runtime fuses, and show another computation than the user's. What its codes say is to be compared with what the codes of
the exact value say, so that rounding an output counts where the output is read, as in torch.

Two edited copies of the file answer for all sites at once:

    propagated    the file, with more outputs
    local         the file, cut behind every site: what follows reads the exact value, which is fed, and the site's own
                  value is an output, through a Q of its own where the site has one

        v = op(...)          v = op(...)   Q'(v) -> output
        q = Q(v)      ->     q = Q(exact)
        ... DQ(q)            ... DQ(q)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from graphopt.backend import Rounds, See
from graphopt.backends.onnx.compare import FLOAT32, float32_borders, load_session, session_options
from graphopt.backends.onnx.naming import input_names
from graphopt.errors import GraphoptError, first_line
from graphopt.ir import Program

Array = npt.NDArray[Any]

# The runtime computes these together with the operator before them.
_CLAMPS = frozenset(("Relu", "Clip"))
_EXACT, _OWN = "::exact", "::own"
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_FLOATS = (torch.float32, torch.float16, torch.float64)


@dataclass(frozen=True)
class _Rounding:
    """A QuantizeLinear with constant parameters."""

    node: NodeProto
    scale: Array
    zero: Array
    axis: int

    def decoded(self, codes: Array) -> Array:
        """Return the values of codes, float64."""
        scale, zero = (self._spread(each, codes.ndim) for each in (self.scale, self.zero))
        return (codes.astype(np.float64) - zero) * scale

    def rounded(self, values: Array) -> Array:
        """Return the values of the codes of `values`, float64."""
        scale, zero = (self._spread(each, values.ndim) for each in (self.scale, self.zero))
        ends = np.iinfo(self.zero.dtype)
        codes = np.clip(np.rint(values.astype(np.float64) / scale) + zero, ends.min, ends.max)
        return np.asarray((codes - zero) * scale)

    def _spread(self, parameter: Array, dimensions: int) -> Array:
        wide = parameter.astype(np.float64)
        if wide.size == 1:
            return wide.reshape(())
        shape = [1] * dimensions
        shape[self.axis] = wide.size
        return wide.reshape(shape)


@dataclass(frozen=True)
class _Point:
    """Where a site shows: the value called `value`, that of the program's node `where`, and the Q that takes it."""

    site: str
    where: str
    value: str
    rounding: _Rounding | None

    @property
    def shown(self) -> str:
        """Name of the output that shows it in the file as it is."""
        return self.rounding.node.output[0] if self.rounding else self.value

    @property
    def own(self) -> str:
        """Name of the output that shows it in the file that is cut."""
        return self.value + _OWN if self.rounding else self.value


class OnnxObserver:
    """Shows the sites of `program` in the file `path` that it was lowered to; see `graphopt.backend.Observer`."""

    def __init__(self, path: Path, program: Program, threads: int = 1) -> None:
        self._path, self._program, self._threads = path, program, threads
        load_session(path, session_options(threads))  # says what is wrong with a file, if anything is
        self._model = onnx.load(path, load_external_data=False)
        float32_borders(self._model)
        self._names = {node.name for node in program.graph.nodes if node.op == "call_function"}
        self._types = {each.name: each.type.tensor_type.elem_type for each in self._model.graph.value_info}
        self._constants = {each.name: each for each in self._model.graph.initializer}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self._model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._outputs = {each.name for each in self._model.graph.output}
        self._sessions: dict[Any, onnxruntime.InferenceSession] = {}
        self._last: tuple[list[Any], dict[str, Array]] | None = None

    def local(self, flat: list[Any], exact: Mapping[str, Any], sites: Collection[str], see: See) -> None:
        points = self._fitting(flat, exact, sites)
        shown = self._propagated(flat, sites)
        fed = {each.value + _EXACT: _array(exact[each.where]).reshape(shown[each.site].shape) for each in points}
        key = ("local", *((name, array.shape) for name, array in fed.items()))
        session = self._session(key, lambda: self._cut(points, fed))
        made = self._run(session, self._feeds(flat) | fed, [each.own for each in points])
        for each, value in zip(points, made, strict=True):
            see(each.site, each.where, *_told(each, value, exact[each.where]))

    def propagated(self, flat: list[Any], exact: Mapping[str, Any], sites: Collection[str], see: See) -> None:
        made = self._propagated(flat, sites)
        for each in self._fitting(flat, exact, sites):
            see(each.site, each.where, *_told(each, made[each.site], exact[each.where]))

    def _points(self, sites: Collection[str]) -> list[_Point]:
        """Return where each site shows; sites that are not in the file, or not under their own name, are left out."""
        found: dict[str, _Point] = {}
        for site, node in self._last_nodes(sites).items():
            if self._types.get(node.output[0]) == TensorProto.BFLOAT16:
                continue  # NumPy knows no such values
            where, value = site, node.output[0]
            behind = self._only_reader(value)
            while behind is not None and behind.op_type in _CLAMPS and behind.name in self._names:
                where, value = behind.name, behind.output[0]
                behind = self._only_reader(value)
            found.setdefault(value, _Point(site, where, value, self._rounding(behind)))
        return list(found.values())

    def _last_nodes(self, sites: Collection[str]) -> dict[str, NodeProto]:
        """Return the node that gives the value of each site.

        It is called as the site. Where it became superfluous (a reshape to more axes that is followed by another), it
        is the only `site/...` whose value others read.
        """
        named = {node.name: node for node in self._model.graph.node if node.name in sites}
        parts: dict[str, list[NodeProto]] = {}
        for node in self._model.graph.node:
            site, _, part = node.name.partition("/")
            if part and site in sites and site not in named:
                readers = [reader for name in node.output for reader in self._readers.get(name, [])]
                if any(reader.name.partition("/")[0] != site for reader in readers):
                    parts.setdefault(site, []).append(node)
        last = named | {site: nodes[0] for site, nodes in parts.items() if len(nodes) == 1}
        return {site: node for site, node in last.items() if len(node.output) == 1}

    def _only_reader(self, value: str) -> NodeProto | None:
        readers = self._readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self._outputs else None

    def _rounding(self, node: NodeProto | None) -> _Rounding | None:
        if node is None or node.op_type != "QuantizeLinear" or len(node.input) != 3:
            return None
        if not all(name in self._constants for name in node.input[1:]):
            return None
        folder = str(self._path.parent)
        scale, zero = (numpy_helper.to_array(self._constants[name], folder) for name in node.input[1:])
        if not np.issubdtype(zero.dtype, np.integer):
            return None  # a float grid: shown before it is rounded
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
        return _Rounding(node, scale, zero, axis)

    def _feeds(self, flat: list[Any]) -> dict[str, Array]:
        tensors = [value for value in flat if isinstance(value, Tensor)]
        return {name: _array(value) for name, value in zip(input_names(self._program), tensors, strict=True)}

    def _propagated(self, flat: list[Any], sites: Collection[str]) -> dict[str, Array]:
        """Run the file and return what each site shows; the last run is remembered."""
        if self._last is None or self._last[0] is not flat:
            points = self._points(sites)
            session = self._session(("whole", *sites), lambda: self._showing(points))
            made = self._run(session, self._feeds(flat), [each.shown for each in points])
            self._last = flat, {each.site: value for each, value in zip(points, made, strict=True)}
        return self._last[1]

    def _fitting(self, flat: list[Any], exact: Mapping[str, Any], sites: Collection[str]) -> list[_Point]:
        """Return the points whose values are those that the reference has there, perhaps with axes flattened."""
        made = self._propagated(flat, sites)
        return [
            each
            for each in self._points(sites)
            if isinstance(value := exact.get(each.where), Tensor)
            and value.dtype in _FLOATS
            and _alike(made[each.site].shape, tuple(value.shape))
        ]

    def _showing(self, points: list[_Point]) -> ModelProto:
        model = ModelProto()
        model.CopyFrom(self._model)
        for each in points:
            if each.shown not in self._outputs:
                model.graph.output.append(onnx.ValueInfoProto(name=each.shown))
        return model

    def _cut(self, points: list[_Point], fed: Mapping[str, Array]) -> ModelProto:
        model = ModelProto()
        model.CopyFrom(self._model)
        cut = {each.value for each in points}
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name in cut:
                    node.input[index] = name + _EXACT
        for each in points:
            name, array = each.value + _EXACT, fed[each.value + _EXACT]
            kind = self._types.get(each.value) or helper.np_dtype_to_tensor_dtype(array.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, list(array.shape)))
            if each.rounding is not None:
                own = NodeProto()
                own.CopyFrom(each.rounding.node)
                own.name += _OWN
                own.input[0], own.output[0] = each.value, each.own
                model.graph.node.append(own)
                model.graph.output.append(onnx.ValueInfoProto(name=each.own))
            elif each.value not in self._outputs:
                model.graph.output.append(onnx.ValueInfoProto(name=each.value))
        return model

    def _session(self, key: Any, make: Callable[[], ModelProto]) -> onnxruntime.InferenceSession:
        if key not in self._sessions:
            options = session_options(self._threads)
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self._path.parent.resolve())
            )
            self._sessions[key] = load_session(self._path, options, make().SerializeToString())
        return self._sessions[key]

    def _run(self, session: onnxruntime.InferenceSession, given: Mapping[str, Array], names: list[str]) -> list[Array]:
        feeds = {}
        for each in session.get_inputs():
            array, dtype = given[each.name.removesuffix(FLOAT32)], _DTYPES.get(each.type)
            feeds[each.name] = array if dtype is None else array.astype(dtype)
        try:
            return list(session.run(names, feeds)) if names else []
        except Exception as error:  # onnxruntime's exception classes are not public
            reason = first_line(error)
            raise GraphoptError(f"ONNX Runtime cannot run '{self._path}': {reason}; check the inputs") from None


def _array(value: Any) -> Array:
    plain = value.detach().cpu()
    return np.asarray((plain.float() if plain.dtype is torch.bfloat16 else plain).numpy())


def _alike(shown: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return shown == wanted or (math.prod(shown) == math.prod(wanted) and shown[-1:] == wanted[-1:] and len(shown) == 2)


def _told(point: _Point, shown: Array, exact: Tensor) -> tuple[Tensor, Rounds | None]:
    """Return the value that was shown and how others are to be rounded beside it."""
    rounding, shape = point.rounding, exact.shape
    if rounding is None:
        return torch.from_numpy(np.array(shown)).reshape(shape), None

    def rounds(other: Tensor) -> Tensor:
        return torch.from_numpy(rounding.rounded(_array(other).reshape(shown.shape))).reshape(shape)

    return torch.from_numpy(rounding.decoded(shown)).reshape(shape), rounds
