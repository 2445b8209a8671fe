"""Recipes in Python and YAML, and untrusted YAML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import made_up_passes as made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import passes
from graphopt.errors import GraphoptError
from graphopt.pipeline import Pass, Recipe, as_recipe, builtin, builtin_names, read_yaml
from graphopt.pipeline.recipe import _MAX_BYTES
from graphopt.pipeline.registry import UnknownPass

text = st.text(st.characters(codec="utf-8"))
globs = st.lists(text, max_size=3).map(tuple)
PASSES = st.one_of(
    st.builds(
        passes.QuantizeStatic,
        observer=st.sampled_from(["minmax", "percentile", "mse", "entropy"]),
        percentile=st.floats(50, 100, exclude_min=True),
        only=globs,
        skip=globs,
    ),
    st.builds(passes.QuantizeDynamic, only=globs, skip=globs),
    st.just(passes.FoldBatchNorm()),
)


@given(st.builds(Recipe, name=text, passes=st.lists(PASSES).map(tuple), description=text))
def test_yaml_reads_back_equal(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_recipes(name: str) -> None:
    recipe = builtin(name)
    assert recipe.name == name and recipe.description.endswith(".") and recipe.passes
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert as_recipe(name) == recipe


def test_a_recipe_may_hold_another() -> None:
    recipe = Recipe.from_yaml("passes: [recipe: exact, quantize_dynamic: {skip: ['head*']}, retype_floats: ]")
    assert recipe.passes == (*builtin("exact").passes, passes.QuantizeDynamic(skip=("head*",)), passes.RetypeFloats())
    assert (recipe.name, recipe.description) == ("unnamed", "")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("passes: {a: 1}", "needs `passes`, a list of passes"),
        ("name: x", "needs `passes`"),
        ("", "must be a mapping with the keys name, description, passes"),
        ("[canonicalize]", "must be a mapping"),
        ("pases: []", "unknown key 'pases', did you mean 'passes'?; it takes name, description, passes"),
        ("{passes: [], 1: 2}", "unknown key 1"),
        (
            "passes: [fold_batchnorm]",
            "entry 1: there is no pass called 'fold_batchnorm', did you mean 'fold_batch_norm'?",
        ),
        ("passes: [canonicalize, 3]", "entry 2: an entry is a pass name, or one `name: {option: value}`, not 3"),
        ("passes: [{canonicalize: {}, retype_floats: {}}]", "entry 1: an entry is a pass name"),
        ("passes: [{quantize_static: 3}]", "the options of quantize_static must be a mapping, not 3"),
        ("passes: [{quantize_static: {observr: mse}}]", "has no option 'observr', did you mean 'observer'?"),
        ("passes: [{quantize_static: {observer: best}}]", "quantize_static.observer cannot be 'best'"),
        ("passes: [{quantize_static: {skip: head}}]", "quantize_static.skip cannot be 'head'"),
        ("passes: [{quantize_static: {percentile: yes}}]", "quantize_static.percentile cannot be True"),
        ("passes: [{quantize_static: {percentile: .nan}}]", "quantize_static.percentile cannot be nan"),
        ("passes: [recipe: exakt]", "there is no recipe called 'exakt', did you mean 'exact'?"),
        ("passes: []\npasses: []", "not valid YAML at line 2, column 1: the key 'passes' stands twice"),
        ("passes: [{quantize_static: {skip: [], skip: [a]}}]", "the key 'skip' stands twice"),
        ("a: &a [x]\nb: *a", "anchors and aliases are not allowed in a recipe"),
        ("passes: *a", "anchors and aliases are not allowed"),
        ("a: &a {<<: *a}", "anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML at line 1"),
        ("a: !!python/name:os.system", "not valid YAML at line 1"),
        ("a: [", "not valid YAML at line 1"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: 2020-13-45", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("? [1, 2]\n: 3", "not valid YAML at line 1"),
        ("#" * (_MAX_BYTES + 1), "is larger than 1 MB; a recipe is a short list of passes"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_yaml_is_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        Recipe.from_yaml(source, "my.yaml")
    assert str(caught.value).startswith("my.yaml") and sentence in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_billion_laughs_are_not_expanded() -> None:
    lines = ["a0: &a0 [lol, lol, lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(GraphoptError, match="anchors and aliases"):
        read_yaml("\n".join(lines), "x")


def test_an_unknown_pass_is_told_apart() -> None:
    with pytest.raises(UnknownPass, match="entry 1: there is no pass called 'nowhere'"):
        Recipe.from_yaml("passes: [nowhere]")


def test_options_can_be_set() -> None:
    recipe = builtin("int8").with_option("quantize_static", "observer", "minmax")
    assert recipe.passes[-2] == passes.QuantizeStatic(observer="minmax")
    again = recipe.with_option("quantize_static", "skip", ["a"]).passes[-2]
    assert again == passes.QuantizeStatic(observer="minmax", skip=("a",))
    with pytest.raises(GraphoptError, match="has no pass 'quantize_statik', did you mean 'quantize_static'"):
        recipe.with_option("quantize_statik", "observer", "mse")
    with pytest.raises(GraphoptError, match="has no option 'observr'"):
        recipe.with_option("quantize_static", "observr", "mse")


def test_keeping_float_reaches_every_quantizing_pass() -> None:
    recipe = Recipe("r", (*builtin("int8").passes, passes.QuantizeDynamic(skip=("x",)))).keeping_float(["head*", "a"])
    skips = {each.name: getattr(each, "skip", None) for each in recipe.passes}
    assert skips.pop("quantize_dynamic") == ("x", "head*", "a")
    assert {value for name, value in skips.items() if name.startswith("quantize")} == {("head*", "a")}
    assert builtin("exact").keeping_float(["a"]) == builtin("exact")


def test_keeping_float_goes_by_what_a_pass_does_not_by_its_name() -> None:
    @dataclass(frozen=True)
    class Ternary(made.Coarse):
        quantizes: ClassVar[bool] = True

    @dataclass(frozen=True)
    class QuantizedToNothing(made.Coarse):
        pass

    recipe = Recipe("r", (Ternary(), QuantizedToNothing())).keeping_float(["head"])
    assert recipe.passes == (Ternary(skip=("head",)), QuantizedToNothing())


def test_every_form_of_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("passes: [canonicalize]")
    expected = (passes.Canonicalize(),)
    assert as_recipe(file).passes == as_recipe(str(file)).passes == as_recipe(list(expected)).passes == expected
    assert as_recipe(expected).name == "custom" and as_recipe([]).passes == ()
    assert as_recipe(builtin("exact")) is not None


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("int9", "there is no recipe called 'int9', did you mean 'int8'?; built-in: auto, drop_blocks, exact, fp8, "),
        (
            [passes.Canonicalize],
            "holds passes, not <class 'graphopt.passes.canonicalize.canonicalize.Canonicalize'>; call it",
        ),
        (["canonicalize"], "holds passes, not 'canonicalize'; construct it"),
        (passes.Canonicalize(), "recipe must be a name, a YAML file, a Recipe or a list of passes, not Canonicalize"),
        (3, "not int"),
        (b"int8", "not bytes"),
        ("missing/x.yaml", "cannot read the recipe missing/x.yaml: No such file or directory"),
        ("/tmp/", "cannot read the recipe /tmp: Is a directory"),
        ("a\0b/x.yaml", "cannot read the recipe"),
    ],
)
def test_what_is_no_recipe(recipe: Any, sentence: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        as_recipe(recipe)
    assert sentence in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(GraphoptError, match="is not UTF-8 text"):
        as_recipe(file)
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: reading it whole would fill the memory
    with pytest.raises(GraphoptError, match="is larger than 1 MB"):
        as_recipe(file)


def test_passes_are_kept_in_order() -> None:
    names: list[Pass] = [passes.RetypeFloats(), passes.Canonicalize(), passes.RetypeFloats()]
    assert as_recipe(names).passes == tuple(names)
