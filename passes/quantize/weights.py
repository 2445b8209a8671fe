"""Store the weights of linears, convolutions and embedding tables on a grid.

    y = linear(x, w, b)   ->   y' = linear(x, dequantize(codes, scale, zero_point?, table?), b)
                                    [+ linear(index_select(x, -1, kept), columns)]  [+ linear(linear(x, B), A)]

The inputs stay in floating point. How a weight is rounded is a choice from each of five columns, which combine freely
(`graphopt.quantization.solve`): grid, range, objective, rounding, side information.

    objective   plain: each weight by itself. gram: what the layer's inputs over the calibration data make of an error.
                attention: the same, tokens weighted by the attention they draw. gradient: by the gradients of the
                loss, for `parts` groups of output channels each (`graphopt.calibration.tokens`). fisher: by the
                gradients too, and output channels weighed against each other by how their errors add up in the loss
    sequential  a layer's inputs are those that the quantized layers before it give, stage by stage
    drift       and its target is what the original layer gives for the original inputs

A weight that several operators read is rounded once, for the inputs of all of them.

Lossy. Runs after what changes weights exactly, and after what quantizes activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.calibration import observe
from graphopt.calibration.stream import Stream
from graphopt.calibration.tokens import attention_weights, gradient_weights
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Rewriter, arguments, dialect, is_floating, operator
from graphopt.ir.arguments import positional
from graphopt.pipeline import Context, LossyPass
from graphopt.quantization.coding import Form, WeightRange
from graphopt.quantization.grids import grid
from graphopt.quantization.objectives import Gram, patches
from graphopt.quantization.rounding.gptq import Order
from graphopt.quantization.solve import Choices, Quantized, Rounding, quantize_matrix, relative_error

aten = torch.ops.aten
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class QuantizeWeights(LossyPass):
    """Quantize weights alone, to any grid.

    Attributes:
        grid: what values a weight may take: int2 to int8, ternary, e2m1, mxfp4, nvfp4, nf4, codebook3 and so on.
        group_size: neighbouring inputs that share a scale; 0: all of a channel, -1: one scale for the whole weight. A
            block format has its own.
        conv_group_size: the same for convolutions.
        symmetric: whether zero is the middle code; else there are zero points, where the grid takes them.
        range: minmax, percentile, mse or entropy; percentile: the share of weights inside.
        objective: plain, gram, attention, gradient or fisher, see above.
        rounding: nearest; gptq or adaround, which weigh inputs against each other and so need another objective than
            plain.
        order: of the inputs in gptq: activation, group or given.
        sweeps: rounds of coordinate descent over codes, scales and tables, after that.
        columns: share of inputs that keep their weights.
        outliers: share of single weights that keep theirs.
        rank: of a low-rank correction.
        damping: added to the diagonal of a Gram matrix, relative to its mean.
        sequential, drift: see above.
        parts: groups of output channels with a Gram matrix each, for objective=gradient; all together where the
            channels cannot be divided so.
        embeddings: the grid of embedding tables, a scale a row, and of linears that are tied to one; empty: tables
            stay, and so do these linears.
        spill: keep activations in files between stages.
    """

    quantizes: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "retype_floats")

    grid: str = "int4"
    group_size: Annotated[int, Field(ge=-1)] = 64
    conv_group_size: Annotated[int, Field(ge=-1)] = 0
    symmetric: bool = False
    range: WeightRange = "mse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.9
    objective: Literal["plain", "gram", "attention", "gradient", "fisher"] = "gram"
    rounding: Rounding = "gptq"
    order: Order = "activation"
    sweeps: Annotated[int, Field(ge=0)] = 3
    columns: Annotated[float, Field(ge=0, lt=1)] = 0.0
    outliers: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rank: Annotated[int, Field(ge=0)] = 0
    damping: Annotated[float, Field(ge=0)] = 0.01
    sequential: bool = True
    drift: bool = True
    parts: Annotated[int, Field(ge=1)] = 4
    embeddings: str = ""
    spill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("grid", "embeddings"):
            if given := getattr(self, name):
                try:
                    form = grid(given)
                except GraphoptError as error:
                    raise GraphoptError(f"{self.name}.{name}: {error}") from None
                if name == "embeddings" and form.tabled:
                    raise GraphoptError(f"{self.name}.embeddings cannot be {given}: its tables are for linears")
        self.choices(False), self.choices(True)  # refuses what does not go together
        if self.objective == "plain" and self.rounding != "nearest":
            raise GraphoptError(
                f"{self.name}: rounding={self.rounding!r} weighs inputs against each other; give objective='gram', "
                "or rounding='nearest'"
            )

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        weights: dict[fx.Node, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if operator(node) == "linear" or operator(node) in _CONVOLUTIONS:
                if reason := self.refusal(program, node) or _unfit(program, node):
                    rewriter.decline(node, reason)
                else:
                    weights.setdefault(arguments(node)["weight"], []).append(node)
        alike = {weight: sites for weight, sites in weights.items() if self._fits(weight, sites, rewriter)}
        made, without = self._solved(program, alike, context)
        costs, bits = {}, {}
        for weight, (quantized, cost) in made.items():
            self._write(weight, alike[weight], quantized, rewriter)
            costs[str(weight.target)] = cost
            bits[str(weight.target)] = quantized.bits() / quantized.codes.numel()
        if self.embeddings:
            self._tables(program, rewriter)
        rewriter.note(relative_errors=costs, bits=bits)
        if without:
            rewriter.note(without_token_weights=without)
        if not made:
            rewriter.decline("program", "it has no weight to quantize")
        return rewriter.finish()

    def _fits(self, weight: fx.Node, sites: list[fx.Node], rewriter: Rewriter) -> bool:
        """Return whether a weight can be replaced for all who read it; declines its readers otherwise."""
        kinds = {(operator(site) == "linear", int(arguments(site).get("groups", 1))) for site in sites}
        others = [user for user in weight.users if user not in sites]
        tables = [user for user in others if operator(user) == "embedding"]
        reason = ""
        if len(kinds) > 1:
            reason = f"{weight.target} is read as matrices of different shapes"
        elif len(tables) < len(others):
            other = next(user for user in others if user not in tables)
            reason = f"{weight.target} is also read by {other.name}, and would be stored twice"
        elif tables and not self.embeddings:
            both = "give embeddings='int8' to quantize both"
            reason = f"{weight.target} is also the table of {tables[0].name}; {both}"
        elif tables and (self.columns or self.outliers or self.rank):
            reason = f"{weight.target} is also the table of {tables[0].name}, which takes codes and scales alone"
        elif kinds != {(True, 1)} and (self.columns or (self.rank and kinds != {(False, 1)})):
            what = "columns are kept for linears" if self.columns else "low rank is for convolutions without groups"
            reason = f"{what}; skip it, or leave that option out"
        for site in sites if reason else []:
            rewriter.decline(site, reason)
        return not reason

    # Solving ------------------------------------------------------------------------------------------------------

    def choices(self, convolution: bool, table: bool = False) -> Choices:
        """Return what is to be done with the weight of a convolution or a linear, or of one that is a table as well."""
        form = grid(self.embeddings if table and self.embeddings else self.grid)
        group = form.block or (self.conv_group_size if convolution else self.group_size)
        return Choices(
            Form(form, group, self.symmetric, self.range, self.percentile),
            self.rounding,
            self.order,
            sweeps=self.sweeps if self.objective != "plain" else 0,
            columns=self.columns,
            outliers=self.outliers,
            rank=self.rank,
            damping=self.damping,
        )

    def _solved(
        self, program: Program, weights: Mapping[fx.Node, list[fx.Node]], context: Context
    ) -> tuple[dict[fx.Node, tuple[Quantized, float]], list[str]]:
        """Return every weight quantized, with its relative error, and the sites whose tokens all count alike.

        These are sites without an attention, or without gradients, where an objective asks for one.
        """
        made: dict[fx.Node, tuple[Quantized, float]] = {}
        weight_of = {site: weight for weight, sites in weights.items() for site in sites}
        grams: dict[fx.Node, Gram] = {}
        outputs: dict[fx.Node, Tensor] = {}

        parts = {weight: self._parts_of(sites) for weight, sites in weights.items()}

        def solve(weight: fx.Node, gram: Gram | None) -> Tensor:
            site = weights[weight][0]
            matrix = to_matrix(program.weight(weight).detach(), site, parts[weight])
            table = any(operator(user) == "embedding" for user in weight.users)
            choices = self.choices(operator(site) != "linear", table)
            quantized = quantize_matrix(matrix, choices, gram, _sum_over(weights[weight], outputs))
            made[weight] = quantized, relative_error(matrix, quantized, gram)
            return from_matrix(quantized.value(), program.weight(weight))

        if self.objective == "plain":
            for weight in weights:
                solve(weight, None)
            return made, []
        batches = context.needed_calibration(self.name)
        sites_of = {site: parts[weight] for site, weight in weight_of.items()}
        counts = self._token_weights(program, sites_of, outputs, context)
        # A weight that is read in several places is rounded before the first of them runs: inputs from the original.
        shared = [weight for weight, sites in weights.items() if len(sites) > 1]
        observers: dict[fx.Node, _Inputs] = {}
        weighted: set[fx.Node] = set()
        if shared:
            for weight in shared:
                grams[weight] = _gram(program, weights[weight][0], parts[weight])
                for site in weights[weight]:
                    shown = observers.setdefault(arguments(site)["input"], _Inputs([]))
                    shown.all.append((site, grams[weight], counts.get(site, [])))
            observe(program, observers, batches, context.progress)

        def show(site: fx.Node, x: Tensor, original: Tensor | None, batch: int) -> None:
            weight = weight_of[site]
            if weight not in shared:
                gram = grams.get(weight) or grams.setdefault(weight, _gram(program, site, parts[weight]))
                if update(gram, site, x, original if self.drift else None, _nth(counts.get(site, []), batch)):
                    weighted.add(site)

        def settle(sites: list[fx.Node]) -> dict[fx.Node, Tensor]:
            values: dict[fx.Node, Tensor] = {}
            with context.progress.stage("quantize", len(sites)) as stage:
                for site in sites:
                    weight = weight_of[site]
                    if weight not in made:
                        value = solve(weight, grams.pop(weight, None))
                        values |= dict.fromkeys(weights[weight], value)
                    stage.advance()
            return values if self.sequential else {}

        exact = self.sequential and self.drift
        Stream(program, list(weight_of), batches, context.progress, exact, self.spill).run(show, settle)
        weighted |= {site for shown in observers.values() for site in shown.weighted}
        without = [site.name for site in weight_of if site not in weighted and self.objective != "gram"]
        return made, without

    def _parts_of(self, sites: list[fx.Node]) -> int:
        """Return in how many parts the output channels of a weight are solved."""
        channels = int(arguments(sites[0])["weight"].meta["val"].shape[0])
        whole = int(arguments(sites[0]).get("groups", 1)) == 1 and channels % self.parts == 0
        # A correction of low rank is one for all channels.
        return self.parts if self.objective == "gradient" and whole and not self.rank else 1

    def _token_weights(
        self, program: Program, sites: Mapping[fx.Node, int], outputs: dict[fx.Node, Tensor], context: Context
    ) -> dict[fx.Node, list[Tensor | None]]:
        """Return what each token counts, a tensor a batch for each site; sites without weights are left out.

        For the fisher objective `outputs` is filled as well.
        """
        batches = context.needed_calibration(self.name)
        if self.objective == "attention":
            return attention_weights(program, sites, batches, context.progress)
        if self.objective in ("gradient", "fisher"):
            wanted = outputs if self.objective == "fisher" else None
            return gradient_weights(program, sites, batches, context.progress, context.loss, context.seed, wanted)
        return {}

    # Writing ------------------------------------------------------------------------------------------------------

    def _write(self, weight: fx.Node, sites: list[fx.Node], made: Quantized, rewriter: Rewriter) -> None:
        """Put the codes in the place of a weight, and its side information behind its readers."""
        shape = list(rewriter.program.weight(weight).shape)
        parts, axis, group = self._parts(weight, made, rewriter)
        name = made.coding.grid.name
        for site in sites:
            value = rewriter.insert(dialect.dequantize, *parts, axis, group, name, before=site)
            if group and len(shape) > 2:
                value = rewriter.insert(aten.view.default, value, shape, before=site, origin=[site])
            if made.outliers is not None:
                value = _with_outliers(value, weight, made, shape, site, rewriter)
            rewriter.rewire(site, weight=value)
            where = f" in groups of {group}" if group > 0 else ""
            rewriter.touch(site, f"{operator(site)} on {name}{where}{_besides(made)}")
            self._correct(site, weight, made, rewriter)
        for node in [user for user in weight.users if operator(user) == "embedding"]:
            _look_up(node, parts, group, name, rewriter)

    def _parts(self, weight: fx.Node, made: Quantized, rewriter: Rewriter) -> tuple[list[fx.Node | None], int, int]:
        """Return codes, scale, zero point and table as weights of the program, and their axis and group size."""
        name, original = str(weight.target), rewriter.program.weight(weight)
        storage = made.coding.grid.storage
        codes, scale, zero, axis, group = stored(made, list(original.shape))
        table = made.coding.table
        parts: list[fx.Node | None] = [
            rewriter.weight(codes, name, storage, weight),
            rewriter.weight(scale, f"{name}_scale", original.dtype),
            None if zero is None else rewriter.weight(zero, f"{name}_zero_point", storage),
            None if table is None else rewriter.weight(table.flatten(0, 1), f"{name}_table", original.dtype),
        ]
        return parts, axis, group

    def _correct(self, site: fx.Node, weight: fx.Node, made: Quantized, rewriter: Rewriter) -> None:
        """Add what the inputs that are kept, and the correction of low rank, give to an operator's output."""
        if not len(made.columns) and made.left is None:
            return
        named, name = arguments(site), str(weight.target)
        source, total, behind = named["input"], site, site.next

        def half(value: Tensor, what: str) -> fx.Node:
            """A weight in float16, widened where it is read."""
            key = f"{what} of {self.name}"
            stored = rewriter.once(weight, key, lambda: rewriter.weight(value, f"{name}_{what}", torch.float16))
            dtype = site.meta["val"].dtype
            return rewriter.insert(aten._to_copy.default, stored, before=behind, origin=[site], dtype=dtype)

        def call(target: Any, *args: Any) -> fx.Node:
            return rewriter.insert(target, *args, before=behind, origin=[site])

        added: list[fx.Node] = []
        if len(made.columns):
            which = rewriter.once(
                weight, "columns", lambda: rewriter.weight(made.columns, f"{name}_columns", torch.int32)
            )
            kept = call(aten.index_select.default, source, source.meta["val"].dim() - 1, which)
            added.append(call(aten.linear.default, kept, half(made.column_values.mT.flatten(0, 1), "column_values")))
        if made.left is not None and made.right is not None:
            down, up = half(_kernel(made.left[0].mT, weight), "down"), half(made.right[0].mT, "up")
            if operator(site) == "linear":
                added.append(call(aten.linear.default, call(aten.linear.default, source, down), up))
            else:
                ones = [1] * (named["weight"].meta["val"].dim() - 2)
                args, kwargs = positional(site, {"weight": down, "bias": None})
                inner = rewriter.insert(site.target, *args, before=behind, origin=[site], **kwargs)
                wide = call(aten.view.default, up, [*made.right[0].mT.shape, *ones])
                added.append(call(site.target, inner, wide))
        for each in added:
            total = call(aten.add.Tensor, total, each)
        rewriter.replace(site, total)

    def _tables(self, program: Program, rewriter: Rewriter) -> None:
        """Quantize the tables of embeddings that no linear shares."""
        form = grid(self.embeddings)
        symmetric = self.symmetric or form.bits >= 8  # eight bits have room for either side
        choices = Choices(Form(form, form.block, symmetric, "mse" if self.range == "entropy" else self.range))
        for node in [node for node in program.graph.nodes if operator(node) == "embedding"]:
            table = arguments(node)["weight"]
            looked_up = any(operator(user) == "graphopt.dequantize" for user in node.users)
            if not node.users or not is_floating(table) or looked_up:
                continue  # replaced by now, or the looking up of codes or scales
            if reason := self.refusal(program, node) or _unfit(program, node):
                rewriter.decline(node, reason)
                continue

            def make(table: fx.Node = table) -> tuple[list[fx.Node | None], int, int]:
                matrix = program.weight(table).detach().mT[None]
                return self._parts(table, quantize_matrix(matrix, choices), rewriter)

            parts, _, group = rewriter.once(table, f"table on {form.name}", make)
            _look_up(node, parts, group, form.name, rewriter)


def _kernel(matrix: Tensor, weight: fx.Node) -> Tensor:
    """Return the first factor [r, K] in the shape of a weight of r channels."""
    return matrix.reshape(len(matrix), *weight.meta["val"].shape[1:])


def _with_outliers(
    value: fx.Node, weight: fx.Node, made: Quantized, shape: list[int], site: fx.Node, rewriter: Rewriter
) -> fx.Node:
    """Add single weights to dequantized ones: scatter_add at their flat places."""
    assert made.outliers is not None
    flat = made.outliers.mT.reshape(-1)
    (places,) = torch.nonzero(flat, as_tuple=True)
    name, dtype = str(weight.target), value.meta["val"].dtype

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return rewriter.insert(target, *args, before=site, origin=[site], **kwargs)

    where = rewriter.once(weight, "places", lambda: rewriter.weight(places, f"{name}_places", torch.int32))
    what = rewriter.once(weight, "outliers", lambda: rewriter.weight(flat[places], f"{name}_outliers", torch.float16))
    index = call(aten._to_copy.default, where, dtype=torch.int64)
    source = call(aten._to_copy.default, what, dtype=dtype)
    added = call(aten.scatter_add.default, call(aten.view.default, value, [-1]), 0, index, source)
    return call(aten.view.default, added, shape)


def _besides(made: Quantized) -> str:
    """Return what besides codes there is, for a message."""
    found = []
    if len(made.columns):
        found.append(f"{len(made.columns)} inputs in float16")
    if made.outliers is not None:
        found.append(f"{int((made.outliers != 0).sum())} weights in float16")
    if made.left is not None:
        found.append(f"a correction of rank {made.left.shape[-1]}")
    return "".join(f", {each}" for each in found)


def _look_up(node: fx.Node, parts: list[fx.Node | None], group: int, name: str, rewriter: Rewriter) -> None:
    """Make an embedding look up codes, scales and zero points: dequantized is what was looked up."""
    named = arguments(node)
    indices = named["indices"]
    columns: list[fx.Node | None] = []
    for part in parts[:3]:
        if part is None or part.meta["val"].dim() == 0:
            columns.append(part)
            continue
        source = part
        if part is not parts[0] and part.meta["val"].dim() == 1:
            source = rewriter.insert(aten.unsqueeze.default, part, -1, before=node)
        columns.append(rewriter.insert(node.target, source, indices, before=node))
    whole = parts[1] is not None and parts[1].meta["val"].dim() == 0
    where = (0, 0) if whole else (-1, group or -1)
    value = rewriter.insert(dialect.dequantize, *columns, None, *where, name, before=node)
    rewriter.replace(node, value)
    rewriter.touch(node, f"table on {name} by row" + (f" in groups of {group}" if group else ""))


def _gram(program: Program, site: fx.Node, parts: int) -> Gram:
    matrix = to_matrix(program.weight(arguments(site)["weight"]).detach(), site, parts)
    return Gram(matrix.shape[0], matrix.shape[1])


def update(gram: Gram, site: fx.Node, x: Tensor, original: Tensor | None, counts: Tensor | None = None) -> bool:
    """Add what a site reads to its Gram matrix; `counts` [P, T] or [T] is what each token counts.

    Returns whether they counted so: what a site reads may have other tokens than the attention is over.
    """
    named = arguments(site)
    shape = tuple(named["weight"].meta["val"].shape)
    kwargs = {} if operator(site) == "linear" else named
    before = None if original is None else patches(original, shape, kwargs)
    rows = patches(x, shape, kwargs)
    weights = None if counts is None else counts.reshape(-1, counts.shape[-1])
    if weights is not None and weights.shape[-1] != rows.shape[1]:
        weights = None
    gram.update(rows, site.name, weights, before)
    return weights is not None


def to_matrix(weight: Tensor, site: fx.Node, parts: int = 1) -> Tensor:
    """Return a weight [R, ...] as [P, K, R / P]: P the groups of a convolution, or `parts` where it has none."""
    groups = max(int(arguments(site).get("groups", 1)), parts)
    return weight.flatten(1).reshape(groups, weight.shape[0] // groups, -1).mT.contiguous()


def from_matrix(matrix: Tensor, like: Tensor) -> Tensor:
    """Return [P, K, R / P] in the shape and dtype of a weight."""
    return matrix.mT.reshape(like.shape).to(like.dtype)


def stored(made: Quantized, shape: list[int]) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """Return codes, scale, zero point, axis and group size as the dialect takes them.

    Codes have the shape of the weight, unless groups run through several of its axes: then [R, K].
    """
    coding, (parts, channels, inputs) = made.coding, made.codes.shape
    rows, count = parts * channels, coding.scale.shape[1]
    codes = made.codes.reshape(rows, inputs)
    scale = coding.scale.mT.reshape(rows, count)
    zero = None if coding.zero_point is None else coding.zero_point.mT.reshape(rows, count).to(coding.grid.storage)
    group = int((coding.groups == 0).sum()) if count > 1 else 0
    if coding.grid.block:
        group = coding.grid.block
    if made.single_scale:
        return codes.reshape(shape), scale[0, 0], None if zero is None else zero[0, 0], 0, 0
    if not group:
        return codes.reshape(shape), scale[:, 0], None if zero is None else zero[:, 0], 0, 0
    return codes, scale, zero, 1, group


@dataclass(eq=False)
class _Inputs:
    """Shows a value to the Gram matrices of all who read it."""

    all: list[tuple[fx.Node, Gram, list[Tensor | None]]]
    batch: int = 0
    weighted: set[fx.Node] = field(default_factory=set)

    def update(self, values: Tensor, name: str) -> None:
        for site, gram, counts in self.all:
            if update(gram, site, values, None, _nth(counts, self.batch)):
                self.weighted.add(site)
        self.batch += 1


def _sum_over(sites: list[fx.Node], outputs: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """Return the sum of what all readers of a weight say of its output channels; None where that is nothing."""
    found = [outputs[site] for site in sites if site in outputs]
    total = sum(found[1:], start=found[0]) if found else None
    return total if total is not None and float(total.diagonal().mean()) > 0 else None


def _nth(counts: list[Tensor | None], batch: int) -> Tensor | None:
    return counts[batch] if batch < len(counts) else None


def _unfit(program: Program, node: fx.Node) -> str:
    weight = arguments(node)["weight"]
    if weight.op != "get_attr" or not is_floating(weight):
        return "its weight is computed, or quantized already"
    value = program.weight(weight)
    if value.dim() < 2 or value.numel() == 0:
        return f"its weight {weight.target} is no matrix" if value.numel() else f"its weight {weight.target} is empty"
    if not bool(value.isfinite().all()):
        return f"its weight {weight.target} holds NaN or infinity"
    return ""
