"""Passes as data: options and their types, text and back, globs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import made_up_passes as made
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.ir import Rewriter, dialect
from graphopt.passes import QuantizeStatic
from graphopt.pipeline import Pass, parse, pass_classes, site_names
from graphopt.pipeline.passes import build

finite = st.floats(-1e30, 1e30)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.integers(2, 8),
        "ratio": st.floats(0, 1, exclude_min=True),
        "mode": st.sampled_from(["one", "two"]),
        "flag": st.booleans(),
        "label": st.none() | st.text(),
        "levels": st.lists(st.integers()),
        "table": st.dictionaries(st.text(), st.lists(finite)),
        "only": st.lists(st.text()),
        "skip": st.lists(st.text()),
    },
)


@given(OPTIONS)
def test_text_parses_back_to_an_equal_pass(options: dict[str, Any]) -> None:
    made_pass = build(made.Options, options)
    name, parsed = parse(str(made_pass))
    assert name == "options" and build(made.Options, parsed) == made_pass
    assert build(made.Options, made_pass.options) == made_pass
    assert all(made_pass.options[key] != getattr(made.Options(), key) for key in made_pass.options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 9}, "options.bits cannot be 9: input should be less than or equal to 8"),
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": True}, "options.bits cannot be True"),
        ({"ratio": True}, "options.ratio cannot be True: a truth value is no number"),
        ({"bits": "many"}, "valid integer"),
        ({"bits": 2.5}, "fractional part"),
        ({"bits": None}, "valid integer"),
        ({"ratio": float("nan")}, "options.ratio cannot be nan"),
        ({"ratio": float("inf")}, "options.ratio cannot be inf"),
        ({"ratio": 0}, "greater than 0"),
        ({"mode": "three"}, "input should be 'one' or 'two'"),
        ({"flag": "perhaps"}, "boolean"),
        ({"skip": "head*"}, "options.skip cannot be 'head*': input should be a valid tuple"),
        ({"skip": [1]}, "valid string"),
        ({"levels": [1, True]}, "a truth value is no number"),
        ({"table": {"a": [float("inf")]}}, "finite"),
        ({"bit": 4}, "options has no option 'bit', did you mean 'bits'?; it has only, skip, bits"),
        ({"zzz": 4}, "options has no option 'zzz'; it has only"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        build(made.Options, options)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_plain_data_becomes_the_declared_type() -> None:
    made_pass = build(made.Options, {"skip": ["a"], "ratio": 1, "levels": [1, 2], "table": {"a": [1]}})
    assert (made_pass.skip, made_pass.levels, made_pass.table) == (("a",), (1, 2), {"a": (1.0,)})
    assert build(made.Options, {"ratio": "1e-3"}).ratio == 1e-3  # which YAML reads as text
    assert str(made_pass) == "options(skip=['a'], ratio=1.0, levels=[1, 2], table={'a': [1.0]})"


def test_bounds_of_the_built_in_passes_hold() -> None:
    with pytest.raises(GraphoptError, match=r"quantize_static\.percentile cannot be 5\b"):
        QuantizeStatic(percentile=5)
    with pytest.raises(GraphoptError, match=r"quantize_static\.observer cannot be 'best'"):
        QuantizeStatic(observer="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(pass_classes()))
def test_every_registered_pass_is_data(name: str) -> None:
    cls = pass_classes()[name]
    made_pass = cls()
    assert cls.name == name and str(made_pass) == name and made_pass.options == {}
    assert hash(made_pass) == hash(cls()) and made_pass == cls()
    assert cls.__doc__ and all(required in pass_classes() for required in cls.requires)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made_pass.anything = 1  # type: ignore[attr-defined]


def test_an_option_without_a_default_is_asked_for() -> None:
    with pytest.raises(GraphoptError, match=r"needy needs the option 'bits'; give needy\(bits=\.\.\.\)"):
        build(made.Needy, {})
    assert str(build(made.Needy, {"bits": 4})) == "needy(bits=4)"
    assert build(made.Needy, {"bits": 4}).options == {"bits": 4}


@pytest.mark.parametrize(
    "text",
    ["", "a b", "1", "a(", "a(1)", "a(**{'b': 1})", "a(b=c)", "a(b=1, b=2)", "a.b()", "a(b={[]: 1})", "a()()", "\0",
     "a(b=" + "[" * 5000 + "]" * 5000 + ")", "import os", "a(b=__import__('os'))"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_pass(text: str) -> None:
    with pytest.raises(GraphoptError, match=r"is no pass; write name or name\(option=value"):
        parse(text)


def test_parse_takes_what_a_person_writes() -> None:
    assert parse(" fold_batch_norm ") == ("fold_batch_norm", {})
    assert parse("a()") == ("a", {})
    assert parse("a(b=-1.5, c=('x',), d=None)") == ("a", {"b": -1.5, "c": ("x",), "d": None})


def test_names_follow_from_the_class() -> None:
    class FoldRMSNorm(Pass): ...

    class W8A8(Pass): ...

    class Chosen(Pass):
        name: ClassVar[str] = "my_own"

    assert [cls.name for cls in (FoldRMSNorm, W8A8, Chosen)] == ["fold_rms_norm", "w8_a8", "my_own"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.inner(self.embed(x)))
        return y


def test_globs_mean_nodes_weights_aliases_and_modules() -> None:
    program = capture(Tied().eval(), (torch.tensor([1, 2]),))
    assert "head.weight" in {*program.aliases, *program.weights} and "embed.weight" in {
        *program.aliases,
        *program.weights,
    }
    inner, head = made.calls(program, "linear")
    assert set(site_names(program, inner)) == {"linear", "inner.0", "inner", "inner.0.weight", "inner.0.bias"}
    assert set(site_names(program, head)) == {"linear_1", "head", "head.weight", "embed.weight"}

    def skipped(*globs: str) -> list[bool]:
        return [bool(made.Options(skip=globs).refusal(program, node)) for node in (inner, head)]

    assert skipped() == [False, False]
    assert skipped("linear") == [True, False]
    assert skipped("inner") == skipped("inn*") == skipped("inner.0.b*") == [True, False]
    assert skipped("embed.weight") == [False, True]  # the other name of a tied weight
    assert skipped("Head") == [False, False]
    assert skipped("*") == [True, True]
    only = made.Options(only=("inner*",), skip=("*.bias",))
    assert only.refusal(program, head) == "not among only=['inner*']"
    assert only.refusal(program, inner) == "kept by skip='*.bias'"


def test_a_weight_behind_its_dequantize_keeps_its_name() -> None:
    program = capture(Tied().eval(), (torch.tensor([1, 2]),)).clone()
    rewriter = Rewriter(program, "test")
    inner = made.calls(program, "linear")[0]
    weight = inner.args[1]
    codes = rewriter.weight(torch.ones(4, 4, dtype=torch.int8), "inner.0.weight", torch.int8, weight)  # type: ignore[arg-type]
    scale = rewriter.weight(torch.tensor(1.0), "inner.0.weight_scale", torch.float32)
    back = rewriter.insert(dialect.dequantize, codes, scale, None, None, 0, 0, "int8", before=inner)
    rewriter.rewire(inner, weight=back)
    rewriter.finish()
    assert "inner.0.weight" in site_names(program, inner)
    assert not any("inner.0.weight" in site_names(program, node) for node in made.calls(program, "embedding"))
    # What is computed from an input is not a weight of its reader.
    assert "inner.0.weight" not in site_names(program, made.calls(program, "linear")[1])


def test_a_pass_that_is_built_wrong_is_refused_by_python() -> None:
    @dataclass(frozen=True)
    class Mutable(Pass):
        values: tuple[int, ...] = ()

    assert Mutable(values=[1]) == Mutable(values=(1,))  # type: ignore[arg-type]


@pytest.mark.parametrize("needs", [frozenset({"calibration", "los"}), "calibration"])
def test_a_need_that_nobody_can_meet_is_refused_with_the_class(needs: Any) -> None:
    with pytest.raises(GraphoptError, match=r"^Wishes needs '.*; a pass may need calibration, evaluate or loss$"):
        type("Wishes", (Pass,), {"needs": needs})
