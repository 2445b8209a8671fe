"""Prune a digits network with Torch-Pruning; runs in the peer's environment, knows nothing of graphopt.

    prune_torch.py JOB.json

The job names the network, its weights, the digits, an importance, the share of multiply-accumulates that stays and the
epochs of training afterwards. What it writes: the accuracy on the test images, what is left, seconds and peak memory.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

SAMPLES, STEP = 128, 0.01


def network(kind: str, root: Path) -> nn.Module:
    """Return the untrained network of a task, from its own source file."""
    made = root / "tools" / "bench" / "made" / "networks.py"
    places = {
        "digits_cnn": (root / "graphopt" / "demo" / "network.py", "ResidualCNN"),
        "digits_depthwise": (made, "DepthwiseCNN"),
        "digits_vit": (made, "vision_transformer"),
    }
    path, name = places[kind]
    spec = importlib.util.spec_from_file_location("networks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built: nn.Module = getattr(module, name)()
    return built


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percent of right answers, in pieces of eight as every row is judged."""
    count = len(images) // 8 * 8
    with torch.no_grad():
        found = torch.cat([model(images[i : i + 8]).argmax(-1) for i in range(0, count, 8)])
    return 100 * float((found == labels[:count]).float().mean())


def pruned(model: nn.Module, given: dict[str, Any], data: dict[str, Tensor]) -> tuple[nn.Module, float, float]:
    """Return the pruned model with the shares of multiply-accumulates and parameters that are left."""
    import torch_pruning as tp

    example = data["train_images"][:8]
    before = tp.utils.count_ops_and_params(model, example)
    importance = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    last = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 10]
    # Heads of another size do not fit the views of the model's code: they keep theirs.
    last += [module for name, module in model.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    pruner = tp.pruner.BasePruner(
        model, example, importance=importance[given["importance"]](), global_pruning=False, pruning_ratio=0.95,
        iterative_steps=round(0.95 / STEP), ignored_layers=last,
    )  # fmt: skip
    while True:
        if given["importance"] == "taylor":
            model.zero_grad()
            loss = functional.cross_entropy(model(data["train_images"][:SAMPLES]), data["train_labels"][:SAMPLES])
            loss.backward()  # type: ignore[no-untyped-call]
        pruner.step()
        now = tp.utils.count_ops_and_params(model, example)
        if now[0] <= given["share"] * before[0]:
            return model, now[0] / before[0], now[1] / before[1]


def trained(model: nn.Module, epochs: int, data: dict[str, Tensor]) -> nn.Module:
    """Train as the network was trained, for few epochs and at a fifth of its rate."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data["train_images"])).split(50):  # type: ignore[no-untyped-call]
            loss = functional.cross_entropy(model(data["train_images"][rows]), data["train_labels"][rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def peak_bytes() -> int:
    """Return the most memory held since this program started; getrusage counts what forked it, too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    data = load_file(given["data"])
    torch.manual_seed(0)
    model = network(given["kind"], Path(given["root"])).eval()
    model.load_state_dict(load_file(given["weights"]))
    judge = data["test_images"], data["test_labels"]
    before = accuracy(model, *judge)
    started = time.perf_counter()
    model, macs, params = pruned(model, given, data)
    model = trained(model, given["epochs"], data) if given["epochs"] else model
    seconds = time.perf_counter() - started
    found = {
        "accuracy": accuracy(model, *judge), "before": before, "macs": macs, "params": params, "seconds": seconds,
        "peak_bytes": peak_bytes(), "latency": None,
    }  # fmt: skip
    Path(given["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
