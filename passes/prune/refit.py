"""Fit linears and convolutions of a changed program to what another program has at the same places.

    W, b = argmin |X W + b - (T - s)|^2    T: what the other program has, of the site itself, where s = 0, or of the
                                           join where the site is added to s

Sites are fitted in the order of the data, each on what the fitted ones before it give. Of a chain of blocks each so
takes back what the blocks before it, changed or removed, have left wrong in the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.calibration.batches import Batches
from graphopt.calibration.stream import Change, Lane, Reading, Staged, Stream, levels
from graphopt.errors import GraphoptError
from graphopt.ir import Program, arguments, module_path, operator
from graphopt.passes.prune.elimination import Fit, Normal
from graphopt.progress import Progress
from graphopt.quantization.matrices import from_matrix, patches, to_matrix

_FEW = 4  # inputs for a row: as far as damping, which pulls towards the weight as it was, has been tried
_SITES = ("linear", "conv1d", "conv2d", "conv3d")


def fittable(program: Program, node: fx.Node) -> bool:
    """Return whether a call is a linear or a convolution whose weight, and bias, are its own."""
    if operator(node) not in _SITES:
        return False
    own = [value for name in ("weight", "bias") if (value := arguments(node).get(name)) is not None]
    return all(each.op == "get_attr" and len(each.users) == 1 for each in own)


def rows_of(site: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a site multiplies with its matrix, [P, T, K]."""
    return patches(x, tuple(weight.shape), {} if operator(site) == "linear" else arguments(site))


def output_dim(program: Program, site: fx.Node) -> int:
    """Return the dimension of a site's output that its weight gives, from the last."""
    return -1 if operator(site) == "linear" else 1 - program.weight(arguments(site)["weight"]).dim()


def outputs_of(site: fx.Node, value: Tensor, parts: int) -> Tensor:
    """Return a value of the shape of a site's output as rows [P, T, R]."""
    if operator(site) != "linear":
        spatial = arguments(site)["weight"].meta["val"].dim() - 2
        value = value.movedim(value.dim() - spatial - 1, -1)
    return value.reshape(-1, parts, value.shape[-1] // parts).movedim(1, 0)


def new_arguments(program: Program, site: fx.Node, solved: Tensor) -> dict[str, Tensor]:
    """Return a site's arguments for a solution [P, K (+ 1), R], the last input being the constant of its bias."""
    named = arguments(site)
    weight, bias = program.weight(named["weight"]), named.get("bias")
    inputs = weight[0].numel()
    changed = {"weight": from_matrix(solved[:, :inputs], weight)}
    if bias is not None:
        like = program.weight(bias)
        changed["bias"] = solved[:, -1].reshape(like.shape).to(like.dtype)
    return changed


def given_matrix(program: Program, site: fx.Node) -> Tensor:
    """Return a site's weight and bias as one matrix [P, K (+ 1), R], float64."""
    named = arguments(site)
    matrix = to_matrix(program.weight(named["weight"]).detach(), site).double()
    if named.get("bias") is None:
        return matrix
    constant = program.weight(named["bias"]).detach().double().reshape(len(matrix), 1, -1)
    return torch.cat([matrix, constant], 1)


def multiplied(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return what a site gives [P, T, R] for the rows [P, T, K] and its matrix [P, K (+ 1), R], in the rows' dtype."""
    wide, inputs = matrix.to(rows.dtype), rows.shape[-1]
    return rows @ wide[:, :inputs] + wide[:, inputs:].sum(1, keepdim=True)  # there is a constant, or nothing


def too_few(count: int, inputs: int) -> bool:
    """Return whether so many rows of data say so little of so many inputs that damping would be all there is."""
    return _FEW * count < inputs


def check_rows(who: str, site: fx.Node, count: int, inputs: int) -> None:
    """Raise GraphoptError where a site has several inputs for each row of data."""
    if too_few(count, inputs):
        raise GraphoptError(
            f"{who} cannot fit the {inputs} inputs of {site.name} ({module_path(site)}) to {count} rows of calibration "
            "data; give more samples, or resolve=False"
        )


def added_to(site: fx.Node, join: fx.Node) -> fx.Node:
    """Return the other operand of an addition."""
    named = arguments(join)
    other = named["other"] if named["self"] is site else named["self"]
    assert isinstance(other, fx.Node)
    return other


def joined(site: fx.Node) -> fx.Node | None:
    """Return the addition that is a site's one reader, of another call's value of the same shape."""
    users = list(site.users)
    if len(users) != 1 or operator(users[0]) != "add" or arguments(users[0]).get("alpha", 1) != 1:
        return None
    named = arguments(users[0])
    other = named["other"] if named["self"] is site else named["self"]
    same = isinstance(other, fx.Node) and other.op == "call_function" and other is not site
    return users[0] if same and other.meta["val"].shape == site.meta["val"].shape else None


def there(program: Program, sites: set[fx.Node], node: fx.Node, site: fx.Node) -> bool:
    """Return whether a value is there when a stream over `sites` shows what `site` reads: a site itself waits."""
    level = levels(program, sites)
    return level[node] + (node in sites) <= level[site]


def in_order(program: Program, sites: Mapping[fx.Node, fx.Node], alone: bool = False) -> dict[fx.Node, fx.Node]:
    """Return those of the sites, by the additions that read them, whose other operand is there when they are fitted.

    Where both operands of an addition could be fitted that is the later one. A site that comes with itself is no
    operand; with `alone` those that are dropped become such, and are fitted to what they gave.
    """
    aims = dict(sites)

    def drop(site: fx.Node) -> None:
        if alone:
            aims[site] = site
        else:
            del aims[site]

    last = {join: site for site, join in sites.items()}  # of graph order
    for site in [site for site, join in sites.items() if last[join] is not site]:
        drop(site)
    while True:
        joined = [(site, added_to(site, join)) for site, join in aims.items() if join is not site]
        early = [site for site, other in joined if not there(program, set(aims), other, site)]
        if not early:
            return aims
        for site in early:
            drop(site)


class _Reference(Staged):
    """The other program, run as far as the joins of one level need, batch by batch."""

    def __init__(self, program: Program, joins: Sequence[Sequence[str]], batches: Batches, spill: bool) -> None:
        by_name = {node.name: node for node in program.graph.nodes}
        stages: dict[fx.Node, int] = {}
        for level, names in enumerate(joins):
            waiting = [by_name[name] for name in names]
            while waiting:
                node = waiting.pop()
                if node.op == "call_function" and node not in stages:
                    stages[node] = level
                    waiting += node.all_input_nodes
        super().__init__(program, stages, [], batches, exact=False, spill=spill)
        self._joins = joins
        self._level, self._batch = -1, -1
        self._running: Iterator[tuple[int, tuple[Lane, Lane]]] = iter(())
        self._values: dict[str, Any] = {}

    def values(self, level: int, batch: int) -> dict[str, Any]:
        """Return the joins of a level; asked for level by level, in each batch by batch."""
        if (level, batch) != (self._level, self._batch):
            if level != self._level:
                self._running = self.lanes(level)
            index, (lane, other) = next(self._running)
            assert index == batch
            names = self._joins[level]
            self.advance(index, level, lane, other, names)
            self._values = {name: lane[name] for name in names}
            self.keep(index, level, lane, other)
            self._level, self._batch = level, batch
        return self._values


def refit(
    before: Program,
    after: Program,
    sites: Mapping[fx.Node, fx.Node],
    batches: Batches,
    progress: Progress,
    who: str,
    spill: bool = False,
    kept: Mapping[fx.Node, Tensor] | None = None,
    leave: bool = False,
) -> tuple[dict[fx.Node, Tensor], dict[str, float]]:
    """Fit sites of `after` to `before`.

    Args:
        before: has the targets. Left as it is, like `after`.
        sites: calls that `fittable` allows and `in_order` leaves, each with the addition that is its one reader, or
            with itself; `before` has a value of that name.
        who: asks, for messages.
        kept: of sites that have lost outputs, the indices of those that are left.
        leave: sites that have several inputs for each row of data stay as they are and have no error, instead of
            raising.

    Returns new values by the weights that hold them, and by site the squared error that is left, relative to what the
    target varies. Raises GraphoptError where a site has several inputs for each row of data.
    """
    level = levels(after, set(sites))
    beside = {site: added_to(site, join) for site, join in sites.items() if join is not site}
    last = max((level[site] for site in sites), default=-1)
    joins = [sorted({sites[site].name for site in sites if level[site] == each}) for each in range(last + 1)]
    reference = _Reference(before, joins, batches, spill)
    equations: dict[fx.Node, list[Normal]] = {}
    values: dict[fx.Node, Tensor] = {}
    errors: dict[str, float] = {}

    def show(read: Reading) -> None:
        site = read.site
        weight = after.weight(arguments(site)["weight"])
        rows = rows_of(site, read.x, weight)
        wanted = reference.values(level[site], read.batch)[sites[site].name]
        if kept is not None and site in kept:
            wanted = wanted.index_select(output_dim(after, site), kept[site])
        wanted = wanted if read.beside is None else wanted - read.beside
        target = outputs_of(site, wanted, len(rows))
        if site not in equations:
            constant = arguments(site).get("bias") is not None
            equations[site] = [Normal(rows.shape[2], target.shape[2], constant) for _ in rows]
        for normal, own, want in zip(equations[site], rows, target, strict=True):
            normal.update(own, want)

    def settle(ready: list[fx.Node]) -> dict[fx.Node, Change]:
        changed: dict[fx.Node, Change] = {}
        for site in ready:
            normals = equations.pop(site)
            if leave and too_few(normals[0].count, len(normals[0].gram)):
                continue
            check_rows(who, site, normals[0].count, len(normals[0].gram))
            kept = torch.full((normals[0].inputs,), -1)
            fits = [Fit(n, own, kept) for n, own in zip(normals, given_matrix(after, site), strict=True)]
            changed[site] = new = new_arguments(after, site, torch.stack([fit.weight for fit in fits]))
            values.update({arguments(site)[name]: value for name, value in new.items()})
            errors[site.name] = sum(fit.error() for fit in fits) / len(fits)
        return changed

    try:
        Stream(after, list(sites), batches, progress, spill=spill, beside=beside).run(show, settle)
    finally:
        reference.store.clear()
    return values, errors
