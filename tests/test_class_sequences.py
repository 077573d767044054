"""Sequences of classes: loss, score and metrics against loops and scikit-learn, and every method on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, cohen_kappa_score, mean_absolute_error

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.data.mimic3 import LOS_DAYS, LOS_MEANS, Mimic3Settings
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.history import StepLog
from libmtl_fair.metrics import GroupMetrics, shrinkage_curve, utility
from libmtl_fair.metrics.drift import targets
from libmtl_fair.models import LSTM, sequence_heads
from libmtl_fair.tasks import at_steps, task_from_dict, task_to_dict

N, L, C, D = 40, 6, 4, 5
EDGES, MEANS = (10.0, 20.0, 45.0), (4.0, 14.0, 30.0, 60.0)
BINNED, PLAIN = lf.MulticlassSequence("left", C, EDGES, MEANS), lf.MulticlassSequence("left", C)


def some(seed: int = 0, n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, numbers (NaN where there is none) and where there are steps; some examples have no label at all."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.arange(L) < torch.randint(1, L + 1, (n, 1), generator=g)
    logits = at_steps(torch.randn(n, L, C, generator=g), steps)
    labels = 70 * torch.rand(n, L, generator=g)
    labels[(torch.rand(n, L, generator=g) < 0.3) | ~steps] = torch.nan
    labels[:3] = torch.nan
    return logits, labels, steps


def classes_of(labels: torch.Tensor) -> torch.Tensor:
    found = torch.full(labels.shape, -100)
    for place, value in np.ndenumerate(labels.numpy()):
        if not np.isnan(value):
            found[place] = sum(value >= edge for edge in EDGES)
    return found


def test_loss_and_score_are_those_of_the_steps_that_there_are() -> None:
    logits, labels, steps = some()
    classes = classes_of(labels)
    losses, scores = [], []
    for z, y, there in zip(logits, classes, steps):
        scores.append(torch.softmax(z[there], -1).amax(-1).mean())
        seen = y != -100
        losses.append(nnf.cross_entropy(z[seen], y[seen]) if seen.any() else torch.tensor(0.0))
    wanted = torch.stack(losses)[(classes != -100).any(1)].mean()
    for task, held in (
        (BINNED, labels),
        (PLAIN, classes),
        (PLAIN, classes.float().masked_fill(classes < 0, torch.nan)),
    ):
        torch.testing.assert_close(task.score(logits), torch.stack(scores))
        torch.testing.assert_close(task.example_losses(logits, held), torch.stack(losses))
        torch.testing.assert_close(task.loss(logits, held), wanted)
        assert task.observed(held).tolist() == (classes != -100).any(1).tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1e4, 1e4))
def test_what_stands_in_the_padding_changes_nothing(seed: int, junk: float) -> None:
    logits, labels, steps = some(seed, 6)
    raw = torch.where(steps[..., None], logits, junk).requires_grad_()
    masked = at_steps(raw, steps)
    (BINNED.loss(masked, labels) + BINNED.score(masked).sum()).backward()
    assert raw.grad is not None and torch.isfinite(raw.grad).all() and (raw.grad[~steps] == 0).all()
    torch.testing.assert_close(BINNED.score(masked), BINNED.score(logits))
    torch.testing.assert_close(BINNED.statistics(masked, labels), BINNED.statistics(logits, labels))
    assert BINNED.probabilities(masked)[~steps].isnan().all()


def wanted_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    seen = labels.isfinite()
    truth, chosen = classes_of(labels)[seen].numpy(), logits[seen].argmax(-1).numpy()
    return {
        "kappa": cohen_kappa_score(truth, chosen, weights="linear", labels=range(C)),
        "accuracy": accuracy_score(truth, chosen),
        "mae": mean_absolute_error(labels[seen], np.array(MEANS)[chosen]),
    }


def test_metrics_are_scikit_learns_overall_and_by_group_and_survive_a_file(tmp_path: Any) -> None:
    logits, labels, _ = some(1)
    groups = {"sex": torch.arange(N) % 2}
    made = lf.Predictions(
        (BINNED,), {"left": BINNED.score(logits)}, {"left": logits}, {"left": labels}, groups, {"sex": ["a", "b"]}
    )
    wanted = wanted_metrics(logits, labels)
    back = lf.Predictions.load(made.save(tmp_path / "p.parquet"))
    again = lf.Predictions.load(back.save(tmp_path / "again.parquet"))  # of statistics, as a run keeps them
    torch.testing.assert_close(again.outputs["left"], back.outputs["left"])
    assert back.tasks == (BINNED,) and back.outputs["left"].shape == (N, C * C + 1)
    for found in (made, back):
        assert utility(found)["left"] == pytest.approx(wanted, rel=1e-5)
        table = (
            GroupMetrics([BINNED], {"sex": 2}, confidence=None).update(found.outputs, found.labels, groups).compute()
        )
        for g, name in enumerate("01"):
            own = groups["sex"] == g
            rows = table[(table["group"].astype(str) == name)].set_index("metric")["value"]
            assert {m: rows[m] for m in wanted} == pytest.approx(wanted_metrics(logits[own], labels[own]), rel=1e-5)
    metric = lf.task_dict([BINNED])["left"]["metrics_fn"]
    metric.update_fun(logits[:25], labels[:25])
    metric.update_fun(logits[25:], labels[25:])
    assert dict(zip(metric.names, metric.score_fun())) == pytest.approx(wanted, rel=1e-5)
    right = targets(made)["left"]
    assert np.isnan(right[:3]).all() and ((right[3:] >= 0) & (right[3:] <= 1)).sum() == np.isfinite(right).sum()
    assert len(shrinkage_curve({t: made.scores["left"] for t in "ab"}, {t: right for t in "ab"}, 0.1))


def test_classes_without_means_are_their_own() -> None:
    classes = torch.tensor([[0, 3, -100], [2, 1, 1]])
    logits = 9.0 * nnf.one_hot(torch.tensor([[1, 3, 0], [0, 1, 3]]), C).float()
    native = PLAIN.native(PLAIN.statistics(logits, classes).sum(0))
    assert float(native["mae"]) == pytest.approx((1 + 0 + 2 + 0 + 2) / 5)
    spoken = lf.MulticlassSequence("left", C, means=MEANS)
    native = spoken.native(spoken.statistics(logits, classes).sum(0))
    assert float(native["mae"]) == pytest.approx((10 + 0 + 26 + 0 + 46) / 5)
    nothing = PLAIN.native(PLAIN.statistics(logits, torch.full_like(classes, -100)).sum(0))
    assert all(value.isnan() for value in nothing.values())
    assert task_from_dict(task_to_dict(BINNED)) == BINNED


def test_the_benchmarks_ten_classes() -> None:
    """Below a day, a day each to eight, 8 to 14, beyond: a class begins where the day is full."""
    task = Mimic3Settings(los="classes").task("length_of_stay")
    bins = [(-np.inf, 1), *((d, d + 1) for d in range(1, 8)), (8, 14), (14, np.inf)]
    assert isinstance(task, lf.MulticlassSequence) and task.n_classes == len(bins) == 10 and task.means == LOS_MEANS
    hours = np.array([0.0, 23.999, 24.0, 30, 47.9, 48, 7 * 24, 191.9, 192, 14 * 24 - 1, 14 * 24, 5000])
    wanted = [next(i for i, (a, b) in enumerate(bins) if a * 24 <= h < b * 24) for h in hours]
    assert task.truth(torch.tensor(hours)[None]).tolist() == [wanted]
    assert all(e / 24 == d for e, d in zip(task.edges, LOS_DAYS)) and all(
        low * 24 <= mean < high * 24 for (low, high), mean in zip(bins, LOS_MEANS)
    )
    assert isinstance(Mimic3Settings().task("length_of_stay"), lf.BinarySequence)


TASKS = (BINNED, lf.Binary("dies"))


def clinical(n: int = 64) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(5)
    steps = torch.arange(L) < torch.randint(2, L + 1, (n, 1), generator=g)
    x, sex = torch.randn(n, L, D, generator=g) * steps[..., None], torch.randint(0, 2, (n,), generator=g)
    left = (30 + 20 * x[..., 0] + 3 * sex[:, None]).where(steps & (torch.rand(n, L, generator=g) < 0.8), torch.nan)
    labels = {"left": left, "dies": (F.last_step(x, steps)[:, 0] > 0).float()}
    return lf.ResidentLoader(
        x, labels, {"sex": sex}, batch_size=32, shuffle=True, seed=0, device="cpu", reference=x[:, 0]
    )


def trainer_of(weighting: str, **options: Any) -> lf.FairTrainer:
    torch.manual_seed(0)
    architecture = "FairBranch" if weighting == "FBGrad" else "HPS"
    entries, heads = lf.task_dict(TASKS), dict(sequence_heads(TASKS, 8).items())
    if weighting == "LambdaMix":
        entries, made = lf.add_fairness_heads(entries, heads, loss="glf", sensitive=("sex",))
        heads = dict(made.items())
    return lf.FairTrainer(
        entries, weighting, architecture, lambda: LSTM(D, hidden=8, dropout=0.1), heads, False, False, {"optim": "adam", "lr": 0.02}, None,
        seed=0, progress=False, select="last", **{"device": "cpu", **options},
    )  # fmt: skip


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("PCGrad", {}),
    ("ReLiF", {}),
    ("ReLiF", {"pairs": "random"}),
    ("FBGrad", {}),
    ("FairMT", {"min_count": 1}),
    ("FairMT", {"form": "phi", "min_count": 1, "alpha": "uniform"}),
    ("GroupRegulariser", {"loss": "glf"}),
    ("LambdaMix", {}),
]


@pytest.mark.parametrize(("weighting", "args"), METHODS)
def test_methods_train_predict_and_are_audited(weighting: str, args: dict[str, Any]) -> None:
    trainer, loader = trainer_of(weighting, weight_args=args), clinical()
    trainer.train(loader, None, 20 if weighting == "PCGrad" else 5)
    assert trainer.epochs["loss/left"].iloc[-1] < trainer.epochs["loss/left"].iloc[0]
    found, small = trainer.predict(loader), trainer.predict(loader, maps=False)
    assert found.outputs["left"].shape == (64, L, C) and small.outputs["left"].shape == (64, C * C + 1)
    assert utility(found)["left"] == pytest.approx(utility(small)["left"])
    assert utility(found)["left"]["kappa"] > (0.1 if weighting == "PCGrad" else -0.1)
    assert 0 <= trainer.audit(loader, 0.1).bias <= 1
    assert {"kappa", "accuracy", "mae"} <= set(trainer.group_metrics(loader).query("task == 'left'")["metric"])
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize(("weighting", "args"), METHODS[1:])
def test_a_step_reads_no_value(weighting: str, args: dict[str, Any]) -> None:
    trainer = trainer_of(weighting, device="meta", weight_args=args)
    trainer.n_groups, trainer.model.epoch = {"sex": 2}, 0
    trainer.epoch_steps, trainer.model.epochs = 1, 4
    trainer.model.train_loss_buffer = torch.ones(len(trainer.task_name), 1).numpy()
    trainer.model.train()
    labels: dict[str, Any] = {"left": torch.zeros(16, L, device="meta"), "dies": torch.zeros(16, device="meta")}
    labels["sensitive"] = {"sex": torch.zeros(16, dtype=torch.long, device="meta")}
    labels["reference"] = torch.zeros(16, 3, device="meta")
    stepping.step(trainer, (torch.zeros(16, L, D, device="meta"), labels), 0, StepLog())
    assert trainer.global_step == 1


def test_what_does_not_fit_is_said() -> None:
    logits, labels, _ = some()
    with pytest.raises(RecipeError, match=r"edges must be 3 ascending numbers for 4 classes, found \(3, 2, 4\)"):
        lf.MulticlassSequence("left", 4, (3, 2, 4))
    with pytest.raises(RecipeError, match="2 means for n_classes=4"):
        lf.MulticlassSequence("left", 4, means=(1, 2))
    with pytest.raises(RecipeError, match="n_classes must be an integer of at least 2"):
        lf.MulticlassSequence("left", 1)
    with pytest.raises(DataError, match=r"expected a logit a class and step, \[B, L, C\], found \[40, 6, 3\]"):
        BINNED.loss(logits[..., :3], labels)
    with pytest.raises(DataError, match="expected one label a step"):
        BINNED.loss(logits, labels[:, 1:])
    assert PLAIN.wrong(torch.tensor([[0.0, 3.0, torch.nan, 4.0, -1.0, 0.5]])).tolist() == [[False] * 3 + [True] * 3]
    assert BINNED.wrong(torch.tensor([[0.0, -5.0, torch.nan, torch.inf]])).tolist() == [[False] * 3 + [True]]
    with pytest.raises(
        RecipeError, match=r"loss 'gap' compares one score an example, and task 'left' is multiclass_sequence"
    ):
        lf.add_fairness_heads(
            lf.task_dict(TASKS), dict(sequence_heads(TASKS, 8).items()), loss="gap", sensitive=("sex",)
        )


def test_groups_count_people_and_intervals_draw_people_anew() -> None:
    logits, labels, _ = some(1)
    groups = {"sex": torch.arange(N) % 2}
    table = (
        GroupMetrics([BINNED], {"sex": 2}, n_bootstrap=40).update({"left": logits}, {"left": labels}, groups).compute()
    )
    rows = table.set_index(["metric", "group"])
    assert rows.loc[("count", "overall"), "value"] == labels.isfinite().any(1).sum()
    gap = rows.loc[("mae", "difference")]
    assert 0 <= gap["low"] <= gap["value"] <= gap["high"]
