"""Mutated recipes are valid or give a RecipeError, never another exception; valid ones survive a round trip."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libmtl_fair.errors import RecipeError
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.schema import apply_overrides
from libmtl_fair.recipe.yaml_source import Source, parse_yaml

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SNIPPETS = ["&a ", "*a", "<<: ", "!!int ", "---\n", "%YAML 9.9\n", "[", "]", "{", "}", ": ", "- ", "\t", "#", "'", '"']
SNIPPETS += ["|\n", ">-\n", "\x00", "\x85", "\ufeff", "é", "😀", "1e999", ".nan", "~", "?", "\r", "\n", "0x", "@", "`"]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["EW", "adult", "p75", "base_rate", "step", "1e-3", "yes", "null", "2024-01-01", "0x1F", "a: b", "<<"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def attempt(call: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """Result and empty message, or None and the RecipeError's message."""
    try:
        return call(*args), ""
    except RecipeError as error:
        return None, str(error)


def build(source: Source) -> Recipe | None:
    if not isinstance(source.data, dict):
        return None
    recipe, message = attempt(Recipe.from_dict, source.data, source)
    assert recipe is not None or message
    return recipe


def spots(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested data."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] + [spot for key, child in children for spot in spots(child, (*path, key))]


@FUZZ
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 10_000), st.integers(0, 6), st.sampled_from(SNIPPETS)), min_size=1, max_size=4
    )
)
def test_mutated_text(recipe_text, edits):
    text = recipe_text
    for position, removed, snippet in edits:
        at = position % (len(text) + 1)
        text = text[:at] + snippet + text[at + removed :]
    source, message = attempt(parse_yaml, text, "fuzz.yaml")
    assert message.startswith("fuzz.yaml:") or source is not None
    if source is not None:
        build(source)


@FUZZ
@given(text=st.text(max_size=60))
def test_any_text(text):
    source, message = attempt(parse_yaml, text)
    assert message.startswith("recipe:") or source is not None
    if source is not None:
        build(source)


@FUZZ
@given(data=st.data())
def test_mutated_values_and_round_trip(recipe_text, data):
    plain = copy.deepcopy(parse_yaml(recipe_text).data)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(spots(plain)[1:]))
        target = plain
        for key in place[:-1]:
            target = target[key]
        if isinstance(target, dict) and data.draw(st.booleans()):
            target[data.draw(st.text(max_size=6))] = data.draw(values)
        else:
            target[place[-1]] = data.draw(values)
    recipe = build(Source(data=plain))
    if recipe is not None:
        again = build(parse_yaml(recipe.to_yaml()))
        assert again == recipe
        assert again.fingerprint() == recipe.fingerprint()


@FUZZ
@given(
    path=st.one_of(
        st.text(max_size=10),
        st.sampled_from(
            ["train.epochs", "methods.relif.x", "data.tasks.0", "seeds", "tune.space.a.b", "model.arch_args.q"]
        ),
    ),
    value=st.one_of(st.text(max_size=10), values.map(repr)),
)
def test_any_override(recipe_text, path, value):
    source = parse_yaml(recipe_text)
    changed, message = attempt(apply_overrides, source, [f"{path}={value}"])
    assert message.startswith("--set ") or changed is not None
    if changed is not None:
        build(changed)


@pytest.mark.parametrize(
    "text", ["é: 1", "😀", "\x07", "\u2028", "a\nb", " lead", "trail ", "1e-3", "null", "- x", "#c", "<<", ""]
)
def test_awkward_text_survives_the_round_trip(recipe_text, text):
    source = parse_yaml(recipe_text)
    source.data["description"] = text
    source.data["methods"]["relif"] |= {"note": text, "map": {text: [text]}}
    recipe = Recipe.from_dict(source.data)
    assert Recipe.from_dict(parse_yaml(recipe.to_yaml()).data) == recipe
