"""The methods: graphopt and its peers. Each is a child script, its environment and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OWN = "graphopt"  # the environment that tools/setup makes
CNN, TRANSFORMER = "cnn", "transformer"
_ALL = (CNN, TRANSFORMER)


@dataclass(frozen=True)
class Method:
    """`script` lies in children/; `environment` is OWN or a name with a pinned list in peers/NAME.txt.

    A peer starts from the fp32 export, whose time and memory therefore count as its own (`from_export`). `kinds`: of
    the tasks that it is meant for.
    """

    name: str
    summary: str
    script: str
    environment: str = OWN
    from_export: bool = True
    kinds: tuple[str, ...] = _ALL
    options: Mapping[str, object] = field(default_factory=dict)


METHODS = {
    method.name: method
    for method in (
        Method(
            "graphopt",
            "graphopt.optimize(recipe='int8') and export",
            "graphopt_int8.py",
            from_export=False,
            options={"recipe": "int8"},
        ),
        Method(
            "onnxruntime",
            "quant_pre_process, quantize_static: QDQ, per channel, uint8 activations, int8 weights, min-max",
            "onnxruntime_int8.py",
            environment="onnxruntime",
        ),
        Method(
            "onnxruntime-matmul",
            "the same for MatMul and Gemm only",
            "onnxruntime_int8.py",
            environment="onnxruntime",
            kinds=(TRANSFORMER,),
            options={"operators": ["MatMul", "Gemm"]},
        ),
        Method(
            "onnxruntime-dynamic",
            "quant_pre_process, quantize_dynamic: per channel, int8 weights",
            "onnxruntime_int8.py",
            environment="onnxruntime",
            kinds=(TRANSFORMER,),
            options={"dynamic": True},
        ),
        Method("nncf", "nncf.quantize, default preset", "nncf_int8.py", environment="nncf"),
        Method(
            "nncf-mixed",
            "nncf.quantize, preset MIXED (asymmetric activations)",
            "nncf_int8.py",
            environment="nncf",
            kinds=(CNN,),
            options={"preset": "mixed"},
        ),
        Method(
            "nncf-transformer",
            "nncf.quantize, model type TRANSFORMER (with smooth quantization)",
            "nncf_int8.py",
            environment="nncf",
            kinds=(TRANSFORMER,),
            options={"model_type": "transformer"},
        ),
    )
}
