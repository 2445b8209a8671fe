"""Residual branches, layers and cuts of a program, found in its graph alone.

    blocks = find_blocks(program)
    print(blocks)       12 layers of 2 pre-norm branches: [rms_norm → linear×3 → sdpa → linear] [rms_norm → ...]

No module's name and no architecture is known: a branch is what post-dominance says it is (`bypasses`), a layer is what
repeats along a stream (`streams`), and layers are the same where their expressions are (`isomorphism`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from graphopt.analysis.blocks.bypasses import Bypass, find_bypasses
from graphopt.analysis.blocks.flow import Flow, is_norm
from graphopt.analysis.blocks.isomorphism import Expressions, match
from graphopt.analysis.blocks.streams import (
    Step,
    kind_of_step,
    layer_nodes,
    parents,
    starts_with_norm,
    streams,
    tile,
)
from graphopt.ir.program import Program


@dataclass(frozen=True, eq=False)
class Region:
    """A value that goes around some operators and meets their result.

    Attributes:
        join: the addition or concatenation where they meet.
        source: the node where they part.
        skip: the nodes between them on the way around: none, a projection, a pool.
        body: the calls between them on the other way, in graph order, with those that serve it alone (the projection of
            another sequence to keys and values). Weights are arguments of these calls, see `weights_of`.
        ends: the nodes of the body that the join reads, maybe over additions of other branches. Without the body, an
            addition that reads an end is its other argument.
        parent: the smallest region whose body holds this one.
    """

    join: fx.Node
    source: fx.Node
    skip: tuple[fx.Node, ...]
    body: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    parent: Region | None = field(repr=False)


@dataclass(frozen=True, eq=False)
class Branch(Region):
    """A residual branch, `join = skip(source) + body(source)`.

    Branches of one source that run side by side are several, of the same join or of consecutive ones.

    Attributes:
        kind: `pre-norm` where only norms of the body read the source, `post-norm` where a norm reads the join and hands
            on the stream, else `none`.
    """

    kind: str


@dataclass(frozen=True, eq=False)
class Skip(Region):
    """A value that is concatenated with what was computed from it further down."""


@dataclass(frozen=True, eq=False)
class Layer:
    """Consecutive branches that repeat along a stream.

    Attributes:
        branches: its branches, in graph order, nested ones not among them.
        nodes: its calls, in graph order; `weights_of(layer.nodes)` are the weights they read.
        inputs: what it reads besides weights, the stream first.
        outputs: what others read of it, the stream first.
    """

    branches: tuple[Branch, ...]
    nodes: tuple[fx.Node, ...] = field(repr=False)
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Blocks:
    """What `find_blocks` found.

    Attributes:
        branches: every residual branch, nested ones too, joins in graph order.
        skips: every skip by concatenation.
        streams: the branches along each residual stream, in the order of the data. A stream inside a branch is not
            among them, except where that branch stands alone and surrounds several (one addition around a whole
            network); a stream inside a skip is.
        layers: the layers of all streams, in graph order.
        groups: the same layers, isomorphic ones together, in the order of their first.
        cuts: nodes that all dataflow from a stream's start to the outputs passes, in graph order. Weights and values
            that never touched the stream (ids, masks, positions, rotation tables, an encoder's output for a decoder)
            may go around a cut: whoever runs a program piece by piece gives each piece the values at the cuts before it
            and lets it compute those. A value returned to the caller does not count as going around. Every floating
            value that is no function of another starts a stream; one that joins another before a single convolution or
            product is a side input, and has no cuts. Two towers have two sequences of cuts, up to where they meet.
    """

    branches: tuple[Branch, ...]
    skips: tuple[Skip, ...]
    streams: tuple[tuple[Branch, ...], ...]
    layers: tuple[Layer, ...]
    groups: tuple[tuple[Layer, ...], ...]
    cuts: tuple[fx.Node, ...]

    def __str__(self) -> str:
        from graphopt.analysis.blocks.printing import blocks_text

        return blocks_text(self)


def find_blocks(program: Program) -> Blocks:
    """Find the residual branches, layers and cuts of a canonical program; nothing is changed.

    The time is about proportional to the number of nodes, times the depth of nesting.
    """
    flow = Flow(program)
    bypasses = find_bypasses(flow)
    is_branch = [each for each in bypasses if "add" in str(flow.nodes[each.join].target)]
    parent = parents(bypasses, flow)
    found_streams = streams(flow, is_branch, parent)
    kinds = {
        branch: _kind(flow, step, branch) for stream in found_streams for step in stream for branch in step.branches
    }
    regions: dict[Bypass, Branch | Skip] = {}
    for bypass, outer in parent.items():
        parts = (
            flow.nodes[bypass.join],
            flow.nodes[bypass.source],
            tuple(flow.nodes[v] for v in bypass.skip),
            bypass.body,
            tuple(flow.nodes[v] for v in bypass.ends),
            regions[outer] if outer is not None else None,
        )
        regions[bypass] = Branch(*parts, kinds[bypass]) if bypass in kinds else Skip(*parts)
    ordered = [regions[bypass] for bypass in bypasses]
    outermost = _outermost(found_streams, parent)
    layers = _layers(flow, outermost, regions)
    return Blocks(
        tuple(each for each in ordered if isinstance(each, Branch)),
        tuple(each for each in ordered if isinstance(each, Skip)),
        tuple(tuple(_branches(stream, regions)) for stream in outermost),
        tuple(layers),
        _groups(layers),
        tuple(flow.nodes[v] for v in flow.cuts()),
    )


def weights_of(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Return the weights that some calls read, each once, in the order of reading."""
    read = {each: None for node in nodes for each in node.all_input_nodes if each.op == "get_attr"}
    return tuple(read)


def correspondence(first: Layer, second: Layer) -> dict[fx.Node, fx.Node] | None:
    """Return which node of `second` each node of `first` is, or None where they are not isomorphic.

    Isomorphic layers apply the same operators with the same plain arguments to weights of the same shapes and dtypes,
    in the same arrangement. The weights and the inputs of the layers correspond as well.
    """
    return match(*((each.nodes, each.inputs[0], each.outputs[0]) for each in (first, second)))


def _kind(flow: Flow, step: Step, branch: Bypass) -> str:
    if starts_with_norm(flow, branch):
        return "pre-norm"
    return "post-norm" if any(is_norm(flow.nodes[v]) for v in step.trail) else "none"


def _outermost(found: list[list[Step]], parent: dict[Bypass, Bypass | None]) -> list[list[Step]]:
    """Return the streams that `Blocks.streams` describes."""
    longest: dict[Bypass | None, int] = {}
    of_branch = {branch: stream for stream in found for step in stream for branch in step.branches}
    for stream in found:
        longest[stream[0].parent] = max(longest.get(stream[0].parent, 0), len(stream))
    open_regions: set[Bypass | None] = {None}
    surrounding = set[Bypass]()
    for bypass, outer in parent.items():
        if outer not in open_regions:
            continue
        own = of_branch.get(bypass)
        alone = own is not None and len(own) == len(own[0].branches) == 1 and longest.get(bypass, 0) > 1
        if own is None or alone:
            open_regions.add(bypass)
        if alone:
            surrounding.add(bypass)
    return [s for s in found if s[0].parent in open_regions and s[0].branches[0] not in surrounding]


def _branches(steps: Sequence[Step], regions: dict[Bypass, Branch | Skip]) -> list[Branch]:
    found = [regions[branch] for step in steps for branch in step.branches]
    return [each for each in found if isinstance(each, Branch)]


def _layers(flow: Flow, found: list[list[Step]], regions: dict[Bypass, Branch | Skip]) -> list[Layer]:
    layers = []
    for stream in found:
        for begin, end in tile([kind_of_step(flow, step) for step in stream]):
            steps = stream[begin:end]
            last = steps[-1].trail[-1] if steps[-1].trail else steps[-1].end
            layers.append(_layer(flow, steps, flow.nodes[last], regions))
    return sorted(layers, key=lambda layer: flow.order[layer.outputs[0]])


def _layer(flow: Flow, steps: Sequence[Step], end: fx.Node, regions: dict[Bypass, Branch | Skip]) -> Layer:
    inside = layer_nodes(flow, steps)
    nodes = sorted(inside, key=flow.order.__getitem__)
    source = flow.nodes[steps[0].source]
    outside = [each for node in nodes for each in node.all_input_nodes if each not in inside]
    read = {each: None for each in outside if each.op != "get_attr"}
    seen = [node for node in nodes if any(user not in inside for user in node.users)]
    return Layer(
        tuple(_branches(steps, regions)),
        tuple(nodes),
        (source, *(each for each in read if each is not source)),
        (end, *(each for each in seen if each is not end)),
    )


def _groups(layers: Sequence[Layer]) -> tuple[tuple[Layer, ...], ...]:
    expressions = Expressions()
    alike: dict[int, list[list[Layer]]] = {}
    groups: list[list[Layer]] = []
    for layer in layers:
        candidates = alike.setdefault(expressions.number(layer.nodes, layer.inputs[0], layer.outputs[0]), [])
        group = next((each for each in candidates if correspondence(each[0], layer) is not None), None)
        if group is None:
            group = []
            candidates.append(group)
            groups.append(group)
        group.append(layer)
    return tuple(tuple(group) for group in groups)
