"""FairTrainer: LibMTL's Trainer on any device, with fairness methods, exact resume and a structured history."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from libmtl_fair.data.loader import resolve_device
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.files import need_writable
from libmtl_fair.libmtl import batches, checkpoint, saving
from libmtl_fair.libmtl import checkpoint_selection as judging
from libmtl_fair.libmtl import evaluate as evaluation
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.checkpoint_selection import DivergenceError
from libmtl_fair.libmtl.history import History, StepLog
from libmtl_fair.libmtl.joint_heads import joined_heads
from libmtl_fair.libmtl.loading import Trainer
from libmtl_fair.libmtl.loggers import Trackers
from libmtl_fair.libmtl.losses import LossBank, tasks_of
from libmtl_fair.libmtl.model import RepresentationHook, compose
from libmtl_fair.libmtl.optimizers import make_optimizer, make_scheduler
from libmtl_fair.libmtl.registry import resolve_architecture, resolve_weighting
from libmtl_fair.methods.base import FairWeighting
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import AUXILIARY_PREFIX, Task

if TYPE_CHECKING:
    from libmtl_fair.metrics import AuditReport

__all__ = ["DivergenceError", "FairTrainer"]

Selector = Callable[[evaluation.Results], float]


class FairTrainer(Trainer):  # type: ignore[misc]
    """A drop-in for ``LibMTL.Trainer`` (both lineages). A subclass with ``process_preds`` changes its base class only.

    Parameters
    ----------
    task_dict : LibMTL's; :func:`libmtl_fair.task_dict` builds one with masked losses. Order is task order.
    weighting, architecture : a name or a class, ours or LibMTL's.
    encoder_class : called without arguments, as LibMTL does.
    decoders : task -> head; a plain dict or ``nn.ModuleDict``.
    rep_grad, multi_input, optim_param, scheduler_param : as in LibMTL. Optimisers are fused where the device can.
    device : ``"auto"`` (CUDA where there is one, else the CPU) or a torch device.
    run_dir : folder for checkpoints (``last.pt`` each epoch, ``best.pt``) and ``history.csv``; None keeps nothing.
    resume : continue from ``run_dir/last.pt`` if there is one, to the numbers of an uninterrupted run.
    seed : seeds Python, numpy and torch when made and again when training starts; None leaves them alone.
    progress : a progress bar, where the error stream is a terminal.
    select : ``"best"``: after training the model holds its best epoch on validation data; ``"last"``: its last.
    select_by : validation results -> number, higher is better; default is LibMTL's mean relative improvement.
    loggers : where each epoch's numbers go besides ``epochs.jsonl`` in ``run_dir``: ``"tensorboard"``, ``"mlflow"``, or
        objects with ``log_epoch(epoch, values)``; see :mod:`libmtl_fair.libmtl.loggers`.
    weight_args, arch_args : hyperparameters, as in LibMTL; missing ones take LibMTL's defaults.

    Raises
    ------
    HostError : weighting, architecture, heads or device that do not fit.
    RecipeError : a hyperparameter, optimiser or scheduler that does not make sense.
    """

    def __init__(
        self,
        task_dict: Mapping[str, Mapping[str, Any]],
        weighting: str | type[Any],
        architecture: str | type[Any],
        encoder_class: Callable[[], nn.Module],
        decoders: Mapping[str, nn.Module],
        rep_grad: bool,
        multi_input: bool,
        optim_param: Mapping[str, Any],
        scheduler_param: Mapping[str, Any] | None,
        *,
        device: str | torch.device = "auto",
        run_dir: str | Path | None = None,
        resume: bool = False,
        seed: int | None = None,
        progress: bool = True,
        select: str = "best",
        select_by: Selector | None = None,
        loggers: Iterable[Any] = (),
        weight_args: Mapping[str, Any] | None = None,
        arch_args: Mapping[str, Any] | None = None,
        save_path: str | Path | None = None,
        load_path: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        if kwargs:
            raise RecipeError(
                f"FairTrainer takes no argument {next(iter(kwargs))!r}; hyperparameters go into weight_args and arch_args"
            )
        if select not in ("best", "last"):
            raise RecipeError(f"select must be 'best' or 'last', found {select!r}")
        if resume and run_dir is None and save_path is None:
            raise RecipeError("resume=True needs run_dir, the folder to continue from")
        if not task_dict:
            raise HostError("task_dict is empty; it needs at least one task")
        self.device = resolve_device(device)
        self.task_dict = {name: dict(entry) for name, entry in task_dict.items()}
        self.task_name = list(task_dict)
        self.task_num = len(task_dict)
        self.tasks = tasks_of(self.task_dict)
        self.auxiliary, self.main_tasks = _kinds(self.tasks)
        self.rep_grad, self.multi_input = rep_grad, multi_input
        self.run_dir = Path(run_dir or save_path) if run_dir or save_path else None  # type: ignore[arg-type]
        self.resume, self.seed, self.progress = resume, seed, progress
        self.select, self.select_by = select, select_by
        self._trackers = Trackers(loggers, self.run_dir)
        self.optim_param, self.scheduler_param = dict(optim_param), scheduler_param
        self.losses = LossBank(self.task_dict)
        self._own_losses = type(self)._compute_loss is FairTrainer._compute_loss
        self.kwargs = {"weight_args": dict(weight_args or {}), "arch_args": dict(arch_args or {})}
        if seed is not None:
            checkpoint.seed_everything(seed)
        self._prepare_model(weighting, architecture, encoder_class, decoders)
        self._prepare_optimizer(self.optim_param, scheduler_param)
        self._reset_progress()
        if load_path is not None:
            saving.load_weights(self, Path(load_path))

    def _reset_progress(self) -> None:
        self._history = History()
        self.epoch = self.global_step = 0
        self.best: dict[str, Any] = {
            "epoch": None, "score": float("-inf"), "results": None, "state": None, "structure": None
        }  # fmt: skip
        self.last_structure: Any = None
        self.validation: Any = None
        self._running: dict[str, Any] | None = None
        self._warned = False
        self.test_results: evaluation.Results | None = None
        self._first: evaluation.Results | None = None
        self._n_groups: dict[str, int] = {}

    def _prepare_model(self, weighting: Any, architecture: Any, encoder_class: Any, decoders: Any) -> None:
        weighting, architecture = resolve_weighting(weighting), resolve_architecture(architecture)
        self.weighting = weighting.__name__
        self.model, self._weight_args = compose(
            weighting,
            architecture,
            encoder_class,
            decoders,
            self.task_name,
            rep_grad=self.rep_grad,
            multi_input=self.multi_input,
            device=self.device,
            weight_settings=self.kwargs["weight_args"],
            arch_args=self.kwargs["arch_args"],
        )
        self.group_modules = [m for m in self.model.modules() if hasattr(m, "take_groups")]
        self._is_fair = isinstance(self.model, FairWeighting)
        self._hook = RepresentationHook(self.model) if self._is_fair else None
        self._samples = stepping.SAMPLES.get(self.weighting, 1)

    def _prepare_optimizer(self, optim_param: Mapping[str, Any], scheduler_param: Mapping[str, Any] | None) -> None:
        self.optimizer = make_optimizer(self.model, optim_param)
        self.scheduler = make_scheduler(self.optimizer, scheduler_param)
        if hasattr(self.model, "bind_optimizer"):
            self.model.bind_optimizer(self.optimizer)

    # -- training ---------------------------------------------------------------------------------------------

    def train(
        self,
        train_dataloaders: Any,
        test_dataloaders: Any = None,
        epochs: int = 1,
        val_dataloaders: Any = None,
        return_weight: bool = False,
    ) -> Any:
        """Train; choose the epoch on validation data only; score the test data once, at the end.

        Parameters
        ----------
        train_dataloaders, test_dataloaders, val_dataloaders : a loader, or task -> loader with ``multi_input``.
        epochs : in all; a resumed run, or a second call, goes on to this number.
        return_weight : return the tasks' weights of every step, [T, steps] numpy, NaN where a weighting has none.

        Raises
        ------
        DivergenceError : a loss was not finite: says epoch, step and task; the last good state is kept.
        DataError : a loader that does not fit.
        CheckpointError : a run folder that cannot be written, or a checkpoint that does not fit.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise RecipeError(f"epochs must be a whole number of at least 0, found {epochs!r}")
        self.validation = val_dataloaders
        self._start(train_dataloaders, val_dataloaders, epochs)
        self._trackers.start(self)
        for epoch in self._epochs(epochs):
            self._one_epoch(epoch, train_dataloaders, val_dataloaders)
        self._trackers.finish()
        if self.select == "best" and self.best["state"] is not None and self.epoch > self.best["epoch"] + 1:
            self._running = self._running or judging.snapshot(self)
            judging.hold_best(self)
        if test_dataloaders is not None:
            self.test_results = evaluation.evaluate(self, test_dataloaders)
        return self._weights() if return_weight else None

    def _start(self, train_dataloaders: Any, val_dataloaders: Any, epochs: int) -> None:
        if val_dataloaders is None and self.select == "best" and epochs > 0 and not self._warned:
            self._warned = True
            message = "no validation loader: the last epoch is kept (an epoch is never chosen on test data)"
            warnings.warn(message, stacklevel=3)
        if self.run_dir is not None:
            need_writable(self.run_dir)
        if self._running is not None and self.epoch < epochs:
            judging.put_back(self, self._running)
            self._running = None
        if self.seed is not None and self.epoch == 0:
            checkpoint.seed_everything(self.seed + 1)
        self._prepare_groups(train_dataloaders, val_dataloaders)
        if self.resume and self.epoch == 0:
            saving.resume(self, train_dataloaders)
        self._train_buffer(epochs)

    def _epochs(self, epochs: int) -> Iterator[int]:
        if not self.progress:
            yield from range(self.epoch, epochs)
            return
        from libmtl_fair.progress import bar

        with bar("training", epochs, self.epoch) as advance:
            for epoch in range(self.epoch, epochs):
                yield epoch
                advance(f"epoch {epoch + 1}/{epochs}")

    def _one_epoch(self, epoch: int, train_dataloaders: Any, val_dataloaders: Any) -> None:
        started = time.perf_counter()
        self.model.epoch = epoch
        before = None if self.run_dir is not None and epoch > 0 else judging.snapshot(self)
        log = StepLog()
        self.model.train()
        with joined_heads(self.model, self.optimizer):
            for batch in stepping.draw(self, train_dataloaders):
                stepping.step(self, batch, epoch, log)
        if not log.steps:
            raise DataError(f"epoch {epoch}: the training loader has no batch")
        steps = log.read(self.task_name)
        judging.check_finite(self, epoch, steps, before)
        means = log.means(steps[[f"loss/{task}" for task in self.task_name]].to_numpy())
        self.model.train_loss_buffer[:, epoch] = means
        results = {"train_s": time.perf_counter() - started}
        score = None
        if val_dataloaders is not None:
            found = evaluation.evaluate(self, val_dataloaders)
            results |= {f"val/{task}/{name}": value for task, scores in found.items() for name, value in scores.items()}
            score = judging.judge(self, epoch, found)
        self._history.add_epoch(epoch, steps, results)
        self._trackers.log_epoch(epoch, {**{str(k): float(v) for k, v in steps.mean().items()}, **results})
        self._move_schedule(-means.sum() if score is None else score)
        after = getattr(self.model, "after_epoch", None)
        if after is not None:
            after(self, epoch)
        self.epoch = epoch + 1
        if self.run_dir is not None:
            saving.save(self, train_dataloaders)

    def _move_schedule(self, score: float) -> None:
        if self.scheduler is None:
            return
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(score)
        else:
            self.scheduler.step()

    def _compute_loss(self, preds: Any, gts: Any, task_name: str | None = None) -> Tensor:
        """Return the losses of all tasks [T], or of one; LibMTL's hook, which a user's subclass may override."""
        return self.losses(preds, gts) if task_name is None else self.losses.one(task_name, preds, gts)

    def _compute_losses(self, preds: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        if not self.multi_input:
            return self._compute_loss(preds, labels)
        if self._own_losses:
            return self.losses(preds, labels)
        return torch.stack([self._compute_loss(preds[t], labels[t], t) for t in self.task_name])

    def _prepare_groups(self, train_dataloaders: Any, val_dataloaders: Any) -> None:
        if not (self.auxiliary or self.group_modules or (self._is_fair and self.model.needs_groups)):
            return
        found = [
            list(x.values()) if self.multi_input else [x] for x in (train_dataloaders, val_dataloaders) if x is not None
        ]
        self._n_groups = batches.group_counts([loader for part in found for loader in part])
        empty = [name for name, count in self._n_groups.items() if count < 1]
        if empty:
            raise DataError(
                f"sensitive attribute {empty[0]!r}: no example of the training data has a known group (all ids are below 0), "
                f"and {self._who_needs_groups()} it"
            )
        if not self._n_groups:
            raise HostError(
                f"{self._who_needs_groups()} sensitive groups, and the training loader gives none: its labels need a "
                "'sensitive' dict attribute -> group ids, as libmtl_fair.data.ResidentLoader yields"
            )

    def _who_needs_groups(self) -> str:
        if self.auxiliary:
            return f"auxiliary task {self.auxiliary[0]!r} needs"
        return "group-specific heads need" if self.group_modules else f"{self.weighting} needs"

    def _train_buffer(self, epochs: int) -> None:
        held = getattr(self.model, "train_loss_buffer", np.zeros((self.task_num, 0)))
        buffer = np.zeros((self.task_num, max(epochs, held.shape[1])))
        buffer[:, : held.shape[1]] = held
        self.model.train_loss_buffer = buffer
        self.model.epochs = epochs

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: ``epoch, step, loss/<task>``, a weighting's traces; epoch results on an epoch's last row."""
        return self._history.frame

    @property
    def epochs(self) -> pd.DataFrame:
        """One row an epoch: means over its steps, and validation results as ``val/<task>/<metric>``."""
        return self._history.epochs

    def _weights(self) -> Any:
        frame = self.history
        columns = [f"weight/{task}" for task in self.task_name]
        return frame.reindex(columns=columns).to_numpy().T

    def test(self, test_dataloaders: Any, epoch: int | None = None, mode: str = "test", **_: Any) -> evaluation.Results:
        """Return task -> metric -> value over a loader (``loss`` and the task's metrics)."""
        return evaluation.evaluate(self, test_dataloaders)

    def predict(self, loader: Any, *, embeddings: bool = False) -> Predictions:
        """Return outputs, scores, labels and groups of every example, on the CPU.

        ``embeddings=True`` also keeps what the heads received, [N, d] or one per task.
        """
        return evaluation.predict(self, loader, embeddings)

    def audit(self, loader: Any, delta: Any, *, exact: bool = True, **options: Any) -> AuditReport:
        """Return the fixed-delta audit (methods.md, 1.1) of the model's scores on a loader."""
        from libmtl_fair.metrics import FixedDeltaAudit

        return FixedDeltaAudit(delta, exact=exact, **options).run(self.predict(loader).scores)


def _kinds(tasks: Mapping[str, Task | None]) -> tuple[list[str], list[str]]:
    """Return the names of auxiliary tasks and of the others."""
    auxiliary = [name for name, task in tasks.items() if task is not None and task.auxiliary]
    main = [name for name in tasks if name not in auxiliary]
    reserved = [name for name in main if name.startswith(AUXILIARY_PREFIX)]
    if reserved:
        raise HostError(
            f"task {reserved[0]!r}: names that start with {AUXILIARY_PREFIX!r} are for auxiliary fairness heads; rename it"
        )
    if not main:
        raise HostError("task_dict has auxiliary tasks only; it needs at least one main task")
    return auxiliary, main
