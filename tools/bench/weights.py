#!/usr/bin/env python3
"""What each published method of weight quantization gains over the plain choice, in one quantizer and beside peers.

    tools/bench/weights.py --list
    tools/bench/weights.py                                    every method, model and width; an hour
    tools/bench/weights.py --task language --bits 4 2         some of them
    tools/bench/weights.py --docs docs/weights.md             and write the tables of what was measured last

Runs in the environment of tools/setup, peers in their own, made on demand; linears are in groups of 64 where the
peer has groups. Each row is a process of its own, whose time and peak memory are
measured. All linears and convolutions are quantized in every row, embeddings in none; bits are those of the
quantized weights with scales, zero points, tables and side information.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import records
from environments import ROOT, python_of
from rows import measure_row

if TYPE_CHECKING:
    from tasks import Material

RESULTS = ROOT / "runs" / "bench" / "weights.jsonl"
LANGUAGE, DIGITS = ("language", "language_outliers"), ("digits_cnn", "digits_vit")
TASKS = (*LANGUAGE, *DIGITS)
WIDTHS = (4, 3, 2)
KINDS = {
    "weights": "weights alone",
    "W4A8": "activations of eight bits (ours by token, AIMET's and ONNX Runtime's by tensor)",
    "W4A4": "activations of four bits by token",
}

NEAREST = "objective='plain', rounding='nearest', range='minmax'"
FISHER = "sweeps=3, objective='fisher'"
PAPER = "range='minmax', sweeps=0, drift=False"  # GPTQ as published: the quantized inputs, no target but W


@dataclass(frozen=True)
class Row:
    """`recipe(bits)` gives passes as `str(pass)` writes them; `plain` names the row to compare with."""

    name: str
    recipe: Callable[[int], list[str]]
    plain: str = ""
    widths: tuple[int, ...] = WIDTHS
    tasks: tuple[str, ...] = TASKS
    kind: str = "weights"

    @property
    def stands_beside_peers(self) -> bool:
        return self.name.startswith(("recipe", "nearest"))


def _integer(options: str) -> Callable[[int], list[str]]:
    return lambda bits: [f"quantize_weights(grid='int{bits}', {options})"]


def _codebook(options: str) -> Callable[[int], list[str]]:
    return lambda bits: [f"quantize_weights(grid='codebook{bits}', group_size=0, {options})"]


def _rotated(options: str) -> Callable[[int], list[str]]:
    return lambda bits: ["rotate", *_integer(options)(bits)]


def _fp4(searched: bool) -> Callable[[int], list[str]]:
    spread = "mse" if searched else "minmax"
    activations = f"quantize_activations(grid='e2m1', granularity='tensor', static=True, observer='{spread}')"
    weights = f"quantize_weights(grid='e2m1', range='{spread}', objective='plain', rounding='nearest')"
    return lambda bits: [*(["smooth"] if searched else []), activations, weights]


def _beside_activations(grid: str, options: str) -> Callable[[int], list[str]]:
    return lambda bits: [f"quantize_activations(grid='{grid}')", *_integer(options)(bits)]


_AT_FOUR: dict[str, Any] = {"widths": (4,), "tasks": ("language_outliers",), "kind": "W4A4"}
_AT_EIGHT: dict[str, Any] = {"widths": (4,), "kind": "W4A8"}
ROWS = (
    Row("nearest", _integer(NEAREST)),
    Row("searched ranges", _integer("objective='plain', rounding='nearest'"), "nearest"),
    Row("AdaRound", _integer("rounding='adaround', range='minmax', sweeps=0, drift=False"), "nearest"),
    Row("GPTQ", _integer(PAPER), "nearest"),
    Row("OWQ", _integer(f"{PAPER}, columns=0.01"), "GPTQ"),
    Row("GuidedQuant", _integer(f"{PAPER}, objective='gradient'"), "GPTQ"),
    Row("YAQA", _integer(f"{PAPER}, objective='fisher'"), "GPTQ"),
    Row("rotation + GPTQ", _rotated(PAPER), "GPTQ"),
    Row("RSQ", _rotated(f"{PAPER}, objective='attention'"), "rotation + GPTQ"),
    Row("codebook, nearest", _codebook("objective='plain', rounding='nearest'")),
    Row("LeanQuant, p = 4", _codebook("sweeps=0, drift=False, spread=4"), "codebook, nearest"),
    Row("LeanQuant, p = 1", _codebook("sweeps=0, drift=False"), "codebook, nearest"),
    Row("GuidedQuant + LNQ", _codebook("sweeps=10, drift=False, objective='gradient'"), "LeanQuant, p = 1"),
    Row("FP4, largest to the end", _fp4(False), widths=(4,)),
    Row("LLM-FP4", _fp4(True), "FP4, largest to the end", (4,)),
    Row("low rank 4 + GPTQ", _integer(f"{PAPER}, rank=4"), "GPTQ"),
    Row("GPTQ + drift", _integer("range='minmax', sweeps=0"), "GPTQ"),
    Row("GPTQ + drift + ranges + sweeps", _integer("sweeps=3"), "GPTQ"),
    Row("all of that + fisher", _integer(FISHER), "GPTQ"),
    Row("all of that + fisher, scales tuned by blocks", _integer(f"{FISHER}, tune='blocks'"), "all of that + fisher"),
    Row("all of that + fisher, scales tuned", _integer(f"{FISHER}, tune='model'"), "all of that + fisher"),
    Row("recipe", lambda bits: [f"w{bits}"], "GPTQ"),
    Row("nearest, W4A8", _beside_activations("int8", NEAREST), **_AT_EIGHT),
    Row("recipe w4a8", lambda bits: ["w4a8"], "nearest, W4A8", **_AT_EIGHT),
    Row("nearest, W4A4", _beside_activations("int4", NEAREST), **_AT_FOUR),
    Row("recipe w4a4", lambda bits: ["w4a4"], "nearest, W4A4", **_AT_FOUR),
)


@dataclass(frozen=True)
class Peer:
    """A method of children/round_weights.py or children/round_onnx.py, and the environment that it runs in."""

    name: str
    environment: str
    method: str
    tasks: tuple[str, ...] = LANGUAGE
    widths: tuple[int, ...] = WIDTHS
    kind: str = "weights"


_COMPRESSOR = functools.partial(Peer, environment="llmcompressor")
_AIMET = functools.partial(Peer, environment="aimet", tasks=DIGITS, widths=(3,))
_AIMET_8 = functools.partial(Peer, environment="aimet", tasks=DIGITS, widths=(4,), kind="W4A8")

PEERS = (
    Peer("HQQ", "hqq", "hqq"),
    _COMPRESSOR("llm-compressor GPTQ", method="gptq"),
    _COMPRESSOR("llm-compressor GPTQ, zero points", method="gptq_asymmetric"),
    _COMPRESSOR("llm-compressor AutoRound", method="autoround"),
    _COMPRESSOR("llm-compressor AutoRound, zero points", method="autoround_asymmetric"),
    _COMPRESSOR("llm-compressor SmoothQuant + GPTQ, W4A4", method="smoothquant_gptq", **_AT_FOUR),
    _COMPRESSOR("llm-compressor SpinQuant R1 R2 + GPTQ, W4A4", method="r1r2_gptq", **_AT_FOUR),
    _COMPRESSOR("llm-compressor SpinQuant R1 R2 R4 + GPTQ, W4A4", method="r1r2r4_gptq", **_AT_FOUR),
    Peer("ONNX Runtime, W4A8", "onnxruntime", "static", DIGITS, (4,), "W4A8"),
    _AIMET_8("AIMET, W4A8", method="nearest_8"),
    _AIMET_8("AIMET sequential MSE, W4A8", method="seq_mse_8"),
    _AIMET_8("AIMET AdaRound, W4A8", method="adaround_8"),
    _AIMET("AIMET", method="nearest"),
    _AIMET("AIMET sequential MSE", method="seq_mse"),
    _AIMET("AIMET AdaRound", method="adaround"),
)
GROUP_SIZE = 64


LISTED: tuple[Row | Peer, ...] = (*ROWS, *PEERS)


def measure_peer(task: str, environment: str, method: str, bits: int) -> dict[str, Any]:
    """Return the figures of a peer: it runs in a process of its own, and its logits are judged here as our own are."""
    from tasks import TASKS as KNOWN

    material = KNOWN[task].make()
    reference = list(_logits(material.model, material.heldout))
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as name:
        folder = Path(name)
        language = task.startswith("language")
        script, job, read = (_decoder_job if language else _onnx_job)(material, folder)
        job |= {"method": method, "bits": bits, "result": str(folder / "result.json")}
        (folder / "job.json").write_text(json.dumps(job))
        # -P: the children's own names would stand before the peer's modules.
        path = Path(__file__).parent / "children" / script
        command: list[str | Path] = [python_of(environment), "-P", path, folder / "job.json"]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
        found, result = read(), json.loads((folder / "result.json").read_text())
    figures = _judged(reference, found, material.heldout, language)
    return figures | {
        "bits": bits + result["bits_beside"], "seconds": result["seconds"], "peak_bytes": result["peak_bytes"],
    }  # fmt: skip


_Job = tuple[str, dict[str, Any], Callable[[], Iterator[Any]]]  # script, job, what reads logarithms of predictions


def _decoder_job(material: Material, folder: Path) -> _Job:
    """Hand over a decoder's weights under transformers' names."""
    from language.model import LanguageModel
    from language.names import transformers_names, transformers_sizes
    from safetensors.torch import load_file, save_file

    model = material.model
    assert isinstance(model, LanguageModel)
    names, output = transformers_names(model.shape), str(folder / "logits.safetensors")
    given = {names[name]: value.detach().clone() for name, value in model.state_dict().items()}
    given |= {"calibration": _tokens(material.calibration), "heldout": _tokens(material.heldout)}
    save_file(given, folder / "weights")
    job = {"weights": str(folder / "weights"), "output": output, "sizes": transformers_sizes(model.shape)}
    return "round_weights.py", job | {"group_size": GROUP_SIZE}, lambda: _normalized(load_file(output)["logits"])


def _onnx_job(material: Material, folder: Path) -> _Job:
    """Hand over an image network as a float ONNX file; its batches have one input."""
    import numpy as np
    import onnx
    import torch

    paths = {name: str(folder / name) for name in ("fp32.onnx", "calibration.npz", "heldout.npz", "logits.npy")}
    inputs: Any = material.example_inputs
    torch.onnx.export(material.model, inputs, paths["fp32.onnx"], dynamo=True, opset_version=20, external_data=False)
    name = onnx.load(paths["fp32.onnx"]).graph.input[0].name
    for part in ("calibration", "heldout"):
        batches: Any = getattr(material, part)
        arrays: dict[str, Any] = {name: np.stack([batch[0].numpy() for batch in batches])}
        np.savez(paths[f"{part}.npz"], **arrays)
    job = {Path(each).stem: path for each, path in paths.items()}
    return "round_onnx.py", job, lambda: _normalized(torch.from_numpy(np.load(paths["logits.npy"])))


def _tokens(batches: list[Any]) -> Any:
    import torch

    return torch.cat([inputs[0] for inputs in batches])


def _logits(model: Any, batches: list[Any]) -> Iterator[Any]:
    """Yield the logarithms of the predictions, float64 [rows, classes]."""
    import torch

    for inputs in batches:
        with torch.no_grad():
            yield from _normalized(model(*inputs)[None])


def _normalized(logits: Any) -> Iterator[Any]:
    """Yield what `_logits` does for the logits [batches, ..., classes]."""
    for each in logits:
        yield each.double().log_softmax(-1).flatten(0, -2)


def _judged(reference: list[Any], made: Iterator[Any], batches: list[Any], language: bool) -> dict[str, Any]:
    divergence = surprise = 0.0
    count = following = 0
    for inputs, expected, found in zip(batches, reference, made, strict=True):
        divergence += float((expected.exp() * (expected - found)).sum())
        count += len(expected)
        if language:
            surprise -= float(found[:-1].gather(1, inputs[0].reshape(-1)[1:, None]).sum())
            following += len(found) - 1
    return {"kl": divergence / count, "bits_per_byte": surprise / following / math.log(2) if following else None}


def measure(task: str, passes: list[str]) -> dict[str, Any]:
    """Return the figures of one row; runs in a process of its own."""
    from tasks import TASKS as KNOWN

    import graphopt
    from graphopt.analysis.cost import weight_bits
    from graphopt.passes import QuantizeWeights
    from graphopt.pipeline import builtin, builtin_names, parse_pass

    material = KNOWN[task].make()
    if len(passes) == 1 and passes[0] in builtin_names():
        # Tables of embeddings stay float in every row.
        found = list(builtin(passes[0]).passes)
        recipe = [replace(each, embeddings="") if isinstance(each, QuantizeWeights) else each for each in found]
    else:
        recipe = [*builtin("exact").passes, *(parse_pass(each) for each in passes)]
    started = time.perf_counter()
    result = graphopt.optimize(
        material.model, material.example_inputs, recipe=recipe, calibration=material.calibration
    )
    seconds = time.perf_counter() - started
    reference = list(_logits(material.model, material.heldout))
    figures = _judged(reference, _logits(result, material.heldout), material.heldout, task.startswith("language"))
    assert result.original is not None
    original, program = result.original.weights, result.program
    kept = [n for n, w in program.weights.items() if w.is_floating_point() and n in original]
    untouched = sum(32 * program.weights[name].numel() for name in kept)
    quantized = sum(w.numel() for n, w in original.items() if n not in kept and w.dim() > 1)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return figures | {
        "bits": (weight_bits(program) - untouched) / quantized, "seconds": seconds, "peak_bytes": peak,
    }  # fmt: skip


def jobs(task: str, names: list[str], widths: list[int]) -> Iterator[tuple[str, int, list[Any]]]:
    """Yield name, width and what the child is given, for every row of a task."""
    for bits in widths:
        for row in ROWS:
            if bits in row.widths and task in row.tasks and (not names or row.name in names):
                yield row.name, bits, [task, row.recipe(bits)]
        for peer in PEERS:
            if bits in peer.widths and task in peer.tasks and (not names or peer.name in names):
                yield peer.name, bits, [task, peer.environment, peer.method, bits]


def run(tasks: list[str], names: list[str], widths: list[int]) -> None:
    """Measure rows one after the other; each is written when it is done."""
    for task in tasks:
        for name, bits, job in jobs(task, names, widths):
            measure_row(__file__, RESULTS, job, task=task, method=name, bits_wanted=bits)


def tables() -> str:
    """Return the tables of the newest record of each row: methods against the plain choice, recipes against peers."""
    newest: dict[tuple[str, int, str], dict[str, Any]] = {}
    for record in records.read(RESULTS):
        newest[record["task"], record["bits_wanted"], record["method"]] = record
    if not newest:
        return ""
    last = next(reversed(newest.values()))
    text = [
        "# What each method gains",
        "",
        "Written by `tools/bench/weights.py --docs docs/weights.md`. KL to the float model on held-out data, in nats;",
        "*gain*: the KL of the plain choice that the method improves on, over its own (below 1: no gain here).",
        "Bits are those of the quantized weights, with everything that is stored beside codes. Seconds and peak memory",
        f"are of the whole run, on {last['machine']['cpu']}, {last['machine'].get('cores', 2)} cores, most rows",
        "measured two at a time with a thread each.",
    ]
    for task in TASKS:
        for bits in WIDTHS:
            found = {each.name: newest[task, bits, each.name] for each in LISTED if (task, bits, each.name) in newest}
            methods = [row for row in ROWS if row.name in found]
            if methods:
                text += ["", f"## {task}, {bits} bits", "", *_table(methods, found)]
            for kind in KINDS:
                against = [each for each in LISTED if each.name in found and each.kind == kind]
                peers = [each for each in against if isinstance(each, Peer)]
                own = [each for each in against if isinstance(each, Row) and each.stands_beside_peers]
                if peers and own:
                    text += ["", f"### Beside other tools: {KINDS[kind]}", "", *_table([*own, *peers], found, peers)]
    return "\n".join([*text, "", f"Peers: {', '.join(_versions())}."]) + "\n"


def _versions() -> list[str]:
    """Return the pinned versions of the peers themselves."""
    packages = {"hqq": "hqq", "llmcompressor": "llmcompressor", "onnxruntime": "onnxruntime", "aimet": "aimet-onnx"}
    pins = [
        line
        for environment, package in packages.items()
        for line in (Path(__file__).parent / "peers" / f"{environment}.txt").read_text().splitlines()
        if line.startswith((f"{package}==", "auto-round=="))
    ]
    return [pin.replace("==", " ") for pin in pins]


def _table(rows: Sequence[Row | Peer], found: dict[str, dict[str, Any]], peers: Sequence[Peer] = ()) -> list[str]:
    """Return a table of rows; with `peers`, KL over the best of theirs in the place of the gain over a plain choice."""
    language = any((each.get("figures") or {}).get("bits_per_byte") for each in found.values())
    compared = ["KL ÷ best peer's"] if peers else ["over", "gain"]
    heads = ["method", "KL", *compared, *(["bits a byte"] if language else []), "bits", "seconds", "peak MB"]
    text = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    theirs = [figures["kl"] for peer in peers if (figures := found[peer.name].get("figures"))]
    for row in rows:
        figures = found[row.name].get("figures")
        if figures is None:
            text.append(f"| {row.name} | {found[row.name]['error'][0]} |" + " |" * (len(heads) - 2))
            continue
        cells = [row.name, f"{figures['kl']:.2e}"]
        if peers:
            cells.append(f"{figures['kl'] / min(theirs):.2f}" if theirs else "")
        else:
            over = row.plain if isinstance(row, Row) else ""
            plain = (found.get(over) or {}).get("figures")
            cells += [over, f"{plain['kl'] / figures['kl']:.2f}" if plain and figures["kl"] > 0 else ""]
        cells += [f"{figures['bits_per_byte']:.4f}"] if language else []
        cells += [f"{figures['bits']:.2f}", f"{figures['seconds']:.0f}", f"{figures['peak_bytes'] / 1e6:.0f}"]
        text.append("| " + " | ".join(cells) + " |")
    dates = sorted({found[row.name]["date"] for row in rows})
    commits = sorted({found[row.name]["commit"] for row in rows})
    return [*text, "", f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, commit {', '.join(commits)}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the rows and leave")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="models")
    parser.add_argument("--method", nargs="+", default=[], help="rows by name; all where not given")
    parser.add_argument("--bits", nargs="+", type=int, choices=WIDTHS, default=list(WIDTHS), help="widths")
    parser.add_argument("--docs", type=Path, help="write the tables of all that was measured here, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = [row.name for row in LISTED]
    if unknown := [name for name in given.method if name not in known]:
        parser.error(f"there is no method {unknown[0]!r}; there are {', '.join(known)}")
    if given.child:
        job = json.loads(given.child)
        print(json.dumps(measure(*job) if len(job) == 2 else measure_peer(*job)))
    elif given.list:
        print("\n".join(f"{row.name:40} {'; '.join(row.recipe(row.widths[0]))}" for row in ROWS))
        print("\n".join(f"{peer.name:40} {peer.environment}" for peer in PEERS))
    elif given.docs:
        if not RESULTS.exists():
            parser.error(f"nothing was measured yet: {RESULTS} is not there; run without --docs first")
        given.docs.write_text(tables())
    else:
        run(given.task, given.method, given.bits)


if __name__ == "__main__":
    main()
