"""Fold the affine of a norm into everything that reads it.

    linear(norm(x) * γ + β, W, b)  ->  linear(norm(x), W diag(γ), b + W β)

γ goes wherever the analysis finds that a scale of the norm's output ends: in linears and convolutions, in stacks of
experts that are picked by index, behind moves and activations that pass a scale. All readers take it or none does. β
goes into the biases of linear operators where all readers are such; else it stays behind the norm as an addition, which
a rotation can carry.

A weight that is also read elsewhere (the embedding table that is the head as well) gets a copy for these readers,
unless `untie` says not to. What that costs in bytes stands in the trace.

Exact. A norm without affine is invariant to rotations (an RMS norm) or becomes so (a layer norm, by `center_norms`).
Source: Ashkboos et al., "Compress Large Language Models by Deleting Rows and Columns" (2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.spaces import Member, Space, Symmetry, analyze
from graphopt.ir import Changes, Program, Rewriter, arguments, operator
from graphopt.passes.fold.affine import bias_name, is_linear_operator, overflows, pads_with_zeros, shift_of_outputs
from graphopt.passes.transform.reparameterize import Reparameterization
from graphopt.pipeline import Context, Pass

aten = torch.ops.aten
_NORMS = {"layer_norm": aten.layer_norm.default, "rms_norm": aten.rms_norm.default}
_MOVES = {
    "reshape", "permute", "transpose", "slice", "select", "unsqueeze", "squeeze", "clone", "expand", "_to_copy",
    "alias", "view", "contiguous", "split", "split_with_sizes", "chunk", "unbind", "getitem", "index", "index_select",
}  # fmt: skip


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Fold the gains and biases of layer and RMS norms into their readers.

    Attributes:
        untie: copy a weight that is tied to something else where only that keeps a norm's affine from being folded.
    """

    untie: bool = True

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        fold_norm_affine(rewriter, self.untie)
        return rewriter.finish()


def fold_norm_affine(rewriter: Rewriter, untie: bool = True) -> None:
    """Fold what can be folded and record the rest with its reason; see `FoldNormAffine`."""
    if untie:
        _untie(rewriter)
    folding = _Folding(rewriter)
    for norm, reason in folding.fold_all().items():
        rewriter.decline(norm, reason)
    folding.commit()


def _by_weight(program: Program) -> dict[tuple[object, object], list[fx.Node]]:
    """Return the norms that have an affine, those that share it together."""
    found: dict[tuple[object, object], list[fx.Node]] = {}
    for node in program.graph.nodes:
        if operator(node) in _NORMS:
            named = arguments(node)
            affine = named.get("weight"), named.get("bias")
            if any(isinstance(part, fx.Node) for part in affine):
                found.setdefault(affine, []).append(node)
    return found


@dataclass(frozen=True)
class _Shift:
    """What the bias of a reader gains, W β [out], by the β of a norm."""

    reader: fx.Node
    norm: fx.Node
    value: Tensor


class _Folding:
    """Folds norm after norm against one analysis, and writes the changed weights once."""

    def __init__(self, rewriter: Rewriter) -> None:
        self._rewriter = rewriter
        self._edits = Reparameterization(rewriter)
        analysis = analyze(rewriter.program)
        self._of = {
            symmetry: {member.node: (space, member) for space in analysis.under(symmetry) for member in space.members}
            for symmetry in (Symmetry.DIAGONAL, Symmetry.SIGN)
        }
        self._done: list[tuple[fx.Node, Tensor | None]] = []
        self._shifts: list[_Shift] = []

    def fold_all(self) -> dict[fx.Node, str]:
        """Fold what can be folded; return the norms that keep their affine, with the reason."""
        groups = _by_weight(self._rewriter.program).values()
        reasons = {norms[0]: self.fold(norms) for norms in groups}
        return {norm: reasons[norms[0]] for norms in groups for norm in norms if reasons[norms[0]]}

    def fold(self, norms: list[fx.Node]) -> str:
        """Fold the affine that some norms share, or return why not."""
        named = arguments(norms[0])
        weight, bias = named.get("weight"), named.get("bias")
        if len(named["normalized_shape"]) != 1:
            return "it normalizes over several axes"
        for part in (weight, bias):
            if isinstance(part, fx.Node) and part.op != "get_attr":
                return f"its affine is computed by {part.name}, not a weight"
            if isinstance(part, fx.Node) and not bool(self._rewriter.program.weight(part).isfinite().all()):
                return f"{part.target} holds NaN or infinity"
        size = int(named["normalized_shape"][0])
        gain = self._edits.value(weight) if weight is not None else torch.ones(size, dtype=torch.float64)
        shift = self._edits.value(bias) if bias is not None else torch.zeros(size, dtype=torch.float64)
        if bool((gain == 1).all()) and not bool(shift.any()):
            self._done += [(norm, None) for norm in norms]
            return ""
        own = {part for part in (weight, bias) if part is not None}
        spaces: list[tuple[Space, bool]] = []
        for symmetry in (Symmetry.DIAGONAL, Symmetry.SIGN)[: 1 + bool((gain < 0).any())]:
            affine = weight if weight is not None else bias
            if affine not in self._of[symmetry]:
                return "nothing is known of what it writes"
            found = self._of[symmetry][affine]
            reason = _refusal(*found, norms, own, size)
            if reason:
                return reason
            spaces.append((found[0], found[1].dual))
        space, dual = spaces[0]
        shifts = self._shifts_of(norms, space, dual, shift) if bool(shift.any()) else []
        divides = [member for member in space.members if member.node not in own and member.dual is dual]
        if not bool(gain.all()) and (divides or shifts is None):
            return f"a gain of {norms[0].name} is 0, and what would be divided by it is not only what reads it"
        if weight is None:
            spaces = []
        elif reason := self._overflow(space, own, gain):
            return reason
        for each, inverse in spaces:
            if each.symmetry is Symmetry.SIGN:
                self._edits.apply(each, torch.where(gain < 0, -1.0, 1.0))
            else:
                self._edits.apply(each, gain.abs() if inverse else 1 / gain.abs())
        left = None if shifts is not None else shift / gain
        self._shifts += shifts or []
        self._done += [(norm, left) for norm in norms]
        return ""

    def _overflow(self, space: Space, own: set[fx.Node], gain: Tensor) -> str:
        for member in space.members:
            held = self._rewriter.program.weight(member.node)
            largest = float(self._edits.value(member.node).abs().max()) * float(gain.abs().max())
            if member.node not in own and overflows(largest, held.dtype):
                return f"{member.weight} would overflow {held.dtype}"
        return ""

    def _shifts_of(self, norms: list[fx.Node], space: Space, dual: bool, shift: Tensor) -> list[_Shift] | None:
        """Return what the readers' biases gain, or None where not every reader can take the shift."""
        readers = _linear_readers(norms)
        reads = {(read.node, read.source): read for read in space.reads}
        if readers is None:
            return None
        found = []
        for node, source in readers:
            read = reads.get((node, source))
            weight, bias = arguments(node)["weight"], arguments(node).get("bias")
            constant = all(part is None or part.op == "get_attr" for part in (weight, bias))
            if read is None or not constant or pads_with_zeros(node) or "transpose" in operator(node):
                return None
            if read.dual is not dual or len(read.dims) != 1:
                return None
            ones = torch.ones(source.meta["val"].shape[read.dims[0]], dtype=torch.float64)
            spread = space.gather_read(read, torch.arange(float(len(ones))))
            if spread.numel() != len(ones):
                return None  # other coordinates stand beside those that the norm writes
            placed = torch.zeros_like(ones).scatter_(0, spread.flatten().long(), shift.expand(spread.shape).flatten())
            found.append(_Shift(node, norms[0], shift_of_outputs(node, self._edits.value(weight), placed)))
        return found

    def commit(self) -> dict[str, fx.Node]:
        """Write the changed weights; put a norm without affine in the place of each folded one, and return them."""
        rewriter = self._rewriter
        bare: dict[str, fx.Node] = {}
        for shift in self._shifts:
            _add_to_bias(shift, rewriter)
        self._edits.commit()
        for norm, left in self._done:
            what = "folded into its readers"
            new = bare[norm.name] = _without_affine(norm, rewriter)
            if left is not None:
                new = rewriter.insert(aten.add.Tensor, new, _left_behind(norm, left, rewriter), before=norm)
                what += "; its bias stays as an addition"
            rewriter.replace(norm, new)
            rewriter.touch(norm, what)
        rewriter.sweep()
        return bare


def _refusal(space: Space, member: Member, norms: list[fx.Node], own: set[fx.Node], size: int) -> str:
    """Return why the affine of some norms cannot move through a space, or an empty string."""
    if space.pins:
        return str(space.pins[0])
    if len(member.slots) != 1 or space.size != size:
        return f"what reads it splits its {size} coordinates: {member.layout}"
    for part in own:
        for user in part.users:
            if user not in norms:
                return f"{part.target} is also read by {user.name}"
    for other in space.members:
        if other.node not in own:
            for user in other.node.users:
                if operator(user) in _NORMS and arguments(user)["input"] is not other.node:
                    return f"what reads it also reads {user.name}, which has a gain of its own"
    if all(other.node in own for other in space.members):
        return "no weight reads it"
    return ""


def _without_affine(norm: fx.Node, rewriter: Rewriter) -> fx.Node:
    named = arguments(norm)
    parts = [named["input"], named["normalized_shape"], None, *([None] if operator(norm) == "layer_norm" else [])]
    return rewriter.insert(_NORMS[operator(norm)], *parts, named["eps"], before=norm)


def _left_behind(norm: fx.Node, shift: Tensor, rewriter: Rewriter) -> fx.Node:
    bias, dtype = arguments(norm)["bias"], norm.meta["val"].dtype
    key = f"shift of {arguments(norm).get('weight')}"
    return rewriter.once(bias, key, lambda: rewriter.weight(shift, str(bias.target), dtype, bias))


def _add_to_bias(shift: _Shift, rewriter: Rewriter) -> None:
    named = arguments(shift.reader)
    weight, bias = named["weight"], named.get("bias")

    def make() -> fx.Node:
        dtype = rewriter.program.weight(weight if bias is None else bias).dtype
        value = shift.value if bias is None else rewriter.value(bias) + shift.value
        return rewriter.weight(value, bias_name(weight), dtype, bias)

    key = f"bias of {weight.target} after {shift.norm}"
    rewriter.rewire(shift.reader, bias=rewriter.once(weight if bias is None else bias, key, make))


def _linear_readers(norms: Iterable[fx.Node]) -> list[tuple[fx.Node, fx.Node]] | None:
    """Return the linear operators that read some values after moves, with what each reads; None if others do too."""
    found, pending = [], list(norms)
    while pending:
        value = pending.pop()
        for user in value.users:
            if is_linear_operator(user) and arguments(user)["input"] is value:
                found.append((user, value))
            elif operator(user) in _MOVES and user.args[0] is value:
                pending.append(user)
            else:
                return None
    return found


def _untie(rewriter: Rewriter) -> None:
    """Copy tied weights for the readers of norms whose affine can be folded then, and not before.

    That is worth its bytes where it lets what the norm normalizes be rotated or centered, which is tried on a copy.
    """
    tied = _tied_readers(rewriter.program)
    if not tied:
        return
    stuck = _Folding(rewriter).fold_all()
    trial = Rewriter(rewriter.program.clone(), rewriter.author)
    nodes = {node.name: node for node in trial.graph.nodes}
    for readers in tied.values():
        _copy_weights([nodes[reader.name] for reader in readers], trial)
    folding = _Folding(trial)
    folding.fold_all()
    bare = folding.commit()
    trial.sweep()
    analysis = analyze(trial.program)
    freed = {node for symmetry in (Symmetry.ORTHOGONAL, Symmetry.CENTER) for space in analysis.under(symmetry)
             if space.free for node in space.norms}  # fmt: skip
    costs: dict[str, int] = {}
    for norm, readers in tied.items():
        if norm in stuck and bare.get(norm.name) in freed:
            costs |= _copy_weights(readers, rewriter)
    if costs:
        rewriter.note(untied_bytes=costs)


def _tied_readers(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Return for each norm the linear operators behind it whose weight something else reads too."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for norms in _by_weight(program).values():
        reached = _reached(norms)
        linears = [node for node in reached if is_linear_operator(node) and arguments(node)["weight"].op == "get_attr"]
        tied = [node for node in linears if any(user not in reached for user in arguments(node)["weight"].users)]
        if tied:
            found[norms[0]] = tied
    return found


def _reached(norms: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """Return what follows from some values, up to the linear operators and norms that come next."""
    found: dict[fx.Node, None] = {}
    pending = list(norms)
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found[user] = None
                if not is_linear_operator(user) and operator(user) not in _NORMS:
                    pending.append(user)
    return found


def _copy_weights(readers: Iterable[fx.Node], rewriter: Rewriter) -> dict[str, int]:
    """Give some readers copies of their weights, one for all that share it; return the bytes by weight."""
    costs = {}
    for reader in readers:
        weight = arguments(reader)["weight"]
        held = rewriter.program.weight(weight)
        parameter = isinstance(held, nn.Parameter)

        def make(held: Tensor = held, weight: fx.Node = weight, parameter: bool = parameter) -> fx.Node:
            return rewriter.weight(held, f"{weight.target}_untied", held.dtype, parameter=parameter)

        rewriter.rewire(reader, weight=rewriter.once(weight, "untied", make))
        rewriter.touch(reader, f"reads a copy of {weight.target} of its own ({held.nbytes:,} bytes)")
        costs[str(weight.target)] = held.nbytes
    return costs
