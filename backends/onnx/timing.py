"""Time files of the same inputs in turns, on inputs made up from what they declare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from graphopt.backend import Timing
from graphopt.backends.onnx.compare import load_session, session_options
from graphopt.backends.onnx.latency import measure_latency
from graphopt.backends.onnx.profile import profile_by_node
from graphopt.errors import GraphoptError

_SYMBOLIC_SIZE = 1  # of a dimension that the file leaves open


def measure(paths: Mapping[str, Path], threads: int) -> dict[str, Timing]:
    """Time the files in turns on the inputs that the first one declares; see `made_up_feeds`.

    Raises GraphoptError where a file does not load, or takes other inputs than the first.
    """
    first, *others = paths.values()
    declared = declared_inputs(first, threads)
    for other in others:
        if declared_inputs(other, threads) != declared:
            raise GraphoptError(
                f"{other} and {first} take different inputs; compare files of equal names, shapes and types"
            )
    feeds = made_up_feeds(declared)
    times = measure_latency(paths, feeds, threads)
    described = [f"{name}: {array.dtype}{list(array.shape)}" for name, array in feeds.items()]
    return {
        label: Timing(
            times[label].median_ms,
            times[label].minimum_ms,
            times[label].samples,
            [(each.name, each.op_type, each.milliseconds) for each in profile_by_node(path, feeds, threads)],
            described,
        )
        for label, path in paths.items()
    }


def declared_inputs(path: Path, threads: int) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Return name -> (type, shape) of the file's inputs."""
    session: onnxruntime.InferenceSession = load_session(path, session_options(threads))
    return {value.name: (value.type, tuple(value.shape)) for value in session.get_inputs()}


def made_up_feeds(declared: Mapping[str, tuple[str, tuple[Any, ...]]]) -> dict[str, npt.NDArray[Any]]:
    """Return seeded inputs: normal floats, ones for integers and booleans, open dimensions of size one.

    One is an index that nearly every table has, and a mask that lets everything through.
    """
    generator = np.random.default_rng(0)
    feeds: dict[str, npt.NDArray[Any]] = {}
    for name, (kind, shape) in declared.items():
        sizes = tuple(size if isinstance(size, int) else _SYMBOLIC_SIZE for size in shape)
        dtype = _dtype(kind, name)
        drawn = generator.standard_normal(sizes) if np.issubdtype(dtype, np.floating) else np.ones(sizes)
        feeds[name] = np.asarray(drawn).astype(dtype)
    return feeds


def _dtype(kind: str, name: str) -> np.dtype[Any]:
    element = kind.removeprefix("tensor(").removesuffix(")")
    # numpy knows bfloat16 or not, depending on what else is imported; ONNX Runtime takes no such array either way.
    if not re.fullmatch(r"float|float16|double|bool|u?int(8|16|32|64)", element):
        raise GraphoptError(f"the input {name!r} is a {kind}, which cannot be made up; time the file from Python")
    return np.dtype({"float": "float32", "double": "float64"}.get(element, element))
