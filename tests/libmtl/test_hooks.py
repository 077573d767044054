"""A user's own Trainer methods, as LibMTL's examples override them, are called and not passed over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError
from libmtl_fair.libmtl.batches import to_device

TASKS = (lf.Binary("a"), lf.Binary("b"))


def rows(kit: SimpleNamespace) -> DataLoader[Any]:
    """Four tensors a batch, as LibMTL's xtreme example has them: no pair of inputs and labels."""
    x, labels, groups = kit.data()
    return DataLoader(TensorDataset(x, labels["a"], labels["b"], groups["sex"]), batch_size=32)


class Tokens(lf.FairTrainer):
    """Takes batches apart itself, as the xtreme example does, ``.next()`` and bare except and all."""

    calls = 0

    def _process_data(self, loader: Any) -> Any:
        type(self).calls += 1
        try:
            x, a, b, sex = loader[1].next()
        except:  # noqa: E722
            loader[1] = iter(loader[0])
            x, a, b, sex = loader[1].next()
        return {"x": x, "scale": 1.0}, {"a": a, "b": b, "sensitive": {"sex": sex}}


class Inner(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, 8)

    def forward(self, inputs: Any) -> Tensor:
        return torch.relu(self.layer(inputs["x"])) * inputs["scale"]


@pytest.mark.parametrize("weighting", ["EW", "ReLiF", "FairMT", "MGDA"])
def test_process_data(kit: SimpleNamespace, weighting: str) -> None:
    Tokens.calls = 0
    trainer = kit.trainer(weighting, TASKS, Tokens, encoder_class=lambda: Inner(kit.features))
    trainer.train(rows(kit), rows(kit), epochs=3)
    assert Tokens.calls >= 4 * 3
    losses = trainer.epochs["loss/a"]
    assert losses.iloc[-1] < losses.iloc[0]
    assert trainer.predict(rows(kit)).scores["a"].shape == (96,)
    plain = kit.trainer(weighting, TASKS, encoder_class=lambda: nn.Sequential(nn.Linear(kit.features, 8), nn.ReLU()))
    x, labels, groups = kit.data()
    loader = lf.ResidentLoader(
        x, {t: labels[t] for t in "ab"}, {"sex": groups["sex"]}, batch_size=32, shuffle=False, device="cpu"
    )
    plain.train(loader, epochs=3)
    assert losses.tolist() == pytest.approx(plain.epochs["loss/a"].tolist(), rel=1e-5)


def test_process_data_that_returns_no_pair_is_told(kit: SimpleNamespace) -> None:
    class Bad(lf.FairTrainer):
        def _process_data(self, loader: Any) -> Any:
            return next(loader[1])

    with pytest.raises(DataError, match=r"_process_data must return \(inputs, labels\), found list of 4"):
        kit.trainer("EW", TASKS, Bad).train(rows(kit), epochs=1)


class Restarting(lf.FairTrainer):
    """As LibMTL's own ``_process_data``, which starts again for ever."""

    def _process_data(self, loader: Any) -> Any:
        try:
            batch = next(loader[1])
        except StopIteration:
            loader[1] = iter(loader[0])
            batch = next(loader[1])
        return batch


class Plain(lf.FairTrainer):
    """Takes what is there."""

    def _process_data(self, loader: Any) -> Any:
        return next(loader[1])


@pytest.mark.parametrize("cls", [Restarting, Plain])
@pytest.mark.parametrize("multi", [False, True])
def test_process_data_of_a_stream(kit: SimpleNamespace, cls: Any, multi: bool) -> None:
    """A loader without a length: a pass ends where its iterator does."""
    x, labels, groups = kit.data(96)

    class Stream(IterableDataset[Any]):
        def __init__(self, rows: int) -> None:
            self.rows = rows

        def __iter__(self) -> Iterator[Any]:
            for i in range(0, self.rows, 32):
                part = slice(i, i + 32)
                yield x[part], {t: labels[t][part] for t in "ab"}, {name: ids[part] for name, ids in groups.items()}

    def made(**options: Any) -> Any:
        streams = {t: DataLoader(Stream(rows), batch_size=None) for t, rows in (("a", 96), ("b", 64))}
        trainer = kit.trainer("ReLiF", TASKS, cls, multi_input=multi, weight_args={"pairs": "random", "k": 4})
        given = streams if multi else streams["a"]
        trainer.train(given, given, 2, given, **options)
        return trainer, given

    trainer, given = made(steps_per_epoch=5)
    assert len(trainer.history) == 10
    assert {t: len(scores) for t, scores in trainer.predict(given).scores.items()} == {
        "a": 96,
        "b": 64 if multi else 96,
    }
    if not multi:
        assert len(made()[0].history) == 6
    else:
        with pytest.raises(DataError, match="no length"):
            made()


def test_prepare_dataloaders_with_inputs_a_task(kit: SimpleNamespace) -> None:
    """Loaders are chosen by the hook: here the first half of the batches, and its own order of tasks."""

    class Half(lf.FairTrainer):
        def _prepare_dataloaders(self, dataloaders: Any) -> Any:
            loaders, counts = super()._prepare_dataloaders(dataloaders)
            return loaders, [count // 2 for count in counts]

    x, labels, _ = kit.data(256)
    loaders = {t: DataLoader(TensorDataset(x, labels[t]), batch_size=32) for t in "ab"}
    trainer = kit.trainer("EW", TASKS, Half, multi_input=True)
    trainer.train(loaders, loaders, epochs=2)
    assert len(trainer.history) == 8


@pytest.mark.parametrize(
    ("weighting", "multi"),
    [("EW", False), ("EW", True), ("ReLiF", False), ("ReLiF", True), ("FairMT", False), ("PCGrad", True)],
)
def test_forward4loss(kit: SimpleNamespace, weighting: str, multi: bool) -> None:
    class Doubled(lf.FairTrainer):
        def forward4loss(self, model: Any, inputs: Any, gts: Any, return_preds: bool = False) -> Any:
            if not self.multi_input:
                preds = {task: 2 * z for task, z in model(inputs).items()}
            else:
                preds = {t: 2 * model(inputs[t], t)[t] for t in self.task_name}
            losses = torch.zeros(self.task_num, device=self.device)
            for i, task in enumerate(self.task_name):
                losses[i] = nn.functional.binary_cross_entropy_with_logits(preds[task].squeeze(1), gts[task])
            return (losses, preds) if return_preds else losses

    x, labels, groups = kit.data()
    if multi:
        loaders: Any = {t: [(x, labels[t], {"sex": groups["sex"]})] * 4 for t in "ab"}
    else:
        loaders = [(x, {t: labels[t] for t in "ab"}, {"sex": groups["sex"]})] * 4
    trainer = kit.trainer(weighting, TASKS, Doubled, multi_input=multi)
    trainer.train(loaders, epochs=3)
    assert trainer.epochs["loss/a"].iloc[-1] < trainer.epochs["loss/a"].iloc[0]

    class Processed(lf.FairTrainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            return 2 * preds if task_name else {task: 2 * z for task, z in preds.items()}

    same = kit.trainer(weighting, TASKS, Processed, multi_input=multi)
    same.train(loaders, epochs=3)
    assert trainer.epochs["loss/a"].tolist() == pytest.approx(same.epochs["loss/a"].tolist(), rel=1e-4)


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "FairMT"])
@pytest.mark.parametrize("multi", [False, True])
def test_a_compute_loss_copied_from_libmtl(
    kit: SimpleNamespace, weighting: str, multi: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    class Copied(lf.FairTrainer):
        def _compute_loss(self, preds: Any, gts: Any, task_name: str | None = None) -> Any:
            if not self.multi_input:
                train_losses = torch.zeros(self.task_num).to(self.device)
                for tn, task in enumerate(self.task_name):
                    train_losses[tn] = self.meter.losses[task]._update_loss(preds[task], gts[task])
            else:
                train_losses = self.meter.losses[task_name]._update_loss(preds, gts)
            return train_losses

    made = []
    for cls in (lf.FairTrainer, Copied):
        args = {"form": "phi", "min_count": 1} if weighting == "FairMT" else {}
        trainer = kit.trainer(weighting, TASKS, cls, multi_input=multi, weight_args=args)
        loaders = {t: kit.loader() for t in "ab"} if multi else kit.loader()
        trainer.train(loaders, epochs=3)
        made.append(trainer.history[["loss/a", "loss/b"]].to_numpy())
    assert made[1] == pytest.approx(made[0], rel=1e-4)
    assert len(trainer.meter.losses["a"].record) == 3  # of the last epoch only
    assert capsys.readouterr().out == ""


WRONG = [
    (
        "forward4loss",
        lambda *_, **__: None,
        "forward4loss.*must return a tensor .* and a dict task -> output, found NoneType",
    ),
    ("forward4loss", lambda *_, **__: ([], {}), "must return a tensor .*, found list, dict"),
    ("process_preds", lambda *_: None, "process_preds must return a dict task -> output, found NoneType"),
    ("_compute_loss", lambda *_: [1.0, 2.0], r"_compute_loss must return .* a tensor \[T\], found list"),
    (
        "_prepare_dataloaders",
        lambda self, given: [given, iter(given)],
        "_prepare_dataloaders must return .* the number of batches",
    ),
    ("_prepare_optimizer", lambda *_: None, "_prepare_optimizer must set self.optimizer .*: there is no optimizer"),
]


@pytest.mark.parametrize(
    ("name", "method", "message"), WRONG, ids=[f"{name} {i}" for i, (name, *_) in enumerate(WRONG)]
)
@pytest.mark.parametrize("weighting", ["EW", "ReLiF"])
def test_hooks_that_return_something_else_are_told(
    kit: SimpleNamespace, weighting: str, name: str, method: Any, message: str
) -> None:
    with pytest.raises((HostError, DataError), match=message):
        kit.trainer(weighting, TASKS, type("Own", (lf.FairTrainer,), {name: method})).train(kit.loader(), epochs=1)


def test_prepare_optimizer(kit: SimpleNamespace) -> None:
    class Own(lf.FairTrainer):
        def _prepare_optimizer(self, optim_param: Any, scheduler_param: Any) -> None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
            self.scheduler = None

    trainer = kit.trainer("EW", cls=Own)
    trainer.train(kit.loader(), epochs=2)
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert trainer.epochs["loss/a"].iloc[-1] < trainer.epochs["loss/a"].iloc[0]


class Graph:
    """What a graph library's batch is to us: something with ``.to``, which is no tensor, dict or list."""

    def __init__(self, x: Tensor, where: str | None = None) -> None:
        self.x, self.where = x, where

    def to(self, device: torch.device) -> Graph:
        return Graph(self.x.to(device), str(device))


class Named(NamedTuple):
    x: Tensor
    other: Tensor


@dataclasses.dataclass(frozen=True)
class Held:
    x: Tensor
    parts: list[Tensor] = dataclasses.field(default_factory=list)


class Moves(Graph):
    """Moves itself, and returns nothing."""

    def to(self, device: torch.device) -> None:  # type: ignore[override]
        self.x = self.x.to(device)


@pytest.mark.parametrize("kind", [Graph, Moves, Held, Named])
def test_what_holds_tensors_goes_to_the_device(kind: Any) -> None:
    x, device = torch.ones(2), torch.device("meta")
    given = kind(x, [x]) if kind is Held else kind(x, x) if kind is Named else kind(x)
    moved = to_device({"a": (given, "text")}, device)["a"][0]
    assert type(moved) is kind
    assert moved.x.device == device
    assert kind is not Held or (moved.parts[0].device == device and given.x.device.type == "cpu")


@pytest.mark.parametrize("kind", ["graph", "named"])
def test_inputs_that_are_no_tensor_go_to_the_device(kit: SimpleNamespace, kind: str) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(kit.features, 8)

        def forward(self, inputs: Any) -> Tensor:
            assert getattr(inputs, "where", "cpu") == "cpu"
            return torch.relu(self.layer(inputs.x))

    x, labels, groups = kit.data()
    made: Any = Graph(x) if kind == "graph" else Named(x, x)
    loader = [(made, {**{t: labels[t] for t in "ab"}, "sensitive": groups})] * 3
    trainer = kit.trainer("FairMT", TASKS, encoder_class=Encoder)
    trainer.train(loader, epochs=3)
    assert trainer.epochs["loss/a"].iloc[-1] < trainer.epochs["loss/a"].iloc[0]
    assert len(trainer.predict(loader).scores["a"]) == 3 * 96


def test_a_bare_label_tensor_carries_groups_as_a_third_part(kit: SimpleNamespace) -> None:
    x, labels, groups = kit.data()
    bare = {t: [(x, labels[t], groups)] * 2 for t in "ab"}
    full = {t: [(x, {t: labels[t], "sensitive": groups})] * 2 for t in "ab"}
    trainers = [kit.trainer("GroupRegulariser", TASKS, multi_input=True) for _ in range(2)]
    for trainer, loaders in zip(trainers, (bare, full)):
        trainer.train(loaders, epochs=2)
    kit.assert_same(*(kit.parameters(t) for t in trainers))


def test_a_third_part_that_is_no_groups_is_told(kit: SimpleNamespace) -> None:
    x, labels, _ = kit.data()
    with pytest.raises(DataError, match=r"\(x, labels, groups\) with a dict attribute -> ids, found tuple of 3"):
        kit.trainer("EW", TASKS).train([(x, {t: labels[t] for t in "ab"}, x)], epochs=1)


def test_fairness_heads_and_a_forward_of_ones_own(kit: SimpleNamespace) -> None:
    class Own(lf.FairTrainer):
        def forward4loss(self, model: Any, inputs: Any, gts: Any, return_preds: bool = False) -> Any:
            return super().forward4loss(model, inputs, gts, return_preds)

    tasks, heads = lf.add_fairness_heads(
        lf.task_dict(TASKS), {t: nn.Linear(8, 1) for t in "ab"}, loss="gap", sensitive=("sex",)
    )
    trainer = Own(
        tasks, "LambdaMix", "HPS", lambda: lf.models.MLP(kit.features, (16, 8)), heads, False, False,
        {"optim": "adam", "lr": 1e-2}, None, device="cpu", progress=False, select="last",
    )  # fmt: skip
    with pytest.raises(HostError, match="fairness heads make their own labels"):
        trainer.train(kit.loader(), epochs=1)
