"""The zoo's models are captured whole, and no part of them is idle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from honest_values import weight_effects
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves
from zoo import CAPTURED, FEW, MODELS, branch_contributions, built, capture

import graphopt


def _entries(names: tuple[str, ...]) -> list[Any]:
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


every_captured = pytest.mark.parametrize("name", _entries(CAPTURED))
every_model = pytest.mark.parametrize("name", _entries(tuple(MODELS)))


def _assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@every_captured
def test_captured_computes_what_the_model_does(name: str) -> None:
    model, inputs = built(name)
    second = MODELS[name].second_inputs()
    assert any(second[key].shape != value.shape for key, value in inputs.items())
    for given in (inputs, second):
        with torch.no_grad():
            _assert_same(capture(name)(**given), model(**given))


@every_captured
def test_dimensions_stay_symbols(name: str) -> None:
    dims = {dim.__name__ for dim in tree_leaves(MODELS[name].dynamic_shapes) if isinstance(dim, Dim)}
    assert "batch" in dims
    assert set(capture(name).dimension_names.values()) == dims


@pytest.mark.parametrize("name", _entries(tuple(name for name, entry in MODELS.items() if entry.refused)))
def test_refused(name: str) -> None:
    with pytest.raises(graphopt.GraphoptError) as caught:
        capture(name)
    assert str(caught.value).endswith(MODELS[name].refused)


@every_model
def test_every_branch_contributes(name: str) -> None:
    found = branch_contributions(*built(name), MODELS[name].branches)
    assert len(found) == MODELS[name].branch_count
    assert min(found.values()) >= 0.01, found


@every_model
def test_every_weight_reaches_the_output(name: str) -> None:
    """But for the biases of keys, which a softmax takes away again, and a copy of the frequencies that nobody reads."""
    free = ("k_proj.bias", "k_lin.bias", "key.bias", "original_inv_freq")
    found = {key: value for key, value in weight_effects(*built(name)).items() if not key.endswith(free)}
    assert min(found.values()) >= 1e-3, found


@every_model
def test_no_value_of_a_fresh_model_is_left(name: str) -> None:
    model, _ = built(name)
    fresh = dict(MODELS[name].make().named_parameters())
    assert list(fresh) == [key for key, _ in model.named_parameters()]  # tied as they were
    assert len(fresh) < len(list(model.named_parameters(remove_duplicate=False))) or "tied" not in MODELS[name].note
    for key, value in model.named_parameters():
        assert value.dtype == torch.float32
        if value.ndim == 1 and key.endswith("bias"):
            assert value.abs().min() > 0 and 0.03 < value.square().mean().sqrt() < 0.5, key
        elif value.ndim == 1 and (start := fresh[key]).min() == start.max():
            used = value + 1 if start[0] == 0 else value
            assert used.min() >= 0.25 and used.max() <= 1.5 and used.std() > 0.05, key
        elif value.ndim:
            assert 0.03 < value.std() < 2, key
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_mean.std() > 0.1
            for positive in (module.weight, module.running_var):
                assert positive is not None and positive.min() >= 0.5 and positive.max() <= 1.5


def test_an_idle_branch_is_seen() -> None:
    model, inputs = copy.deepcopy(built("Llama"))
    silent = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    torch.nn.init.zeros_(silent)
    contributions = branch_contributions(model, inputs, MODELS["Llama"].branches)
    assert [name for name, value in contributions.items() if value < 0.01] == ["model.layers.1.mlp"]
    effects = weight_effects(model, inputs)
    assert effects["model.layers.1.mlp.up_proj.weight"] == 0
    assert effects["model.layers.0.mlp.up_proj.weight"] > 0.01
