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
    tune        scales and tables are learned by gradient when all is rounded, for what each block gives or for what the
                whole model gives (`graphopt.quantization.tuning`)

A weight that several operators read is rounded once, for the inputs of all of them.

Lossy. Runs after what changes weights exactly, and after what quantizes activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.calibration import observe
from graphopt.calibration.stream import Reading, Stream
from graphopt.calibration.tokens import attention_weights, gradient_weights
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Rewriter, arguments, is_floating, operator
from graphopt.pipeline import Context, LossyPass
from graphopt.quantization.coding import Form, WeightRange
from graphopt.quantization.grids import grid
from graphopt.quantization.matrices import from_matrix, patches, to_matrix
from graphopt.quantization.objectives import Gram
from graphopt.quantization.rounding.gptq import Order
from graphopt.quantization.solve import Choices, Quantized, Rounding, quantize_matrix, relative_error
from graphopt.quantization.tuning import Tuner
from graphopt.quantization.weights import unfit
from graphopt.quantization.writing import look_up, put_codes, stored_parts
from graphopt.search import Choosing, Level, Offer, Store

aten = torch.ops.aten
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class QuantizeWeights(LossyPass, Choosing):
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
        spread: the exponent p of the weights 1 / (H^-1)_kk^p with which codebooks are learned.
        damping: added to the diagonal of a Gram matrix at least, relative to its mean; more where inputs are few.
        sequential, drift: see above.
        parts: groups of output channels with a Gram matrix each, for objective=gradient; all together where the
            channels cannot be divided so.
        embeddings: the grid of embedding tables, a scale a row, and of linears that are tied to one; empty: tables
            stay, and so do these linears.
        spill: keep activations in files between stages.
        tune: none, blocks or model, see above; tune_steps: of Adam, for each block or for all.
        grids: of single weights, as `name=grid`, instead of `grid`; `name=float` leaves one as it is.
        levels: grids that a search may choose from for each weight (`allocate`).
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
    spread: Annotated[float, Field(ge=0)] = 1.0
    damping: Annotated[float, Field(ge=0)] = 0.01
    sequential: bool = True
    drift: bool = True
    parts: Annotated[int, Field(ge=1)] = 4
    embeddings: str = ""
    spill: bool = False
    tune: Literal["none", "blocks", "model"] = "none"
    tune_steps: Annotated[int, Field(ge=1)] = 100
    grids: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()

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
        if odd := [each for each in self.grids if not all(each.rpartition("=")[::2])]:
            raise GraphoptError(f"{self.name}.grids: {odd[0]!r} is no name=grid")
        for option, names in (("grids", self._grids.values()), ("levels", self.levels)):
            for given in names:
                try:
                    grid(given) if given != "float" else None
                except GraphoptError as error:
                    raise GraphoptError(f"{self.name}.{option}: {error}") from None
        self.choices(False), self.choices(True)  # refuses what does not go together
        if self.objective == "plain" and self.rounding != "nearest":
            raise GraphoptError(
                f"{self.name}: rounding={self.rounding!r} weighs inputs against each other; give objective='gram', "
                "or rounding='nearest'"
            )

    @property
    def _grids(self) -> dict[str, str]:
        """Return the grids of single weights by name."""
        return {name: form for name, _, form in (each.rpartition("=") for each in self.grids)}

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        weights = self._weights(program, rewriter.decline)
        made: dict[fx.Node, tuple[Quantized, float]] = {}

        def solve(weight: fx.Node, gram: Gram | None, outputs: Tensor | None) -> Tensor:
            made[weight] = self._quantized(program, weight, weights[weight], gram, outputs)
            return from_matrix(made[weight][0].value(), program.weight(weight))

        without = self._each(program, weights, context, solve)
        if self.tune != "none" and made:
            made = self._tuned(program, weights, made, context, rewriter)
        costs, bits = {}, {}
        for weight, (quantized, cost) in made.items():
            put_codes(weight, weights[weight], quantized, rewriter)
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

    def offers(self, program: Program, context: Context, store: Store) -> list[Offer]:
        """Return a choice of grids for each weight; each is rounded for the inputs that the original layers give."""
        if not self.levels:
            raise GraphoptError(f"{self.name} has no levels to choose from; give levels=['int8', 'int4', ...]")
        alone = replace(self, sequential=False, levels=())
        levels = {name: replace(alone, grid=name) for name in self.levels if name != "float"}
        weights = self._weights(program, lambda node, reason: None)
        found: dict[fx.Node, list[Level]] = {}

        def solve(weight: fx.Node, gram: Gram | None, outputs: Tensor | None) -> None:
            name, original = str(weight.target), program.weight(weight)
            stored = original.numel() * original.element_size()
            count = {"parameters": float(original.numel())}
            found[weight] = [Level("float", count | {"bits": 8.0 * stored, "size_bytes": float(stored)})]
            for level, each in levels.items():
                quantized, _ = each._quantized(program, weight, weights[weight], gram, outputs)
                store.put(name, level, {name: from_matrix(quantized.value(), original)})
                costs = {"bits": quantized.bits(), "size_bytes": quantized.file_bits(context.target.code_bits) / 8}
                found[weight].append(Level(level, count | costs))

        alone._each(program, weights, context, solve)
        merges = context.target.merges_readers
        return [
            Offer(
                str(weight.target), tuple(found[weight]), nodes=tuple(site.name for site in sites),
                group=_read_by(sites) if merges else "",
            )
            for weight, sites in weights.items()
        ]  # fmt: skip

    def chosen(self, levels: Mapping[str, str]) -> QuantizeWeights | None:
        """Return the pass that gives each weight the grid it was chosen for, and leaves the others."""
        if not levels:
            return None
        grids = tuple(f"{name}={level}" for name, level in levels.items())
        return replace(self, levels=(), grids=grids, only=(*levels,), skip=())

    def sketched(self, levels: Mapping[str, str]) -> QuantizeWeights | None:
        made = self.chosen(levels)
        quick: dict[str, Any] = {"objective": "plain", "rounding": "nearest", "range": "minmax", "tune": "none"}
        return None if made is None else replace(made, **quick)

    def _weights(self, program: Program, decline: Callable[[fx.Node, str], object]) -> dict[fx.Node, list[fx.Node]]:
        """Return the weights that can be quantized, with the operators that multiply by them."""
        weights: dict[fx.Node, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if operator(node) == "linear" or operator(node) in _CONVOLUTIONS:
                if reason := self.refusal(program, node) or _unfit(program, node):
                    decline(node, reason)
                elif self._grids.get(str(arguments(node)["weight"].target)) == "float":
                    decline(node, "kept float by grids")
                else:
                    weights.setdefault(arguments(node)["weight"], []).append(node)
        return {weight: sites for weight, sites in weights.items() if self._fits(weight, sites, decline)}

    def _fits(self, weight: fx.Node, sites: list[fx.Node], decline: Callable[[fx.Node, str], object]) -> bool:
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
            decline(site, reason)
        return not reason

    # Solving ------------------------------------------------------------------------------------------------------

    def choices(self, convolution: bool, table: bool = False, weight: str = "") -> Choices:
        """Return what is to be done with the weight of a convolution or a linear, or of one that is a table as well."""
        form = grid(self.embeddings if table and self.embeddings else self._grids.get(weight, self.grid))
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
            spread=self.spread,
        )

    def _quantized(
        self, program: Program, weight: fx.Node, sites: list[fx.Node], gram: Gram | None, outputs: Tensor | None
    ) -> tuple[Quantized, float]:
        """Return a weight quantized, with its relative error."""
        matrix = to_matrix(program.weight(weight).detach(), sites[0], self._parts_of(sites))
        table = any(operator(user) == "embedding" for user in weight.users)
        choices = self.choices(operator(sites[0]) != "linear", table, str(weight.target))
        quantized = quantize_matrix(matrix, choices, gram, outputs)
        return quantized, relative_error(matrix, quantized, gram)

    def _each(
        self,
        program: Program,
        weights: Mapping[fx.Node, list[fx.Node]],
        context: Context,
        solve: Callable[[fx.Node, Gram | None, Tensor | None], Tensor | None],
    ) -> list[str]:
        """Call `solve` for every weight, with what is known of its inputs and outputs; it returns the new weight.

        Returns the sites whose tokens all count alike: those without an attention, or without gradients, where an
        objective asks for one.
        """
        solved: set[fx.Node] = set()
        weight_of = {site: weight for weight, sites in weights.items() for site in sites}
        grams: dict[fx.Node, Gram] = {}
        outputs: dict[fx.Node, Tensor] = {}
        parts = {weight: self._parts_of(sites) for weight, sites in weights.items()}
        if self.objective == "plain":
            for weight in weights:
                solve(weight, None, None)
            return []
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

        def show(read: Reading) -> None:
            site = read.site
            weight = weight_of[site]
            if weight not in shared:
                gram = grams.get(weight) or grams.setdefault(weight, _gram(program, site, parts[weight]))
                exact = read.exact if self.drift else None
                if update(gram, site, read.x, exact, _nth(counts.get(site, []), read.batch)):
                    weighted.add(site)

        def settle(sites: list[fx.Node]) -> dict[fx.Node, Tensor]:
            values: dict[fx.Node, Tensor] = {}
            with context.progress.stage("quantize", len(sites)) as stage:
                for site in sites:
                    weight = weight_of[site]
                    if weight not in solved:
                        solved.add(weight)
                        value = solve(weight, grams.pop(weight, None), _sum_over(weights[weight], outputs))
                        values |= dict.fromkeys(weights[weight], value) if value is not None else {}
                    stage.advance()
            return values if self.sequential else {}

        both = self.sequential and self.drift
        Stream(program, list(weight_of), batches, context.progress, both, self.spill).run(show, settle)
        weighted |= {site for shown in observers.values() for site in shown.weighted}
        return [site.name for site in weight_of if site not in weighted and self.objective != "gram"]

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
            if context.loss is None and not any(is_floating(each) for each in program.outputs):
                return {}  # nothing has a gradient: all tokens count alike, as the trace says of every site
            wanted = outputs if self.objective == "fisher" else None
            return gradient_weights(program, sites, batches, context.progress, context.loss, context.seed, wanted)
        return {}

    def _tuned(
        self,
        program: Program,
        weights: Mapping[fx.Node, list[fx.Node]],
        made: Mapping[fx.Node, tuple[Quantized, float]],
        context: Context,
        rewriter: Rewriter,
    ) -> dict[fx.Node, tuple[Quantized, float]]:
        """Return the weights with learned scales; the errors stay those of rounding."""
        rounded = {weight: quantized for weight, (quantized, _) in made.items()}
        whole = self.tune == "model"
        tuner = Tuner(program, weights, rounded, context.progress, whole, self.tune_steps, context.seed)
        tuner.run(context.needed_calibration(self.name), self.spill)
        rewriter.note(tuned=tuner.gains)
        if not tuner.gains:
            rewriter.decline("program", "tune has nothing to learn: no output is floating, or scales are not free")
        return {weight: (tuner.made[weight], cost) for weight, (_, cost) in made.items()}

    # Embedding tables ---------------------------------------------------------------------------------------------

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
                return stored_parts(table, quantize_matrix(matrix, choices), rewriter)

            parts, _, group = rewriter.once(table, f"table on {form.name}", make)
            look_up(node, parts, group, form.name, rewriter)


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


def _read_by(sites: list[fx.Node]) -> str:
    """Return the name of the value that a linear reads, if it alone has its weight; empty otherwise."""
    return arguments(sites[0])["input"].name if len(sites) == 1 and operator(sites[0]) == "linear" else ""


def _nth(counts: list[Tensor | None], batch: int) -> Tensor | None:
    return counts[batch] if batch < len(counts) else None


def _unfit(program: Program, node: fx.Node) -> str:
    weight = arguments(node)["weight"]
    if weight.op != "get_attr" or not is_floating(weight):
        return "its weight is computed, or quantized already"
    if reason := unfit(program, weight, "its weight"):
        return reason
    return "" if program.weight(weight).dim() > 1 else f"its weight {weight.target} is no matrix"
