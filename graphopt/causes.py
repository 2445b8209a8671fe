"""Root causes: where a result loses what it loses, in torch and in its runtime, and what would help, tried out.

    reference   the program that the first quantizing pass was given: everything exact is in it, and has its names
    sites       `graphopt.analysis.numerics.site_errors`, of the program and of the file in its runtime
    remedies    of the worst sites, tried (`graphopt.remedies`)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from graphopt.analysis.numerics import SiteError, Spread, site_errors, site_spreads
from graphopt.analysis.numerics.fit import dequantize_of
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir.arguments import arguments, operator
from graphopt.ir.program import Program
from graphopt.ir.rewriter import module_path, provenance
from graphopt.pipeline import Context, backend, make_pass, run_passes
from graphopt.progress import Progress, Silent
from graphopt.remedies import Remedy, Trial, composite, quantizes

if TYPE_CHECKING:
    from graphopt.result import Result

_ROWS = 8  # of a batch whose size is open
_EFFECTS = 64  # sites whose effect is measured
_RUNS = 128  # of half a model, that all effects may take, one batch aside
_SPREADS = 64  # sites with histograms
_SAME_DB = 60.0  # the last bits of floats


@dataclass(frozen=True)
class Cause:
    """A site and what is lost there; signal over noise in dB, None where there is no noise or nobody looked.

    Attributes:
        node, kind, module: of the operator. position: its place in the program. by: the pass that quantized it.
        weights, inputs: formats that it reads, empty for floats.
        local_db: its own error. weights_db, inputs_db: of that, what weights alone and inputs alone cause.
        propagated_db: its error with what came before. effect_db: at the model's outputs, were it alone quantized.
        share: of the sum of all effects.
        runtime_db, runtime_propagated_db: own error, and with what came before, in the runtime; where it shows rounded,
            the rounding makes them larger than in torch.
        apart_db: its value in the runtime beside the one in torch, and whether the two `differ` by more than roundings.
        misfits: values whose rounding does not fit them, and how many times too coarse it is.
        spreads: histograms of `weights` and `output`, before and after.
    """

    node: str
    kind: str
    position: int = 0
    module: str = ""
    by: str = ""
    weights: str = ""
    inputs: str = ""
    local_db: float | None = None
    weights_db: float | None = None
    inputs_db: float | None = None
    propagated_db: float | None = None
    effect_db: float | None = None
    share: float | None = None
    runtime_db: float | None = None
    runtime_propagated_db: float | None = None
    apart_db: float | None = None
    differ: bool = False
    misfits: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)

    @property
    def defects(self) -> list[str]:
        """Sentences about what is wrong here, beyond what the format must lose."""
        found = [
            f"the rounding of {name} is {each:.3g} times as coarse as it need be" for name, each in self.misfits.items()
        ]
        if self.differ:
            found.append(f"the runtime gives something else than torch does here ({self.runtime})")
        return found

    @property
    def runtime(self) -> str:
        """How far the value in the runtime is from the one in torch; empty where it is not seen there."""
        if self.runtime_db is None:
            return ""
        return "as in torch" if self.apart_db is None or self.apart_db > _SAME_DB else f"{self.apart_db:.1f} dB apart"

    def __str__(self) -> str:
        share = "" if self.share is None else f" ({100 * self.share:.3g} % of all)"
        alone = "" if self.effect_db is None else f": alone it leaves {self.effect_db:.1f} dB at the outputs{share}"
        own = "none" if self.local_db is None else f"{self.local_db:.1f} dB"
        pairs = (("weights", self.weights_db), ("inputs", self.inputs_db))
        parts = [f"{what} {each:.1f} dB" for what, each in pairs if each is not None]
        of = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        by = f", {self.by}" if self.by else ""
        return "; ".join([f"{self.node} ({self.kind}{by}){alone}", f"own error {own}{of}", *self.defects])


@dataclass(frozen=True)
class Causes:
    """Where a result loses what it loses.

    Attributes:
        sites: the worst first: what is wrong before what merely costs, then by effect.
        in_runtime: names of sites, by what the file loses in its runtime; empty where it was not looked at.
        unseen: sites that the runtime's graph does not show.
        remedies: changes that were tried and help, the best first.
        sqnr_db: of the outputs on the batches that were looked at. samples: rows of these.
    """

    sites: list[Cause] = field(default_factory=list)
    in_runtime: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    sqnr_db: float | None = None
    samples: int = 0

    @property
    def defective(self) -> list[Cause]:
        """Sites where something is wrong."""
        return [each for each in self.sites if each.defects]


def find_causes(
    result: Result, batches: Batches | None, file: Path | None = None, progress: Progress | None = None
) -> Causes | None:
    """Return where a result loses what it loses; None where nothing is quantized.

    Args:
        batches: calibration data, of which the first few rows are looked at; None takes the example inputs.
        file: what the program was exported to, to look at it in its runtime.

    Raises GraphoptError where the captured program is not at hand.
    """
    shown = progress or Silent()
    with shown.stage("root causes"):
        reference = _reference(result, batches, shown)
        if reference is None:
            return None
        looked_at = [_first_rows(result.program, result.program.flat_example)]
        if batches is not None:
            looked_at = [_first_rows(result.program, each) for each in batches.first(_ROWS)]
            measured = min(_EFFECTS, sum(node.op == "call_function" for node in reference.graph.nodes))
            looked_at = looked_at[: max(min(_ROWS // _rows(looked_at[:1]), _RUNS // measured), 1)]
        return causes_of(reference, result, looked_at, file, batches, shown)


def causes_of(
    reference: Program,
    result: Result,
    batches: list[list[Any]],
    file: Path | None = None,
    calibration: Batches | None = None,
    progress: Progress | None = None,
    tries: bool = True,
) -> Causes:
    """Return the causes, against a program that is the result before anything was quantized, on flat batches.

    `calibration` is for remedies that need data of their own; without `tries` there are none.
    """
    program = result.program
    looks = file is not None and bool(result.target.backend)
    observer = backend(result.target.backend).observer(file, program) if looks and file is not None else None
    found = site_errors(reference, program, batches, _EFFECTS, progress=progress, observer=observer)
    names = [site.node for site in found]
    spreads = site_spreads(reference, program, batches[0], names[:_SPREADS]) if names else {}
    total = sum(site.effect.ratio for site in found)
    with torch.no_grad():
        exact = [reference.run(flat) for flat in batches]
    nodes = {node.name: (node, position) for position, node in enumerate(program.graph.nodes)}
    sites = [_cause(site, *nodes[site.node], spreads, total) for site in found]
    seen = sorted((site for site in found if site.runtime is not None), key=lambda site: site.rank(elsewhere=True))
    trial = Trial(reference, result, batches, exact, calibration)
    return Causes(
        sites,
        [site.node for site in seen],
        [site.node for site in found if looks and site.runtime is None],
        trial.remedies(found) if tries else [],
        trial.before.sqnr_db,
        _rows(batches),
    )


def _rows(batches: list[list[Any]]) -> int:
    """Return the sizes of the first axes of the first tensors, together."""
    firsts = [next((each for each in flat if isinstance(each, Tensor) and each.dim()), None) for flat in batches]
    return sum(max(len(each), 1) if each is not None else 1 for each in firsts)


def _reference(result: Result, batches: Batches | None, progress: Progress) -> Program | None:
    """Return the program that the first quantizing pass was given; the passes before it run again if it is gone."""
    records = list(result.trace)
    first = next((each for each in records if each.name != "capture" and each.changed and quantizes(each.name)), None)
    if first is None:
        return None
    known = next((each.given for each in records if each.given is not None), None)
    if isinstance(known, Program):
        return known
    if result.original is None:
        raise GraphoptError("the captured model is not at hand to compare with; say what was optimized")
    ran = [each for each in records[1 : records.index(first)] if each.changed and not each.rejected]
    passes = [make_pass(each.name, each.options) for each in ran if not composite(each.name)]
    context = Context(result.target, batches, progress=progress)
    program, _ = run_passes(result.original, passes, context)
    return program


def _first_rows(program: Program, flat: list[Any]) -> list[Any]:
    """Return the first rows of inputs whose first size is the same open one."""
    values = [node.meta.get("val") for node in program.placeholders]
    rows = next((str(each.shape[0]) for each in values if isinstance(each, Tensor) and each.dim()), "")
    if not rows or rows.isdigit():
        return flat
    return [
        given[:_ROWS] if isinstance(val, Tensor) and val.dim() and str(val.shape[0]) == rows else given
        for val, given in zip(values, flat, strict=True)
    ]


def _cause(
    site: SiteError,
    node: fx.Node,
    position: int,
    spreads: Mapping[str, Mapping[str, Spread]],
    total: float,
) -> Cause:
    runtime = site.runtime
    reads = [each for each in map(dequantize_of, node.all_input_nodes) if each is not None]
    weights = [each for each in reads if arguments(each)["codes"].op == "get_attr"]
    inputs = [each for each in reads if each not in weights]
    by = next((made for each in (*inputs, *weights) if (made := provenance(each)["by"])), "")
    return Cause(
        site.node,
        site.kind,
        position,
        module_path(node),
        by,
        _formats(weights[:1]),
        _formats(inputs),
        site.local.sqnr_db,
        site.weights.sqnr_db,
        site.inputs.sqnr_db,
        site.propagated.sqnr_db,
        site.effect.sqnr_db,
        site.effect.ratio / total if total > 0 and site.effect.signal else None,
        runtime.local.sqnr_db if runtime else None,
        runtime.propagated.sqnr_db if runtime else None,
        runtime.apart.sqnr_db if runtime else None,
        site.differs,
        dict(site.misfits),
        dict(spreads.get(site.node, {})),
    )


def _formats(reads: Iterable[fx.Node]) -> str:
    found = []
    for each in reads:
        named = arguments(each)
        group, scale = named["group_size"], named["scale"].meta["val"]
        dynamic = operator(named["codes"]) == "graphopt.quantize" and named["scale"].op == "call_function"
        where = " by token" if group < 0 else " by channel" if scale.dim() else ""
        where = f" in groups of {group}" if group > 0 else where
        found.append(f"{named['format']}{where}{' at run time' if dynamic else ''}")
    return ", ".join(dict.fromkeys(found))
