"""rotate: residual streams, values per head, and online transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from harness import CONTEXT, Example, apply, before, captured, check_means_the_same, four_tests, operators
from small_decoder import Decoder, example_ids
from torch import Tensor, nn
from torch.nn import functional

from graphopt.analysis import node_macs
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import operator
from graphopt.passes import Rotate
from graphopt.pipeline import Context
from graphopt.pipeline.validation import Validator

PASS = Rotate()

PRE = Example("pre_norm", Decoder, example_ids, fires=2)
POST = Example(
    "post_norm",
    lambda: Decoder(post=True),
    example_ids,
    fires=1,
    declines="writes it, an RMS norm with an affine (after",
)
EXAMPLES = [
    PRE,
    POST,
    Example("layer_norm", lambda: Decoder(norm=nn.LayerNorm), example_ids, fires=2),
    Example("nothing_to_rotate", lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU()), (2, 8), fires=0),
    Example(
        "linear_chain",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)),
        (2, 4),
        fires=1,
        golden="""
        linear = linear(input_1, @0.weight, @0.bias)
        linear_1 = linear(linear, @1.weight, @1.bias)
        return linear_1
        """,
    ),
    Example("input", lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)), (2, 8), fires=0),
]
test_fires, test_declines, test_means_the_same, _ = four_tests(PASS, EXAMPLES)


@pytest.mark.parametrize(
    "pass_",
    [
        Rotate(kind="orthogonal"),
        Rotate(block_size=4),
        Rotate(values=False),
        Rotate(residual=False),
        Rotate(queries_keys=True),
        Rotate(hidden=True),
        Rotate(queries_keys=True, hidden=True, block_size=4),
        Rotate(explicit=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [Decoder, lambda: Decoder(post=True, spelled=True)], ids=["pre", "post"])
def test_every_option_means_the_same(pass_: Rotate, build: type[Decoder]) -> None:
    check_means_the_same(pass_, Example("option", build, example_ids))


def test_a_second_rotation_is_a_rotation() -> None:
    """Not idempotent, but exact: rotating again with another seed undoes nothing and breaks nothing."""
    once, _ = apply(PASS, before(PRE, PASS))
    validator = Validator(once, seed=5)
    twice, changes = apply(PASS, once)
    assert changes.changed
    assert validator.check(twice, changes.unrounded)[0] <= PASS.tolerance


def test_residual_weights_are_those_of_the_rotation() -> None:
    """Against the definition: the table becomes E Q, and Q is the same everywhere and orthogonal."""
    program = before(PRE, PASS)
    after, _ = apply(PASS, program)
    old, new = (each.weights["table.weight"].double() for each in (program, after))
    q = torch.linalg.lstsq(old, new).solution if len(old) >= old.shape[1] else torch.linalg.pinv(old) @ new
    torch.testing.assert_close(old @ q, new, rtol=0, atol=1e-6)
    gate, rotated = (each.weights["gate.weight"].double() for each in (program, after))
    torch.testing.assert_close(rotated @ rotated.mT, gate @ gate.mT, rtol=1e-5, atol=1e-6)  # W Q (W Q)ᵀ = W Wᵀ
    assert not torch.allclose(gate, rotated, atol=1e-2)


def test_values_have_a_rotation_for_each_key_head() -> None:
    _, changes = apply(Rotate(residual=False), before(PRE, PASS))
    assert [site.reason.partition(", ")[2] for site in changes.touched] == ["3 weights, 2 rotations"]


def test_a_matrix_from_a_file(tmp_path: Path) -> None:
    matrix = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    np.save(tmp_path / "q.npy", matrix.numpy())
    pass_ = Rotate(file=str(tmp_path / "q.npy"), values=False)
    program = before(PRE, pass_)
    after, _ = apply(pass_, program)
    expected = program.weights["table.weight"].double() @ matrix.double()
    torch.testing.assert_close(after.weights["table.weight"].double(), expected, rtol=0, atol=1e-6)
    check_means_the_same(pass_, PRE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((3, 3)), "is not orthogonal"),
        (np.ones((3, 2)), "holds no square matrix"),
        (np.eye(3, dtype=np.int64), "holds no square matrix of floats"),
        (np.array([{}], dtype=object), "cannot be read"),
        (np.full((2, 2), np.nan), "is not orthogonal"),
        (None, "cannot be read"),
    ],
    ids=["singular", "oblong", "integers", "pickle", "nan", "missing"],
)
def test_a_bad_file_is_refused(value: np.ndarray | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "q.npy"
    if value is not None:
        np.save(path, value, allow_pickle=True)
    with pytest.raises(GraphoptError, match=message):
        apply(Rotate(file=str(path)), before(PRE, PASS))


def test_a_block_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(GraphoptError, match=r"rotate\.block_size=5 does not divide the 12 coordinates of table\.out"):
        apply(Rotate(block_size=5), before(PRE, PASS))


def test_block_rotations_keep_blocks_apart() -> None:
    program = before(PRE, PASS)
    after, _ = apply(Rotate(block_size=4, values=False), program)
    old, new = (each.weights["head.weight"].double().unflatten(1, (3, 4)) for each in (program, after))
    torch.testing.assert_close(old.square().sum(-1), new.square().sum(-1), rtol=1e-5, atol=1e-6)


def test_online_transforms_are_inserted_and_their_cost_is_shown() -> None:
    after, changes = apply(Rotate(queries_keys=True, hidden=True), before(PRE, PASS))
    transforms = [node for node in after.nodes if operator(node) == "graphopt.hadamard"]
    assert len(transforms) == 3
    reasons = " ".join(site.reason for site in changes.touched)
    for node in transforms:
        assert f"{node_macs(node):,} MACs" in reasons
    # Query and key are each 2 x 4 heads x 5 places of 4 coordinates; the hidden vectors are 10 of 20.
    assert sorted(node.meta["val"].numel() for node in transforms) == [160, 160, 200]


def test_spelled_attention_is_transformed_before_the_transposition() -> None:
    example = Example("spelled", lambda: Decoder(spelled=True), example_ids)
    after, changes = apply(Rotate(queries_keys=True), before(example, PASS))
    assert operators(after).count("graphopt.hadamard") == 2
    check_means_the_same(Rotate(queries_keys=True), example)
    assert any("queries and keys" in site.reason for site in changes.touched)


@pytest.mark.parametrize(
    "options", [{"partial": True}, {"spelled": True, "capped": True}], ids=lambda each: [*each][-1]
)
def test_queries_and_keys_of_other_attention(options: dict[str, bool]) -> None:
    """Half of a head that weights can rotate leaves the other half; what caps scores does not hide the softmax."""
    example = Example("attention", lambda: Decoder(**options), example_ids)
    after, _ = apply(Rotate(queries_keys=True), before(example, PASS))
    assert operators(after).count("graphopt.hadamard") == 2
    check_means_the_same(Rotate(queries_keys=True), example)


class _Experts(nn.Module):
    """An MLP whose second weight is that of an expert chosen by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.down[x[:, 0].argmax().remainder(3)[None]]
        y: Tensor = functional.silu(self.up(x)) @ chosen
        return y


def test_a_product_by_a_computed_weight_is_declined_by_name() -> None:
    example = Example("experts", _Experts, (2, 5, 6))
    after, changes = apply(Rotate(residual=False, values=False, hidden=True), before(example, PASS))
    assert "graphopt.hadamard" not in operators(after)
    assert [site.reason for site in changes.skipped] == [
        "multiplies by a weight computed from down, not by the weight itself"
    ]


def test_explicit_linears_only_where_that_frees_the_residual() -> None:
    after, changes = apply(Rotate(explicit=True), before(POST, PASS))
    assert changes.facts["explicit_linears"] == 1
    assert changes.facts["explicit_macs_per_token"] == 12 * 12
    assert [site.reason for site in changes.touched if "now a linear" in site.reason] == [
        "writes the residual: now a linear does, [12, 12], 144 MACs a token"
    ]
    assert "after.rotation.weight" in after.weights
    _, changes = apply(Rotate(explicit=True), before(PRE, PASS))
    assert "explicit_linears" not in changes.facts


class _Returned(nn.Module):
    """A stream whose last norm, with its affine, is returned beside what a head makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8), nn.RMSNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.last, self.head = nn.RMSNorm(8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        x = self.last(x + self.down(functional.silu(self.up(self.norm(x)))))
        return x, self.head(x)


def test_a_returned_norm_needs_one_explicit_linear() -> None:
    example = Example("returned", _Returned, example_ids)
    program = before(example, PASS)
    assert not apply(PASS, program)[1].touched
    after, changes = apply(Rotate(explicit=True), program)
    assert changes.facts["explicit_macs_per_token"] == 8 * 8
    reasons = [site.reason for site in changes.touched]
    assert reasons[0] == "has an affine that others than linears read: now a linear takes it, [8, 8], 64 MACs a token"
    assert reasons[-1] == "rotated table.out (8), 6 weights"
    assert "last.rotation.weight" in after.weights
    check_means_the_same(Rotate(explicit=True), example)


def test_numbers_before_and_after_where_data_is_given() -> None:
    """Planted outliers are what the rotation takes away."""

    def planted(module: Decoder) -> None:
        module.table.weight[:, 3] *= 50

    example = Example("outlier", lambda: Decoder(16), example_ids, prepare=planted)
    program = before(example, PASS)
    context = Context(CONTEXT.target, calibration=Batches([example_ids()], program))
    with torch.no_grad():
        facts = Rotate(hidden=True).run(program.clone(), context).facts
    sites = facts["sites"]
    names = {node.name for node in program.nodes if operator(node) == "linear"}
    assert set(sites) == names
    first = next(iter(sites.values()))
    assert first["after"]["kurtosis"] < first["before"]["kurtosis"]
    assert first["after"]["sqnr_db"] > first["before"]["sqnr_db"]
    assert first["after"]["qsur"] > first["before"]["qsur"]
    assert set(first["before"]) == {"kurtosis", "max_to_median", "sqnr_db", "qsur"}


def test_a_seed_decides() -> None:
    program = before(PRE, PASS)

    def weights(seed: int) -> Tensor:
        after = program.clone()
        with torch.no_grad():
            PASS.run(after, Context(CONTEXT.target, seed=seed))
        return after.weights["head.weight"]

    assert torch.equal(weights(0), weights(0))
    assert not torch.allclose(weights(0), weights(1))
    assert captured(PRE)
