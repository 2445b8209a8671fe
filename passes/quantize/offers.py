"""Schemes as levels of a search: weights as a scheme rounds them, and activations where it rounds them.

    W' = dq(q(W))        a level: the weights that an operator on integers has, in the shape they had

A weight is offered where all who read it can run on integers. Candidates get the rounded weights from the store; the
pass puts the rounding of activations into their graphs, with scales that were computed once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, fx

from graphopt.analysis.cost import resources_of
from graphopt.ir import Program, arguments
from graphopt.search import Level, Offer, Store


def scheme_offers(level: str, program: Program, quantized: Program, sites: Sequence[str], store: Store) -> list[Offer]:
    """Return a choice between float and a scheme for each weight, and put what it becomes into the store.

    `quantized` is the program with the scheme at all `sites`, the names of operators.
    """
    before, after = ({node.name: node for node in each.graph.nodes} for each in (program, quantized))
    readers: dict[fx.Node, list[fx.Node]] = {}
    for name in sites:
        readers.setdefault(arguments(before[name])["weight"], []).append(before[name])
    found = []
    for weight, nodes in readers.items():
        if set(weight.users) != set(nodes):
            continue
        made: dict[str, Tensor] = {}
        constants: set[str] = set()
        for node in nodes:
            old, new = arguments(node), arguments(after[node.name])
            for name in ("weight", "bias"):
                if isinstance(old.get(name), fx.Node) and new[name].op == "call_function":
                    made[str(old[name].target)] = _rounded(quantized, new[name])
                    constants |= {str(each.target) for each in new[name].all_input_nodes}
        unit = str(weight.target)
        store.put(unit, level, made)
        count = {"parameters": float(program.weight(weight).numel())}
        kept, biases = resources_of(program, [unit]), resources_of(program, made.keys() - {unit})
        spent = {name: cost - biases[name] for name, cost in resources_of(quantized, constants).items()}
        levels = Level("float", count | kept), Level(level, count | spent)
        found.append(Offer(unit, levels, nodes=tuple(node.name for node in nodes)))
    return found


def not_among(program: Program, weights: Collection[str]) -> dict[str, str]:
    """Return the operators that multiply by none of these weights, each with a reason to leave it."""
    found = {}
    for node in program.graph.nodes:
        weight = arguments(node).get("weight") if node.op == "call_function" else None
        if isinstance(weight, fx.Node) and str(weight.target) not in weights:
            found[node.name] = "its weight is not among those given"
    return found


def _rounded(program: Program, dequantize: fx.Node) -> Tensor:
    given = [program.weight(each) if isinstance(each, fx.Node) else each for each in dequantize.args]
    made: Tensor = dequantize.target(*given)  # type: ignore[operator]
    return made
