#!/usr/bin/env python3
"""What removing structure costs and gains: widths, blocks and ranks, beside other methods at the same budget.

    tools/bench/structure.py --list
    tools/bench/structure.py                                   every row; half an hour
    tools/bench/structure.py --task digits_cnn --method prune  some of them
    tools/bench/structure.py --docs docs/structure-table.md    write the table of what was measured last

Runs in the environment of tools/setup, Torch-Pruning in its own, made on demand. Each row is a process of its own.
Images are judged by the accuracy on test images, the language model by the KL to the original and the rise of the
logarithm of its perplexity on held-out text. Multiply-accumulates and parameters are those of the result over the
original's; latency is that of both files in ONNX Runtime, one thread, in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import records
from environments import ROOT, python_of
from rows import measure_row

RESULTS = ROOT / "runs" / "bench" / "structure.jsonl"
DIGITS, LANGUAGE = ("digits_cnn", "digits_depthwise", "digits_vit"), ("language", "language_deep")
TASKS = (*DIGITS, *LANGUAGE)


@dataclass(frozen=True)
class Row:
    """`passes(share)` gives passes as `str(pass)` writes them for a budget that leaves `share`; None: see `measure`.

    Attributes:
        budget: the field that holds the share; empty where the share is a number of layers.
    """

    name: str
    passes: Callable[[float], list[str]] | None
    tasks: tuple[str, ...] = TASKS
    shares: tuple[float, ...] = (0.5,)
    budget: str = "macs_ratio"


def _prune(options: str = "") -> Callable[[float], list[str]]:
    return lambda share: [f"prune({options})"]


def _drop(options: str) -> Callable[[float], list[str]]:
    return lambda count: [f"drop_blocks(count={count:.0f}, {options})"]


_IMAGES: dict[str, Any] = {"tasks": DIGITS, "shares": (0.5, 0.35)}
_SMALLER: dict[str, Any] = {"tasks": ("language",), "shares": (0.75, 0.625), "budget": "params_ratio"}
_LAYERS: dict[str, Any] = {"tasks": ("language_deep",), "shares": (1, 2, 3), "budget": ""}
_WITH_INT8: dict[str, Any] = {"tasks": ("digits_cnn",), "shares": (_OF_EACH := 0.3,), "budget": ""}
_INT8 = ["retype_floats", "quantize_static"]
_EPOCH = "prune, an epoch's images read once"  # what the peers train on in theirs
_BARE, _WHOLE = "resolve=False", "streams=False, turn=False"
ROWS = (
    Row("magnitude", _prune(f"criterion='magnitude', {_WHOLE}, {_BARE}"), **_IMAGES),
    Row("taylor", _prune(f"criterion='taylor', {_WHOLE}, {_BARE}"), **_IMAGES),
    *(
        Row(f"{name}, readers fitted", _prune(f"criterion='{name}', {_WHOLE}"), **_IMAGES)
        for name in ("magnitude", "lamp", "distortion", "activation", "wanda", "fidelity", "taylor")
    ),
    Row("variance", _prune("criterion='variance'"), **_IMAGES),
    Row("prune, streams whole, nothing turned", _prune(_WHOLE), **_IMAGES),
    Row("prune", _prune(), **_IMAGES),
    Row("prune + recover", lambda share: ["prune", "recover"], **_IMAGES),
    Row(_EPOCH, _prune(), **_IMAGES),
    Row("prune 30 %", _prune("ratio=0.3"), **_WITH_INT8),
    Row("int8", lambda share: _INT8, **_WITH_INT8),
    Row("prune 30 %, int8", lambda share: ["prune(ratio=0.3)", *_INT8], **_WITH_INT8),
    Row("prune, streams whole, nothing turned", _prune(_WHOLE), **_SMALLER),
    Row("variance", _prune("criterion='variance'"), **_SMALLER),
    Row("prune", _prune(), **_SMALLER),
    Row("prune + recover", lambda share: ["prune", "recover"], **_SMALLER),
    Row("SliceGPT", None, **_SMALLER),
    Row("2SSP", lambda share: ["two_stage"], **_SMALLER),
    Row("2SSP, fitted", lambda share: ["two_stage(resolve=True)"], **_SMALLER),
    Row("ShortGPT", lambda share: [f"drop_blocks(criterion='cosine', {_BARE})"], **_SMALLER),
    Row("drop_blocks", lambda share: ["drop_blocks"], **_SMALLER),
    Row("factorize", lambda share: ["factorize"], **_SMALLER),
    Row("layers by cosine (ShortGPT)", _drop(f"criterion='cosine', {_BARE}"), **_LAYERS),
    Row("layers by influence", _drop(f"criterion='influence', {_BARE}"), **_LAYERS),
    Row("layers by additive influence", _drop(f"criterion='additive', {_BARE}"), **_LAYERS),
    Row("layers, greedy", _drop(_BARE), **_LAYERS),
    Row("layers, every choice tried", None, **{**_LAYERS, "shares": (1, 2)}),
    Row("layers, greedy, fitted", _drop(""), **_LAYERS),
    Row("layers, greedy, linear maps, fitted", _drop("replace='linear'"), **_LAYERS),
)


@dataclass(frozen=True)
class Peer:
    """A method of children/prune_torch.py: an importance, and epochs of training afterwards."""

    name: str
    importance: str
    epochs: int
    tasks: tuple[str, ...] = DIGITS
    shares: tuple[float, ...] = (0.5, 0.35)


PEERS = (
    Peer("Torch-Pruning magnitude", "magnitude", 0),
    Peer("Torch-Pruning Taylor", "taylor", 0),
    Peer("Torch-Pruning magnitude, 1 epoch", "magnitude", 1),
    Peer("Torch-Pruning Taylor, 1 epoch", "taylor", 1),
)


def measure(task: str, name: str, passes: list[str] | None, share: float, budget: str) -> dict[str, Any]:
    """Return the figures of a row; runs in a process of its own."""
    from tasks import TASKS as KNOWN
    from tasks import deep_language
    from weights import _judged, _logits

    import graphopt

    material = deep_language() if task == "language_deep" else KNOWN[task].make()
    if name == _EPOCH:
        material = replace(material, calibration=_all_images())
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    if name == "SliceGPT":
        model = _sliced(material, share)
        figures["params"] = _count(model) / _count(material.model)
    elif passes is None:
        model = _best_choice(material, round(share))
    else:
        model = _optimized(material, passes, {budget: share} if budget else {})
    figures["seconds"] = time.perf_counter() - started
    figures["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    language = task in LANGUAGE
    reference = list(_logits(material.model, material.heldout))
    figures |= _judged(reference, _logits(model, material.heldout), material.heldout, language)
    if language:
        before = _judged(reference, iter(reference), material.heldout, True)["bits_per_byte"]
        figures["rise"] = (figures["bits_per_byte"] - before) * math.log(2)
    else:
        metric = KNOWN[task].metric
        assert metric is not None
        figures |= {"accuracy": metric()(model.module), "before": metric()(material.model)}
    if isinstance(model, graphopt.Result):
        with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder:
            report = model.export(str(Path(folder) / "model.onnx"))
        figures |= {
            "macs": model.report.macs.ratio, "params": model.report.parameters.ratio, "latency": report.latency_ratio,
            "size": report.size_bytes / (report.baseline_size_bytes or 1),
        }  # fmt: skip
    return figures


def _all_images(size: int = 8) -> Any:
    from graphopt.demo.data import digits

    images = digits().train_images
    return [(images[at : at + size],) for at in range(0, len(images) // size * size, size)]


def _optimized(material: Any, passes: list[str], budget: dict[str, float]) -> Any:
    import graphopt
    from graphopt.pipeline import builtin, parse_pass

    return graphopt.optimize(
        material.model, material.example_inputs, budget=graphopt.Budget(**budget), calibration=material.calibration,
        recipe=[*builtin("exact").passes, *(parse_pass(each) for each in passes)],
    )  # fmt: skip


def _count(model: Any) -> int:
    return sum(each.numel() for each in model.parameters())


def _sliced(material: Any, share: float) -> Any:
    from language.slicing import sliced_to

    return sliced_to(material.model, share, [ids for (ids,) in material.calibration])


def _best_choice(material: Any, count: int) -> Any:
    """Return the model without the layers, of all choices of so many, that diverges least on the calibration data."""
    from graphopt.calibration.judge import Judge
    from graphopt.passes import DropBlocks

    whole = _optimized(material, [], {})
    judge = Judge(whole.program, _batches(material, whole.program), DropBlocks().samples)
    names = [layer.branches[0].body[0].name for layer in _layers(whole.program)]
    made = {}
    for chosen in itertools.combinations(names, count):
        made[chosen] = _optimized(material, [f"drop_blocks(count={count}, {_BARE}, only={list(chosen)!r})"], {})
    return min(made.values(), key=lambda result: judge(result.program))


def _layers(program: Any) -> Any:
    from graphopt.analysis.blocks import find_blocks

    return find_blocks(program).layers


def _batches(material: Any, program: Any) -> Any:
    from graphopt.calibration import Batches

    return Batches(material.calibration, program)


def measure_peer(task: str, importance: str, epochs: int, share: float) -> dict[str, Any]:
    """Return the figures of a peer: it prunes and trains in a process of its own, and is judged there."""
    from safetensors.torch import save_file
    from tasks import TASKS as KNOWN

    from graphopt.demo.data import digits

    material, data = KNOWN[task].make(), digits()
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as name:
        folder = Path(name)
        keys = ("train_images", "train_labels", "test_images", "test_labels")
        images = {key: getattr(data, key).contiguous() for key in keys}
        save_file(images, folder / "data")
        save_file({key: value.contiguous() for key, value in material.model.state_dict().items()}, folder / "weights")
        job = {
            "kind": task, "importance": importance, "epochs": epochs, "share": share, "data": str(folder / "data"),
            "weights": str(folder / "weights"), "result": str(folder / "result.json"), "root": str(ROOT),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        child = Path(__file__).parent / "children" / "prune_torch.py"
        command: list[str | Path] = [python_of("torchpruning"), "-P", child, folder / "job.json"]
        done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def jobs(task: str, names: list[str]) -> Iterator[tuple[str, float, list[Any]]]:
    """Yield name, share and what the child is given, for every row of a task."""
    for row in ROWS:
        for share in row.shares if task in row.tasks and (not names or row.name in names) else ():
            passes = None if row.passes is None else row.passes(share)
            yield row.name, share, ["row", task, row.name, passes, share, row.budget]
    for peer in PEERS:
        for share in peer.shares if task in peer.tasks and (not names or peer.name in names) else ():
            yield peer.name, share, ["peer", task, peer.importance, peer.epochs, share]


def run(tasks: list[str], names: list[str]) -> None:
    """Measure rows one after the other; each is written when it is done."""
    for task in tasks:
        for name, share, job in jobs(task, names):
            measure_row(__file__, RESULTS, job, task=task, method=name, share=share)


def tables() -> str:
    """Return the tables of the newest record of each row."""
    newest: dict[tuple[str, float, str], dict[str, Any]] = {}
    for record in records.read(RESULTS):
        newest[record["task"], record["share"], record["method"]] = record
    if not newest:
        return ""
    last = next(reversed(newest.values()))["machine"]
    text = [
        "# What structure can go, at what price", "",
        "Written by `tools/bench/structure.py --docs`. Nothing is trained where no recovery or epoch is named. Latency",
        f"is the file's over the original's in ONNX Runtime, one thread, on {last['cpu']}.", "",
        "What `prune` took from the demo network: a strip for each space, grey what is gone, beside it the largest",
        "error that a fitted reader leaves, relative to what its target varies (`tools/draw_structure.py`).", "",
        "![Coordinates that each space of the demo network lost](pictures/structure.svg)",
    ]  # fmt: skip
    for task in TASKS:
        shares = sorted({share for known, share, _ in newest if known == task}, reverse=True)
        for share in shares:
            found = {name: each for (known, at, name), each in newest.items() if (known, at) == (task, share)}
            layers = task in LANGUAGE and share >= 1
            counted = "parameters" if task in LANGUAGE else "multiply-accumulates"
            what = f"{share:.0f} of the layers removed" if layers else f"{share:.1%} of the {counted}"
            what = "30 % of every width removed" if share == _OF_EACH else what
            text += ["", f"## {task}, {what}", "", *_table(task, found)]
    return "\n".join(text) + "\n"


def _table(task: str, found: dict[str, dict[str, Any]]) -> list[str]:
    judged = ["KL", "rise of log perplexity"] if task in LANGUAGE else ["accuracy", "before"]
    heads = ["method", *judged, "MACs", "parameters", "size", "latency", "seconds", "peak MB"]
    text = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    order = {name: index for index, name in enumerate([*(r.name for r in ROWS), *(p.name for p in PEERS)])}
    for name, record in sorted(found.items(), key=lambda item: order.get(item[0], len(order))):
        figures = record.get("figures")
        if figures is None:
            text.append(f"| {name} | {record['error'][0]} |" + " |" * (len(heads) - 2))
            continue
        if task in LANGUAGE:
            cells = [f"{figures['kl']:.2e}", f"{figures['rise']:.4f}"]
        else:
            cells = [f"{figures['accuracy']:.2f}", f"{figures['before']:.2f}"]
        shares = [figures.get(key) for key in ("macs", "params", "size", "latency")]
        cells += ["" if share is None else f"{share:.3f}" for share in shares]
        cells += [f"{figures['seconds']:.0f}", f"{figures['peak_bytes'] / 1e6:.0f}"]
        text.append("| " + " | ".join([name, *cells]) + " |")
    dates = sorted({each["date"] for each in found.values()})
    commits = sorted({each["commit"] for each in found.values()})
    return [*text, "", f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, commit {', '.join(commits)}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the rows and leave")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="models")
    parser.add_argument("--method", nargs="+", default=[], help="rows by name; all where not given")
    parser.add_argument("--docs", type=Path, help="write the tables of all that was measured here, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = [*dict.fromkeys(row.name for row in ROWS), *(peer.name for peer in PEERS)]
    if unknown := [name for name in given.method if name not in known]:
        parser.error(f"there is no method {unknown[0]!r}; there are {', '.join(known)}")
    if given.child:
        job = json.loads(given.child)
        print(json.dumps(measure_peer(*job[1:]) if job[0] == "peer" else measure(*job[1:])))
    elif given.list:
        print("\n".join(known))
    elif given.docs:
        if not RESULTS.exists():
            parser.error(f"nothing was measured yet: {RESULTS} is not there; run without --docs first")
        given.docs.write_text(tables())
    else:
        run(given.task, given.method)


if __name__ == "__main__":
    main()
