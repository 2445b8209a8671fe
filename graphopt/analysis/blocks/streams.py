"""Order residual branches along their streams, and group consecutive ones into layers.

A *step* is all branches that part at one source (attention and MLP side by side make one). Steps follow each other
along the post-dominators from one join to the next source. A *layer* is the group of steps that repeats along a stream:
the tandem repeat of most steps, then the same for what is left on either side. For that, steps are alike when the same
operators mix elements in them, whatever the sizes; which layers are isomorphic is a stricter question.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import fx

from graphopt.analysis.blocks.bypasses import Bypass
from graphopt.analysis.blocks.flow import Flow, is_move, is_norm, is_pointwise, mixes
from graphopt.ir.arguments import operator

_LONGEST_LAYER = 32  # steps; bounds the search for repeats


@dataclass(eq=False)
class Step:
    """The branches of one source.

    Attributes:
        end: the last of their joins.
        following: the step whose source comes next.
        link: the nodes from `end` (not included) to the next step's source (included); None where there is none.
        trail: the part of the link that belongs to this step: the norm of post-norm, an activation.
    """

    branches: list[Bypass]
    parent: Bypass | None
    following: Step | None = None
    link: list[int] | None = None
    trail: list[int] = field(default_factory=list)

    @property
    def source(self) -> int:
        return self.branches[0].source

    @property
    def end(self) -> int:
        return max(branch.join for branch in self.branches)


def parents(bypasses: Sequence[Bypass], flow: Flow) -> dict[Bypass, Bypass | None]:
    """Return for each bypass the smallest one whose body holds its join; outer ones come first."""
    owner: dict[fx.Node, Bypass] = {}
    found: dict[Bypass, Bypass | None] = {}
    for bypass in sorted(bypasses, key=lambda each: -len(each.body)):
        found[bypass] = owner.get(flow.nodes[bypass.join])
        owner.update(dict.fromkeys(bypass.body, bypass))
    return found


def streams(flow: Flow, branches: Sequence[Bypass], parent: dict[Bypass, Bypass | None]) -> list[list[Step]]:
    """Return the steps, in their streams."""
    steps: dict[tuple[Bypass | None, int], Step] = {}
    for branch in branches:
        key = parent[branch], branch.source
        steps.setdefault(key, Step([], parent[branch])).branches.append(branch)
    joined: dict[int, list[int]] = {}  # join -> sources of what is joined there
    for bypass in parent:
        joined.setdefault(bypass.join, []).append(bypass.source)
    preceding: dict[Step, list[Step]] = {}
    for step in steps.values():
        step.following = _following(flow, step, steps, joined)
        if step.following is not None:
            preceding.setdefault(step.following, []).append(step)
    for merging in preceding.values():
        if len(merging) > 1:  # two streams become one: a new one
            for step in merging:
                step.following = None
    followers = {step.following for step in steps.values()}
    found = []
    for step in steps.values():
        if step not in followers:
            stream = [step]
            while (following := stream[-1].following) is not None:
                stream.append(following)
            found.append(stream)
    for stream in found:
        _set_trails(flow, stream)
    return found


def _following(
    flow: Flow, step: Step, steps: dict[tuple[Bypass | None, int], Step], joined: dict[int, list[int]]
) -> Step | None:
    """Walk on from the step's end to the next source, but not into a join from the side.

    What enters a join by another way than its source is no stream that goes on there: an encoder's last value, read by
    attention in a decoder. Going over a concatenation from its source is staying on the stream.
    """
    node, passed = step.end, set[int]()
    while node != flow.exit:
        following = steps.get((step.parent, node))
        if following is not None and following is not step:
            return following
        if passed and node in joined and not any(source in passed for source in joined[node]):
            return None
        passed.add(node)
        node = flow.after[node]
    return None


def kind_of_step(flow: Flow, step: Step) -> Hashable:
    """Return the operators that mix elements in a step, each as often as it occurs."""
    nodes = {node for branch in step.branches for node in branch.body if node in flow.number}
    return tuple(sorted(operator(node) for node in nodes if mixes(node)))


def _set_trails(flow: Flow, stream: list[Step]) -> None:
    """Say for each step what belongs to it behind its join.

    Between two steps that is all there is, if it is made of norms and pointwise operators. Before a change of
    resolution and at the end of the stream a step has what its like have elsewhere.
    """
    usual: dict[Hashable, list[str]] = {}
    unsettled: list[tuple[Step, Hashable]] = []
    for step in stream:
        kind = kind_of_step(flow, step)
        if step.following is not None:
            source = step.following.source
            step.link = [] if source == step.end else [*sorted(flow.between(step.end, source)), source]
        if step.link is None or not all(_may_trail(flow.nodes[v]) for v in step.link):
            unsettled.append((step, kind))
            continue
        step.trail = step.link
        usual.setdefault(kind, [operator(flow.nodes[v]) for v in step.link])
    for step, kind in unsettled:
        chain = _chain(flow, step.end)
        names = [operator(flow.nodes[v]) for v in chain]
        wanted = usual.get(kind)
        if wanted is None:
            step.trail = chain[: _own_length(flow, step, chain)]
        elif names[: len(wanted)] == wanted:
            step.trail = chain[: len(wanted)]


def _may_trail(node: fx.Node) -> bool:
    return is_norm(node) or is_move(node) or is_pointwise(node)


def _chain(flow: Flow, node: int) -> list[int]:
    """Return the nodes behind `node` up to the first value that two nodes read or that is computed from two."""
    chain = []
    while len(flow.onward[node]) == 1:
        node = flow.onward[node][0]
        if node == flow.exit or len(flow.inputs[node]) > 1 or not _may_trail(flow.nodes[node]):
            break
        chain.append(node)
    return chain


def _own_length(flow: Flow, step: Step, chain: list[int]) -> int:
    """Return how much of what follows a step is its own, where no other step tells: an activation, or a norm if none
    stands before or behind its body."""
    for i, v in enumerate(chain):
        node = flow.nodes[v]
        if is_norm(node):
            normed = any(starts_with_norm(flow, branch) or _ends_with_norm(flow, branch) for branch in step.branches)
            return 0 if normed else i + 1
        if not is_move(node):
            return i + 1
    return 0


def starts_with_norm(flow: Flow, branch: Bypass) -> bool:
    """True where the source enters the body through norms only; moved data is followed to what computes with it."""
    inside = {flow.number[node] for node in branch.body if node in flow.number}
    queue, seen = [branch.source], set[int]()
    while queue:
        for v in flow.onward[queue.pop()]:
            if v in inside and v not in seen:
                seen.add(v)
                if is_move(flow.nodes[v]):
                    queue.append(v)
                elif not is_norm(flow.nodes[v]):
                    return False
    return any(is_norm(flow.nodes[v]) for v in seen)


def _ends_with_norm(flow: Flow, branch: Bypass) -> bool:
    for v in branch.ends:
        while is_move(flow.nodes[v]) and len(flow.inputs[v]) == 1:
            v = flow.inputs[v][0]
        if is_norm(flow.nodes[v]):
            return True
    return False


def layer_nodes(flow: Flow, steps: Sequence[Step]) -> set[fx.Node]:
    """Return the nodes of consecutive steps: all of their branches, what lies between them, and the last trail."""
    inside: set[int] = set()
    for step in steps:
        inside |= flow.between(step.source, step.end) | {step.end}
        inside.update(step.trail if step is steps[-1] else step.link or ())
    nodes = {flow.nodes[v] for v in inside}
    return nodes.union(*(branch.body for step in steps for branch in step.branches))


def tile(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Cut a sequence into layers, `[begin, end)` each, by its tandem repeats.

    The repeat that covers most goes first (the shorter unit where two cover the same), and takes in neighbouring units
    that have a step in common with it at the same place (a dense layer among layers of experts); then the rest on
    either side. What repeats nowhere is a layer of its own.
    """
    found: list[tuple[int, int]] = []
    queue = [(0, len(kinds))]
    while queue:
        low, high = queue.pop()
        if low == high:
            continue
        best = _longest_repeat(kinds, low, high)
        if best is None:
            found += [(i, i + 1) for i in range(low, high)]
            continue
        begin, end, size = best
        unit = kinds[begin : begin + size]
        while begin - size >= low and any(a == b for a, b in zip(kinds[begin - size : begin], unit, strict=True)):
            begin -= size
        while end + size <= high and any(a == b for a, b in zip(kinds[end : end + size], unit, strict=True)):
            end += size
        found += [(i, i + size) for i in range(begin, end, size)]
        queue += [(low, begin), (end, high)]
    return sorted(found)


def _longest_repeat(kinds: Sequence[Hashable], low: int, high: int) -> tuple[int, int, int] | None:
    """Return `(begin, end, size of the unit)` of the repeat that covers most of `[low, high)`."""
    best: tuple[int, int, int] | None = None
    for size in range(1, min((high - low) // 2, _LONGEST_LAYER) + 1):
        begin = low
        while begin + 2 * size <= high:
            end = begin + size
            while end < high and kinds[end] == kinds[end - size]:
                end += 1
            covered = (end - begin) // size * size
            if covered >= 2 * size and (best is None or covered > best[1] - best[0]):
                best = begin, begin + covered, size
            begin = max(end - size, begin) + 1
    return best


