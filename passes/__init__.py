"""The built-in passes, loaded when first asked for.

`graphopt.passes.FoldBatchNorm` imports `graphopt.passes.fold.batch_norm`; `__all__` lists what there is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.passes.allocate.allocate import Allocate
    from graphopt.passes.allocate.auto import Auto
    from graphopt.passes.canonicalize.canonicalize import Canonicalize
    from graphopt.passes.factorize.factorize import Factorize
    from graphopt.passes.fold.batch_norm import FoldBatchNorm
    from graphopt.passes.fold.center_norms import CenterNorms
    from graphopt.passes.fold.layer_scale import FoldLayerScale
    from graphopt.passes.fold.norm_affine import FoldNormAffine
    from graphopt.passes.fold.weight_norm import FoldWeightNorm
    from graphopt.passes.prune.drop_blocks import DropBlocks
    from graphopt.passes.prune.prune import Prune
    from graphopt.passes.prune.two_stage import TwoStage
    from graphopt.passes.quantize.activations import QuantizeActivations
    from graphopt.passes.quantize.choose_schemes import ChooseSchemes
    from graphopt.passes.quantize.dynamic import QuantizeDynamic
    from graphopt.passes.quantize.embedding import QuantizeEmbedding
    from graphopt.passes.quantize.static import QuantizeStatic
    from graphopt.passes.quantize.weights import QuantizeWeights
    from graphopt.passes.recover.recover import Recover
    from graphopt.passes.retype.floats import RetypeFloats
    from graphopt.passes.transform.absorb_bias import AbsorbBias
    from graphopt.passes.transform.best_of import BestOf
    from graphopt.passes.transform.equalize import Equalize
    from graphopt.passes.transform.merge_linears import MergeLinears
    from graphopt.passes.transform.permute import Permute
    from graphopt.passes.transform.rotate import Rotate
    from graphopt.passes.transform.smooth import Smooth
    from graphopt.passes.transform.split_linears import SplitLinears

_MODULES = {
    "AbsorbBias": "transform.absorb_bias",
    "Allocate": "allocate.allocate",
    "Auto": "allocate.auto",
    "BestOf": "transform.best_of",
    "Canonicalize": "canonicalize.canonicalize",
    "CenterNorms": "fold.center_norms",
    "ChooseSchemes": "quantize.choose_schemes",
    "DropBlocks": "prune.drop_blocks",
    "Equalize": "transform.equalize",
    "Factorize": "factorize.factorize",
    "FoldBatchNorm": "fold.batch_norm",
    "FoldLayerScale": "fold.layer_scale",
    "FoldNormAffine": "fold.norm_affine",
    "FoldWeightNorm": "fold.weight_norm",
    "MergeLinears": "transform.merge_linears",
    "Permute": "transform.permute",
    "Prune": "prune.prune",
    "QuantizeActivations": "quantize.activations",
    "QuantizeDynamic": "quantize.dynamic",
    "QuantizeEmbedding": "quantize.embedding",
    "QuantizeStatic": "quantize.static",
    "QuantizeWeights": "quantize.weights",
    "Recover": "recover.recover",
    "RetypeFloats": "retype.floats",
    "Rotate": "transform.rotate",
    "Smooth": "transform.smooth",
    "SplitLinears": "transform.split_linears",
    "TwoStage": "prune.two_stage",
}

__all__ = [
    "AbsorbBias", "Allocate", "Auto", "BestOf", "Canonicalize", "CenterNorms", "ChooseSchemes", "DropBlocks",
    "Equalize", "Factorize", "FoldBatchNorm", "FoldLayerScale", "FoldNormAffine", "FoldWeightNorm", "MergeLinears",
    "Permute", "Prune", "QuantizeActivations", "QuantizeDynamic", "QuantizeEmbedding", "QuantizeStatic",
    "QuantizeWeights", "Recover", "RetypeFloats", "Rotate", "Smooth", "SplitLinears", "TwoStage",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"graphopt.passes.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
