"""Measure every file of a task in one process: latency interleaved, error against fp32, size, kernels.

Job: task, heldout, files {name: path} with `fp32` first among them, rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import protocol
from kernels import count_kernels
from limits import BASELINE
from tasks import TASKS

WARM_UP_ROUNDS = 5
Feed = dict[str, Any]


def open_session(path: str) -> Any:
    """One thread, and no worker left spinning while another file's turn is timed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def read_feeds(path: str) -> list[Feed]:
    """The held-out batches, by input name."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    count = len(next(iter(arrays.values())))
    return [{name: array[index] for name, array in arrays.items()} for index in range(count)]


def latencies_ms(sessions: dict[str, Any], feeds: list[Feed], rounds: int) -> dict[str, list[float]]:
    """`rounds` timings of each session, one of each per round, each in turn going first."""
    names = list(sessions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARM_UP_ROUNDS, rounds):
        feed = feeds[turn % len(feeds)]
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            sessions[name].run(None, feed)
            elapsed_ms = (time.perf_counter() - start) * 1e3
            if turn >= 0:
                samples[name].append(elapsed_ms)
    return samples


def sqnr_db(reference: list[list[Any]], other: list[list[Any]]) -> float | None:
    """10·log10(Σ reference² / Σ (other − reference)²) over all floating outputs; None where equal."""
    signal = noise = 0.0
    for expected_outputs, outputs in zip(reference, other, strict=True):
        for expected, output in zip(expected_outputs, outputs, strict=True):
            if np.issubdtype(expected.dtype, np.floating):
                exact = expected.astype(np.float64)
                signal += float(np.square(exact).sum())
                noise += float(np.square(output.astype(np.float64) - exact).sum())
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def divergence(reference: list[list[Any]], other: list[list[Any]]) -> float:
    """KL(reference || other) in nats of the first outputs as logits over the last axis, the mean over all others."""
    total, count = 0.0, 0
    for (expected, *_), (output, *_) in zip(reference, other, strict=True):
        exact, made = _log_softmax(expected), _log_softmax(output)
        total += float((np.exp(exact) * (exact - made)).sum())
        count += exact[..., 0].size
    return total / count


def _log_softmax(logits: Any) -> Any:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def cosine(reference: list[list[Any]], other: list[list[Any]]) -> tuple[float, float]:
    """Mean and least cosine between the rows [..., n] of the first outputs."""
    found = []
    for (expected, *_), (output, *_) in zip(reference, other, strict=True):
        exact, made = (each.astype(np.float64).reshape(-1, each.shape[-1]) for each in (expected, output))
        found.append((exact * made).sum(-1) / np.linalg.norm(exact, axis=-1) / np.linalg.norm(made, axis=-1))
    every = np.concatenate(found)
    return float(every.mean()), float(every.min())


def judge(how: str, reference: list[list[Any]], other: list[list[Any]]) -> dict[str, float]:
    """The figures by which a task compares outputs with the float model's."""
    if how == "kl":
        return {"kl": divergence(reference, other)}
    if how == "cosine":
        mean, least = cosine(reference, other)
        return {"cosine": mean, "least_cosine": least, "cosine_distance": max(1 - mean, 0.0)}
    return {}


def file_bytes(path: str) -> int:
    """Bytes of the model, external data included."""
    model = onnx.load(path, load_external_data=False)
    locations = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    folder = Path(path).parent
    return sum(file.stat().st_size for file in (Path(path), *(folder / name for name in sorted(locations))))


def stripped_bytes(path: str) -> int:
    """Bytes of the model without metadata and doc strings, which are not part of the function."""
    model = onnx.load(path, load_external_data=False)
    external = file_bytes(path) - model.ByteSize()
    holders: list[Any] = [model, model.graph, *model.graph.node, *model.graph.initializer, *model.functions]
    holders += [*model.graph.value_info, *model.graph.input, *model.graph.output]
    holders += [node for function in model.functions for node in function.node]
    for holder in holders:
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    return int(model.ByteSize() + external)


def rate(task: str, path: str) -> float | None:
    """The task's own metric of the file as it runs in ONNX Runtime; None where the task has none."""
    make_metric = TASKS[task].metric
    if make_metric is None:
        return None
    from onnx_module import OnnxModule  # needs torch, which a task without a metric does not load

    return make_metric()(OnnxModule(open_session(path)))


def work(job: protocol.Job, clock: protocol.Clock) -> protocol.Result:
    files: dict[str, str] = job["files"]
    feeds = read_feeds(job["heldout"])
    sessions = {name: open_session(path) for name, path in files.items()}
    with clock.running():
        samples = latencies_ms(sessions, feeds, job["rounds"])
    outputs = {name: [session.run(None, feed) for feed in feeds] for name, session in sessions.items()}
    figures: dict[str, dict[str, Any]] = {}
    baseline_ms = statistics.median(samples[BASELINE])
    baseline_bytes = stripped_bytes(files[BASELINE])
    baseline_metric = rate(job["task"], files[BASELINE])
    for name, path in files.items():
        deciles = statistics.quantiles(samples[name], n=10)
        size_bytes = stripped_bytes(path) if name == BASELINE else file_bytes(path)
        metric = baseline_metric if name == BASELINE else rate(job["task"], path)
        figures[name] = {
            "latency_ms": statistics.median(samples[name]),
            "latency_p10_ms": deciles[0],
            "latency_p90_ms": deciles[-1],
            "latency_ratio": statistics.median(samples[name]) / baseline_ms,
            "size_bytes": size_bytes,
            "size_ratio": size_bytes / baseline_bytes,
            "sqnr_db": None if name == BASELINE else sqnr_db(outputs[BASELINE], outputs[name]),
            "metric": metric,
            "metric_drop": None if metric is None or baseline_metric is None else baseline_metric - metric,
            **(judge(TASKS[job["task"]].judged, outputs[BASELINE], outputs[name]) if name != BASELINE else {}),
            **count_kernels(path),
        }
    return {"figures": figures, "versions": protocol.versions("onnxruntime")}


if __name__ == "__main__":
    protocol.main(work)
