"""Tasks: masked losses against plain loops, scores, probabilities, what bad definitions get."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.functional import auc
from libmtl_fair.libmtl.losses import LossBank

B = 24
NAN = float("nan")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cases() -> list[Any]:
    g = torch.Generator().manual_seed(1)
    missing = torch.rand(B, generator=g) < 0.3
    binary = (draw(2, B) > 0).float().masked_fill(missing, NAN)
    multilabel = (draw(3, B, 4) > 0).float().masked_fill(torch.rand(B, 4, generator=g) < 0.4, NAN)
    multilabel[0] = NAN
    classes = torch.randint(0, 3, (B,), generator=g).masked_fill(missing, -100)
    return [
        pytest.param(lf.Binary("t"), draw(4, B, 1), binary, id="binary"),
        pytest.param(lf.Binary("t"), draw(4, B), binary, id="binary flat"),
        pytest.param(lf.Binary("t"), draw(5, B, 2), binary, id="binary two logits"),
        pytest.param(lf.Binary("t"), draw(4, B, 1), binary.nan_to_num(-100).long(), id="binary int"),
        pytest.param(
            lf.Multiclass("t", 3),
            draw(6, B, 3),
            classes,
            id="multiclass",
        ),
        pytest.param(lf.Multilabel("t", 4), draw(7, B, 4), multilabel, id="multilabel"),
        pytest.param(lf.Regression("t"), draw(8, B, 1), draw(9, B).masked_fill(missing, NAN), id="regression"),
        pytest.param(lf.Regression("t"), draw(8, B), draw(9, B).masked_fill(missing, NAN), id="regression flat"),
    ]


def by_hand(task: lf.Task, output: Any, label: Any) -> float | None:
    """Loss of one example in plain Python; None where its label is missing."""

    def bce(z: float, y: float) -> float:
        p = 1 / (1 + math.exp(-z))
        return -(y * math.log(p) + (1 - y) * math.log(1 - p))

    values = np.atleast_1d(np.asarray(output, dtype=float))
    if task.kind == "multilabel":
        known = [(z, y) for z, y in zip(values, label) if not math.isnan(y)]
        return sum(bce(z, y) for z, y in known) / len(known) if known else None
    if label == -100 or math.isnan(label):
        return None
    if task.kind == "binary":
        return bce(values[1] - values[0] if len(values) == 2 else values[0], label)
    if task.kind == "multiclass":
        return float(np.log(np.exp(values).sum()) - values[int(label)])
    return float((values[0] - label) ** 2)


@pytest.mark.parametrize(("task", "output", "labels"), cases())
class TestEveryKind:
    def test_losses_by_hand(self, task: lf.Task, output: Tensor, labels: Tensor) -> None:
        expected = [by_hand(task, o, y) for o, y in zip(output.tolist(), labels.tolist())]
        found = task.example_losses(output, labels)
        assert task.observed(labels).tolist() == [e is not None for e in expected]
        np.testing.assert_allclose(found.numpy(), [e or 0.0 for e in expected], rtol=1e-5)
        known = [e for e in expected if e is not None]
        assert task.loss(output, labels).item() == pytest.approx(sum(known) / len(known), rel=1e-5)

    def test_missing_labels_have_no_gradient(self, task: lf.Task, output: Tensor, labels: Tensor) -> None:
        output = output.clone().requires_grad_()
        (grad,) = torch.autograd.grad(task.loss(output, labels), output)
        missing = ~task.observed(labels)
        assert bool(missing.any())
        assert bool((grad[missing] == 0).all())
        assert bool(grad.isfinite().all())
        assert bool((grad[~missing] != 0).any())

    def test_no_label_at_all(self, task: lf.Task, output: Tensor, labels: Tensor) -> None:
        output = output.clone().requires_grad_()
        nothing = torch.full_like(labels, NAN) if labels.is_floating_point() else torch.full_like(labels, -100)
        loss = task.loss(output, nothing)
        assert loss.item() == 0
        assert bool((torch.autograd.grad(loss, output)[0] == 0).all())

    def test_scores(self, task: lf.Task, output: Tensor, labels: Tensor) -> None:
        score = task.score(output)
        assert score.shape == (B,)
        assert bool(((score >= 0) & (score <= 1)).all())
        assert len(task.probabilities(output)) == B

    def test_the_bank_gives_the_same_loss(self, task: lf.Task, output: Tensor, labels: Tensor) -> None:
        from dataclasses import replace

        names = ("x", "y", "z")
        bank = LossBank(lf.task_dict([replace(task, name=n) for n in names]))
        found = bank({n: output + i for i, n in enumerate(names)}, dict.fromkeys(names, labels))
        expected = torch.stack([task.loss(output + i, labels) for i in range(3)])
        torch.testing.assert_close(found, expected)

    def test_labels_as_a_column(self, task: lf.Task, output: Tensor, labels: Tensor) -> None:
        if task.kind != "multilabel":
            assert torch.equal(task.example_losses(output, labels[:, None]), task.example_losses(output, labels))

    def test_half_precision_and_float64(self, task: lf.Task, output: Tensor, labels: Tensor) -> None:
        wide = task.loss(output.double(), labels)
        assert wide.dtype == torch.float64
        assert wide.item() == pytest.approx(task.loss(output, labels).item(), rel=1e-5)


def test_a_bank_of_many_kinds_keeps_the_order() -> None:
    tasks = [lf.Regression("r"), lf.Binary("p"), lf.Multiclass("m", 3), lf.Binary("q")]
    outputs = {"r": draw(0, B, 1), "p": draw(1, B, 1), "m": draw(2, B, 3), "q": draw(3, B, 1)}
    labels = {"r": draw(4, B), "p": (draw(5, B) > 0).float(), "m": torch.arange(B) % 3, "q": (draw(6, B) > 0).float()}
    labels["q"][::3] = NAN
    found = LossBank(lf.task_dict(tasks))(outputs, labels)
    torch.testing.assert_close(found, torch.stack([t.loss(outputs[t.name], labels[t.name]) for t in tasks]))


def test_scores_of_each_kind() -> None:
    z = torch.tensor([[0.0, 1.0, -1.0]])
    assert lf.Binary("t").score(torch.tensor([[0.0]])).item() == 0.5
    assert lf.Multiclass("t", 3).score(z).item() == pytest.approx(float(torch.softmax(z, 1).max()))
    assert lf.Multilabel("t", 3).score(z).item() == pytest.approx(1 / (1 + math.exp(-1)))
    ranged = lf.Regression("t", score_range=(-1.0, 3.0))
    assert ranged.score(torch.tensor([-5.0, -1.0, 1.0, 9.0])).tolist() == pytest.approx([0, 0, 0.5, 1], abs=1e-6)


def test_the_score_range_is_that_of_the_reference_model() -> None:
    outputs = draw(0, 1000, 1)
    task = lf.Regression("t").with_score_range(outputs)
    assert task.score_range == pytest.approx(np.quantile(outputs.numpy(), [0.1, 0.9]).tolist(), rel=1e-5)
    outputs[3] = float("inf")
    assert all(map(math.isfinite, lf.Regression("t").with_score_range(outputs).score_range or ()))
    with pytest.raises(DataError, match="task 't': the reference model has no finite output"):
        lf.Regression("t").with_score_range(torch.full((3, 1), NAN))


def test_regression_metrics_are_in_native_units() -> None:
    entry = lf.task_dict([lf.Regression("t", mean=40.0, std=10.0)])["t"]
    prediction, truth = draw(0, B, 1), draw(1, B)
    truth[:3] = NAN
    entry["metrics_fn"].update_fun(prediction, truth)
    mae, r2 = entry["metrics_fn"].score_fun()
    error = (prediction[3:, 0] - truth[3:]).double()
    assert mae == pytest.approx(10 * error.abs().mean().item())
    assert r2 == pytest.approx(1 - (error**2).sum().item() / truth[3:].double().var(unbiased=False).item() / (B - 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_equals_scikit_learn(pairs: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs])
    found = float(auc(torch.tensor(scores), torch.tensor(positive)))
    if positive.all() or not positive.any():
        assert math.isnan(found)
    else:
        assert found == pytest.approx(roc_auc_score(positive, scores))


def test_metrics_of_nothing_are_missing() -> None:
    for task in (lf.Binary("t"), lf.Regression("t")):
        entry = lf.task_dict([task])["t"]
        assert all(map(math.isnan, entry["metrics_fn"].score_fun()))
        entry["metrics_fn"].update_fun(draw(0, 4, 1), torch.full((4,), NAN))
        assert math.isnan(entry["metrics_fn"].score_fun()[0])


def test_libmtls_own_meter_reads_our_entries() -> None:
    entry = lf.task_dict([lf.Binary("t")])["t"]
    labels = torch.tensor([1.0, 0.0, NAN])
    first = entry["loss_fn"]._update_loss(torch.zeros(3, 1), labels)
    entry["loss_fn"]._update_loss(torch.full((1, 1), 50.0), torch.tensor([1.0]))
    assert first.item() == pytest.approx(math.log(2))
    assert entry["loss_fn"]._average_loss() == pytest.approx(2 / 3 * math.log(2))
    entry["loss_fn"]._reinit()
    assert math.isnan(entry["loss_fn"]._average_loss())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lf.Binary(""), "a task's name must be a non-empty string, found ''"),
        (lambda: lf.Binary(3), "a task's name must be a non-empty string, found 3"),  # type: ignore[arg-type]
        (lambda: lf.Multiclass("t", 1), "task 't': n_classes must be an integer of at least 2, found 1"),
        (lambda: lf.Multiclass("t", 2.5), r"n_classes must be an integer of at least 2, found 2\.5"),  # type: ignore[arg-type]
        (lambda: lf.Multiclass("t", 3, ("a", "b")), "task 't': 2 class names for n_classes=3"),
        (lambda: lf.Multilabel("t", 0), "task 't': n_labels must be an integer of at least 1, found 0"),
        (lambda: lf.Regression("t", std=0), "task 't': std must be above 0, found 0"),
        (lambda: lf.task_dict([]), "task_dict needs at least one task"),
        (lambda: lf.task_dict([lf.Binary("t"), lf.Regression("t")]), "two tasks are named 't'"),
        (lambda: lf.task_dict(["t"]), "task_dict takes tasks such as"),  # type: ignore[list-item]
    ],
)
def test_definitions_are_checked(make: Any, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        make()


def test_labels_of_another_length() -> None:
    with pytest.raises(DataError, match=r"task 't': 4 outputs for labels of shape \(3,\); expected \[B\]"):
        lf.Regression("t").loss(torch.zeros(4, 1), torch.zeros(3))


def test_tasks_are_values() -> None:
    assert lf.Multiclass("t", 3) == lf.Multiclass("t", 3)
    assert {lf.Binary("t"), lf.Binary("t")} == {lf.Binary("t")}
    with pytest.raises(AttributeError, match="cannot assign"):
        lf.Binary("t").name = "u"  # type: ignore[misc]
