"""The stream: the right values at the right stage, nothing run twice, memory of one stage."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt import capture
from graphopt.calibration import Batches
from graphopt.calibration.stream import Reading, Stream
from graphopt.errors import GraphoptError
from graphopt.ir import Program, operator
from graphopt.ir.arguments import arguments
from graphopt.progress import Silent


class Branches(nn.Module):
    """Two branches of different depth and a skip connection over both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.b(self.a(x).relu()) + self.c(x) + x)
        return out


def sites_of(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if operator(node) == "linear"]


def streamed(
    module: nn.Module, data: list[tuple[Tensor, ...]], change: float, exact: bool = False, spill: bool = False
) -> tuple[list[list[str]], dict[str, list[Tensor]], dict[str, list[Tensor | None]]]:
    program = capture(module.eval(), data[0])
    seen: dict[str, list[Tensor]] = {}
    originals: dict[str, list[Tensor | None]] = {}
    stages: list[list[str]] = []

    def show(read: Reading) -> None:
        name = str(arguments(read.site)["weight"].target).removesuffix(".weight")
        assert len(seen.setdefault(name, [])) == read.batch
        seen[name].append(read.x.clone())
        originals.setdefault(name, []).append(None if read.exact is None else read.exact.clone())

    def settle(sites: list[fx.Node]) -> dict[fx.Node, Tensor]:
        stages.append([str(arguments(site)["weight"].target).removesuffix(".weight") for site in sites])
        return {site: program.weight(arguments(site)["weight"]) * change for site in sites}

    Stream(program, sites_of(program), Batches(data, program), Silent(), exact, spill).run(show, settle)
    return stages, seen, originals


@pytest.mark.parametrize("spill", [False, True])
def test_each_site_sees_what_the_changed_ones_before_it_give(spill: bool) -> None:
    module, data = Branches(), [(torch.randn(3, 4),) for _ in range(4)]
    stages, seen, originals = streamed(module, data, 0.5, exact=True, spill=spill)
    assert stages == [["a", "c"], ["b"], ["last"]]
    plain = capture(module.eval(), data[0])
    half = capture(module.eval(), data[0]).map_weights(
        lambda name, weight: weight * 0.5 if name.endswith("weight") else weight
    )
    for name in ("b", "last"):
        for index, (x,) in enumerate(data):
            for program, found in ((half, seen), (plain, originals)):
                expected = value_at(program, x, f"{name}.weight")
                torch.testing.assert_close(found[name][index], expected)
    for index, (x,) in enumerate(data):  # what no site feeds is the same in both
        torch.testing.assert_close(seen["c"][index], x)
        torch.testing.assert_close(originals["c"][index], x)


def value_at(program: Program, x: Tensor, weight: str) -> Tensor:
    """What the linear with that weight reads when the program runs on x."""
    twin = program.clone()
    site = next(node for node in sites_of(twin) if arguments(node)["weight"].target == weight)
    twin.graph.output_node().args = ((arguments(site)["input"],),)
    twin.graph_module.recompile()
    (value,) = twin.run([x])
    assert isinstance(value, Tensor)
    return value


def test_the_exact_lane_does_not_see_quantized_activations() -> None:
    from graphopt.ir import dialect

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.tensor(0.5)
            codes = dialect.quantize(x, scale, None, 0, 0, "int4")
            out: Tensor = self.one(dialect.dequantize(codes, scale, None, None, 0, 0, "int4"))
            return out

    data = [(torch.randn(3, 4),)]
    _, seen, originals = streamed(Quantized(), data, 1.0, exact=True)
    torch.testing.assert_close(originals["one"][0], data[0][0])
    assert float((seen["one"][0] - data[0][0]).abs().max()) > 0.05


@pytest.mark.slow
def test_only_what_later_stages_read_is_kept() -> None:
    """Of a stack of blocks, between two stages: the stream that runs through, for each batch, whatever the depth."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.down(self.up(x).relu())
            return out

    peaks = {}
    for depth in (3, 5):
        module, data = nn.Sequential(*(Block() for _ in range(depth))), [(torch.randn(5, 8),) for _ in range(4)]
        program = capture(module.eval(), data[0])
        alive: list[weakref.ref[Tensor]] = []
        counts: list[int] = []

        def show(read: Reading, alive: list[weakref.ref[Tensor]] = alive) -> None:
            alive.append(weakref.ref(read.x))

        def settle(
            sites: list[fx.Node], alive: list[weakref.ref[Tensor]] = alive, counts: list[int] = counts
        ) -> dict[fx.Node, Tensor]:
            gc.collect()
            counts.append(sum(each() is not None for each in alive))
            return {}

        Stream(program, sites_of(program), Batches(data, program), Silent()).run(show, settle)
        assert len(counts) == 2 * depth
        peaks[depth] = max(counts)
    assert peaks[3] == peaks[5] <= 3 * 4  # the data, the stream, and what the next stage reads


def test_what_a_site_is_added_to_is_shown_in_both_lanes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.down(self.up(x).relu())
            return out

    module, data = nn.Sequential(Block(), Block()).eval(), [(torch.randn(3, 4),) for _ in range(2)]
    program = capture(module, data[0])
    downs = {s: next(iter(s.users)) for s in sites_of(program) if "down" in str(arguments(s)["weight"].target)}
    beside = {site: next(each for each in join.all_input_nodes if each is not site) for site, join in downs.items()}
    seen: list[tuple[Tensor | None, Tensor | None]] = []

    def show(read: Reading) -> None:
        if read.site in beside:
            seen.append((read.beside, read.beside_exact))

    def settle(sites: list[fx.Node]) -> dict[fx.Node, dict[str, Tensor]]:
        return {site: {"bias": program.weight(arguments(site)["bias"]) + 1} for site in sites}

    Stream(program, sites_of(program), Batches(data, program), Silent(), exact=True, beside=beside).run(show, settle)
    shifted = capture(module, data[0]).map_weights(lambda name, w: w + 1 if name.endswith("bias") else w)
    for index, (x,) in enumerate(data):
        torch.testing.assert_close(seen[index], (x, x))
        assert torch.equal(seen[2 + index][1], module[0](x))  # type: ignore[arg-type]
        torch.testing.assert_close(seen[2 + index][0], value_at(shifted, x, "1.up.weight"))


def test_errors_name_the_batch() -> None:
    program = capture(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)).eval(), (torch.tensor([1, 2]),))
    data = [(torch.tensor([1, 2]),), (torch.tensor([1, 9]),)]
    stream = Stream(program, sites_of(program), Batches(data, program), Silent())
    with pytest.raises(GraphoptError, match="does not run on calibration batch 1"):
        stream.run(lambda *args: None, lambda sites: {})
    with pytest.raises(GraphoptError, match="the calibration data is empty"):
        Stream(program, sites_of(program), Batches([], program), Silent()).run(lambda *args: None, lambda sites: {})


def test_no_site_reads_no_data() -> None:
    program = capture(nn.Sequential(nn.ReLU()).eval(), (torch.randn(2),))
    Stream(program, [], Batches([], program), Silent()).run(lambda *args: None, lambda sites: {})
