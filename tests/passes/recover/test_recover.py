"""Recover: what it is judged by falls or nothing changes, alike for a seed, with features and a loss of one's own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import targets
import torch
from torch import Tensor, nn

import graphopt
from graphopt import capture
from graphopt.calibration import Batches
from graphopt.errors import GraphoptError
from graphopt.ir import Program
from graphopt.ir.verify import verify
from graphopt.passes import DropBlocks, Prune, QuantizeWeights, Recover
from graphopt.passes.recover.recover import Step
from graphopt.pipeline import Context, Pass, run_passes
from graphopt.pipeline.trace import Trace
from graphopt.progress import Silent

Given = list[tuple[Tensor, ...]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Block(), Block(), Block(), nn.Linear(8, 5)).eval()


@functools.cache
def captured() -> Program:
    """The network; nothing that is run on it changes it."""
    return capture(network(), rows()[0])


def rows(count: int = 16, seed: int = 0) -> Given:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 6, generator=random),) for _ in range(count)]


def recovered(passes: list[Pass], batches: Given | None = None, **options: Any) -> tuple[Program, Program, Trace]:
    batches = rows() if batches is None else batches
    program = captured()
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True, **options)
    after, trace = run_passes(program, passes, context)
    verify(after)
    return program, after, trace


def error(program: Program, after: Program) -> float:
    return sum(float((after(*b) - program(*b)).square().sum()) for b in rows(4, seed=1))


CUT = Prune(ratio=0.5, streams=False, resolve=False, criterion="magnitude")


def test_what_pruning_lost_comes_back() -> None:
    program, before, _ = recovered([CUT])
    _, after, trace = recovered([CUT, Recover(steps=200, rate=1e-2)])
    assert error(program, after) < 0.3 * error(program, before)
    facts = trace["recover"].facts
    assert facts["loss"][1] < 0.5 * facts["loss"][0] and len(facts["features"]) == 3


def test_also_behind_removed_blocks_and_quantized_weights() -> None:
    drop = DropBlocks(unit="branches", count=1, resolve=False)
    program, before, _ = recovered([drop])
    _, after, trace = recovered([drop, Recover(steps=150, rate=1e-2)])
    assert error(program, after) < 0.5 * error(program, before)
    assert len(trace["recover"].facts["features"]) == 2
    quantize = QuantizeWeights(grid="int3", objective="plain", rounding="nearest")
    _, after, _ = recovered([CUT, Recover(steps=20), quantize])
    assert after(*rows()[0]).isfinite().all()


def test_nothing_to_gain_changes_nothing() -> None:
    _, _, trace = recovered([Recover(steps=20)])
    assert not trace["recover"].changed
    assert "gained nothing" in trace["recover"].skipped[-1].reason


def test_a_rate_that_diverges_leaves_the_best() -> None:
    program, before, _ = recovered([CUT])
    _, after, _ = recovered([CUT, Recover(steps=40, rate=1e3)])
    assert error(program, after) <= error(program, before) * 1.5


def test_deterministic() -> None:
    one, two = (recovered([CUT, Recover(steps=30)])[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.weights.values(), two.weights.values(), strict=True))


def test_the_users_loss_takes_part() -> None:
    seen: list[Any] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return (module(*batch) - 3).square().mean()

    each = Recover(steps=100, rate=1e-2, outputs=0, features=0, task=1)
    _, after, _ = recovered([CUT, each], loss=loss)
    assert seen and float((after(*rows(1, seed=2)[0]) - 3).abs().mean()) < 1


def test_only_what_is_named_learns() -> None:
    _, before, _ = recovered([CUT])
    _, after, _ = recovered([CUT, Recover(steps=40, rate=1e-2, only=("4.*",))])
    changed = [n for n in before.weights if not torch.equal(before.weights[n], after.weights[n])]
    assert changed and all(name.startswith("4.") for name in changed)


def test_the_original_is_left_as_it_was() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graphopt.optimize(model, rows()[0], recipe=[CUT, Recover(steps=20)], calibration=rows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_blocks_learn_each_for_itself() -> None:
    program, before, _ = recovered([CUT])
    _, after, trace = recovered([CUT, Recover(method="blocks", steps=200, rate=1e-2)])
    assert error(program, after) < 0.3 * error(program, before)
    changed = {name for name in before.weights if not torch.equal(before.weights[name], after.weights[name])}
    assert changed and not any(name.startswith("4.") for name in changed)  # behind the last join
    assert trace["recover"].facts["loss"][1] < trace["recover"].facts["loss"][0]


def test_closed_form_is_one_reading_of_least_squares() -> None:
    program, before, _ = recovered([CUT])
    _, after, trace = recovered([CUT, Recover(method="closed_form")])
    assert error(program, after) < 0.3 * error(program, before)
    errors = trace["recover"].facts["relative_errors"]
    assert len(errors) == 5  # the first linear, three writers of the stream, the head; the pruned ones have no target
    batches = rows()
    x = torch.cat([before_join(after, b) for b in batches])
    target = torch.cat([program(*b) for b in batches])
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), target).solution
    torch.testing.assert_close(after.weights["4.weight"], solved[:-1].mT, rtol=1e-2, atol=2e-3)


def test_too_few_rows_leave_a_site_as_it_is() -> None:
    """The last linear has 65 inputs for 8 rows of data; the rest is solved."""
    wide = nn.Sequential(network()[:4], nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 5)).eval()  # type: ignore[index]
    batches = [(x[:4],) for (x,) in rows(2)]
    program = capture(wide, batches[0])
    context = Context(targets.EXACT, calibration=Batches(batches, program), strict=True)
    cut = DropBlocks(count=1)
    after, trace = run_passes(program, [cut, Recover(method="closed_form")], context)
    assert "too few rows" in "".join(site.reason for site in trace["recover"].skipped if site.node == "linear_8")
    assert "linear_8" not in trace["recover"].facts["relative_errors"]
    torch.testing.assert_close(after.weights["3.weight"], program.weights["3.weight"])


def test_solving_that_gains_nothing_changes_nothing() -> None:
    _, _, trace = recovered([Recover(method="closed_form")])
    assert not trace["recover"].changed and "gained nothing" in trace["recover"].skipped[-1].reason


def before_join(program: Program, batch: tuple[Tensor, ...]) -> Tensor:
    """What the head reads."""
    (head,) = [node for node in program.graph.nodes if node.name == "linear_7"]
    return intermediate(program, head.args[0].name, batch)  # type: ignore[union-attr]


@torch.no_grad()
def intermediate(program: Program, name: str, batch: tuple[Tensor, ...]) -> Tensor:
    class Keep(torch.fx.Interpreter):
        kept: Tensor

        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name == name:
                self.kept = value
            return value

    keep = Keep(program.graph_module)
    keep.run(*batch)
    return keep.kept


@pytest.mark.parametrize("method", ["distillation", "blocks", "closed_form"])
def test_streams_that_were_turned_and_pruned(method: Any) -> None:
    """The residual stream lies in other coordinates, and there are fewer: what is learned aims at the right place."""
    cut = Prune(ratio=0.25, multiple=1, resolve=False)
    program, before, trace = recovered([cut])
    assert [8, 6] in trace["prune"].facts["widths"].values()
    _, after, _ = recovered([cut, Recover(method=method, steps=200, rate=3e-3)])
    bound = {"distillation": 0.7, "blocks": 1.05, "closed_form": 1.0}[method]  # blocks look at no output
    assert error(program, after) < bound * error(program, before)


def test_a_step_of_ones_own() -> None:
    """A subclass trains by its own rule; the rest of the pass stays."""
    seen: list[Step] = []

    class Plain(Recover):
        def train_step(self, given: Step) -> None:
            seen.append(given)
            given.optimizer.zero_grad()
            (given.student(*given.batch) - given.teacher(*given.batch).detach()).square().mean().backward()
            given.optimizer.step()

    program, before, _ = recovered([CUT])
    _, after, trace = recovered([CUT, Plain(steps=100, rate=1e-2)])
    assert len(seen) == trace["plain"].facts["steps"] > 0
    assert error(program, after) < 0.8 * error(program, before)


class Stopping(Silent):
    """Interrupts when so many steps of `recover` are done."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.began: list[int] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Any]:
        owner = self

        class Counted:
            def advance(self, steps: int = 1) -> None:
                if name == "recover":
                    owner.began.append(steps)
                    owner.left -= steps
                    if owner.left <= 0:
                        raise KeyboardInterrupt

        yield Counted()


def test_an_interrupted_training_goes_on_and_ends_alike(tmp_path: Path) -> None:
    def run(folder: str, progress: Any) -> Any:
        return graphopt.optimize(
            network(), rows()[0], recipe=[CUT, Recover(steps=30)], calibration=rows(), run_dir=tmp_path / folder,
            progress=progress,
        )  # fmt: skip

    whole = run("whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        run("cut", Stopping(17))
    going = Stopping(10**6)
    again = run("cut", going)
    assert going.began[0] == 15 and sum(going.began) == 30
    for name, weight in whole.program.weights.items():
        assert torch.equal(weight, again.program.weights[name])
    assert not list(tmp_path.glob(".*"))


def test_mistakes_are_sentences() -> None:
    with pytest.raises(GraphoptError, match="needs two batches"):
        recovered([Recover(steps=5)], rows(1))
    with pytest.raises(GraphoptError, match="needs a loss"):
        recovered([Recover(steps=5, task=1)])
    program = captured()
    with pytest.raises(GraphoptError, match="recover needs calibration data"):
        run_passes(program, [Recover()], Context(targets.EXACT, strict=True))
