"""Recon: blocks of the tasks' own, against models written out by hand, and the ranking of blocks against counting."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.methods.recon import SplitEncoder, conflicting_blocks
from libmtl_fair.models import MLP, linear_heads

TASKS = (lf.Binary("a"), lf.Binary("b"), lf.Regression("c"))


def loader(**options: Any) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 6, generator=g)
    labels = {"a": (x[:, 0] > 0).float(), "b": (x[:, 0] + x[:, 2] > 0).float(), "c": x[:, 1] - x[:, 2]}
    settings = {"batch_size": 32, "shuffle": True, "seed": 1, "device": "cpu", "reference": x}
    return lf.ResidentLoader(x, labels, {"sex": (x[:, 3] > 0).long()}, **{**settings, **options})


def trainer(own: list[int], weighting: str = "EW", architecture: str = "Recon", **changes: Any) -> Any:
    torch.manual_seed(4)
    settings: dict[str, Any] = {"weight_args": {}, "arch_args": {"own": own} if architecture == "Recon" else {}}
    settings |= {"device": "cpu", "seed": 0, "progress": False, "select": "last"}
    encoder = MLP(6, (12, 10, 8))
    return lf.FairTrainer(
        lf.task_dict(TASKS), weighting, architecture, lambda: copy.deepcopy(encoder), linear_heads(TASKS, 8), False, False,
        {"optim": "sgd", "lr": 0.05}, None, **{**settings, **changes},
    )  # fmt: skip


def test_nothing_own_is_hard_sharing() -> None:
    ours, hard = trainer([]), trainer([], architecture="HPS")
    for each in (ours, hard):
        each.train(loader(), epochs=2)
    for task, score in ours.predict(loader(shuffle=False)).scores.items():
        torch.testing.assert_close(score, hard.predict(loader(shuffle=False)).scores[task])


def test_everything_own_is_a_model_a_task() -> None:
    ours = trainer([1, 2, 3])
    ours.train(loader(), epochs=2)
    for task in TASKS:
        alone = trainer([], architecture="HPS")
        every = alone.model.decoders
        alone = lf.FairTrainer(
            lf.task_dict([task]), "EW", "HPS", lambda made=alone.model.encoder: made, {task.name: every[task.name]}, False,
            False, {"optim": "sgd", "lr": 0.05}, None, device="cpu", seed=0, progress=False, select="last",
            weight_args={}, arch_args={},
        )  # fmt: skip
        alone.train(loader(), epochs=2)
        found, expected = (each.predict(loader(shuffle=False)).scores[task.name] for each in (ours, alone))
        torch.testing.assert_close(found, expected)


def test_a_shared_block_after_own_ones_by_hand() -> None:
    torch.manual_seed(0)
    first, second, third = (nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))
    encoder = SplitEncoder(nn.Sequential(first, second, third), 2, (2,))
    with torch.no_grad():
        for p in encoder.blocks[1][1].parameters():
            p.add_(0.3)
    x = torch.randn(7, 5)
    h = first(x)
    expected = [third(copy_(h)) for copy_ in encoder.blocks[1]]
    found = encoder(x)
    assert isinstance(found, list)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    assert {id(p) for p in encoder.shared_parameters()} == {id(p) for m in (first, third) for p in m.parameters()}
    assert len(list(encoder.parameters())) == 2 * 4


class Stemmed(nn.Module):
    """A stem, blocks, and a last step without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def before_blocks(self, x: Tensor) -> Tensor:
        return self.stem(x)  # type: ignore[no-any-return]

    def after_blocks(self, h: Tensor) -> Tensor:
        return h.relu()

    def forward(self, x: Tensor) -> Tensor:
        h = self.before_blocks(x)
        for block in self.blocks:
            h = block(h)
        return self.after_blocks(h)


def test_a_stem_stays_shared() -> None:
    plain = Stemmed()
    encoder, x = SplitEncoder(copy.deepcopy(plain), 2, (1,)), torch.randn(3, 6)
    for each in encoder(x):
        torch.testing.assert_close(each, plain(x))
    names = {name for name, _ in encoder.named_parameters()}
    assert names == {"frame.stem.weight", "frame.stem.bias"} | {
        f"blocks.{block}.{i}.0.{part}" for block, n in ((0, 2), (1, 1)) for i in range(n) for part in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("weighting", "own", "args"),
    [
        ("PCGrad", [2], {}),
        ("MGDA", [1, 3], {}),
        ("ReLiF", [2], {"pairs": "random", "k": 4}),
        ("GroupRegulariser", [1, 2, 3], {"loss": "gap", "lam": 0.95}),
        ("FairMT", [2], {"min_count": 1}),
    ],
)
def test_trains_with_weightings(weighting: str, own: list[int], args: dict[str, Any]) -> None:
    made = trainer(own, weighting, weight_args=args)
    made.train(loader(), epochs=3)
    losses = made.epochs[["loss/a", "loss/b", "loss/c"]].sum(axis=1)
    assert losses.iloc[-1] < losses.iloc[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.model.parameters())


def test_resume(tmp_path: Path) -> None:
    whole = trainer([2])
    whole.train(loader(), epochs=4)
    trainer([2], run_dir=tmp_path / "run").train(loader(), epochs=2)
    second = trainer([2], run_dir=tmp_path / "run", resume=True)
    second.train(loader(), epochs=4)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_the_ranking_of_blocks_by_counting() -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "layer": [f"block {n}" for n in rng.integers(1, 12, 400)],
            "kind": rng.choice(["accuracy", "fairness"], 400),
            "cosine": rng.uniform(-1, 1, 400),
        }
    )
    for threshold in (-0.4, 0.0, 0.3):
        scores = SimpleNamespace(of=dict.fromkeys(range(1, 12), 0))
        for row in rows.itertuples():
            scores.of[int(str(row.layer).split()[1])] += row.kind == "accuracy" and row.cosine < threshold
        best = sorted(scores.of, key=lambda n: (-scores.of[n], -n))[:4]
        assert conflicting_blocks(rows, 4, threshold) == sorted(best)
    with pytest.raises(DataError, match="top must be from 1 to the number of recorded blocks, 11"):
        conflicting_blocks(rows, 12)
    with pytest.raises(DataError, match="found no cosine"):
        conflicting_blocks(rows.drop(columns="cosine"), 1)


def test_the_two_trainings_of_the_source(tmp_path: Path) -> None:
    first = trainer([], "FBGrad", "HPS", weight_args={"strength": 0.0, "record_conflicts": True, "where": "everywhere"})
    first.train(loader(), epochs=2)
    own = conflicting_blocks(first.model.conflicts.frame(), 1)
    assert own in ([1], [2], [3])
    trainer(own).train(loader(), epochs=1)


@pytest.mark.parametrize(
    ("own", "error", "match"),
    [
        ([4], HostError, "own names block 4, and the encoder has 3"),
        ([0], RecipeError, "own must be different whole numbers of at least 1, found \\[0\\]"),
        ([2, 2], RecipeError, "own must be different"),
        (["two"], RecipeError, "own must be a list of whole numbers"),
    ],
)
def test_errors(own: list[Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        trainer(own)
