"""What each token of the calibration data counts: by the attention it draws, or by the gradients of the loss.

    attention   r_t = 0.01 + 0.99 (s_t - min s) / (max s - min s),  s_t the attention that token t receives, summed over
                heads and queries; a layer's Gram matrix is sum r_t^2 x_t x_t^T   ("RSQ: Learning from Important Tokens
                Leads to Better Quantized LLMs")
    gradient    r_tp = mean over the output channels of part p of (d loss / d z_t)^2   ("GuidedQuant: Large Language
                Model Quantization via Exploiting End Loss Guidance")
    outputs     G = sum_t (d loss / d z_t) (d loss / d z_t)^T, how errors of a layer's outputs add up in the loss

Attention is what the graph says it is: scaled_dot_product_attention, or a softmax whose result a product reads as its
first factor. A layer takes the attention that it feeds, else the last one before it, else the first one after it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.calibration.batches import Batches
from graphopt.calibration.gradients import Loss, Watch, read_all, read_gradients
from graphopt.ir.arguments import arguments, operator
from graphopt.ir.program import Program
from graphopt.progress import Progress

_LEAST = 0.01
_PRODUCTS = frozenset(("matmul", "bmm", "mm"))
_PASSED = frozenset(("_to_copy", "clone", "dropout", "expand", "reshape", "view", "contiguous"))

# Attention ----------------------------------------------------------------------------------------------------


def attention_weights(
    program: Program, sites: Collection[fx.Node], batches: Batches, progress: Progress
) -> dict[fx.Node, list[Tensor | None]]:
    """Return r^2 [tokens] of every batch for each site that has an attention: a token for each key, batch first.

    One reading of the data.
    """
    nearest = nearest_attention(program, sites)
    found: dict[fx.Node, list[Tensor]] = {}

    def show(node: fx.Node, values: Mapping[fx.Node, Any], result: Any) -> Any:
        received = _received(node, values, result)
        low, high = received.aminmax(dim=-1, keepdim=True)
        width = torch.where(high > low, high - low, torch.ones_like(high))
        ratio = torch.where(high > low, (received - low) / width, torch.ones_like(received))
        found.setdefault(node, []).append((_LEAST + (1 - _LEAST) * ratio).square())
        return result

    watch = Watch(program, set(nearest.values()), show)
    with torch.no_grad():
        read_all("attention", watch.run, batches, progress)
    return {site: [each.reshape(-1) for each in found.get(node, [])] for site, node in nearest.items()}


def nearest_attention(program: Program, sites: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return the attention that each site feeds without another site between, else the last before, else the next."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    attentions = {node for node in program.graph.nodes if _is_attention(node)}
    entered = {node: node for node in attentions} | {
        product: node for node in attentions for product in _products_of(node)
    }
    before: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        feeding = [each if each in attentions else before.get(each) for each in node.all_input_nodes]
        last = max((each for each in feeding if each is not None), key=order.__getitem__, default=None)
        if last is not None:
            before[node] = last
    nearest = {}
    for site in sites:
        # Another attention further on, reached past a residual sum, is not this layer's.
        found = _fed(site, entered, sites, order)
        if found is not None and before.get(found) is before.get(site):
            nearest[site] = found
        elif site in before:
            nearest[site] = before[site]
        elif (after := _fed(site, entered, (), order)) is not None:
            nearest[site] = after
    return nearest


def _fed(
    site: fx.Node, entered: Mapping[fx.Node, fx.Node], stops: Collection[fx.Node], order: Mapping[fx.Node, int]
) -> fx.Node | None:
    """Return the first attention that a site feeds on ways that do not pass `stops`."""
    seen, queue, found = {site}, [site], []
    while queue:
        for user in queue.pop().users:
            if user in entered:
                found.append(entered[user])
            elif user not in seen and user not in stops:
                seen.add(user)
                queue.append(user)
    return min(found, key=order.__getitem__, default=None)


def _products_of(value: fx.Node) -> list[fx.Node]:
    """Return the products that read an attention as their first factor, maybe moved on the way."""
    found = []
    for user in value.users:
        if operator(user) in _PRODUCTS and user.args[0] is value:
            found.append(user)
        elif operator(user) in _PASSED:
            found += _products_of(user)
    return found


def _is_attention(node: fx.Node) -> bool:
    if operator(node) == "scaled_dot_product_attention":
        return True
    return operator(node) in ("softmax", "_softmax") and bool(_products_of(node))


def _received(node: fx.Node, values: Mapping[fx.Node, Any], result: Tensor) -> Tensor:
    """Return the attention each key receives, [batch, keys]."""
    probabilities = result if operator(node) != "scaled_dot_product_attention" else _probabilities(node, values)
    if probabilities.dim() < 3:
        return probabilities.sum(0, keepdim=True)
    return probabilities.sum(dim=tuple(range(1, probabilities.dim() - 1)))


def _probabilities(node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
    named = {name: values.get(each, each) for name, each in arguments(node).items() if isinstance(each, fx.Node)}
    named = arguments(node) | named
    query, key = named["query"].float(), named["key"].float()
    if query.dim() == 4 and query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = named.get("scale") or query.shape[-1] ** -0.5
    scores = query @ key.mT * scale
    if named.get("is_causal"):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    mask = named.get("attn_mask")
    if isinstance(mask, Tensor):
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.nan_to_num(torch.softmax(scores, -1))  # a query that may see nothing gives nothing


# Gradients ----------------------------------------------------------------------------------------------------


def gradient_weights(
    program: Program,
    sites: Mapping[fx.Node, int],
    batches: Batches,
    progress: Progress,
    loss: Loss | None = None,
    seed: int = 0,
    outputs: dict[fx.Node, Tensor] | None = None,
) -> dict[fx.Node, list[Tensor | None]]:
    """Return the mean squared gradients [parts, tokens] of every batch for each site; `sites` gives the parts.

    A site has a list of None where the loss does not depend on it. Tokens are the rows of what the site writes,
    [..., R] of a linear, [N, R, *positions] of a convolution. One reading of the data, forward and backward.

    Args:
        loss: of the module and a batch; None: the program's own where an output is a single number, else minus the
            logarithm of the probability of labels drawn from its own predictions (the last axis is the classes), whose
            mean squared gradient is the Fisher information.
        outputs: where given, G [R, R] of every site is put there, float64.
    """
    found: dict[fx.Node, list[Tensor | None]] = {site: [] for site in sites}

    def show(site: fx.Node, gradient: Tensor, value: Tensor | None, batch: int) -> None:
        rows = _rows(gradient, site)
        found[site] += [None] * (batch + 1 - len(found[site]))
        found[site][batch] = _by_part(rows, sites[site])
        if outputs is not None:
            outputs[site] = outputs.get(site, 0) + _second_moment(rows)

    count = read_gradients(program, sites, batches, progress, show, loss, seed)
    for each in found.values():
        each += [None] * (count - len(each))
    return {site: _evened(each, site, outputs) for site, each in found.items()}


def _rows(gradient: Tensor, site: fx.Node) -> Tensor:
    """Return the gradient of each token, float32 or wider [T, R]."""
    rows = gradient if operator(site) == "linear" else gradient.movedim(1, -1)
    return rows.reshape(-1, rows.shape[-1]).to(torch.promote_types(rows.dtype, torch.float32))


def _by_part(rows: Tensor, parts: int) -> Tensor:
    squared = rows.double().square()
    return squared.reshape(len(squared), parts, -1).mean(-1).mT


def _second_moment(rows: Tensor) -> Tensor:
    """Return sum_t g_t g_t^T, float64 [R, R]; multiplied in float32 at a scale at which squares cannot vanish."""
    scale = rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)
    unit = rows / scale
    return (unit.mT @ unit).double() * scale.double() ** 2


def _evened(
    weights: Sequence[Tensor | None], site: fx.Node, outputs: dict[fx.Node, Tensor] | None
) -> list[Tensor | None]:
    """Bring the mean over all batches to 1, and trust the weights as far as many batches share them.

    Where predictions are almost certain, the gradients of a few batches are all there is, and say little of other data.
    With the share a of the batches that they come from, (sum R)^2 / (n sum R^2) for sums R over batches, tokens count
    a r + (1 - a), and G becomes a G + (1 - a) I, its mean diagonal brought to 1.
    """
    known = [each for each in weights if each is not None]
    sums = torch.tensor([float(each.sum()) for each in known], dtype=torch.float64)
    if not float(sums.sum()) > 0:
        return [None for _ in weights]
    share = float(sums.sum() ** 2 / (len(sums) * sums.square().sum()))
    mean = float(sums.sum()) / sum(each.numel() for each in known)
    if outputs is not None:
        total = outputs[site] / outputs[site].diagonal().mean()
        outputs[site] = share * total + (1 - share) * torch.eye(len(total), dtype=total.dtype)
    return [None if each is None else (share * each / mean + 1 - share).float() for each in weights]
