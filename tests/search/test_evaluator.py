"""Evaluations: cached, journaled, rejected early, alike in one process and in several; what dies or hangs is told."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor
from made_up_candidates import Quadratic, allocation

from graphopt.errors import GraphoptError
from graphopt.pipeline.journal import Journal
from graphopt.search import Evaluator, Pool


@pytest.fixture(autouse=True)
def fresh_processes() -> None:
    """Workers of an earlier test have its candidates loaded, trouble and all."""
    get_reusable_executor().shutdown(wait=True)


MANY = [(at % 5, at // 5 % 5, (at * 7) % 5) for at in range(20)]


def evaluator(pool: Pool | None = None, journal: Journal | None = None, **options: object) -> Evaluator:
    made = Quadratic(3, **options)  # type: ignore[arg-type]
    return Evaluator(allocation(3, 4), made, pool or Pool(), journal or Journal())


def test_a_loss_is_the_mean_over_pieces_and_nothing_is_done_twice() -> None:
    judge, truth = evaluator(), Quadratic(3)
    assert judge.losses([(0, 1, 2)], [1, 3]) == [pytest.approx(truth.loss((0, 1, 2), [1, 3]))]
    assert judge.evaluated == 2
    assert judge.losses([(0, 1, 2), (0, 1, 2)]) == [pytest.approx(truth.loss((0, 1, 2)))] * 2
    assert judge.evaluated == 8
    judge.losses([(0, 1, 2)])
    assert judge.evaluated == 8


def test_a_bad_candidate_is_rejected_before_all_is_read() -> None:
    judge, truth = evaluator(), Quadratic(3)
    bound = truth.loss((0, 0, 0))
    assert judge.losses([(4, 4, 4)], bound=bound) == [math.inf]
    assert judge.evaluated == 1
    assert judge.losses([(4, 4, 4)]) == [pytest.approx(truth.loss((4, 4, 4)))]  # asked without a bound: in full
    assert judge.losses([(0, 0, 0)], bound=bound * (1 + 1e-9)) == [pytest.approx(bound)]


def test_two_processes_give_what_one_gives() -> None:
    assert evaluator(Pool(2)).losses(MANY) == evaluator().losses(MANY)
    assert evaluator(Pool(2)).metric(MANY) == evaluator().metric(MANY)


def test_the_journal_is_read_instead(tmp_path: Path) -> None:
    first = evaluator(journal=Journal(tmp_path / "journal"))
    found = first.losses(MANY), first.metric(MANY)
    second = evaluator(journal=Journal(tmp_path / "journal"))
    assert (second.losses(MANY), second.metric(MANY)) == found
    assert second.busy == 0.0 < first.busy


@pytest.mark.parametrize("kind", ["die", pytest.param("die always", marks=pytest.mark.slow)])
def test_a_process_that_dies_costs_its_own_task_at_most(kind: str, tmp_path: Path) -> None:
    which = MANY[7]
    trouble = {"trouble": f"{kind}:{''.join(map(str, which))}", "marker": str(tmp_path / "once")}
    judge = evaluator(Pool(2), Journal(tmp_path / "journal"), **trouble)
    expected = evaluator().losses(MANY)
    if kind == "die always":
        expected[7] = math.inf
        assert judge.losses(MANY) == expected
        reason = "its process died; it may need more memory than there is"
        assert judge.lost == [f"a candidate could not be evaluated: {reason}"]
        next_time = evaluator(journal=Journal(tmp_path / "journal"))
        assert next_time.losses([which])[0] < math.inf
    else:
        assert judge.losses(MANY) == expected and not judge.lost


def test_what_hangs_is_given_up(tmp_path: Path) -> None:
    which = MANY[3]
    trouble = {"trouble": f"hang:{''.join(map(str, which))}", "marker": str(tmp_path / "once")}
    judge = evaluator(Pool(2, timeout=1.0), **trouble)
    expected = evaluator().losses(MANY)
    expected[3] = math.inf
    assert judge.losses(MANY) == expected
    assert judge.lost == ["a candidate could not be evaluated: it took longer than 1 s"]


def test_what_a_candidate_raises_is_raised_and_the_rest_is_kept(tmp_path: Path) -> None:
    which = MANY[-1]
    trouble = {"trouble": f"raise:{''.join(map(str, which))}", "marker": str(tmp_path / "once")}
    with pytest.raises(ValueError, match="no such thing"):
        evaluator(Pool(), Journal(tmp_path / "journal"), **trouble).losses(MANY)
    second = evaluator(journal=Journal(tmp_path / "journal"))
    second.losses(MANY)
    assert len((tmp_path / "journal").read_text().splitlines()) == len(set(MANY))


def test_a_worker_that_lacks_a_package_is_one_sentence(tmp_path: Path) -> None:
    trouble = {"trouble": f"lack:{''.join(map(str, MANY[3]))}", "marker": str(tmp_path / "once")}
    with pytest.raises(GraphoptError, match="a worker lacks the package made_up; install there what is installed here"):
        evaluator(Pool(2), **trouble).losses(MANY)


def test_a_cluster_without_its_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GraphoptError, match=r"a Ray cluster needs the package ray; pip install 'graphopt\[ray\]'"):
        evaluator(Pool(2, "ray")).losses(MANY)
