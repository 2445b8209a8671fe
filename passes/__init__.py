"""The built-in passes, loaded when first asked for.

`graphopt.passes.FoldBatchNorm` imports `graphopt.passes.fold.batch_norm`; `__all__` lists what there is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.passes.canonicalize.canonicalize import Canonicalize
    from graphopt.passes.fold.batch_norm import FoldBatchNorm
    from graphopt.passes.fold.weight_norm import FoldWeightNorm
    from graphopt.passes.quantize.dynamic import QuantizeDynamic
    from graphopt.passes.quantize.embedding import QuantizeEmbedding
    from graphopt.passes.quantize.static import QuantizeStatic
    from graphopt.passes.retype.floats import RetypeFloats

_MODULES = {
    "Canonicalize": "canonicalize.canonicalize",
    "FoldBatchNorm": "fold.batch_norm",
    "FoldWeightNorm": "fold.weight_norm",
    "QuantizeDynamic": "quantize.dynamic",
    "QuantizeEmbedding": "quantize.embedding",
    "QuantizeStatic": "quantize.static",
    "RetypeFloats": "retype.floats",
}

__all__ = [
    "Canonicalize", "FoldBatchNorm", "FoldWeightNorm", "QuantizeDynamic", "QuantizeEmbedding", "QuantizeStatic",
    "RetypeFloats",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"graphopt.passes.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
