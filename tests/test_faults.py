"""Labels, ids, weights and outputs that are not what they should be: refused with task, value and row, wherever they come in."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import libmtl_fair as lf
from libmtl_fair import metrics
from libmtl_fair.errors import DataError
from libmtl_fair.faults import Faults
from tests.harness.trainers import quiet

NAN = float("nan")
BINARY, THREE, LABELS, NUMBER = lf.Binary("t"), lf.Multiclass("t", 3), lf.Multilabel("t", 2), lf.Regression("t")
WRONG = [  # task, labels, what the message names
    (BINARY, torch.tensor([1.0, -1.0, 1.0, 1.0]), "found -1 in row 1; expected 0 or 1"),
    (BINARY, torch.tensor([0, 2, 0, 2]), r"found 2 in row 1 \(2 such values in all\)"),
    (BINARY, torch.tensor([5, 5, 5, 5]), "found 5 in row 0"),
    (BINARY, torch.tensor([0.0, 0.5, NAN, 1.0]), "found 0.5 in row 1"),
    (BINARY, torch.tensor([0.0, -100.0, 1.0, 1.0]), "found -100 in row 1"),
    (THREE, torch.tensor([0, 1, 2, 3]), "found 3 in row 3; expected whole numbers 0 to 2"),
    (THREE, torch.tensor([0, 1, -1, 2]), "found -1 in row 2"),
    (THREE, torch.tensor([0.0, 1.5, NAN, 2.0]), "found 1.5 in row 1"),
    (LABELS, torch.tensor([[0.0, 1.0], [NAN, 1.0], [0.0, 7.0], [1.0, 1.0]]), "found 7 in row 2"),
    (NUMBER, torch.tensor([0.0, float("inf"), NAN, 1.0]), "infinite|found inf in row 1"),
]
RIGHT = [
    (BINARY, torch.tensor([0.0, 1.0, NAN, 1.0])),
    (BINARY, torch.tensor([0, 1, -100, 1])),
    (BINARY, torch.tensor([True, False, True, False])),
    (THREE, torch.tensor([0, 1, -100, 2])),
    (THREE, torch.tensor([0.0, 1.0, NAN, 2.0])),
    (LABELS, torch.tensor([[0.0, 1.0], [NAN, 1.0], [0.0, 0.0], [1.0, NAN]])),
    (NUMBER, torch.tensor([0.0, -1e3, NAN, 1.0])),
]
WIDTH = {"binary": 1, "multiclass": 3, "multilabel": 2, "regression": 1}
SEX = torch.tensor([0, 1, 0, 1])


def trainer(task, width=None):
    heads = {"t": nn.Linear(3, width or WIDTH[task.kind])}
    return quiet(lambda: nn.Linear(2, 3), 3, [task], optim="sgd", decoders=heads, seed=None, device="auto")


def loaders(labels, groups=SEX):
    """Return a resident loader, and torch's over the same rows; each made when asked for."""
    x, given = torch.zeros(len(labels), 2), {"t": labels}
    rows = [(x[i], {"t": labels[i], "sensitive": {"sex": groups[i]}}) for i in range(len(labels))]
    return {
        "resident": lambda: lf.ResidentLoader(x, given, {"sex": groups}, batch_size=4, shuffle=False),
        "torch": lambda: DataLoader(rows, batch_size=4),
    }


@pytest.mark.parametrize("loader", ["resident", "torch"])
@pytest.mark.parametrize(
    ("task", "labels", "message"), WRONG, ids=lambda v: v.kind if isinstance(v, lf.tasks.Task) else ""
)
def test_a_trainer_refuses_labels_of_another_kind(task, labels, message, loader):
    with pytest.raises(DataError, match=message):
        trainer(task).train(loaders(labels)[loader](), epochs=1)
    with pytest.raises(DataError, match=message):
        trainer(task).predict(loaders(labels)[loader]())


@pytest.mark.parametrize("loader", ["resident", "torch"])
@pytest.mark.parametrize(("task", "labels"), RIGHT, ids=lambda v: v.kind if isinstance(v, lf.tasks.Task) else "")
def test_labels_that_are_right_or_missing_are_taken(task, labels, loader):
    ready = trainer(task)
    ready.train(loaders(labels)[loader](), epochs=1)
    assert np.isfinite(ready.history["loss/t"]).all()


@pytest.mark.parametrize(
    ("task", "labels", "message"), WRONG, ids=lambda v: v.kind if isinstance(v, lf.tasks.Task) else ""
)
def test_metrics_refuse_labels_of_another_kind_and_keep_what_they_had(task, labels, message):
    good = next(y for each, y in RIGHT if each is task)
    found = metrics.GroupMetrics([task], {"sex": 2}, confidence=None, auc=False)
    output = torch.randn(4, WIDTH[task.kind], generator=torch.Generator().manual_seed(0))
    before = found.update({"t": output}, {"t": good}, {"sex": SEX}).compute()
    with pytest.raises(DataError, match=f"task 't'.*{message}"):
        found.update({"t": output}, {"t": labels}, {"sex": SEX})
    assert found.compute().equals(before)
    with pytest.raises(DataError, match=message):
        metrics.task_utility(task, output, labels)


@pytest.mark.parametrize(
    "ids", [torch.tensor([0.0, 1.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])], ids=["cut", "float"]
)
def test_group_ids_are_whole_numbers(ids):
    y = torch.tensor([0.0, 1.0, 1.0, 0.0])
    with pytest.raises(DataError, match="'sex': expected integer ids"):
        loaders(y, ids)["resident"]()
    with pytest.raises(DataError, match="'sex': expected whole ids"):
        trainer(BINARY).train(loaders(y, ids)["torch"](), epochs=1)
    with pytest.raises(DataError, match="'sex': expected whole group ids"):
        metrics.GroupMetrics([BINARY], {"sex": 2}).update({"t": y}, {"t": y}, {"sex": ids})
    if ids[2] == 0.5:
        with pytest.raises(DataError, match="expected whole ids"):
            metrics.group_rates(y, y, ids, n_groups=2)


@pytest.mark.parametrize("ids", [[0, 1, 0, 2**63], [0, 1, 0, 2**64 - 1], [0, 1, 0, -3]])
def test_huge_and_negative_ids_do_not_wrap(ids):
    y = [0, 1, 1, 0]
    groups = np.array(ids, dtype=np.uint64 if min(ids) >= 0 else np.int64)
    with pytest.raises(DataError, match="group ids must lie in -1..1"):
        metrics.group_rates(y, y, groups, n_groups=2)


def test_ids_that_stand_for_more_groups_than_memory_holds():
    y, ids = torch.tensor([0.0, 1.0, 1.0, 0.0]), SEX + 10**15
    with pytest.raises(DataError, match="found id 1000000000000001; .*number the groups anew"):
        loaders(y, ids)["resident"]()
    with pytest.raises(DataError, match="'sex': found 1000000000000000 in row 0"):
        trainer(BINARY).train(loaders(y, ids)["torch"](), epochs=1)
    with pytest.raises(DataError, match="at most 100,000 groups"):
        metrics.GroupMetrics([BINARY], {"sex": 10**15})
    with pytest.raises(DataError, match="at most 100,000 groups"):
        metrics.group_rates(y, y, ids, n_groups=10**15)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -1.0])
def test_weights_are_finite_and_not_negative(bad):
    y, weight = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, bad, 1.0, 1.0])
    found = metrics.GroupMetrics([BINARY], {"sex": 2}, confidence=None)
    calls = [
        lambda: found.update({"t": y}, {"t": y}, {"sex": SEX}, weight),
        lambda: metrics.group_rates(y, y, SEX, 2, weight),
        lambda: metrics.group_auc(y, y, SEX, 2, sample_weight=weight),
        lambda: metrics.group_regression(y, y, SEX, 2, weight),
    ]
    for call in calls:
        with pytest.raises(DataError, match="sample_weight: found .* in row 1"):
            call()
    with pytest.raises(DataError, match=r"sample_weight has shape \[4, 1\]"):
        found.update({"t": y}, {"t": y}, {"sex": SEX}, torch.ones(4, 1))


@pytest.mark.parametrize(
    ("task", "shape"),
    [(BINARY, (4, 3)), (BINARY, (4, 1, 1)), (THREE, (4, 2)), (THREE, (4,)), (LABELS, (4,)), (NUMBER, (4, 2))],
)
def test_metrics_refuse_outputs_of_another_shape(task, shape):
    good = next(y for each, y in RIGHT if each is task)
    with pytest.raises(DataError, match=r"task 't' .*outputs of shape .*; expected \[B, "):
        metrics.GroupMetrics([task], {"sex": 2}).update({"t": torch.zeros(shape)}, {"t": good}, {"sex": SEX})


def test_metrics_of_two_logits_columns_and_narrow_floats_equal_those_of_one_logit():
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(400, generator=generator), (torch.rand(400, generator=generator) < 0.4).float()
    groups = {"sex": torch.randint(-1, 2, (400,), generator=generator)}

    def table(output, labels):
        return (
            metrics.GroupMetrics([BINARY], {"sex": 2}, confidence=None)
            .update({"t": output}, {"t": labels}, groups)
            .compute()
        )

    plain = table(z, y)
    assert table(torch.stack([torch.zeros(400), z], 1), y).equals(plain)
    assert table(z[:, None], y[:, None]).equals(plain)
    narrow = z.bfloat16()
    assert table(narrow, y).equals(table(narrow.float(), y))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2, 0.3], [0, 1, 5], "found label 5 in row 2"),
        ([0.1, 0.2, 0.3], [-1, 1, 1], "found label -1 in row 0"),
        ([0.1, NAN, 0.3], [0, 1, 1], "1 scores are not finite"),
        ([0.1, 0.2], [0, 1, 1], "as many labels"),
        ([[0.1, 0.2], [0.3, 0.4]], [0, 1], "as many labels"),
        ([0.1, 0.2, 0.3], [0, 1, NAN], "found label nan in row 2"),
        (["a", "b"], [0, 1], "expected scores"),
    ],
)
def test_auc_refuses_what_it_cannot_rank(scores, labels, message):
    with pytest.raises(DataError, match=message):
        metrics.auc_score(scores, labels)
    if np.ndim(scores) == 1:
        with pytest.raises(DataError, match=message if "many" not in message else "one length"):
            metrics.group_auc(scores, labels, [0] * len(scores), 1)


def test_where_a_device_would_have_to_be_waited_for_a_fault_is_said_when_asked_for():
    labels, faults = torch.tensor([0.0, 3.0, 4.0]), Faults(at_once=False)
    faults.note(labels > 9, labels, "labels", "0 or 1")
    faults.note(labels > 1, labels, "labels", "0 or 1")
    faults.note(labels > 3, labels, "labels", "0 or 1")
    with pytest.raises(DataError, match=r"found 3 in row 1 \(2 such values"):
        faults.check()
    faults.check()
    on_meta = torch.zeros(3, device="meta")
    faults.note(on_meta > 0, on_meta, "labels", "0 or 1")
    faults.check()


@pytest.mark.parametrize(
    ("task", "labels", "message"), WRONG, ids=lambda v: v.kind if isinstance(v, lf.tasks.Task) else ""
)
def test_a_step_of_ones_own_loop_refuses_labels_of_another_kind(task, labels, message):
    h = torch.randn(4, 3, requires_grad=True)
    head = nn.Linear(3, WIDTH[task.kind])
    fair = lf.FairStep("GroupRegulariser", [task], {"t": head}, loss="glf")
    with pytest.raises(DataError, match=message):
        fair.backward(representation=h, outputs={"t": head(h)}, labels={"t": labels}, groups={"sex": SEX})
    good = next(y for each, y in RIGHT if each is task)
    with pytest.raises(DataError, match="at most 100,000 groups"):
        fair.backward(representation=h, outputs={"t": head(h)}, labels={"t": good}, groups={"sex": SEX + 10**15})
