"""The same evaluations on a Ray cluster of two nodes, which this file starts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up_candidates import Quadratic, allocation

import graphopt
from graphopt.pipeline.journal import Journal
from graphopt.search import Evaluator, Evolution, Pool, integer_program

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
cluster_utils = pytest.importorskip("ray.cluster_utils")

TESTS = Path(__file__).parents[1]
MANY = [(at % 5, at // 5 % 5, (at * 7) % 5) for at in range(12)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two nodes with a core each, on loopback; their workers find graphopt and these tests."""
    before = os.environ.copy()
    roots = [str(Path(graphopt.__file__).parents[1]), str(TESTS), before.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, roots)), "RAY_AUTH_MODE": "disabled"}
    started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        started.add_node(num_cpus=1)
        ray.init(address=started.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        started.shutdown()
        os.environ.clear()
        os.environ |= before


def evaluator(pool: Pool, seed: int = 0, journal: Journal | None = None, **options: str) -> Evaluator:
    return Evaluator(allocation(3, 4), Quadratic(3, seed=seed, **options), pool, journal or Journal())  # type: ignore[arg-type]


def test_two_nodes_give_what_one_process_gives() -> None:
    assert len(ray.nodes()) == 2
    assert evaluator(Pool(2, "ray")).losses(MANY) == evaluator(Pool()).losses(MANY)
    assert evaluator(Pool(2, "ray")).metric(MANY) == evaluator(Pool()).metric(MANY)


def test_a_search_ends_alike() -> None:
    problem = allocation(12, 3.5)
    seeds = [integer_program(problem, [[float(level) for level in range(5)]] * 12)]
    found = [
        Evolution(evaluations=4).search(Evaluator(problem, Quadratic(12), pool), seeds).points
        for pool in (Pool(), Pool(2, "ray"))
    ]
    assert found[0] == found[1]


def test_a_worker_that_dies_loses_nothing(tmp_path: Path) -> None:
    which = "".join(map(str, MANY[7]))
    trouble = {"trouble": f"die:{which}", "marker": str(tmp_path / "m")}
    judge = evaluator(Pool(2, "ray"), 1, Journal(tmp_path / "journal"), **trouble)
    assert judge.losses(MANY) == evaluator(Pool(), 1).losses(MANY)
    assert (tmp_path / "m").exists() and not judge.lost
    assert len((tmp_path / "journal").read_text().splitlines()) == len(set(MANY))


def test_what_hangs_is_given_up(tmp_path: Path) -> None:
    which = "".join(map(str, MANY[3]))
    judge = evaluator(Pool(2, "ray", timeout=1), 2, trouble=f"hang:{which}", marker=str(tmp_path / "m"))
    expected = evaluator(Pool(), 2).losses(MANY)
    expected[3] = math.inf
    assert judge.losses(MANY) == expected
    assert judge.lost == ["a candidate could not be evaluated: it took longer than 1 s"]
