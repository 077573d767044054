"""One head per group: who goes where, and what an unknown group gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.methods.heads.modules import GroupHeads
from libmtl_fair.models import MLP, linear_heads


def test_each_example_goes_through_the_head_of_its_group() -> None:
    heads = GroupHeads(nn.Linear(4, 3), ("sex",), (2,))
    h = torch.randn(5, 4)
    heads.take_groups({"sex": torch.tensor([0, 1, -1, 1, 0])})
    out = heads(h)
    first, second = heads.heads[0](h), heads.heads[1](h)
    torch.testing.assert_close(out, torch.stack([first[0], second[1], (first[2] + second[2]) / 2, second[3], first[4]]))
    torch.testing.assert_close(heads(h), (first + second) / 2)  # groups are for one pass


def test_groups_are_crossed_by_id() -> None:
    heads = GroupHeads(nn.Linear(4, 1), ("sex", "race"), (2, 3))
    h = torch.randn(2, 4)
    heads.take_groups({"sex": torch.tensor([1, 0]), "race": torch.tensor([2, 1])})
    torch.testing.assert_close(heads(h), torch.stack([heads.heads[5](h)[0], heads.heads[1](h)[1]]))


def trainer() -> tuple[lf.FairTrainer, lf.ResidentLoader]:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    labels, groups = {"a": (x[:, 0] > 0).float()}, {"sex": (x[:, 1] > 0).long()}
    loader = lf.ResidentLoader(x, labels, groups, batch_size=16, shuffle=False, device="cpu")
    tasks = (lf.Binary("a"),)
    entries, decoders = lf.add_fairness_heads(
        lf.task_dict(tasks), linear_heads(tasks, 8), "group_specific", sensitive={"sex": 2}
    )
    made = lf.FairTrainer(
        entries, "EW", "HPS", lambda: MLP(5, (8,)), decoders, False, False, {"optim": "adam", "lr": 1e-2}, None,
        device="cpu", progress=False, select="last",
    )  # fmt: skip
    return made, loader


def test_training_and_prediction_use_the_groups() -> None:
    made, loader = trainer()
    assert list(made.task_dict) == ["a"]
    made.train(loader, None, 2)
    found = made.predict(loader)
    model = made.model.eval()
    x = torch.cat([batch for batch, _ in loader])
    with torch.no_grad():
        both = torch.stack([head(model.encoder(x)) for head in model.decoders["a"].heads])
    expected = both[found.groups["sex"], torch.arange(64)]
    torch.testing.assert_close(found.outputs["a"], expected)


def test_bad_input() -> None:
    with pytest.raises(RecipeError, match="at least two groups"):
        GroupHeads(nn.Linear(4, 1), ("sex",), (1,))
    with pytest.raises(DataError, match="did you mean 'sex'"):
        GroupHeads(nn.Linear(4, 1), ("sxe",), (2,)).take_groups({"sex": torch.zeros(2)})
    made, loader = trainer()
    bare = [(x, {"a": labels["a"]}) for x, labels in loader]
    with pytest.raises(HostError, match="group-specific heads need sensitive groups"):
        made.train(bare, None, 1)
