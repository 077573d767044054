"""Outputs and labels as one matrix: handed on where it is one, stacked once where it is not, never another's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import libmtl_fair as lf
from libmtl_fair.batch import Columns, joined
from libmtl_fair.libmtl import batches
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.losses import LossBank

NAMES = ("a", "b", "c", "d")


def test_columns_are_a_mapping_that_is_taken_apart_on_demand() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    labels = Columns(NAMES, matrix)
    assert not vars(labels).keys() & {"_parts"}
    assert (list(labels), len(labels), "b" in labels, "e" in labels) == (list(NAMES), 4, True, False)
    assert [labels[name].tolist() for name in NAMES] == matrix.T.tolist()
    assert labels["b"] is labels["b"]
    wide = Columns(("a", "b"), matrix, [1, 3], {"e": torch.zeros(3)})
    assert {name: tuple(value.shape) for name, value in wide.items()} == {"a": (3, 1), "b": (3, 3), "e": (3,)}
    with pytest.raises(KeyError, match="'f'"):
        wide["f"]


def test_the_matrix_of_all_or_neighbouring_columns_is_no_copy() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert Columns(NAMES, matrix).matrix_of(NAMES) is matrix
    part = Columns(NAMES, matrix, [1, 1, 1, 1]).matrix_of(("b", "c"))
    assert part is not None
    assert part.data_ptr() == matrix[:, 1:].data_ptr()
    assert torch.equal(part, matrix[:, 1:3])
    after_a_wide_one = Columns(("x", "b"), matrix, [3, 1]).matrix_of(("b",))
    assert after_a_wide_one is not None
    assert torch.equal(after_a_wide_one, matrix[:, 3:])


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (Columns(NAMES, torch.zeros(3, 4)), ("a", "c")),
        (Columns(NAMES, torch.zeros(3, 4)), ("b", "a")),
        (Columns(NAMES, torch.zeros(3, 4)), ("e",)),
        (Columns(("x", "b"), torch.zeros(3, 4), [3, 1]), ("x", "b")),
        (Columns(NAMES, torch.zeros(3, 4, 2)), NAMES),
        (Columns(NAMES, torch.zeros(3, 4, 2)), ("a",)),
    ],
)
def test_other_columns_are_no_matrix(columns: Columns, names: tuple[str, ...]) -> None:
    assert columns.matrix_of(names) is None


def test_separate_columns_are_stacked() -> None:
    flat, tall = torch.arange(3.0), torch.arange(3.0).view(3, 1)
    expected = torch.stack([flat, flat], 1)
    for parts in ([flat, flat], [tall, tall], [flat, tall]):
        found = joined(dict(zip("ab", parts)), ("a", "b"))
        assert found is not None
        assert torch.equal(found, expected)
    found = joined(Columns(NAMES, torch.arange(12.0).view(3, 4)), ("c", "a"))
    assert found is not None
    assert found.tolist() == [[2, 0], [6, 4], [10, 8]]


@pytest.mark.parametrize(
    "other", [torch.zeros(2), torch.zeros(3, 2), torch.zeros(3, 1, 1), torch.tensor(0.0), [0, 0, 0]]
)
def test_what_is_no_column_of_as_many_rows_is_not(other: Any) -> None:
    assert joined({"a": torch.zeros(3), "b": other}, ("a", "b")) is None


def test_losses_and_gradients_are_those_of_separate_tensors() -> None:
    tasks = [lf.Binary(name) for name in "abc"]
    bank = LossBank(lf.task_dict(tasks))
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(8, 3, generator=g), (torch.rand(8, 3, generator=g) > 0.5).float()
    y[2, 1] = torch.nan
    joint = z.clone().requires_grad_()
    apart = [column.clone().requires_grad_() for column in z.split(1, 1)]
    names = ("a", "b", "c")
    found = bank(Columns(names, joint, [1, 1, 1]), Columns(names, y))
    truth = {name: y[:, i].clone() for i, name in enumerate(names)}
    expected = torch.stack([task.loss(z, truth[task.name]) for task, z in zip(tasks, apart)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(bank(dict(zip(names, apart)), truth), expected)
    weights = torch.tensor([1.0, 2.0, 3.0])
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(joint.grad, torch.cat([p.grad for p in apart], 1))


@pytest.mark.parametrize("order", ["abcd", "dcba", "dabc"])
def test_a_bank_of_several_kinds_keeps_the_order_of_its_tasks(order: str) -> None:
    kinds = {"a": lf.Binary("a"), "b": lf.Regression("b"), "c": lf.Binary("c"), "d": lf.Multiclass("d", 3)}
    bank = LossBank(lf.task_dict([kinds[name] for name in order]))
    z = {name: torch.randn(6, task.out_features) for name, task in kinds.items()}
    y = {"a": torch.ones(6), "b": torch.randn(6), "c": torch.tensor([0, 1, -100, 1, 0, 1]), "d": torch.arange(6) % 3}
    expected = torch.stack([kinds[name].loss(z[name], y[name]) for name in order])
    torch.testing.assert_close(bank(z, y), expected)


@pytest.mark.parametrize("kind", ["resident", "resident, other order", "ordinary", "integers"])
@pytest.mark.parametrize("joined_heads", [False, True])
def test_a_step_of_binary_tasks_has_its_matrices_from_any_loader(
    kit: SimpleNamespace, kind: str, joined_heads: bool
) -> None:
    tasks = (lf.Binary("a"), lf.Binary("b"))
    trainer = kit.trainer("ReLiF", tasks, rep_grad=not joined_heads)
    x, labels, groups = kit.data()
    labels["b"][::7] = torch.nan
    both = {name: labels[name] for name in ("ba" if "order" in kind else "ab")}
    if kind == "integers":
        both = {name: torch.where(y.isnan(), -100, y).long() for name, y in both.items()}
    loader: Any = lf.ResidentLoader(x, both, groups, batch_size=32, shuffle=False, device="cpu")
    if kind == "ordinary":
        loader = [(x[:32], {name: y[:32] for name, y in both.items()})]
    made = stepping.losses_of(trainer, next(batches.drawn(loader)))
    assert made.matrices is not None
    assert isinstance(made.outputs, Columns)
    assert made.outputs.matrix is made.matrices.logits
    truth = torch.stack([labels[name][:32] for name in "ab"], 1)
    torch.testing.assert_close(made.matrices.labels, truth, equal_nan=True)
    assert made.matrices.labelled.tolist() == truth.isfinite().sum(0).tolist()
    expected = [task.loss(made.outputs[task.name], truth[:, i]) for i, task in enumerate(tasks)]
    torch.testing.assert_close(made.losses, torch.stack(expected))


@pytest.mark.parametrize(
    "tasks",
    [
        (lf.Binary("a"), lf.Regression("c")),
        (
            lf.Binary("a"),
            lf.Binary(
                "b",
            ),
        ),
    ],
)
def test_other_tasks_or_inputs_have_none(kit: SimpleNamespace, tasks: tuple[lf.Task, ...]) -> None:
    apart = all(isinstance(task, lf.Binary) for task in tasks)
    trainer = kit.trainer("ReLiF", tasks, multi_input=apart)
    batch: Any = next(iter(kit.loader()))
    made = stepping.losses_of(trainer, {task.name: batch for task in tasks} if apart else batch)
    assert made.matrices is None
    assert made.losses.isfinite().all()


@pytest.mark.parametrize("change", ["nothing", "order", "a value", "all values", "loss"])
def test_a_fairness_method_never_gets_matrices_of_other_outputs(kit: SimpleNamespace, change: str) -> None:
    class Changes(lf.FairTrainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            if change == "a value":
                return {**preds, "b": 2 * preds["b"]}
            if change == "all values":
                return {name: 2 * z for name, z in preds.items()}
            return dict(reversed(preds.items())) if change == "order" else preds

    class Weighs(Changes):
        def _compute_loss(self, preds: Any, gts: Any, task_name: str | None = None) -> Any:
            flipped = 1 - torch.stack(list(gts.values()), 1)
            return super()._compute_loss(preds, dict(zip(gts, flipped.unbind(1))), task_name)

    tasks = (lf.Binary("a"), lf.Binary("b"))
    trainer = kit.trainer("FairMT", tasks, Weighs if change == "loss" else Changes)
    x, labels, groups = kit.data()
    both = {name: labels[name] for name in "ab"}
    loader = lf.ResidentLoader(x, both, groups, batch_size=32, shuffle=True, seed=1, device="cpu")
    made = stepping.losses_of(trainer, next(iter(loader)))
    fair = stepping.fair_batch(trainer, made, 0)
    matrices = fair.matrices
    assert matrices is not None
    for i, name in enumerate(trainer.task_name):
        assert torch.equal(matrices.logits[:, i : i + 1], made[1][name])
        assert torch.equal(matrices.labels[:, i], made[2][name])
    assert fair.standard_losses == (change != "loss")
    (through,) = torch.autograd.grad(made.losses.sum(), matrices.logits)  # the losses hang on the matrix
    assert (through != 0).any(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_loss_has_the_type_of_its_logits_or_better(dtype: torch.dtype) -> None:
    bank = LossBank(lf.task_dict([lf.Binary("a"), lf.Binary("b")]))
    z = torch.zeros(3000, 2)
    y = torch.ones(3000, 2, dtype=dtype)
    y[0, 1] = torch.nan
    y[1, 1] = torch.inf
    losses = bank({"a": z[:, :1], "b": z[:, 1:]}, {"a": y[:, 0], "b": y[:, 1]})
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.full((2,), 2.0).log())


@pytest.mark.parametrize(
    "tasks", [(lf.Binary("a"), lf.Binary("b"), lf.Regression("c")), (lf.Binary("a"), lf.Binary("b"))]
)
def test_a_fairness_method_gets_outputs_that_its_losses_hang_on(
    kit: SimpleNamespace, tasks: tuple[lf.Task, ...]
) -> None:
    trainer = kit.trainer("FairMT", tasks)
    trainer.model.train()
    made = stepping.losses_of(trainer, next(iter(kit.loader())))
    batch = stepping.fair_batch(trainer, made, 0)
    through = [batch.outputs[task.name] for task in tasks] if batch.matrices is None else [batch.matrices.logits]
    assert (batch.matrices is None) == (len(tasks) == 3)
    assert all((grad != 0).any() for grad in torch.autograd.grad(made.losses.sum(), through))
