"""Models and data that break other quantizers: a correct file, a float island with its reason, or one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnx.backend import OnnxBackend
from graphopt.errors import GraphoptError

RECIPES = ("int8_static", "int8_dynamic")
MEASURED = pytest.param("int8", marks=pytest.mark.slow)


def _file(
    module: nn.Module, inputs: tuple[Tensor, ...], recipe: str, path: Path, batches: Any = None
) -> tuple[graphopt.Result, Any, list[Any]]:
    """Return the result, the export's report, and what the file computes on the inputs."""
    calibration = None if recipe == "int8_dynamic" else batches or [inputs] * 2
    result = graphopt.optimize(module.eval(), inputs, recipe=recipe, calibration=calibration)
    report = result.export(path, measure=False)
    return result, report, OnnxBackend().run(path, [value for value in inputs if isinstance(value, Tensor)])


class Experts(nn.Module):
    """The second layer sees the rows whose first element is large: none, in ordinary data."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.some = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, 0] > 100).nonzero().squeeze(-1)
        return self.all(x).index_add(0, rows, self.some(x[rows]))  # type: ignore[no-any-return]


def test_an_expert_without_a_token_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result, report, _ = _file(Experts(), (torch.randn(4, 8),), "int8_static", tmp_path / "m.onnx")
    (site,) = [site for site in result.trace["quantize_static"].skipped if "no sample" in site.reason]
    assert "give samples that get there" in site.reason
    assert report.fused.get("QGemm") == 1
    reached = torch.randn(4, 8)
    reached[1, 0] = 200.0
    result, report, _ = _file(Experts(), (reached,), "int8_static", tmp_path / "m.onnx")
    assert report.fused.get("QGemm") == 2


def test_an_input_left_at_zero_stays_float(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    result, _, _ = _file(module, (torch.zeros(2, 4),), "int8_static", tmp_path / "m.onnx")
    reasons = [site.reason for site in result.trace["quantize_static"].skipped]
    assert any("nothing but zeros" in reason for reason in reasons)


def test_a_branch_of_zeros_is_quantized_as_it_is(tmp_path: Path) -> None:
    """As at the end of every residual branch of a network that was just initialised."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            nn.init.zeros_(self.body.weight)
            assert self.body.bias is not None
            nn.init.zeros_(self.body.bias)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return x + self.body(x)  # type: ignore[no-any-return]

    _, report, _ = _file(Residual(), (torch.randn(2, 3, 4, 4),), "int8_static", tmp_path / "m.onnx")
    assert report.fused["QLinearConv"] == 2


class Masked(nn.Module):
    """Attention spelled out, with an additive mask [batch, 1, 1, length]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5 + mask, -1)
        return self.norm(x + self.out((weights @ v).transpose(1, 2).reshape(2, 6, 16)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", [*RECIPES, MEASURED])
@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -torch.inf, -1e9])
def test_masks_do_not_reach_calibration(hidden: float, recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 1, 6)
    mask[:, :, :, 4:] = hidden
    batches = [(torch.randn(2, 6, 16), mask) for _ in range(3)]
    module = Masked()
    _, report, (made,) = _file(module, batches[0], recipe, tmp_path / "m.onnx", batches)
    exact = module(*batches[0]).detach().numpy()
    assert np.isfinite(made).all() and np.abs(made - exact).max() < 0.1 * np.abs(exact).max()
    assert sum(report.fused.values()) >= 2


def test_infinity_where_a_range_is_wanted_is_one_sentence() -> None:
    x = torch.randn(2, 4)
    x[0, 0] = -torch.inf
    with pytest.raises(GraphoptError, match="calibration met NaN or infinity at"):
        graphopt.optimize(nn.Linear(4, 4), (torch.randn(2, 4),), recipe="int8_static", calibration=[(x,)])


class Aliases(nn.Module):
    """Returns its input, one value twice, and views of both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        return x, y, y, y.view(4, 2), x.t()


@pytest.mark.parametrize("recipe", [*RECIPES, MEASURED])
def test_outputs_that_alias(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4),)
    module = Aliases()
    _, _, made = _file(module, inputs, recipe, tmp_path / "m.onnx")
    for value, exact in zip(made, module(*inputs), strict=True):
        wanted = exact.detach().numpy()
        assert value.shape == wanted.shape and np.abs(value - wanted).max() < 0.05


class Empty(nn.Module):
    """A layer of no outputs, and one that reads no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.none, self.some = nn.Linear(4, 0), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.none(x), self.some(x)], -1), self.some(x[:0])


@pytest.mark.parametrize("recipe", [*RECIPES, "int8"])
def test_sizes_of_zero(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, _, (made, nothing) = _file(Empty(), (torch.randn(2, 4),), recipe, tmp_path / "m.onnx")
    assert made.shape == (2, 3) and nothing.shape == (0, 3)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: x + 1, (x,))  # type: ignore[no-any-return]


class Decides(Conditional):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


@pytest.mark.parametrize("module", [Conditional(), Decides()])
@pytest.mark.parametrize("recipe", RECIPES)
def test_control_flow_is_one_sentence_with_a_remedy(module: nn.Module, recipe: str) -> None:
    calibration = None if recipe == "int8_dynamic" else [(torch.randn(2, 4),)]
    with pytest.raises(GraphoptError, match=r"torch\.where.* or export that part on its own") as caught:
        graphopt.optimize(module, (torch.randn(2, 4),), recipe=recipe, calibration=calibration)
    assert "\n" not in str(caught.value)


def _raises(module: nn.Module) -> float:
    raise ValueError("the data is gone")


@pytest.mark.parametrize(
    ("evaluate", "says"), [(lambda module: float("nan"), "returned NaN"), (_raises, "ValueError: the data is gone")]
)
def test_a_metric_that_fails_is_one_sentence(evaluate: Any, says: str) -> None:
    inputs = (torch.randn(2, 4),)
    with pytest.raises(GraphoptError, match=says):
        graphopt.optimize(
            nn.Linear(4, 4), inputs, recipe="int8", calibration=[inputs], evaluate=evaluate,
            budget=graphopt.Budget(metric_drop=1),
        )  # fmt: skip


def test_a_metric_that_fails_on_a_candidate_only_is_one_sentence() -> None:
    """It is called on the original first, then while sites are chosen."""
    calls = []

    def evaluate(module: nn.Module) -> float:
        calls.append(module)
        return 1.0 if len(calls) < 3 else float("nan")

    inputs = (torch.randn(2, 4),)
    with pytest.raises(GraphoptError, match="evaluate returned NaN"):
        graphopt.optimize(
            nn.Linear(4, 4), inputs, recipe="int8", calibration=[inputs], evaluate=evaluate,
            budget=graphopt.Budget(metric_drop=0.0),
        )  # fmt: skip


class Resized(nn.Module):
    """Its resizing asks whether the batch is 2: in the example it is, as the image's sides are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        image = self.head(x).permute(0, 2, 1).reshape(x.shape[0], -1, 2, 2)
        return nn.functional.interpolate(image, size=(4, 4), mode="bilinear", align_corners=False)


def test_an_open_size_stays_open_where_an_operator_compares_it(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 6)
    result = graphopt.optimize(
        Resized().eval(), (x,), recipe="int8_dynamic", dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    assert not isinstance(result.program.placeholders[0].meta["val"].shape[0], int)
    result.export(tmp_path / "model.onnx", measure=False)
    (made,) = OnnxBackend().run(tmp_path / "model.onnx", [torch.randn(3, 4, 6)])
    assert made.shape == (3, 5, 4, 4)
