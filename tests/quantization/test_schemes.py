"""Schemes are chosen by time, then by error within the slack."""

from __future__ import annotations

from graphopt.quantization.schemes import Choice, Option, averaged, choose


def _choice(site: str, alike: str = "", **options: tuple[float, float]) -> Choice:
    return Choice(site, alike or site, {name: Option(name, *figures) for name, figures in options.items()})


def test_the_fastest_scheme_wins_and_float_only_where_it_is_clearly_faster() -> None:
    sites = [
        _choice("a", float=(3.0, 0), static=(1.0, 1), dynamic=(2.0, 1)),
        _choice("b", float=(3.0, 0), static=(2.0, 1), dynamic=(1.0, 1)),
        _choice("c", float=(1.0, 0), static=(2.0, 1), dynamic=(3.0, 1)),
        _choice("d", float=(0.99, 0), static=(1.0, 1)),  # timing cannot tell
        _choice("e", float=(0.001, 0), static=(0.01, 1)),  # nor here
        _choice("f", float=(1.0, 0)),
    ]
    assert choose(sites, 0.0, "static") == {
        "a": "static", "b": "dynamic", "c": "float", "d": "static", "e": "static", "f": "float",
    }  # fmt: skip


def test_the_preferred_scheme_stands_where_another_is_hardly_faster() -> None:
    site = _choice("a", static=(1.03, 1), dynamic=(1.0, 1))
    assert choose([site], 0.0, "static") == {"a": "static"}
    assert choose([site], 0.0, "dynamic") == {"a": "dynamic"}


def test_slack_goes_where_it_removes_most_error() -> None:
    sites = [
        _choice("small", static=(1.0, 0.2), dynamic=(1.2, 0.1)),
        _choice("large", static=(1.0, 9.0), dynamic=(1.2, 1.0)),
        _choice("worse", static=(1.0, 1.0), dynamic=(1.0, 2.0)),
    ]
    assert choose(sites, 0.25, "static") == {"small": "static", "large": "dynamic", "worse": "static"}
    assert choose(sites, 0.5, "static")["small"] == "dynamic"
    assert choose(sites, 0.1, "static")["large"] == "static"


def test_sites_too_small_to_time_keep_the_preferred_scheme() -> None:
    assert choose([_choice("a", static=(0.010, 9.0), dynamic=(0.009, 1.0))], 1.0, "static") == {"a": "static"}


def test_sites_alike_share_their_times() -> None:
    sites = averaged(
        [
            _choice("a", "same", float=(1.0, 0), static=(3.0, 1)),
            _choice("b", "same", float=(3.0, 0), static=(1.0, 2)),
            _choice("c", "other", static=(7.0, 1)),
        ]
    )
    times = {site.site: {name: option.milliseconds for name, option in site.options.items()} for site in sites}
    assert times == {"a": {"float": 2.0, "static": 2.0}, "b": {"float": 2.0, "static": 2.0}, "c": {"static": 7.0}}
    assert sites[1].options["static"].noise == 2
