"""Permutations and reshapes."""

from __future__ import annotations

import torch
from harness import Example, Function, four_tests

from graphopt.passes import Canonicalize

SHAPE = (2, 4, 6, 3)

EXAMPLES = [
    Example(
        "transposes_that_cancel",
        lambda: Function(lambda x: torch.sin(torch.sin(x).transpose(1, 2).transpose(2, 1))),
        SHAPE,
        fires=1,
        rule="merge_permutations",
        golden="""
        sin = sin(x)
        sin_1 = sin(sin)
        return sin_1
        """,
    ),
    Example(
        "permutations_that_cancel",
        lambda: Function(lambda x: torch.sin(torch.sin(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2))),
        SHAPE,
        fires=1,
        rule="merge_permutations",
        golden="""
        sin = sin(x)
        sin_1 = sin(sin)
        return sin_1
        """,
    ),
    Example(
        "permutations_merged",
        lambda: Function(lambda x: x.permute(0, 2, 3, 1).transpose(1, 2)),
        SHAPE,
        fires=1,
        rule="merge_permutations",
        golden="""
        permute_1 = permute(x, [0, 3, 2, 1])
        return permute_1
        """,
    ),
    Example(
        "permutation_that_moves_nothing",
        lambda: Function(lambda x: torch.sin(torch.sin(x).permute(0, 1, 2, -1))),
        SHAPE,
        fires=1,
        rule="drop_permutation",
    ),
    Example(
        "axes_of_size_one_count",
        lambda: Function(lambda x: torch.sin(x.reshape(-1, 1, 1, 72).permute(0, 2, 1, 3))),
        SHAPE,
        fires=0,
        rule="drop_permutation",
    ),
    Example(
        "cancelled_input_stays_apart",
        lambda: Function(lambda x: x.transpose(1, 2).transpose(1, 2)),
        SHAPE,
        declines="the program returns it, and would return x itself",
    ),
    Example(
        "views_merged",
        lambda: Function(lambda x: torch.sin(torch.sin(x).view(-1, 24, 3).view(-1, 8, 9).view(-1, 72))),
        SHAPE,
        golden="""
        sin = sin(x)
        reshape_2 = reshape(sin, [-1, 72])
        sin_1 = sin(reshape_2)
        return sin_1
        """,
        batch=False,
    ),
    Example(
        "view_becomes_reshape",
        lambda: Function(lambda x: torch.sin(x).view(x.shape[0], 72)),
        SHAPE,
        golden="""
        sin = sin(x)
        reshape = reshape(sin, [2, 72])
        return reshape
        """,
    ),
    Example(
        "view_of_a_dropped_copy",
        lambda: Function(lambda x: torch.sin(torch.sin(x).transpose(1, 3).contiguous().view(-1, 72))),
        SHAPE,
        fires=1,
        rule="drop_copy",
    ),
    Example(
        "view_as_another_type_is_no_reshape",
        lambda: Function(
            lambda x: torch.ops.aten.view.dtype(torch.ops.aten.view.dtype(x, torch.int32), torch.int32) + 1
        ),
        SHAPE,
        fires=0,
        rule="merge_reshapes",
        batch=False,
    ),
]

# The bits of a float are not those of a double: float64 has nothing to say about the last one.
BITS = [example for example in EXAMPLES if "another_type" in example.name]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(
    Canonicalize(), [example for example in EXAMPLES if example not in BITS]
)
test_fires_on_bits, *_ = four_tests(Canonicalize(), BITS)
