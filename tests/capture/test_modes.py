"""Capture is for inference, and leaves the module as it found it."""

from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import GraphoptError


def state(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for name, module in model.named_modules():
        tensors = {
            k: (id(v), v.clone(), v.requires_grad)
            for k, v in {**module._parameters, **module._buffers}.items()
            if v is not None
        }
        found.append((name, module.training, sorted(module.__dict__), tensors))
    return found


def assert_unchanged(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for (*old, old_tensors), (*new, new_tensors) in zip(before, after, strict=True):
        assert old == new
        assert old_tensors.keys() == new_tensors.keys()
        for name, (identity, value, grad) in old_tensors.items():
            assert new_tensors[name][0] == identity, name
            assert torch.equal(new_tensors[name][1], value), name
            assert new_tensors[name][2] == grad, name


def test_train_mode_is_captured_as_inference_and_said() -> None:
    model = MODELS["dropout_train_mode"]()
    before = state(model.module)
    program = capture(model.module, model.example_inputs)
    assert_unchanged(before, state(model.module))
    assert program.notes == ["the model was in train mode and was captured in eval mode, as a graph for inference"]
    found = program(*model.example_inputs)
    model.module.eval()
    torch.testing.assert_close(found, model.run())
    assert capture(model.module, model.example_inputs).notes == []


def test_mixed_modes_are_restored_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = state(model)
    capture(model, torch.randn(3, 4))
    assert_unchanged(before, state(model))


def test_a_class_with_its_own_train_is_told_both_times() -> None:
    calls = []

    class Merging(nn.Module):
        """Merges its two weights for inference, as adapters do."""

        def __init__(self) -> None:
            super().__init__()
            self.base, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)

        def train(self, mode: bool = True) -> "Merging":
            calls.append(mode)
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.extra(x)

    model = Merging()
    capture(model, torch.ones(1, 4))
    assert calls == [False, True]
    assert model.training


def test_what_forward_and_tracing_leave_behind_is_undone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("rebound", torch.zeros(()))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.linear(x)
            self.rebound = self.rebound + 1
            self.calls += 1
            return self.last * 2

    model = Counting()
    before = state(model)
    with pytest.raises(
        GraphoptError, match=r"updates its buffer (calls|rebound) in forward at .*test_modes.py:\d+, in forward"
    ):
        capture(model, torch.ones(1, 4))
    assert_unchanged(before, state(model))


def test_attributes_set_in_forward_are_not_left_abstract() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.linear(x)
            return self.last * 2

    model = Remembering()
    before = state(model)
    capture(model, torch.ones(1, 4))
    assert_unchanged(before, state(model))
    hooked = MODELS["weight_norm_hook"]()
    capture(hooked.module, hooked.example_inputs)
    assert not any("Fake" in type(value).__name__ for m in hooked.module.modules() for value in vars(m).values())
    hooked.run()


class HooksItself(nn.Module):
    """Registers a hook in its first call and remembers that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.hooked = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.inner.register_forward_hook(lambda module, args, output: output + 1)
            self.hooked = True
        return self.inner(x)


def test_hooks_registered_in_forward_go_with_what_forward_remembers_of_them() -> None:
    x, never, after = torch.randn(2, 3), HooksItself().eval(), HooksItself().eval()
    after.load_state_dict(never.state_dict())
    capture(after, x)
    assert not after.inner._forward_hooks
    assert torch.equal(after(x), never(x))


def test_failure_restores_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return self.norm(x) if x.sum() > 0 else x

    model = Branching()
    before = state(model)
    with pytest.raises(GraphoptError):
        capture(model, torch.ones(2, 4))
    assert_unchanged(before, state(model))


def test_random_state_is_left_alone() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    capture(Noise(), torch.ones(4))
    assert torch.equal(torch.rand(3), expected)


def test_program_exported_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    exported = torch.export.export(model.train(), (torch.randn(3, 4),))
    with pytest.raises(GraphoptError, match=r"exported in train mode .*call model.eval\(\) before torch.export.export"):
        capture(exported)
    untracked = nn.BatchNorm1d(4, track_running_stats=False).eval()
    capture(torch.export.export(untracked, (torch.randn(3, 4),)))


def test_inference_mode_around_capture() -> None:
    model = nn.Linear(4, 4)
    with torch.inference_mode():
        program = capture(model, torch.ones(2, 4))
    x = torch.randn(2, 4, requires_grad=True)
    program(x).sum().backward()
    assert x.grad is not None


def test_a_model_made_in_inference_mode_is_captured_and_left_as_it_was() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.norm(x)))

    with torch.inference_mode():
        model = Tied()
    assert all(tensor.is_inference() for tensor in model.state_dict().values())
    before, x = state(model), torch.randn(3, 4)
    program = capture(model, x)
    assert_unchanged(before, state(model))
    assert model.norm.running_mean.is_inference()
    assert not any(weight.is_inference() for weight in program.weights.values())
    assert program.aliases == {"second.weight": "first.weight"}
    with torch.no_grad():
        torch.testing.assert_close(program(x), model.eval()(x))
