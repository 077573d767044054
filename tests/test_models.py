"""Encoders and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import libmtl_fair as lf
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.models import MLP, encoder_for, linear_heads
from libmtl_fair.recipe.build import check
from libmtl_fair.recipe.schema import load_recipe


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("hidden", [(8,), (16, 8, 4)])
def test_mlp(norm: str | None, dropout: float, hidden: tuple[int, ...]) -> None:
    model = MLP(6, hidden, dropout, norm)
    found = model(torch.randn(5, 6))
    assert found.shape == (5, hidden[-1])
    assert model.out_features == hidden[-1]
    assert bool((found >= 0).all())
    assert len(model.blocks) == len(hidden)
    kinds = [type(layer) for layer in model.blocks[0]]
    assert (nn.Dropout in kinds) == bool(dropout)
    assert (nn.BatchNorm1d in kinds) == (norm == "batch")
    assert (nn.LayerNorm in kinds) == (norm == "layer")


def test_mlp_is_the_plain_network() -> None:
    model = MLP(6, (8, 4))
    x = torch.randn(5, 6)
    expected = x
    for block in model.blocks:
        expected = torch.relu(expected @ block[0].weight.T + block[0].bias)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"hidden": ()}, r"hidden must be a list of widths of at least 1, found \[\]"),
        ({"hidden": (8, 0)}, r"hidden must be a list of widths of at least 1, found \[8, 0\]"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1\.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ({"norm": "btach"}, r"unknown norm 'btach'; did you mean 'batch'\?"),
    ],
)
def test_mlp_settings(args: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        MLP(6, **args)


def test_heads_have_the_width_of_their_task() -> None:
    heads = linear_heads([lf.Binary("a"), lf.Multiclass("b", 5), lf.Multilabel("c", 3), lf.Regression("d")], 8)
    assert {name: (h.in_features, h.out_features) for name, h in heads.items()} == {
        "a": (8, 1),
        "b": (8, 5),
        "c": (8, 3),
        "d": (8, 1),
    }


class TestEncodersByName:
    @pytest.mark.parametrize(
        ("name", "shape", "args", "error", "match"),
        [
            ("mpl", (3,), {}, RecipeError, r"unknown encoder 'mpl'; did you mean 'mlp'\?"),
            ("mlp", (3, 4, 4), {}, DataError, r"encoder 'mlp' takes rows of numbers .* inputs of shape \[3, 4, 4\]"),
            (
                "mlp",
                (3,),
                {"hiden": [4]},
                RecipeError,
                r"unknown argument of encoder 'mlp' 'hiden'; did you mean 'hidden'",
            ),
            ("mlp", (3,), {"hidden": 4}, RecipeError, r"encoder 'mlp' cannot be made of {'hidden': 4}"),
        ],
    )
    def test_what_does_not_fit(
        self, name: str, shape: tuple[int, ...], args: dict[str, Any], error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            encoder_for(name)(shape, args)

    @pytest.mark.parametrize(
        ("model", "match"),
        [
            ("{encoder: mlpp}", r"recipe.yaml:\d+: model.encoder: unknown encoder 'mlpp'"),
            ("{encoder_args: {hidden: [4]}}", r"model.encoder_args: encoder 'mlp' takes its settings from hidden"),
            ("{weights: a.pt}", r"model.weights: encoder 'mlp' is trained from the start"),
            ("{encoder: cnn, weights: a.pt}", r"model.weights: no file a.pt; weights are of a state dict in a file"),
            (
                "{encoder: cnn, encoder_args: {chanels: [4]}}",
                r"model.encoder_args.*: unknown argument of encoder 'cnn' 'chanels'",
            ),
            ("{encoder: cnn, head: apps}", r"model.head: .*expected 'conv' or 'aspp'"),
        ],
    )
    def test_in_a_recipe(self, tmp_path: Path, model: str, match: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"name: x\ndata: {{name: adult}}\nmodel: {model}\nmethods: {{plain: {{weighting: EW}}}}\n")
        with pytest.raises(RecipeError, match=match):
            check(load_recipe(path))
