"""What the user reads when a model cannot be captured: the line of the model, and what usually helps."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from graphopt.capture import capture
from graphopt.errors import GraphoptError

torch.library.define("graphopt_tests::no_fake", "(Tensor x) -> Tensor")
torch.library.impl("graphopt_tests::no_fake", "cpu", lambda x: x + 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Branch(Model):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # HERE
            return self.linear(x)
        return x


class Loop(Model):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() < 10:  # HERE
            x = x * 2
        return x


class Item(Model):
    def forward(self, x: Tensor) -> Tensor:
        count = int(x.abs().sum().item())  # HERE
        return x[:count]


class Numpy(Model):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(self.linear(x).numpy()))  # HERE


class CustomOperator(Model):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.graphopt_tests.no_fake(x)  # HERE


class State(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)  # HERE
        return self.linear(x) + self.count


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:  # INNER
            return x
        return -x


class Outer(Model):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.linear(x))


class Own(Model):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch._subclasses.FakeTensor) or torch.compiler.is_exporting():
            raise KeyError("a mistake of its own")  # HERE
        return x


CASES = [
    (
        Branch,
        "forward takes a decision that depends on a tensor's value",
        "compute both and choose with torch.where, or export that part on its own",
    ),
    (
        Loop,
        "forward takes a decision that depends on a tensor's value",
        "compute both and choose with torch.where, or export that part on its own",
    ),
    (Item, "forward turns a tensor's value into a Python number", "leave out .item()"),
    (Numpy, "forward leaves torch for numpy", "use the torch function of the same name"),
    (
        CustomOperator,
        "operator graphopt_tests.no_fake.default has no rule",
        "register one with torch.library.register_fake",
    ),
    (
        State,
        "updates its buffer count in forward",
        "take the old value as an input and return the new one as an output",
    ),
    (Own, "KeyError: 'a mistake of its own'", "write that line with torch operators"),
]


def line_of(cls: type, mark: str = "# HERE") -> int:
    lines, first = inspect.getsourcelines(cls)
    return first + next(i for i, line in enumerate(lines) if mark in line)


@pytest.mark.parametrize(("cls", "what", "helps"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_line_and_what_helps(
    cls: type[nn.Module], what: str, helps: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GraphoptError) as info:
        capture(cls(), torch.ones(3, 4))
    text = str(info.value)
    assert what in text
    assert helps in text
    assert f"{__file__}:{line_of(cls)}, in forward" in text
    assert "\n" not in text
    # torch.export prints the unfinished graph and logs tracebacks; the user sees neither.
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_the_original_is_the_cause() -> None:
    with pytest.raises(GraphoptError) as info:
        capture(Branch(), torch.ones(3, 4))
    assert type(info.value.__cause__).__name__ == "GuardOnDataDependentSymNode"


def test_the_line_is_that_of_the_submodule() -> None:
    with pytest.raises(GraphoptError) as info:
        capture(Outer(), torch.ones(3, 4))
    assert f"{__file__}:{line_of(Inner, '# INNER')}, in forward" in str(info.value)


def test_a_failure_inside_a_library_names_the_users_line_if_there_is_one() -> None:
    """torch's own code raises here; the line is the one that called it."""

    class Wrong(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.reshape(2, 6))  # HERE

    with pytest.raises(GraphoptError, match="the model itself fails on the example inputs: RuntimeError") as info:
        capture(Wrong(), torch.ones(3, 4))
    assert f"{__file__}:{line_of(Wrong)}, in forward (`return self.linear(x.reshape(2, 6))  # HERE`)" in str(info.value)
    assert isinstance(info.value.__cause__, RuntimeError)


def test_a_failure_of_a_librarys_model_names_the_library() -> None:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
        )
    )
    with pytest.raises(GraphoptError, match=r"the model itself fails .* at .*modeling_\w+\.py:\d+, in forward"):
        capture(model, torch.ones(1, 3, 9, 9))


class Fixed(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.ones(3, 4)


class AtLeastFour(Model):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 3:] * 2 if x.shape[0] > 4 else x * 2


@pytest.mark.parametrize(
    ("make", "shapes", "match"),
    [
        (
            Fixed,
            ({0: Dim("batch")},),
            r"names a dimension that the model fixes at one size .*batch.*constant \(3\).*suggested: batch = 3",
        ),
        (Fixed, {"y": {0: Dim("batch")}}, r"dynamic_shapes does not fit the inputs .*\['x'\]"),
        (Fixed, ({0: Dim("a")}, {0: Dim("b")}), "dynamic_shapes does not fit the inputs"),
        (
            AtLeastFour,
            ({0: Dim("batch", min=2, max=9)},),
            "dynamic_shapes allows sizes that the model does not take .*batch",
        ),
    ],
)
def test_dynamic_shapes_that_do_not_hold(make: Callable[[], nn.Module], shapes: Any, match: str) -> None:
    with pytest.raises(GraphoptError, match=match) as info:
        capture(make(), torch.ones(3, 4), shapes)
    assert "\n" not in str(info.value)
    assert "draft_export" not in str(info.value)


def test_torchscript_is_refused_by_name() -> None:
    class Scripted(Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.jit.trace(nn.Linear(4, 4), torch.ones(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    with pytest.raises(GraphoptError, match="its submodule 'head' is TorchScript"):
        capture(Scripted(), torch.ones(3, 4))


def test_dependence_on_python_state_is_noticed() -> None:
    """The graph would be right for one call and wrong for the next."""
    calls = []

    class Counts(Model):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.linear(x) * len(calls)

    with pytest.raises(GraphoptError, match="computes something else than the model on the example inputs"):
        capture(Counts(), torch.ones(3, 4))


def test_control_flow_operators_are_refused_with_their_line() -> None:
    class Cond(Model):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with pytest.raises(GraphoptError, match=r"uses cond"):
        capture(Cond(), torch.ones(3, 4))


def test_interrupt_passes_through() -> None:
    class Interrupted(Model):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(Interrupted(), torch.ones(3, 4))
