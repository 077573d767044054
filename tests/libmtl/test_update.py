"""Callbacks, accumulation, clipping, mixed precision, early stopping, and loaders that stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import libmtl_fair as lf
from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.libmtl.precision import Precision
from libmtl_fair.libmtl.update import Update
from libmtl_fair.models import MLP

SGD = {"optim": "sgd", "lr": 0.1}


class TestCallbacks:
    def test_moments_come_in_their_order_and_may_be_left_out(self, kit: SimpleNamespace) -> None:
        seen: list[Any] = []

        class All:
            def start(self, trainer: Any) -> None:
                seen.append(("start", trainer.global_step))

            def step(self, trainer: Any, number: int, losses: Tensor) -> None:
                assert losses.shape == (3,)
                seen.append(("step", number))

            def epoch(self, trainer: Any, number: int, results: dict[str, float]) -> None:
                assert results["loss/a"] > 0
                assert len(trainer.epochs) == number + 1
                seen.append(("epoch", number))

            def end(self, trainer: Any) -> None:
                seen.append(("end", trainer.test_results is not None))

        class Some:
            def end(self, trainer: Any) -> None:
                seen.append(("other", True))

        trainer = kit.trainer("ReLiF", callbacks=[All(), Some()])
        trainer.train(kit.loader(), kit.loader(), epochs=2)
        steps = [("step", i) for i in range(1, 7)]
        last = [("end", True), ("other", True)]
        assert seen == [("start", 0), *steps[:3], ("epoch", 0), *steps[3:], ("epoch", 1), *last]

    def test_one_may_stop_the_training(self, kit: SimpleNamespace) -> None:
        class Stop:
            def epoch(self, trainer: Any, number: int, results: dict[str, float]) -> None:
                if number == 1:
                    trainer.stop()

        trainer = kit.trainer("EW", callbacks=[Stop()])
        trainer.train(kit.loader(), epochs=5)
        assert trainer.epoch == 2
        trainer.train(kit.loader(), epochs=3)
        assert trainer.epoch == 3


class TestAccumulation:
    @pytest.mark.parametrize("weighting", ["EW", "UW", "GLS"])
    @pytest.mark.parametrize("clip", [None, 0.05])
    def test_batches_of_a_third_make_the_update_of_the_whole(
        self, kit: SimpleNamespace, weighting: str, clip: float | None
    ) -> None:
        """Where the gradient is linear in the batch: equal weighting and UW; GLS is not, and differs."""
        trainers = []
        for size, accumulate in ((96, 1), (32, 3)):
            trainers.append(kit.trainer(weighting, optim_param=SGD, accumulate=accumulate, clip_norm=clip))
            trainers[-1].train(kit.loader(batch_size=size, shuffle=False), epochs=4)
        whole, parts = (kit.parameters(t) for t in trainers)
        gaps = [float((whole[name] - parts[name]).abs().max()) for name in whole]
        assert (max(gaps) < 1e-6) is (weighting != "GLS")
        assert [len(t.history) for t in trainers] == [4, 12]

    def test_an_epochs_last_update_is_of_what_is_left(self, kit: SimpleNamespace) -> None:
        whole, parts = (kit.trainer("EW", optim_param=SGD, accumulate=n) for n in (3, 100))
        for trainer in (whole, parts):
            trainer.train(kit.loader(shuffle=False), epochs=2)
        kit.assert_same(kit.parameters(whole), kit.parameters(parts))

    @pytest.mark.parametrize("weighting", ["MGDA", "ReLiF", "FairMT", "FBGrad", "GradNorm"])
    def test_every_kind_of_weighting_accumulates_its_own_gradients(self, kit: SimpleNamespace, weighting: str) -> None:
        """By hand: the mean of what each batch leaves in the gradients, at the same weights."""
        seen: list[dict[int, Tensor]] = []
        extra: Any = {"architecture": "FairBranch", "arch_args": {"max_events": 0}} if weighting == "FBGrad" else {}
        trainer = kit.trainer(weighting, optim_param=SGD, accumulate=3, **extra)
        step = trainer.update.step

        def spy(optimizer: Any) -> None:
            seen.append({id(p): p.grad.clone() for p in trainer.model.encoder.parameters()})
            step(optimizer)

        trainer.update.step = spy
        before = [p.detach().clone() for p in trainer.model.encoder.parameters()]
        trainer.train(kit.loader(), epochs=1)
        for old, p in zip(before, [p for p in trainer.model.encoder.parameters() if id(p) in seen[0]]):
            torch.testing.assert_close(p.detach(), old - 0.1 * torch.stack([grads[id(p)] for grads in seen]).mean(0))

    @pytest.mark.parametrize("bad", [0, 1.5, True, "2"])
    def test_a_number_that_is_none(self, kit: SimpleNamespace, bad: Any) -> None:
        with pytest.raises(RecipeError, match="accumulate must be a whole number of batches"):
            kit.trainer("EW", accumulate=bad)


class TestClipping:
    def test_the_norm_is_at_most_that(self, kit: SimpleNamespace) -> None:
        trainer = kit.trainer("EW", optim_param={"optim": "sgd", "lr": 1.0}, clip_norm=0.01)
        before = kit.parameters(trainer)
        trainer.train(kit.loader(batch_size=96), epochs=1)
        moved = sum((kit.parameters(trainer)[n] - before[n]).pow(2).sum() for n in before)
        assert float(moved) ** 0.5 == pytest.approx(0.01, rel=1e-3)

    @pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan"), "1"])
    def test_a_number_that_is_none(self, bad: Any) -> None:
        with pytest.raises(RecipeError, match="clip_norm must be a number above 0"):
            Update(clip_norm=bad)


class TestPrecision:
    @pytest.mark.parametrize(
        ("weighting", "architecture"),
        [
            *((name, "HPS") for name in ("EW", "GradNorm", "PCGrad", "MGDA", "ReLiF", "FairMT", "GroupRegulariser")),
            ("FBGrad", "FairBranch"),
        ],
    )
    def test_bf16_trains_and_all_that_methods_see_is_float32(
        self, kit: SimpleNamespace, weighting: str, architecture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from libmtl_fair.libmtl import step as stepping

        half: list[torch.dtype] = []
        full: list[Any] = []
        made = stepping.fair_batch

        def spy(*args: Any) -> Any:
            batch = made(*args)
            h = batch.h if isinstance(batch.h, dict) else {"": batch.h}
            full.extend([*h.values(), *batch.outputs.values(), batch.losses])
            return batch

        monkeypatch.setattr(stepping, "fair_batch", spy)
        trainer = kit.trainer(weighting, architecture=architecture, amp="bf16")
        linear = next(m for m in trainer.model.encoder.modules() if isinstance(m, nn.Linear))
        linear.register_forward_hook(lambda m, args, out: half.append(out.dtype) if m.training else None)
        trainer.train(kit.loader(), epochs=4)
        assert set(half) == {torch.bfloat16}
        assert {value.dtype for value in full} <= {torch.float32}
        assert all(p.dtype is torch.float32 and p.grad is not None for p in trainer.model.encoder.parameters())
        total = trainer.model.train_loss_buffer.sum(0)
        assert total[-1] < total[0]
        exact = kit.trainer(weighting, architecture=architecture)
        exact.train(kit.loader(), epochs=4)
        assert total == pytest.approx(exact.model.train_loss_buffer.sum(0), rel=0.05)

    @pytest.mark.parametrize("weighting", ["EW", "GradNorm", "MGDA", "ReLiF", "FairMT"])
    def test_the_scale_of_fp16_is_seen_by_nobody(self, kit: SimpleNamespace, weighting: str) -> None:
        """On the CPU, past FairTrainer's check: the same training whatever the scale, up to half precision."""
        found = []
        for scale in (1.0, 1024.0):
            trainer = kit.trainer(weighting)
            trainer.update.precision = vars(trainer.model)["precision"] = Precision("fp16", trainer.device, scale)
            trainer.train(kit.loader(), epochs=3)
            found.append(trainer.history["loss/a"].to_numpy())
            for p in trainer.model.encoder.parameters():
                assert p.grad.abs().max() < 100
        np.testing.assert_allclose(*found, rtol=2e-2)

    def test_a_step_that_overflows_is_left_out_and_halves_the_scale(self, kit: SimpleNamespace) -> None:
        trainer = kit.trainer("EW", optim_param=SGD)
        trainer.update.precision = vars(trainer.model)["precision"] = made = Precision("fp16", trainer.device, 2.0**30)
        before = kit.parameters(trainer)
        trainer.train(kit.loader(), epochs=1)  # three steps
        assert made.scale == 2.0**27
        kit.assert_same(before, kit.parameters(trainer))
        trainer.train(kit.loader(), epochs=9)
        assert made.good > 0
        total = trainer.model.train_loss_buffer.sum(0)
        assert total[-1] < total[0]
        other = Precision("fp16", trainer.device)
        other.load_state_dict(made.state_dict())
        assert (other.scale, other.good) == (made.scale, made.good)

    def test_what_it_does_not_take(self, kit: SimpleNamespace) -> None:
        with pytest.raises(RecipeError, match="amp must be 'bf16', 'fp16' or None, found 'half'"):
            kit.trainer("EW", amp="half")
        with pytest.raises(RecipeError, match="amp='fp16' needs a CUDA device, and this is cpu"):
            kit.trainer("EW", amp="fp16")
        experts = {"img_size": (6,), "num_experts": [2]}
        with pytest.raises(RecipeError, match="HPS takes it, and FairBranch.*what encoder_class makes"):
            kit.trainer("EW", amp="bf16", architecture="MMoE", arch_args=experts)


class Stream(IterableDataset[Any]):
    """Rows in an order of the epoch's, shared among workers."""

    def __init__(self, x: Tensor, labels: dict[str, Tensor], groups: dict[str, Tensor]) -> None:
        self.x, self.labels, self.groups, self.epoch = x, labels, groups, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        worker = get_worker_info()
        for i in order if worker is None else order[worker.id :: worker.num_workers]:
            groups = {name: ids[i] for name, ids in self.groups.items()}
            yield self.x[i], {**{t: y[i] for t, y in self.labels.items()}, "sensitive": groups}


class Counted(IterableDataset[Any]):
    """A stream that goes on where it was, and says where that is."""

    def __init__(self, x: Tensor, labels: dict[str, Tensor]) -> None:
        self.x, self.labels, self.at = x, labels, 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(64):
            i, self.at = self.at % len(self.x), self.at + 1
            yield self.x[i], {t: y[i] for t, y in self.labels.items()}

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class TestStreams:
    @pytest.mark.parametrize("kind", ["two workers", "no worker", "counted"])
    def test_resume_is_exact(self, kit: SimpleNamespace, tmp_path: Path, kind: str) -> None:
        x, labels, groups = kit.data()

        def loader() -> DataLoader[Any]:
            if kind == "counted":
                return DataLoader(Counted(x, labels), batch_size=24)
            return DataLoader(Stream(x, labels, groups), batch_size=24, num_workers=2 if kind == "two workers" else 0)

        weighting = "EW" if kind == "counted" else "GroupRegulariser"
        options: dict[str, Any] = {"accumulate": 2, "clip_norm": 1.0}
        whole = kit.trainer(weighting, run_dir=tmp_path / "whole", **options)
        whole.train(loader(), epochs=3)
        parts = kit.trainer(weighting, run_dir=tmp_path / "parts", **options)
        parts.train(loader(), epochs=1)
        again = kit.trainer(weighting, run_dir=tmp_path / "parts", resume=True, **options)
        again.train(loader(), epochs=3)
        kit.assert_same(kit.parameters(whole), kit.parameters(again))
        assert len(again.history) == len(whole.history)

    def test_another_setting_of_the_update_is_refused(self, kit: SimpleNamespace, tmp_path: Path) -> None:
        first = kit.trainer("EW", run_dir=tmp_path, accumulate=2)
        first.train(kit.loader(), epochs=1)
        with pytest.raises(CheckpointError, match="was made with accumulate = 2, this run has absent"):
            kit.trainer("EW", run_dir=tmp_path, resume=True).train(kit.loader(), epochs=2)


def test_early_stopping_restores_the_best_epoch(kit: SimpleNamespace) -> None:
    scores = iter([0.1, 0.5, 0.3, 0.2, 0.4, 0.9])
    trainer = kit.trainer("EW", patience=2, select="best", select_by=lambda results: next(scores))
    held: list[Any] = []

    class Keep:
        def epoch(self, trainer: Any, number: int, results: Any) -> None:
            held.append(kit.parameters(trainer))

    trainer.callbacks = (Keep(),)
    trainer.train(kit.loader(), None, 6, kit.loader())
    assert trainer.epoch == 4
    kit.assert_same(kit.parameters(trainer), held[1])


def test_a_recipe_says_it(kit: SimpleNamespace) -> None:
    from libmtl_fair.recipe.build import build_trainer
    from libmtl_fair.recipe.sections import Model, Train

    train = Train(accumulate=2, clip_norm=0.5, amp="bf16", early_stopping=3)
    trainer = build_trainer("EW", Model(), train, list(kit.tasks), kit.features, {}, 0, device="cpu", progress=False)
    update = trainer.update
    assert (update.accumulate, update.clip_norm, trainer.patience) == (2, 0.5, 3)
    assert update.precision is not None
    assert isinstance(trainer.model.encoder, MLP)
    with pytest.raises(ValueError, match="accumulate"):
        Train(accumulate=0)
    with pytest.raises(ValueError, match="amp"):
        Train(amp="fp8")
    assert lf.FairTrainer.stop.__doc__
