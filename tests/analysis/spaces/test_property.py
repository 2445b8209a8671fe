"""Random models: what is called free is free, and every symmetry that was planted is found."""

from __future__ import annotations

import torch
from freedom import assert_free
from graphs import Planted, Symmetric, models
from hypothesis import HealthCheck, given, settings

from graphopt.analysis.spaces import Analysis, analyze
from graphopt.passes import Canonicalize
from graphopt.pipeline import Context
from graphopt.pipeline.validation import resample
from graphopt.target import Target

CONTEXT = Context(Target(name="none", backend="none"))


def missing(analysis: Analysis, planted: Symmetric) -> list[str]:
    """Return the symmetries under which no free space is what was planted, with what there is instead."""
    found = []
    for symmetry in sorted(planted.free):
        spaces = analysis.under(symmetry)
        for space in spaces:
            places = {(member.weight, member.axis) for member in space.members}
            holds = places >= set(planted.holds) and places.isdisjoint(planted.lacks)
            alike = symmetry == "permutation" or _fibres(space.fibres, planted)
            if space.free and space.size == planted.size and holds and alike:
                break
        else:
            near = [str(s) for s in spaces if any((m.weight, m.axis) in planted.holds for m in s.members)]
            found.append(f"{symmetry} of {planted} among\n" + "\n".join(near))
    return found


def _fibres(fibres: tuple[int, ...], planted: Symmetric) -> bool:
    return planted.fibres == 1 or planted.fibres in fibres


@given(models())
@settings(max_examples=9, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_planted_symmetries_are_found_and_all_found_are_true(planted: Planted) -> None:
    program = planted.program()
    Canonicalize().run(program, CONTEXT)
    analysis = analyze(program)
    with torch.no_grad():
        assert_free(program, analysis)
        if planted.dynamic:
            assert_free(program, analysis, resample(program, 1))
    lost = [text for each in planted.symmetries for text in missing(analysis, each)]
    assert not lost, "\n\n".join(lost)
