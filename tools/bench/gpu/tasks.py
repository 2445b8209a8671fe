"""What is measured: our kernels as they would be launched, tuned first, and the layer that they are for."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import torch
from torch.nn import functional

from gpu.peers import GROUP, Calls
from graphopt.backends.cuda import launch
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, RowPlan
from graphopt.backends.cuda.timing import copies_of
from graphopt.backends.cuda.tuning import tuned


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def linear(bits: Literal[2, 3, 4, 8], n: int, k: int, tokens: int, most: int) -> tuple[LinearPlan, Calls, float]:
    """Return the fastest plan of `most` that are tried, its calls, and the bytes that one moves."""
    best, trial = tuned(LinearPlan(n, k, bits, GROUP), tokens, _device(), most)
    return best, trial.calls(best), trial.bytes


def int8(n: int, k: int, tokens: int, most: int, library: float | None) -> tuple[Int8Plan, Calls, float]:
    """The same of bytes; `library`: seconds of the library's product, remembered beside."""
    best, trial = tuned(Int8Plan(n, k), tokens, _device(), most, library)
    return best, trial.calls(best), trial.bytes


def rows(plan: RowPlan, tokens: int) -> tuple[Calls, float]:
    """Return calls of a row kernel on inputs that take turns, and the bytes that one moves."""
    device = _device()
    kind = torch.float16 if plan.dtype == "float16" else torch.bfloat16
    whole = [name for name in plan.inputs if name.startswith("in")]
    vectors = {name: torch.randn(plan.n, dtype=kind, device=device) for name in plan.inputs if name not in whole}
    signs = torch.randint(0, 256, (plan.n // 8,), dtype=torch.uint8, device=device) if plan.signs else None
    size = tokens * plan.n
    copies = copies_of(size * 2 * len(whole))
    sets = [[torch.randn(tokens, plan.n, dtype=kind, device=device) for _ in whole] for _ in range(copies)]

    def call(given: list[torch.Tensor]) -> object:
        named = {**dict(zip(whole, given, strict=True)), **vectors}
        return launch.rows(plan, [named[name] for name in plan.inputs], signs)

    moved = size * (2 * len(whole) + (2 if plan.keep else 0) + (2 if plan.output == "half" else 1))
    return [partial(call, given) for given in sets], moved


def norm_by_torch(plan: RowPlan, tokens: int) -> Calls:
    """What torch.compile makes of the same norm and quantization."""
    x = torch.randn(tokens, plan.n, dtype=torch.float16, device="cuda")

    def quantized(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = h.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + plan.eps)
        scale = normed.abs().amax(-1, keepdim=True) / 127
        return (normed / scale).round().clamp(-128, 127).to(torch.int8), scale.half()

    fused = torch.compile(quantized, dynamic=False)
    return [partial(fused, x)]


def decode_layer(width: int = 4096, hidden: int = 14336, tokens: int = 1) -> tuple[Calls, Calls]:
    """Return calls of a decoder layer's linears and norms, in bfloat16 by torch and at W4A16 by kernels.

    Attention itself, which is the same for both, is left out: norm, q k v, o, norm, gate and up, down.
    """
    import graphopt
    from graphopt.passes import QuantizeWeights

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.RMSNorm(width), torch.nn.RMSNorm(width)
            sizes = {"q": (width, width), "k": (width, width // 4), "v": (width, width // 4), "o": (width, width)}
            sizes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
            self.of = torch.nn.ModuleDict({name: torch.nn.Linear(*size, bias=False) for name, size in sizes.items()})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.one(x)
            mixed = self.of["q"](h) + torch.cat((self.of["k"](h), self.of["v"](h)), -1).repeat(1, 2)
            x = x + self.of["o"](mixed)
            h = self.two(x)
            y: torch.Tensor = x + self.of["down"](functional.silu(self.of["gate"](h)) * self.of["up"](h))
            return y

    torch.manual_seed(0)
    model = Layer().eval()
    x = torch.randn(tokens, width)
    weights = QuantizeWeights(grid="int4", group_size=GROUP, symmetric=True, objective="plain", rounding="nearest")
    compiled = graphopt.optimize(model, (x,), [weights], calibration=[(x,)]).compile("cuda")
    given = x.cuda().half()
    plain = model.to("cuda", torch.bfloat16)
    plain_x = x.cuda().bfloat16()

    @torch.no_grad()
    def by_torch() -> object:
        return plain(plain_x)

    return [by_torch], [partial(compiled.program.run, [given])]


def schedule(plan: LinearPlan | Int8Plan) -> dict[str, Any]:
    """Return a plan's schedule as data."""
    names = ("rows", "row_warps", "columns", "k_warps", "k_blocks", "depth", "token_blocks")
    every = dataclasses.asdict(plan)
    return {name: every[name] for name in names}
