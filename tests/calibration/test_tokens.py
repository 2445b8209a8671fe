"""What tokens count: attention against a spelled-out softmax, gradients against autograd on the module itself."""

from __future__ import annotations

import pytest
import torch
from small_decoder import Decoder
from torch import Tensor, fx, nn
from torch.nn import functional

from graphopt import capture
from graphopt.calibration import Batches
from graphopt.calibration.tokens import attention_weights, gradient_weights, nearest_attention
from graphopt.errors import GraphoptError
from graphopt.ir import Program, operator
from graphopt.ir.arguments import arguments
from graphopt.progress import Silent


def linears(program: Program) -> dict[str, fx.Node]:
    return {
        str(arguments(node)["weight"].target).removesuffix(".weight"): node
        for node in program.graph.nodes
        if operator(node) == "linear"
    }


class Attention(nn.Module):
    """One block: projections, attention of two heads, an output projection, and a layer behind it."""

    def __init__(self, spelled: bool, causal: bool, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(8, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.after = nn.Linear(8, 8)
        self.spelled, self.causal, self.masked = spelled, causal, masked

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return q, k, v

    def mask(self, length: int) -> Tensor:
        hidden = torch.zeros(length, length)
        if self.masked:
            hidden[:, 1] = -torch.inf
        if self.causal:
            hidden = hidden + torch.full((length, length), -torch.inf).triu(1)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        q, k, v = self.heads(x)
        length = x.shape[1]
        if self.spelled:
            y = torch.softmax(q @ k.transpose(-1, -2) / 2 + self.mask(length), -1) @ v
        elif self.masked:
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(length))
        else:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.after(x + self.o(y.transpose(1, 2).flatten(2)))
        return out


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_attention_that_tokens_draw(spelled: bool, causal: bool, masked: bool) -> None:
    module = Attention(spelled, causal, masked).eval()
    data = [(torch.randn(2, 5, 8),) for _ in range(3)]
    program = capture(module, data[0])
    sites = linears(program)
    found = attention_weights(program, list(sites.values()), Batches(data, program), Silent())
    assert set(found) == set(sites.values()), "every layer has an attention that it feeds, or one before it"
    for index, (x,) in enumerate(data):
        q, k, _ = module.heads(module.before(x))
        received = torch.softmax(q @ k.mT / 2 + module.mask(5), -1).sum((1, 2))
        low, high = received.amin(-1, keepdim=True), received.amax(-1, keepdim=True)
        expected = (0.01 + 0.99 * (received - low) / (high - low)).square().reshape(-1)
        for site in found:
            made = found[site][index]
            assert made is not None
            torch.testing.assert_close(made, expected.detach(), rtol=1e-4, atol=1e-5)


def test_each_layer_takes_the_attention_of_its_block() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Attention(False, True, False), Attention(True, False, False)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x + self.two(x + self.one(x)))
            return out

    program = capture(Two().eval(), (torch.randn(2, 5, 8),))
    sites = linears(program)
    nearest = nearest_attention(program, list(sites.values()))
    by_name = {name: operator(nearest[site]) for name, site in sites.items()}
    first = "scaled_dot_product_attention"
    for name in ("one.q", "one.k", "one.v", "one.o", "one.after"):
        assert by_name[name] == first, name
    kept = {id(nearest[sites[name]]) for name in ("two.q", "two.k", "two.v", "two.o", "two.after", "head")}
    assert len(kept) == 1
    assert nearest[sites["one.q"]] is not nearest[sites["two.q"]]


def test_without_attention_there_is_nothing() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    data = Batches([(torch.randn(2, 4),)], program)
    assert attention_weights(program, list(linears(program).values()), data, Silent()) == {}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradients_of_a_given_loss(parts: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    data = [(torch.randn(5, 6),) for _ in range(3)]
    program = capture(module, data[0])
    sites = linears(program)

    def loss(model: nn.Module, batch: object) -> Tensor:
        assert isinstance(batch, tuple)
        out: Tensor = model(*batch).square().sum()
        return out

    moments: dict[fx.Node, Tensor] = {}
    found = gradient_weights(
        program, dict.fromkeys(sites.values(), parts), Batches(data, program), Silent(), loss, outputs=moments
    )
    expected: dict[str, list[Tensor]] = {"0": [], "2": []}
    second: dict[str, Tensor] = {"0": torch.zeros(8, 8), "2": torch.zeros(4, 4)}
    for (x,) in data:
        first = module[0](x).detach().requires_grad_()
        last = module[2](module[1](first))
        last.retain_grad()
        last.square().sum().backward()
        for name, value in (("0", first), ("2", last)):
            assert value.grad is not None
            expected[name].append(value.grad.square().reshape(5, parts, -1).mean(-1).T)
            second[name] = second[name] + value.grad.T @ value.grad
    for name, values in expected.items():
        mean, sums = torch.stack(values).mean(), torch.stack([each.sum() for each in values])
        share = sums.sum() ** 2 / (len(sums) * sums.square().sum())
        eye = torch.eye(len(second[name]))
        total = share * second[name] / second[name].diagonal().mean() + (1 - share) * eye
        torch.testing.assert_close(moments[sites[name]].float(), total, rtol=1e-3, atol=1e-4)
        for made, value in zip(found[sites[name]], values, strict=True):
            assert made is not None
            torch.testing.assert_close(made, share * value / mean + 1 - share, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_single_batch_are_hardly_trusted() -> None:
    """Nine of ten batches say nothing: the tenth, however loud, moves weights by a tenth."""
    module = nn.Sequential(nn.Linear(4, 2)).eval()
    data = [(torch.randn(6, 4) * (index == 3),) for index in range(10)]
    program = capture(module, data[0])
    (site,) = linears(program).values()

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        out: Tensor = (model(*batch) * batch[0].abs().sum()).sum()
        return out

    found = gradient_weights(program, {site: 1}, Batches(data, program), Silent(), loss)[site]
    values = [float(each.mean()) for each in found if each is not None]
    assert values[0] == pytest.approx(0.9)
    assert values[3] == pytest.approx(0.1 * 10 + 0.9)


def test_own_loss_is_the_fisher_information_of_drawn_labels() -> None:
    """Over many draws the mean squared gradient of the logits is p (1 - p)."""
    module = nn.Sequential(nn.Linear(4, 3)).eval()
    x = torch.randn(1, 4)
    data = [(x.expand(4000, 4),)]
    program = capture(module, data[0])
    (site,) = linears(program).values()
    found = gradient_weights(program, {site: 3}, Batches(data, program), Silent())[site][0]
    assert found is not None
    p = torch.softmax(module(x)[0].detach(), -1)
    expected = p * (1 - p)
    ratio = found.mean(1) / found.mean()
    torch.testing.assert_close(ratio, expected / expected.mean(), rtol=0.1, atol=0.02)


def test_convolutions_have_a_weight_for_each_position() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 2)).eval()
    data = [(torch.randn(2, 3, 5, 5),)]
    program = capture(module, data[0])
    site = next(node for node in program.graph.nodes if operator(node) == "conv2d")
    found = gradient_weights(program, {site: 2}, Batches(data, program), Silent())[site][0]
    assert found is not None
    assert found.shape == (2, 2 * 9)


def test_what_the_loss_does_not_depend_on_has_no_weights() -> None:
    program = capture(Decoder().eval(), (torch.randint(11, (2, 5)),))
    sites = linears(program)
    data = [(torch.randint(11, (2, 5)),)]

    def nothing(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        model(*batch)
        return torch.zeros((), requires_grad=True) * 1

    found = gradient_weights(program, dict.fromkeys(sites.values(), 1), Batches(data, program), Silent(), nothing)
    assert all(each == [None] for each in found.values())
    with pytest.raises(GraphoptError, match="loss must return a single number"):
        gradient_weights(program, {sites["q"]: 1}, Batches(data, program), Silent(), lambda m, b: m(*b))


def test_gradients_pass_quantized_activations() -> None:
    from graphopt.passes import QuantizeActivations
    from graphopt.pipeline import Context, run_passes
    from graphopt.target import Target

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    data = [(torch.randn(5, 4),)]
    program = capture(module, data[0])
    after, _ = run_passes(program, [QuantizeActivations()], Context(Target(name="none", backend="none")))
    plain, quantized = (
        gradient_weights(each, dict.fromkeys(linears(each).values(), 1), Batches(data, each), Silent())
        for each in (program, after)
    )
    for before, behind in zip(plain.values(), quantized.values(), strict=True):
        assert before[0] is not None
        assert behind[0] is not None
        torch.testing.assert_close(before[0], behind[0])
