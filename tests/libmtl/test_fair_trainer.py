"""FairTrainer: a drop-in for LibMTL's Trainer that keeps its promises."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.loading import AbsWeighting, Trainer, architecture_namespace, weighting_namespace


class Rows(torch.utils.data.Dataset[Any]):
    """An ordinary data set: one row at a time, groups under "sensitive"."""

    def __init__(self, data: tuple[Any, ...]) -> None:
        self.x, self.labels, self.groups = data

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        labels: dict[str, Any] = {t: v[i] for t, v in self.labels.items()}
        return self.x[i], {
            **labels,
            "sensitive": {a: v[i] for a, v in self.groups.items()},
            "reference": self.x[i],
        }


class TestDropIn:
    def test_it_is_libmtls_trainer(self, kit: Any) -> None:
        assert isinstance(kit.trainer(), Trainer)

    @pytest.mark.parametrize("by_class", [False, True])
    def test_names_or_classes(self, kit: Any, by_class: bool) -> None:
        choice = (weighting_namespace.UW, architecture_namespace.HPS) if by_class else ("UW", "HPS")
        trainer = kit.trainer(choice[0], architecture=choice[1])
        assert trainer.weighting == "UW"
        assert isinstance(trainer.model, weighting_namespace.UW)
        assert isinstance(trainer.model, architecture_namespace.HPS)

    def test_heads_in_a_plain_dict(self, kit: Any) -> None:
        heads = {t.name: nn.Linear(8, 1) for t in kit.tasks}
        trainer = kit.trainer(decoders=heads)
        assert isinstance(trainer.model.decoders, nn.ModuleDict)
        assert trainer.model.decoders["a"] is heads["a"]

    def test_process_preds_of_a_subclass(self, kit: Any) -> None:
        class Mine(lf.FairTrainer):
            def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
                assert task_name is None
                return {t: torch.zeros_like(p) + 3 + 0 * p for t, p in preds.items()}

        trainer = kit.trainer(cls=Mine)
        trainer.train(kit.loader(), epochs=1, val_dataloaders=kit.loader())
        assert bool((trainer.predict(kit.loader()).outputs["a"] == 3).all())
        assert trainer.history["loss/a"].nunique() > 1
        assert trainer.history["loss/a"].iloc[0] == pytest.approx(
            float(lf.Binary("a").loss(torch.full((32, 1), 3.0), next(iter(kit.loader()))[1]["a"]))
        )

    def test_process_preds_with_inputs_of_their_own(self, kit: Any) -> None:
        seen: list[Any] = []

        class Mine(lf.FairTrainer):
            def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
                assert isinstance(preds, Tensor)
                seen.append(task_name)
                return preds

        x, labels, _ = kit.data()
        loaders = {
            t: lf.ResidentLoader(x[:n], {t: labels[t][:n]}, batch_size=b, shuffle=True, seed=0, device="cpu")
            for t, n, b in (("a", 96, 16), ("b", 40, 20), ("c", 70, 32))
        }
        trainer = kit.trainer(cls=Mine, multi_input=True)
        trainer.train(loaders, loaders, 2)
        assert len(trainer.history) == 2 * 6  # the longest loader's
        assert seen[:3] == ["a", "b", "c"]
        found = trainer.predict(loaders)
        assert {t: len(s) for t, s in found.scores.items()} == {"a": 96, "b": 40, "c": 70}
        with pytest.raises(DataError, match="different examples"):
            found.frame()

    def test_compute_loss_of_a_subclass(self, kit: Any) -> None:
        class Mine(lf.FairTrainer):
            def _compute_loss(self, preds: Any, gts: Any, task_name: str | None = None) -> Tensor:
                return 2 * super()._compute_loss(preds, gts, task_name)

        plain, mine = kit.trainer(), kit.trainer(cls=Mine)
        for trainer in (plain, mine):
            trainer.train(kit.loader(), epochs=1)
        assert mine.history["loss/a"].iloc[0] == pytest.approx(2 * plain.history["loss/a"].iloc[0], rel=1e-6)

    def test_libmtls_own_losses_and_metrics(self, kit: Any) -> None:
        from LibMTL.loss import CELoss
        from LibMTL.metrics import AccMetric

        x, labels, groups = kit.data()
        task_dict = {
            t: {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]} for t in "ab"
        }
        trainer = lf.FairTrainer(
            task_dict, "EW", "HPS", lambda: nn.Linear(6, 8), {t: nn.Linear(8, 2) for t in "ab"}, False, False,
            {"optim": "adam", "lr": 1e-2}, None, device="cpu", progress=False, seed=0, select="last",
        )  # fmt: skip
        whole = {t: labels[t].long() for t in "ab"}
        loader = lf.ResidentLoader(x, whole, groups, batch_size=32, shuffle=True, seed=1, device="cpu")
        trainer.train(loader, loader, 12)
        assert trainer.test_results is not None
        assert trainer.test_results["a"]["Acc"] > 0.8
        assert trainer.predict(loader).tasks[0].kind == "multiclass"

    def test_weights_are_returned(self, kit: Any) -> None:
        weights = kit.trainer("UW").train(kit.loader(), epochs=2, return_weight=True)
        assert weights.shape == (3, 6)
        assert np.isfinite(weights).all()
        assert kit.trainer("EW").train(kit.loader(), epochs=2) is None

    def test_a_users_own_weighting(self, kit: Any) -> None:
        class Halves(AbsWeighting):  # type: ignore[misc, valid-type]
            def backward(self, losses: Tensor, **kwargs: Any) -> None:
                (losses.sum() * kwargs["share"]).backward()

        trainer = kit.trainer(Halves, weight_args={"share": 0.5})
        trainer.train(kit.loader(), epochs=3)
        assert trainer.history["loss/a"].iloc[-1] < trainer.history["loss/a"].iloc[0]

    def test_the_model_can_be_copied_after_training(self, kit: Any) -> None:
        trainer = kit.trainer()
        trainer.train(kit.loader(), epochs=1)
        copied = copy.deepcopy(trainer.model)
        x = kit.data()[0]
        assert torch.equal(copied(x)["a"], trainer.model(x)["a"])

    @pytest.mark.parametrize("scheduler", ["step", "exp", "cos", "reduce"])
    def test_schedulers(self, kit: Any, scheduler: str) -> None:
        extra = {
            "step": {"step_size": 1, "gamma": 0.5},
            "exp": {"gamma": 0.5},
            "cos": {"T_max": 4},
            "reduce": {"patience": 0},
        }
        trainer = kit.trainer(scheduler_param={"scheduler": scheduler, **extra[scheduler]})
        trainer.train(kit.loader(), epochs=3, val_dataloaders=kit.loader())
        rate = trainer.optimizer.param_groups[0]["lr"]
        assert rate <= 1e-2
        if scheduler in ("step", "exp"):
            assert rate == pytest.approx(1e-2 / 8)

    @pytest.mark.parametrize("optim", ["sgd", "adam", "adamw", "adagrad", "rmsprop"])
    def test_optimisers(self, kit: Any, optim: str) -> None:
        trainer = kit.trainer(optim_param={"optim": optim, "lr": 1e-2})
        trainer.train(kit.loader(), epochs=4)
        assert trainer.epochs["loss/c"].iloc[-1] < trainer.epochs["loss/c"].iloc[0]

    def test_fused_heads_equal_separate_ones(self, kit: Any) -> None:
        trainer = kit.trainer()
        x = kit.data()[0]
        fused = trainer.model(x)
        h = trainer.model.encoder(x)
        for task in kit.tasks:
            torch.testing.assert_close(fused[task.name], trainer.model.decoders[task.name](h))
        handle = trainer.model.decoders["b"].register_forward_hook(lambda m, i, out: out * 0)
        assert bool((trainer.model(x)["b"] == 0).all())
        handle.remove()


class TestValidation:
    def test_without_validation_it_warns_once(self, kit: Any) -> None:
        trainer = kit.trainer(select="best")
        with pytest.warns(UserWarning, match="no validation loader: the last epoch is kept") as seen:
            trainer.train(kit.loader(), epochs=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.train(kit.loader(), epochs=2)
        assert seen[0].filename == __file__

    def test_select_last_needs_no_validation(self, kit: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kit.trainer(select="last").train(kit.loader(), epochs=1)

    def test_the_best_epoch_on_validation_is_kept(self, kit: Any) -> None:
        scores = iter([0.1, 0.9, 0.3, 0.2])
        states: list[dict[str, Tensor]] = []

        def select(_: Any) -> float:
            states.append(kit.parameters(trainer))
            return next(scores)

        trainer = kit.trainer(select="best", select_by=select)
        trainer.train(kit.loader(), epochs=4, val_dataloaders=kit.loader(seed=1))
        assert trainer.best["epoch"] == 1
        kit.assert_same(kit.parameters(trainer), states[1])

    def test_libmtls_relative_improvement_is_the_default(self, kit: Any) -> None:
        from libmtl_fair.libmtl.checkpoint_selection import improvement

        first = {"a": {"loss": 1.0, "AUC": 0.5, "Acc": 0.8}, "c": {"loss": 1.0, "MAE": 2.0}}
        new = {"a": {"loss": 9.0, "AUC": 0.6, "Acc": 0.8}, "c": {"loss": 9.0, "MAE": 1.0}}
        weights = {"a": [1, 1], "c": [0]}
        assert improvement(new, first, weights) == pytest.approx((0.2 + 0 + 0.5) / 3)
        new["a"]["AUC"] = float("nan")
        assert improvement(new, first, weights) == pytest.approx((0 + 0.5) / 2)
        assert improvement({"a": {"loss": 1.0}}, {"a": {"loss": 1.0}}, {"a": []}) == float("-inf")

    def test_test_data_never_choose(self, kit: Any) -> None:
        """A test set that would choose another epoch than the validation set changes nothing."""
        x, labels, groups = kit.data(64, seed=2)
        turned = {"a": 1 - labels["a"], "b": 1 - labels["b"], "c": -labels["c"]}
        opposite = lf.ResidentLoader(x, turned, groups, batch_size=32, shuffle=False, device="cpu")
        kept = []
        for test in (None, kit.loader(64, seed=2, shuffle=False), opposite):
            trainer = kit.trainer(select="best")
            trainer.train(kit.loader(), test, 5, kit.loader(seed=1, shuffle=False))
            kept.append((trainer.best["epoch"], kit.parameters(trainer)))
        assert kept[0][0] > 0  # on the opposite labels the first epoch is the best
        for epoch, state in kept[1:]:
            assert epoch == kept[0][0]
            kit.assert_same(state, kept[0][1])

    def test_a_second_call_goes_on_from_the_last_epoch_not_the_best(self, kit: Any) -> None:
        def select(_: Any) -> float:
            return -trainer.model.epoch  # type: ignore[no-any-return]

        results = []
        for stops in ((5,), (3, 5)):
            trainer = kit.trainer(select="best", select_by=select)
            loader = kit.loader()
            for epochs in stops:
                trainer.train(loader, epochs=epochs, val_dataloaders=kit.loader(seed=1))
            results.append(trainer.history.drop(columns="train_s"))
        pd.testing.assert_frame_equal(*results)


class TestHistory:
    def test_one_row_a_step_and_results_on_the_last_row(self, kit: Any) -> None:
        trainer = kit.trainer("ReLiF", weight_args={"pairs": "random"})
        trainer.train(kit.loader(), epochs=2, val_dataloaders=kit.loader(seed=1))
        found = trainer.history
        assert found["epoch"].tolist() == [0, 0, 0, 1, 1, 1]
        assert found["step"].tolist() == list(range(6))
        assert (
            found[["loss/a", "loss/b", "loss/c", "lambda", "r", "r_smooth", "tau", "kappa", "lipschitz"]]
            .notna()
            .all(axis=None)
        )
        ends = found[["val/a/AUC", "val/c/MAE", "val/b/loss", "train_s"]]
        assert ends.notna().all(axis=1).tolist() == [False, False, True] * 2
        assert trainer.epochs["loss/a"].tolist() == pytest.approx(found.groupby("epoch")["loss/a"].mean().tolist())
        assert trainer.epochs["val/a/AUC"].tolist() == found["val/a/AUC"].dropna().tolist()

    def test_weights_of_a_weighting(self, kit: Any) -> None:
        trainer = kit.trainer("GradNorm")
        trainer.train(kit.loader(), epochs=2)
        assert trainer.history[["weight/a", "weight/b", "weight/c"]].notna().all(axis=None)

    def test_what_the_user_gets_is_a_copy(self, kit: Any) -> None:
        trainer = kit.trainer()
        trainer.train(kit.loader(), epochs=1)
        got = trainer.history
        got["loss/a"] = 0.0
        assert (trainer.history["loss/a"] > 0).all()

    def test_before_training(self, kit: Any) -> None:
        assert len(kit.trainer().history) == 0

    def test_train_loss_buffer_is_the_mean_over_rows(self, kit: Any) -> None:
        trainer = kit.trainer(weighting="DWA")
        trainer.train(kit.loader(80), epochs=1)  # batches of 32, 32, 16
        expected = np.average(trainer.history["loss/a"], weights=[32, 32, 16])
        assert trainer.model.train_loss_buffer[0, 0] == pytest.approx(expected)


class TestQuiet:
    @pytest.mark.parametrize("weighting", ["EW", "ReLiF", "CAGrad", "MGDA"])
    def test_nothing_on_the_console(self, kit: Any, capfd: pytest.CaptureFixture[str], weighting: str) -> None:
        trainer = kit.trainer(weighting, progress=True)
        trainer.train(kit.loader(), kit.loader(), 2, kit.loader())
        trainer.predict(kit.loader())
        trainer.audit(kit.loader(), 0.2)
        assert capfd.readouterr() == ("", "")


class NoWaiting(TorchDispatchMode):
    """Raises where a value is read: on an accelerator that is a wait for the device."""

    forbidden = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten._unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(self.forbidden):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def pretend_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the code paths that run away from the CPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("libmtl_fair") and hasattr(module, "on_cpu"):
            monkeypatch.setattr(module, "on_cpu", lambda *tensors: False)


class TestNoWaiting:
    @pytest.mark.parametrize("kind", ["resident", "ordinary"])
    @pytest.mark.parametrize(
        ("weighting", "args"),
        [
            ("EW", {}),
            ("UW", {}),
            ("DWA", {}),
            ("GLS", {}),
            ("GradNorm", {}),
            ("MGDA", {}),
            ("ReLiF", {"pairs": "near"}),
            ("ReLiF", {"pairs": "random"}),
            ("ReLiF", {"prototypes": "confident"}),
        ],
    )
    def test_steps_never_wait(
        self, kit: Any, monkeypatch: pytest.MonkeyPatch, weighting: str, args: dict[str, Any], kind: str
    ) -> None:
        loader = kit.loader() if kind == "resident" else DataLoader(Rows(kit.data()), batch_size=32)
        pretend_accelerator(monkeypatch)
        steps = []

        def step(*given: Any) -> None:
            with NoWaiting(), monkeypatch.context() as patch:
                for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
                    patch.setattr(Tensor, method, _forbidden(method))
                original(*given)
            steps.append(1)

        original = stepping.step
        monkeypatch.setattr(stepping, "step", step)
        kit.trainer(weighting, weight_args=args, optim_param={"optim": "sgd", "lr": 1e-2}).train(loader, epochs=3)
        assert len(steps) == 9

    def test_the_guard_sees_a_read(self) -> None:
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            torch.ones(1).sum().item()


def _forbidden(method: str) -> Any:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"Tensor.{method} waits for the device")

    return read


class TestIncompleteData:
    @pytest.mark.parametrize(
        "weighting", ["EW", "UW", "GLS", "GradNorm", "MGDA", "PCGrad", "CAGrad", "IMTL", "ReLiF", "FairMT"]
    )
    @pytest.mark.parametrize("kind", ["one batch", "all batches"])
    def test_labels_all_missing(self, kit: Any, weighting: str, kind: str) -> None:
        """A task without a label in a batch adds nothing, and nothing breaks."""
        x, labels, groups = kit.data()
        labels["b"][: 32 if kind == "one batch" else 96] = float("nan")
        loader = lf.ResidentLoader(x, labels, groups, batch_size=32, shuffle=False, device="cpu")
        args = {"FairMT": {"min_count": 1}, "ReLiF": {"pairs": "random"}}.get(weighting, {})
        trainer = kit.trainer(weighting, weight_args=args)
        before = kit.parameters(trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # FairMT says that a task had no groups to compare
            trainer.train(loader, epochs=2, val_dataloaders=loader)
        assert trainer.history["loss/b"].iloc[0] == 0
        assert (trainer.history["loss/b"].iloc[1] > 0) == (kind == "one batch")
        assert trainer.history[["loss/a", "loss/c"]].gt(0).all(axis=None)
        after = kit.parameters(trainer)
        assert all(bool(v.isfinite().all()) for v in after.values())
        if kind == "all batches" and weighting != "ReLiF":  # whose term needs no label
            assert torch.equal(before["decoders.b.weight"], after["decoders.b.weight"])
            assert np.isnan(trainer.history["val/b/AUC"].iloc[-1])

    def test_a_missing_task_adds_no_gradient(self, kit: Any) -> None:
        x, labels, groups = kit.data()
        labels["b"][:] = float("nan")
        with_b, without = kit.trainer(), kit.trainer(tasks=(kit.tasks[0], kit.tasks[2]))
        without.model.load_state_dict({k: v for k, v in with_b.model.state_dict().items() if "decoders.b" not in k})
        for trainer in (with_b, without):
            trainer.train(lf.ResidentLoader(x, labels, groups, batch_size=32, shuffle=False, device="cpu"), epochs=2)
        kit.assert_same(
            {k: v for k, v in kit.parameters(with_b).items() if "decoders" not in k},
            {k: v for k, v in kit.parameters(without).items() if "decoders" not in k},
        )

    @pytest.mark.parametrize("weighting", ["EW", "ReLiF", "FairMT"])
    def test_a_group_missing_in_a_batch(self, kit: Any, weighting: str) -> None:
        x, labels, groups = kit.data()
        groups = {"sex": torch.cat([torch.zeros(48), torch.ones(48)]).long()}
        loader = lf.ResidentLoader(x, labels, groups, batch_size=24, shuffle=False, device="cpu")
        args = {"FairMT": {"min_count": 1}, "ReLiF": {"pairs": "random"}}.get(weighting, {})
        trainer = kit.trainer(weighting, weight_args=args)
        trainer.train(loader, epochs=2)
        assert all(bool(v.isfinite().all()) for v in kit.parameters(trainer).values())

    def test_a_batch_of_one(self, kit: Any) -> None:
        for weighting, args in (("EW", {}), ("ReLiF", {"pairs": "random"}), ("ReLiF", {"pairs": "near"})):
            trainer = kit.trainer(weighting, weight_args=args)
            trainer.train(kit.loader(33), epochs=1)  # 32 and 1
            assert all(bool(v.isfinite().all()) for v in kit.parameters(trainer).values())

    @pytest.mark.parametrize("shape", [(), (1,)])
    def test_labels_as_a_column(self, kit: Any, shape: tuple[int, ...]) -> None:
        x, labels, _ = kit.data()
        data = TensorDataset(x)
        batches = [(x[:48], {t: v[:48].reshape(48, *shape) for t, v in labels.items()})]
        assert len(data) == 96
        trainer = kit.trainer()
        trainer.train(batches, epochs=1, val_dataloaders=batches)
        expected = kit.trainer()
        expected.train([(x[:48], {t: v[:48] for t, v in labels.items()})], epochs=1)
        torch.testing.assert_close(kit.parameters(trainer), kit.parameters(expected))
        assert trainer.predict(batches).labels["c"].shape == (48,)


class TestDivergence:
    @pytest.mark.parametrize("saved", [False, True])
    def test_a_loss_that_is_not_finite(self, kit: Any, tmp_path: Any, saved: bool) -> None:
        loader = kit.loader()
        trainer = kit.trainer(run_dir=tmp_path if saved else None)
        trainer.train(loader, epochs=2)
        good, optimiser = kit.parameters(trainer), copy.deepcopy(trainer.optimizer.state_dict())
        poison(trainer, "b", step=1)
        kept = "last good checkpoint is .*last.pt" if saved else "as it was before this epoch"
        match = rf"the loss of task 'b' is nan in epoch 2, step 1 of the epoch; .*{kept}.*Lower the"
        with pytest.raises(lf.DivergenceError, match=match):
            trainer.train(loader, epochs=4)
        kit.assert_same(kit.parameters(trainer), good)
        assert trainer.epoch == 2
        assert len(trainer.history) == 6
        held = trainer.optimizer.state_dict()["state"]
        assert all(torch.equal(held[i]["exp_avg"], optimiser["state"][i]["exp_avg"]) for i in held)

    def test_in_the_first_epoch_of_a_saved_run(self, kit: Any, tmp_path: Any) -> None:
        trainer = kit.trainer(run_dir=tmp_path)
        before = kit.parameters(trainer)
        poison(trainer, "a", step=2)
        with pytest.raises(
            lf.DivergenceError, match=r"task 'a' is nan in epoch 0, step 2.*as it was before this epoch"
        ):
            trainer.train(kit.loader(), epochs=1)
        kit.assert_same(kit.parameters(trainer), before)

    def test_a_parameter_that_is_not_finite(self, kit: Any) -> None:
        trainer = kit.trainer(optim_param={"optim": "sgd", "lr": 1e-2})
        before = kit.parameters(trainer)

        def spoil(*_: Any) -> None:
            if trainer.global_step == 2:  # the epoch's last
                next(trainer.model.encoder.parameters()).grad.fill_(torch.inf)

        trainer.optimizer.register_step_pre_hook(spoil)
        with pytest.raises(lf.DivergenceError, match=r"epoch 0: a parameter is not finite after the last step"):
            trainer.train(kit.loader(), epochs=1)
        kit.assert_same(kit.parameters(trainer), before)

    def test_relif_state_goes_back_too(self, kit: Any) -> None:
        trainer, loader = kit.trainer("ReLiF", weight_args={"pairs": "random"}), kit.loader()
        trainer.train(loader, epochs=1)
        held = {name: value.clone() for name, value in trainer.model.named_buffers()}
        assert len(held) > 3
        poison(trainer, "a", step=2)
        with pytest.raises(lf.DivergenceError, match="epoch 1, step 2"):
            trainer.train(loader, epochs=2)
        kit.assert_same(dict(trainer.model.named_buffers()), held)


def poison(trainer: Any, task: str, step: int) -> None:
    """Make the task's loss NaN from that step of the coming epoch on."""
    first, original = trainer.global_step, trainer._compute_loss

    def spoiled(preds: Any, gts: Any, task_name: str | None = None) -> Tensor:
        losses: Tensor = original(preds, gts, task_name)
        if trainer.global_step < first + step:
            return losses
        mark = torch.zeros_like(losses)
        mark[trainer.task_name.index(task)] = float("nan")
        return losses + mark

    trainer._compute_loss = spoiled


class TestLoaders:
    def test_an_ordinary_loader_equals_the_resident_one(self, kit: Any) -> None:
        for weighting in ("EW", "ReLiF"):
            args = (
                {"prototypes": "confident"} if weighting == "ReLiF" else {}
            )  # a DataLoader draws from torch's generator
            resident, ordinary = (kit.trainer(weighting, weight_args=args) for _ in range(2))
            resident.train(kit.loader(shuffle=False), epochs=2)
            ordinary.train(DataLoader(Rows(kit.data()), batch_size=32), epochs=2)
            kit.assert_same(kit.parameters(resident), kit.parameters(ordinary))
            found = [
                t.predict(x)
                for t, x in (
                    (resident, kit.loader(shuffle=False)),
                    (ordinary, DataLoader(Rows(kit.data()), batch_size=40)),
                )
            ]
            torch.testing.assert_close(found[0].scores, found[1].scores)
            assert torch.equal(found[0].groups["race"], found[1].groups["race"])

    def test_embeddings(self, kit: Any) -> None:
        trainer = kit.trainer()
        h = trainer.predict(kit.loader(shuffle=False), embeddings=True).embeddings
        assert isinstance(h, Tensor)
        torch.testing.assert_close(h, trainer.model.encoder(kit.data()[0]).detach())
        apart = kit.trainer(rep_grad=True).predict(kit.loader(shuffle=False), embeddings=True).embeddings
        assert apart.shape == (96, 8)

    @pytest.mark.parametrize(
        ("batch", "match"),
        [
            (torch.ones(3, 6), r"a loader must yield pairs \(x, labels\), or .*, found Tensor"),
            ((torch.ones(3, 6), torch.ones(3)), r"labels must be a dict task -> tensor, found Tensor; tasks: a, b, c"),
            ((torch.ones(3, 6), {"a": torch.ones(3), "bb": torch.ones(3)}), r"no task 'b'; unknown task 'b'"),
        ],
    )
    def test_a_batch_of_another_kind(self, kit: Any, batch: Any, match: str) -> None:
        with pytest.raises(DataError, match=match):
            kit.trainer().train([batch], epochs=1)

    def test_an_empty_loader(self, kit: Any) -> None:
        with pytest.raises(DataError, match="the training loader has no batch"):
            kit.trainer().train([], epochs=1)
        with pytest.raises(DataError, match="no batch for task 'a'; nothing to predict"):
            kit.trainer().predict([])

    def test_a_loader_a_task_is_missing(self, kit: Any) -> None:
        trainer = kit.trainer(multi_input=True)
        with pytest.raises(DataError, match="one loader a task; there is none for 'b'"):
            trainer.train({"a": kit.loader(), "c": kit.loader()}, epochs=1)

    def test_an_empty_loader_of_a_task(self, kit: Any) -> None:
        trainer = kit.trainer(multi_input=True)
        with pytest.raises(DataError, match="a training loader has no batch"):
            trainer.train({"a": kit.loader(), "b": [], "c": kit.loader()}, epochs=1)

    def test_a_loss_that_cannot_take_the_tensors(self, kit: Any) -> None:
        x, labels, _ = kit.data()
        with pytest.raises(
            HostError, match=r"task 'c': its loss cannot take these tensors \(output \(96, 1\).*labels \(95,\)"
        ):
            kit.trainer().train([(x, {**labels, "c": labels["c"][:-1]})], epochs=1)


class TestConstruction:
    @pytest.mark.parametrize(
        ("changes", "error", "match"),
        [
            ({"weighting": "EWW"}, HostError, "unknown weighting 'EWW'"),
            ({"architecture": "HSP"}, HostError, "unknown architecture 'HSP'; did you mean 'HPS'"),
            ({"decoders": {"a": nn.Linear(8, 1)}}, HostError, r"no decoder \(head\) for task 'b'; decoders has: a"),
            ({"device": "gpu7"}, DataError, "device: expected 'auto', 'cpu' or 'cuda', found 'gpu7'"),
            ({"optim_param": {"optim": "adm", "lr": 1}}, RecipeError, "unknown optimizer 'adm'; did you mean 'adam'"),
            (
                {"optim_param": {"optim": "adam", "lrr": 1}},
                RecipeError,
                "optimizer adam: unknown setting 'lrr'; did you mean 'lr'",
            ),
            ({"optim_param": {"optim": "adam", "lr": -1}}, RecipeError, "optimizer adam: Invalid learning rate"),
            ({"optim_param": {}}, RecipeError, "optimizer: say which one, for example"),
            ({"scheduler_param": {"scheduler": "stpe"}}, RecipeError, "unknown scheduler 'stpe'; did you mean 'step'"),
            ({"scheduler_param": {"scheduler": "step"}}, RecipeError, "scheduler step: .*step_size"),
            ({"select": "bets"}, RecipeError, "select must be 'best' or 'last', found 'bets'"),
            ({"resume": True}, RecipeError, "resume=True needs run_dir"),
            ({"nonsense": 1}, RecipeError, "takes no argument 'nonsense'"),
            ({"weight_args": {"alpha": 1}}, RecipeError, "EW .*unknown setting 'alpha'"),
            (
                {"weighting": "ReLiF", "weight_args": {"tarqet": 1}},
                RecipeError,
                "ReLiF: unknown setting 'tarqet'; did you mean 'target'",
            ),
            (
                {"weighting": "ReLiF", "weight_args": {"base": "ReLiF"}},
                HostError,
                "base must be a LibMTL weighting such as 'EW'",
            ),
            ({"weighting": "ReLiF", "weight_args": {"base": "GradNrom"}}, HostError, "unknown weighting 'GradNrom'"),
            ({"weighting": "ReLiF", "weight_args": {"base_args": {"x": 1}}}, RecipeError, "EW .*unknown setting 'x'"),
            (
                {"architecture": "MMoE"},
                HostError,
                r"architecture MMoE cannot be built: it needs arch_args\['img_size'\]",
            ),
            (
                {"architecture": "CGC", "arch_args": {"img_size": (6,), "num_experts": [1]}},
                HostError,
                "CGC cannot be built: num_experts needs",
            ),
            (
                {"architecture": "Cross_stitch"},
                HostError,
                "Cross_stitch cannot be built: it needs a ResNet-like encoder",
            ),
            (
                {"architecture": "Cross_stitch", "multi_input": True},
                HostError,
                "Cross_stitch cannot be built: No support",
            ),
        ],
    )
    def test_what_does_not_fit_is_said(
        self, kit: Any, changes: dict[str, Any], error: type[Exception], match: str
    ) -> None:
        changes = dict(changes)
        weighting = changes.pop("weighting", "EW")
        with pytest.raises(error, match=match):
            kit.trainer(weighting, **changes)

    def test_no_task(self, kit: Any) -> None:
        with pytest.raises(HostError, match="task_dict is empty"):
            lf.FairTrainer({}, "EW", "HPS", lambda: nn.Linear(2, 2), {}, False, False, {"optim": "sgd", "lr": 1}, None)

    @pytest.mark.parametrize("epochs", [-1, 1.5, True, "3"])
    def test_epochs(self, kit: Any, epochs: Any) -> None:
        with pytest.raises(RecipeError, match="epochs must be a whole number of at least 0"):
            kit.trainer().train(kit.loader(), epochs=epochs)

    def test_the_users_own_error_in_an_encoder_goes_through(self, kit: Any) -> None:
        def encoder() -> nn.Module:
            raise AttributeError("mine")

        with pytest.raises(AttributeError, match="^mine$"):
            kit.trainer(encoder_class=encoder)

    def test_a_task_of_unknown_kind_has_no_score(self, kit: Any) -> None:
        entries = lf.task_dict(kit.tasks)
        entries["a"] = {k: v for k, v in entries["a"].items() if k != "task"}
        trainer = lf.FairTrainer(
            entries, "EW", "HPS", lambda: nn.Linear(6, 8), {t.name: nn.Linear(8, 1) for t in kit.tasks}, False, False,
            {"optim": "sgd", "lr": 1e-2}, None, device="cpu", progress=False, select="last",
        )  # fmt: skip
        trainer.train(kit.loader(), epochs=1)
        with pytest.raises(HostError, match="task 'a' has no known kind.*lf.task_dict"):
            trainer.predict(kit.loader())
