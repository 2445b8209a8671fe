"""Target: which operators a runtime executes on integers, in which types, and where Q/DQ must stand. Plain data.

Operators are called by their ATen names without overload. A pass reads the profile to decide where `quantize` and
`dequantize` go; the backend that offers the profile emits what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["anchor", "follower", "transparent", "absorbed"]


@dataclass(frozen=True)
class IntegerOperator:
    """How a target runs one operator on integers.

    Attributes:
        role: `anchor` gains from integers by itself (convolution, linear); `follower` is worth it between integer
            operators (residual add, average pool); `transparent` only moves values, its output has its input's scale
            and zero point; `absorbed` is a clamp that vanishes into zero point and range of the `quantize` after it.
        inputs: names of the arguments that hold activations; empty means the first one.
        requires_output: the integer kernel writes integers: a `quantize` must follow. Otherwise it may write floats.
        dynamic: there is an integer kernel that takes scales computed at run time.
    """

    role: Role
    inputs: tuple[str, ...] = ()
    requires_output: bool = True
    dynamic: bool = False


@dataclass(frozen=True)
class Target:
    """A runtime on a class of machines.

    Attributes:
        name: as the user says it, `onnxruntime-cpu`.
        backend: name of the backend that lowers for it.
        activation_format: grid of activations. weight_format: grid of weights. bias_format: grid of biases, whose scale
            is the product of the scales of activation and weight.
        operators: what runs on integers, by ATen name. Whatever is not listed stays float.
        reasons: for operators not listed, why; shown when one interrupts an integer region.
        saturates_pairs: kernels add two products of eight bits in sixteen, which overflow (`quantization.saturation`).
        merges_readers: linears that read the same value are computed as one, in one format.
        code_bits: sizes, ascending, in which its files hold the codes of weights that are not computed on.
        width_multiple: what its float kernels like the sizes of channels to be multiples of.
        measurable: what its backend times on the machine that graphopt runs on holds for the target.
    """

    name: str
    backend: str
    activation_format: str = "uint8"
    weight_format: str = "int8"
    bias_format: str = "int32"
    operators: Mapping[str, IntegerOperator] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    saturates_pairs: bool = False
    merges_readers: bool = False
    code_bits: tuple[int, ...] = (8,)
    width_multiple: int = 1
    measurable: bool = False
