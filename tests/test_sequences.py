"""Sequences: masked loss, score and metrics step by step, the LSTM's padding, and every method on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.history import StepLog
from libmtl_fair.metrics import GroupMetrics, base_rate_thresholds, shrinkage_curve, step_auc, utility
from libmtl_fair.metrics.drift import targets
from libmtl_fair.models import LSTM, sequence_heads
from libmtl_fair.models.lstm import LSTMLayer
from libmtl_fair.tasks import at_steps

TASK = lf.BinarySequence("worse")
N, L, D = 48, 7, 5


def some(seed: int = 0, n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels (NaN where there is none) and lengths; some steps have no label, some examples none at all."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (n,), generator=g)
    steps = torch.arange(L) < lengths[:, None]
    logits = at_steps(torch.randn(n, L, generator=g), steps)
    labels = (torch.rand(n, L, generator=g) < 0.4).float()
    labels[(torch.rand(n, L, generator=g) < 0.3) | ~steps] = torch.nan
    labels[:3] = torch.nan
    return logits, labels, lengths


def test_loss_and_score_are_those_of_the_steps_that_there_are() -> None:
    logits, labels, lengths = some()
    losses, scores = [], []
    for z, y, n in zip(logits, labels, lengths.tolist()):
        p = torch.sigmoid(z[:n])
        scores.append(p.mean())
        seen = [-(y[i] * p[i].log() + (1 - y[i]) * (1 - p[i]).log()) for i in range(n) if not torch.isnan(y[i])]
        losses.append(torch.stack(seen).mean() if seen else torch.tensor(0.0))
    torch.testing.assert_close(TASK.score(logits), torch.stack(scores))
    torch.testing.assert_close(TASK.example_losses(logits, labels), torch.stack(losses), rtol=1e-5, atol=1e-6)
    with_label = labels.isfinite().any(1)
    torch.testing.assert_close(TASK.loss(logits, labels), torch.stack(losses)[with_label].mean())
    assert TASK.observed(labels).tolist() == with_label.tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1e4, 1e4))
def test_what_stands_in_the_padding_changes_nothing(seed: int, junk: float) -> None:
    logits, labels, lengths = some(seed, 6)
    steps = torch.arange(L) < lengths[:, None]
    raw = torch.where(steps, logits, junk).requires_grad_()
    masked = at_steps(raw, steps)
    (TASK.loss(masked, labels) + TASK.score(masked).sum()).backward()
    assert raw.grad is not None and torch.isfinite(raw.grad).all() and (raw.grad[~steps] == 0).all()
    torch.testing.assert_close(TASK.score(masked), TASK.score(logits))
    assert TASK.probabilities(masked)[~steps].isnan().all()


def predictions(n: int = N) -> lf.Predictions:
    logits, labels, _ = some(1, n)
    groups = {"sex": torch.arange(n) % 2}
    scores = {"worse": TASK.score(logits)}
    return lf.Predictions((TASK,), scores, {"worse": logits}, {"worse": labels}, groups, {"sex": ["a", "b"]})


def test_metrics_are_those_of_all_labelled_steps(tmp_path: Any) -> None:
    found = predictions()
    logits, labels = found.outputs["worse"], found.labels["worse"]
    seen = labels.isfinite()
    p, y = torch.sigmoid(logits[seen]).numpy(), labels[seen].numpy()
    assert utility(found)["worse"]["auc"] == pytest.approx(roc_auc_score(y, p))
    metric = lf.task_dict([TASK])["worse"]["metrics_fn"]
    metric.update_fun(logits, labels)
    assert dict(zip(metric.names, metric.score_fun()))["AUC"] == pytest.approx(roc_auc_score(y, p))
    table = (
        GroupMetrics([TASK], {"sex": 2}, confidence=None).update(found.outputs, found.labels, found.groups).compute()
    )
    flat = (
        {"worse": logits.reshape(-1)},
        {"worse": labels.reshape(-1)},
        {"sex": found.groups["sex"].repeat_interleave(L)},
    )
    other = GroupMetrics([lf.Binary("worse")], {"sex": 2}, confidence=None).update(*flat).compute()
    assert table.query("metric == 'auc'").value.notna().all() and table.equals(other)
    rates = base_rate_thresholds(found)["worse"]
    assert isinstance(rates, float) and (p > rates).mean() == pytest.approx(y.mean(), abs=1 / len(y))
    wanted = targets(found)["worse"]
    np.testing.assert_allclose(
        wanted, np.nanmean(np.where(seen.any(1)[:, None], labels, 0), 1) * np.where(seen.any(1), 1, np.nan)
    )
    by_step = step_auc(found, "worse")
    for step, row in by_step.iterrows():
        at = seen[:, step]
        assert (row.labelled, row.positive) == (at.sum(), labels[at, step].sum())
        if 0 < row.positive < row.labelled:
            assert row.auc == pytest.approx(roc_auc_score(labels[at, step], logits[at, step]))
    with pytest.raises(DataError, match="no task 'other'"):
        step_auc(found, "other")
    back = lf.Predictions.load(found.save(tmp_path / "p.parquet"))
    for name in ("outputs", "labels", "scores"):
        torch.testing.assert_close(getattr(back, name)["worse"], getattr(found, name)["worse"], equal_nan=True)
    assert back.tasks == (TASK,)
    assert len(
        shrinkage_curve(
            {"worse": found.scores["worse"], "other": found.scores["worse"]}, {"worse": wanted, "other": wanted}, 0.1
        )
    )


def test_a_label_where_there_is_no_step_is_left_out_of_the_loss_and_named_where_shapes_differ() -> None:
    logits, labels, _ = some()
    with_extra = labels.clone()
    with_extra[logits == float("-inf")] = 1.0
    torch.testing.assert_close(TASK.example_losses(logits, with_extra), TASK.example_losses(logits, labels))
    with pytest.raises(DataError, match=r"outputs \[48, 7\] for labels \[48, 6\]; expected one label a step"):
        TASK.loss(logits, labels[:, :6])
    with pytest.raises(DataError, match=r"labels of a sequence must be \[B, L\], found \[48\]"):
        TASK.loss(logits, labels[:, 0])


def padded(seed: int = 0, n: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (n,), generator=g)
    x = torch.randn(n, L, D, generator=g) * (torch.arange(L) < lengths[:, None])[..., None]
    x[0, 0] = 0  # a step of zeros among others is a step
    return x, torch.where(lengths > 1, lengths, lengths)


def test_the_lstm_gives_what_packed_sequences_give() -> None:
    x, lengths = padded()
    lengths[0] = max(int(lengths[0]), 1)
    torch.manual_seed(0)
    layer = LSTMLayer(D, 4)
    packed, _ = layer.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    wanted, _ = pad_packed_sequence(packed, batch_first=True, total_length=L)
    torch.testing.assert_close(layer(x), wanted)
    assert (F.valid_steps(layer(x)).sum(1) == lengths).all()


def test_a_batch_without_a_step_is_named() -> None:
    with pytest.raises(DataError, match=r"at least one step, found \[2, 0, 5\]"):
        LSTM(5, hidden=3)(torch.zeros(2, 0, 5))


def test_dropout_between_layers_loses_no_step() -> None:
    x, lengths = padded(3, 64)
    torch.manual_seed(0)
    encoder = LSTM(D, hidden=2, layers=3, dropout=0.9)
    assert (F.valid_steps(encoder(x)).sum(1) == lengths).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 0}, "hidden must be a whole number of at least 1, found 0"),
        ({"layers": 2.5}, "layers must be a whole number of at least 1, found 2.5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        ({"every_step": 1}, "every_step must be true or false, found 1"),
    ],
)
def test_wrong_arguments_of_the_lstm(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LSTM(3, **wrong)


def test_pooling_is_the_mean_of_the_steps() -> None:
    x, lengths = padded()
    h = LSTM(D, hidden=3, layers=1)(x)
    wanted = torch.stack([row[: int(n)].mean(0) for row, n in zip(h, lengths)])
    torch.testing.assert_close(F.pooled(h), wanted)
    maps = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(F.pooled(maps), maps.mean((2, 3)))


TASKS = (TASK, lf.Binary("dies"), lf.Regression("stay"))


def clinical(n: int = 64) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(5)
    x, _ = padded(5, n)
    sex = torch.randint(0, 2, (n,), generator=g)
    steps = F.valid_steps(x)
    level = x.cumsum(1)[..., 0] + 0.5 * sex[:, None]
    worse = torch.where(steps & (torch.rand(n, L, generator=g) < 0.8), (level > 0).float(), torch.nan)
    labels = {"worse": worse, "dies": (F.last_step(x, steps)[:, 0] > 0).float(), "stay": x.mean((1, 2))}
    return lf.ResidentLoader(x, labels, {"sex": sex}, batch_size=32, shuffle=True, seed=0, device="cpu")


def trainer_of(weighting: str, tasks: tuple[lf.Task, ...] = TASKS, **options: Any) -> lf.FairTrainer:
    torch.manual_seed(0)
    architecture = "FairBranch" if weighting == "FBGrad" else "HPS"
    return lf.FairTrainer(
        lf.task_dict(tasks), weighting, architecture, lambda: LSTM(D, hidden=8, dropout=0.1), dict(sequence_heads(tasks, 8).items()),
        False, False, {"optim": "adam", "lr": 0.01}, None, seed=0, progress=False, select="last", **{"device": "cpu", **options},
    )  # fmt: skip


@pytest.mark.parametrize("weighting", ["EW", "ReLiF", "FBGrad", "FairMT"])
def test_a_step_reads_no_value(weighting: str) -> None:
    trainer = trainer_of(weighting, device="meta")
    trainer.n_groups, trainer.model.epoch = {"sex": 2}, 0
    trainer.epoch_steps, trainer.model.epochs = 1, 4
    trainer.model.train_loss_buffer = torch.ones(3, 1).numpy()
    trainer.model.train()
    labels: dict[str, Any] = {
        name: torch.zeros(16, *size, device="meta") for name, size in (("worse", (L,)), ("dies", ()), ("stay", ()))
    }
    labels["sensitive"] = {"sex": torch.zeros(16, dtype=torch.long, device="meta")}
    stepping.step(trainer, (torch.zeros(16, L, D, device="meta"), labels), 0, StepLog())
    assert trainer.global_step == 1


@pytest.mark.parametrize("weighting", ["EW", "PCGrad", "ReLiF", "FBGrad"])
def test_methods_train_predict_and_are_audited(weighting: str) -> None:
    trainer, loader = trainer_of(weighting), clinical()
    trainer.train(loader, None, 6)
    assert trainer.epochs["loss/worse"].iloc[-1] < trainer.epochs["loss/worse"].iloc[0]
    found = trainer.predict(loader)
    assert found.outputs["worse"].shape == (64, L) and found.scores["worse"].isfinite().all()
    assert utility(found)["worse"]["auc"] > 0.6
    assert 0 <= trainer.audit(loader, 0.1).bias <= 1
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


def test_a_branch_event_copies_a_layer() -> None:
    trainer, loader = trainer_of("FBGrad"), clinical()
    trainer.train(loader, None, 1)
    trainer.model.branch()
    trainer.train(loader, None, 2)
    assert "dies" in str(trainer.model.tree)


@pytest.mark.parametrize(
    ("weighting", "args"),
    [
        ("FairMT", {}),
        ("FairMT", {"form": "phi", "min_count": 1, "alpha": "uniform"}),
        ("GroupRegulariser", {"loss": "glf"}),
    ],
)
def test_constraints_and_regularisers_compare_the_losses_of_their_examples(
    weighting: str, args: dict[str, Any]
) -> None:
    trainer, loader = trainer_of(weighting, weight_args=args), clinical()
    trainer.train(loader, None, 4)
    assert trainer.epochs["loss/worse"].iloc[-1] < trainer.epochs["loss/worse"].iloc[0]


def test_fairness_heads_compare_the_losses_of_their_examples() -> None:
    entries, decoders = lf.task_dict(TASKS), dict(sequence_heads(TASKS, 8).items())
    with pytest.raises(
        RecipeError, match=r"loss 'gap' compares one score an example, and task 'worse' is binary_sequence; use 'glf'"
    ):
        lf.add_fairness_heads(entries, decoders, loss="gap", sensitive=("sex",), tasks=["worse"])
    made, heads = lf.add_fairness_heads(entries, decoders, loss="glf", sensitive=("sex",), tasks=["worse"])
    torch.manual_seed(0)
    trainer = lf.FairTrainer(
        made, "LambdaMix", "HPS", lambda: LSTM(D, hidden=8), dict(heads.items()), False, False, {"optim": "adam", "lr": 0.01}, None,
        seed=0, device="cpu", progress=False, select="last",
    )  # fmt: skip
    trainer.train(clinical(), None, 3)
    shown = trainer.epochs["loss/fair:worse/sex"]
    assert shown.notna().all() and (shown > 0).all()


def test_a_head_of_every_step_needs_steps() -> None:
    trainer = lf.FairTrainer(
        lf.task_dict([TASK]), "EW", "HPS", lambda: LSTM(D, hidden=8, every_step=False), dict(sequence_heads([TASK], 8).items()),
        False, False, {"optim": "adam", "lr": 0.01}, None, seed=0, device="cpu", progress=False, select="last",
    )  # fmt: skip
    x, _ = padded(5, 32)
    loader = lf.ResidentLoader(x, {"worse": torch.zeros(32, L)}, batch_size=16, shuffle=True, seed=0, device="cpu")
    with pytest.raises(HostError, match=r"every_step: true"):
        trainer.train(loader, None, 1)


def test_whole_sequences_with_plain_heads_train_with_fairmt() -> None:
    torch.manual_seed(0)
    tasks = (lf.Binary("dies"),)
    loader = clinical()
    trainer = lf.FairTrainer(
        lf.task_dict(tasks), "FairMT", "HPS", lambda: LSTM(D, hidden=8, every_step=False), {"dies": nn.Linear(8, 1)},
        False, False, {"optim": "adam", "lr": 0.01}, None, seed=0, device="cpu", progress=False, select="last",
    )  # fmt: skip
    trainer.train(loader, None, 3)
    assert trainer.epochs["loss/dies"].iloc[-1] < trainer.epochs["loss/dies"].iloc[0]
