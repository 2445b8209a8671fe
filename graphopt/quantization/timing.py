"""Whose time it is: a runtime merges operators and adds conversions, a profile names what is left.

A merged operator appears under the name of the last one that went into it; a conversion belongs to who reads through
it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from graphopt.backend import Profile
from graphopt.ir import Program, operator

CONVERSIONS = frozenset(("graphopt.quantize", "graphopt.dequantize", "graphopt.dynamic_scale"))
_MERGED = 3  # operators that a runtime merges into the one before: an addition, a clamp


def region_of(site: fx.Node, profile: Profile, sites: Collection[str]) -> list[str]:
    """Return the site, and what follows up to the operator under whose name the float runtime has merged it."""
    region = [site]
    while not profile.nodes.get(region[-1].name) and len(region) <= _MERGED and len(region[-1].users) == 1:
        (user,) = region[-1].users
        if user.op != "call_function" or user.name in sites:
            break
        region.append(user)
    return [node.name for node in region] if profile.nodes.get(region[-1].name) else [site.name]


def site_times(program: Program, profile: Profile, sites: Mapping[str, list[str]]) -> dict[str, float]:
    """Return the milliseconds of each site: of its region, and its share of the conversions that it asks for."""
    found = {name: sum(profile.nodes.get(each, 0.0) for each in region) for name, region in sites.items()}
    for node in program.graph.nodes:
        spent = profile.nodes.get(node.name, 0.0)
        if node.op != "call_function" or node.name in sites or not spent or operator(node) not in CONVERSIONS:
            continue
        readers = [user for user in _readers(node) if user.name in sites]
        for user in readers:
            found[user.name] += spent / len(readers)
    return found


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the operators that read a value through conversions."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if operator(user) in CONVERSIONS or operator(user) == "getitem":
                stack.append(user)
            else:
                found[user] = None
    return list(found)
