"""FairTrainer: LibMTL's Trainer on any device, with fairness methods, exact resume and a structured history."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from libmtl_fair.data.loader import ResidentLoader, resolve_device
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.faults import Faults
from libmtl_fair.files import writes
from libmtl_fair.libmtl import checkpoint
from libmtl_fair.libmtl import checkpoint_selection as selection
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.batches import batch_count, group_counts, once, per_task, set_epoch
from libmtl_fair.libmtl.checkpoint_selection import DivergenceError
from libmtl_fair.libmtl.compat import forward
from libmtl_fair.libmtl.evaluate import collapsed, evaluate, group_metrics, predict
from libmtl_fair.libmtl.history import Floats, StepLog
from libmtl_fair.libmtl.joint_heads import joined_heads
from libmtl_fair.libmtl.loggers import Tracker, Trackers
from libmtl_fair.libmtl.model import compose
from libmtl_fair.libmtl.optimizers import make_optimizer, make_scheduler
from libmtl_fair.libmtl.precision import Precision
from libmtl_fair.libmtl.state import Loader, Loaders, RepresentationHook, Results, TakesGroups, TrainingState
from libmtl_fair.libmtl.update import Update
from libmtl_fair.locks import alone_in_its_folder
from libmtl_fair.methods.base import FairWeighting
from libmtl_fair.predictions import Predictions
from libmtl_fair.processes import Processes, join
from libmtl_fair.progress import bar, tell, told

if TYPE_CHECKING:
    from libmtl_fair.metrics import AuditReport, ConsistencyAudit, ConsistencyReport
    from libmtl_fair.metrics.near_pairs import Features

__all__ = ["DivergenceError", "FairTrainer"]

_ENOUGH = 200
"""Steps after which a model that is no better than a constant is said to have been collapsed by its fairness heads."""


class FairTrainer(TrainingState):
    """A drop-in for ``LibMTL.Trainer`` (both lineages). A subclass with ``process_preds`` changes its base class only.

    Parameters
    ----------
    task_dict : mapping of str to mapping of str to object
        LibMTL's; :func:`libmtl_fair.task_dict` builds one with masked losses. Order is task order.
    weighting, architecture : str or type[nn.Module]
        A name or a class, ours or LibMTL's.
    encoder_class : callable () -> nn.Module
        Called without arguments, as LibMTL does.
    decoders : mapping of str to nn.Module
        Task -> head; a plain dict or ``nn.ModuleDict``.
    rep_grad, multi_input, optim_param, scheduler_param : bool or mapping of str to object or None
        As in LibMTL. Optimisers are fused where the device can.
    device : str or torch.device, default "auto"
        ``"auto"`` (CUDA where there is one, else the CPU) or a torch device.
    run_dir : str or Path, optional
        Folder for checkpoints (``last.pt`` each epoch, ``best.pt``) and ``history.csv``; None keeps nothing.
    resume : bool, default False
        Continue from ``run_dir/last.pt`` if there is one, to the numbers of an uninterrupted run.
    seed : int, optional
        Seeds Python, numpy and torch when made and again when training starts; None leaves them alone.
    progress : bool, default True
        A progress bar, where the error stream is a terminal.
    select : str, default "best"
        ``"best"``: after training the model holds its best epoch on validation data; ``"last"``: its last.
    select_by : callable (Results) -> float, optional
        Validation results -> number, higher is better; default is LibMTL's mean relative improvement.
    patience : int, optional
        Training stops after so many epochs without a better one on validation data.
    accumulate : int, default 1
        Batches of one update of the optimiser, which gets the mean of their gradients; weightings take each batch by itself.
    clip_norm : float, optional
        The largest Euclidean norm of all gradients of an update.
    amp : str, optional
        ``"bf16"`` or, on CUDA, ``"fp16"``: in training the encoder runs in half precision; its representations, the heads,
        losses, group statistics and everything that a weighting computes stay float32. Evaluation is in float32.
    callbacks : iterable of object, default ()
        Objects with any of ``start(trainer)``, ``step(trainer, number, losses)`` with losses [T] on the device,
        ``epoch(trainer, number, results)`` and ``end(trainer)``, called when they happen; :meth:`stop` ends training.
    loggers : iterable of str or Tracker, default ()
        Where each epoch's numbers go besides ``epochs.jsonl`` in ``run_dir``: ``"tensorboard"``, ``"mlflow"``,
        ``"wandb"``, or objects with ``log_epoch(epoch, values)``; see :mod:`libmtl_fair.libmtl.loggers`.
    n_groups : mapping of str to int, optional
        Attribute -> number of groups. Without it the loaders' ``n_groups`` say, or one look through them.
    weight_args, arch_args : mapping of str to object, optional
        Hyperparameters, as in LibMTL; missing ones take LibMTL's defaults.

    Raises
    ------
    HostError
        Weighting, architecture, heads or device that do not fit.
    RecipeError
        A hyperparameter, optimiser or scheduler that does not make sense.
    """

    def __init__(
        self,
        task_dict: Mapping[str, Mapping[str, object]],
        weighting: str | type[nn.Module],
        architecture: str | type[nn.Module],
        encoder_class: Callable[[], nn.Module],
        decoders: Mapping[str, nn.Module],
        rep_grad: bool,
        multi_input: bool,
        optim_param: Mapping[str, object],
        scheduler_param: Mapping[str, object] | None,
        *,
        device: str | torch.device = "auto",
        run_dir: str | Path | None = None,
        resume: bool = False,
        seed: int | None = None,
        progress: bool = True,
        select: str = "best",
        select_by: Callable[[Results], float] | None = None,
        patience: int | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        amp: str | None = None,
        callbacks: Iterable[object] = (),
        loggers: Iterable[str | Tracker] = (),
        n_groups: Mapping[str, int] | None = None,
        weight_args: Mapping[str, object] | None = None,
        arch_args: Mapping[str, object] | None = None,
        save_path: str | Path | None = None,
        load_path: str | Path | None = None,
        **kwargs: object,
    ) -> None:
        nn.Module.__init__(self)
        folder = run_dir or save_path
        if kwargs:
            raise RecipeError(
                f"FairTrainer takes no argument {next(iter(kwargs))!r}; hyperparameters go into weight_args and arch_args"
            )
        if select not in ("best", "last"):
            raise RecipeError(f"select must be 'best' or 'last', found {select!r}")
        if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
            raise RecipeError(f"patience must be a whole number of epochs, at least 1, or None, found {patience!r}")
        if resume and folder is None:
            raise RecipeError("resume=True needs run_dir, the folder to continue from")
        self.device = resolve_device(device)
        self.processes = join(self.device)
        self.run_dir = Path(folder) if folder else None
        self.save_path, self.load_path = save_path, load_path
        self.rep_grad, self.multi_input = rep_grad, multi_input
        self.resume, self.seed, self.progress = resume, seed, progress
        self.select, self.select_by, self.patience = select, select_by, patience
        self.optim_param, self.scheduler_param = dict(optim_param), scheduler_param
        self.kwargs = {"weight_args": dict(weight_args or {}), "arch_args": dict(arch_args or {})}
        self._trackers = Trackers(loggers, self.run_dir) if writes() else Trackers((), None)
        self.take_tasks(task_dict)
        if seed is not None:
            checkpoint.seed_everything(seed)
        self.model = compose(self, weighting, architecture, encoder_class, decoders)
        if self.processes is not None:
            self.processes.broadcast([*self.model.parameters(), *self.model.buffers()])
        self.group_modules = [m for m in self.model.modules() if isinstance(m, TakesGroups)]
        fair = isinstance(self.model, FairWeighting)
        self.representation = RepresentationHook(self.model) if fair else None
        self.features = (
            self.watch_features(self.model.decoders, True) if fair and hasattr(self.model, "decoders") else None
        )
        self.samples, self.faults = stepping.SAMPLES.get(self.weighting, 1), Faults()
        self.update = Update(accumulate, clip_norm, self._precision(amp))
        self.callbacks, self._stopped = tuple(callbacks), False
        self._declared_groups = dict(n_groups or {})
        self.prepare_optimizer()
        self.start_afresh()
        self.validation: Loaders | None = None
        self.test_results: Results | None = None
        self._before_epoch = selection.Snapshot()
        self._before_best: selection.Snapshot | None = None
        self._warned = False
        if load_path is not None:
            checkpoint.load_weights(self, Path(load_path))

    def _precision(self, amp: str | None) -> Precision | None:
        if amp is None:
            return None
        made = Precision(amp, self.device)
        if amp == "fp16" and self.device.type != "cuda":
            raise RecipeError(f"amp='fp16' needs a CUDA device, and this is {self.device}; 'bf16' runs on the CPU too")
        if not (self.model.takes_precision or type(self.model).forward is forward):
            raise RecipeError(
                "amp: of LibMTL's architectures HPS takes it, and FairBranch; leave it out, or put torch.autocast into what "
                "encoder_class makes"
            )
        vars(self.model)["precision"] = made
        return made

    def stop(self) -> None:
        """End training after the present epoch; for callbacks. In several processes it is enough that one says so."""
        self._stopped = True

    def _stop_is_wanted(self) -> bool:
        if self.processes is not None:
            self._stopped = any(wanted for (wanted,) in self.processes.counts([self._stopped]))
        return self._stopped

    def prepare_optimizer(self) -> None:
        """Make optimiser and scheduler for the model as it is now."""
        self._prepare_optimizer(self.optim_param, self.scheduler_param)
        lacking = [name for name in ("optimizer", "scheduler") if name not in vars(self)]
        if lacking:
            raise HostError(
                f"_prepare_optimizer must set self.optimizer and self.scheduler (which may be None): there is no {lacking[0]}"
            )
        self.model.bind_optimizer(self.optimizer)

    def _prepare_optimizer(
        self, optim_param: Mapping[str, object], scheduler_param: Mapping[str, object] | None
    ) -> None:
        """Set ``optimizer`` and ``scheduler``; LibMTL's hook."""
        self.optimizer = make_optimizer(self.model, optim_param)
        self.scheduler = make_scheduler(self.optimizer, scheduler_param)

    # -- training ---------------------------------------------------------------------------------------------

    @alone_in_its_folder
    def train(
        self,
        train_dataloaders: Loaders,
        test_dataloaders: Loaders | None = None,
        epochs: int = 1,
        val_dataloaders: Loaders | None = None,
        return_weight: bool = False,
        *,
        steps_per_epoch: int | None = None,
    ) -> Floats | None:
        """Train; choose the epoch on validation data only; score the test data once, at the end.

        Parameters
        ----------
        train_dataloaders, test_dataloaders, val_dataloaders : Loaders, Loaders or None, Loaders or None
            A loader, or task -> loader with ``multi_input``.
        epochs : int, default 1
            In all; a resumed run, or a second call, goes on to this number.
        return_weight : bool, default False
            Return the tasks' weights of every step, [T, steps] numpy, NaN where a weighting has none.
        steps_per_epoch : int, optional
            Steps of an epoch, for loaders that do not say how many batches they have: each epoch begins a new pass, and one that
            ends starts again. Without it one pass is an epoch. Several processes, several loaders, MoDo, SDMGrad and FairMT for one
            epoch need the number.

        Raises
        ------
        DivergenceError
            A loss was not finite: says epoch, step and task; the last good state is kept.
        DataError
            A loader that does not fit.
        CheckpointError
            A run folder that cannot be written, or a checkpoint that does not fit.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise RecipeError(f"epochs must be a whole number of at least 0, found {epochs!r}")
        self._take_steps(steps_per_epoch, train_dataloaders, val_dataloaders, epochs)
        self.validation = val_dataloaders
        self._start(train_dataloaders, val_dataloaders, epochs)
        self._trackers.start(self)
        self._stopped = False
        stepping.tell(self, "start")
        for epoch in self._epochs(epochs):
            best = self.best["epoch"]
            if self._stop_is_wanted():
                break
            if self.patience is not None and best is not None and self.epoch > best + self.patience:
                break
            self._one_epoch(epoch, train_dataloaders, val_dataloaders)
        self._trackers.finish()
        best = self.best["epoch"]
        if self.select == "best" and best is not None and self.epoch > best + 1:
            if self._before_best is None:
                self._before_best = selection.Snapshot()
                self._before_best.take(self)
            selection.hold_best(self)
        again = val_dataloaders is not None and not any(map(once, per_task(self, val_dataloaders).values()))
        if self.auxiliary and val_dataloaders is not None and again and self.global_step >= _ENOUGH:
            losses = dict(zip(self.task_name, self.model.train_loss_buffer[:, self.epoch - 1].tolist()))
            if lost := collapsed(self, val_dataloaders, losses):
                warnings.warn(
                    f"after {self.global_step} steps the model is no better than a constant on {', '.join(lost)}: its fairness heads "
                    "outweigh the tasks; give the main tasks a larger share (LambdaMix: lam nearer to 1)",
                    stacklevel=3,
                )
        if test_dataloaders is not None:
            self.test_results = evaluate(self, test_dataloaders)
        stepping.tell(self, "end")
        if not return_weight:
            return None
        weights: Floats = self.history.reindex(columns=[f"weight/{task}" for task in self.task_name]).to_numpy().T
        return weights

    def _start(self, train_dataloaders: Loaders, val_dataloaders: Loaders | None, epochs: int) -> None:
        if val_dataloaders is None and self.select == "best" and epochs > 0 and not self._warned:
            self._warned = True
            message = "no validation loader: the last epoch is kept (an epoch is never chosen on test data)"
            warnings.warn(message, stacklevel=4)
        if self._before_best is not None and self.epoch < epochs:
            self._before_best.put_back(self)
            self._before_best = None
        if self.seed is not None and self.epoch == 0:
            checkpoint.seed_everything(self.seed + 1)
        if self.processes is not None:
            self._align(self.processes, per_task(self, train_dataloaders))
        self.prepare_groups(train_dataloaders, val_dataloaders)
        if self.resume and self.epoch == 0:
            if self.processes is not None and not writes():
                self.processes.objects(None)  # the first process mends what a kill left, and the others read it then
            checkpoint.resume(self, train_dataloaders)
            if self.processes is not None and writes():
                self.processes.objects(None)
            if self.processes is not None and len(set(self.processes.objects(self.epoch))) > 1:
                raise HostError(f"the processes do not all find {self.run_dir}: it must be a folder that they share")
        held = getattr(self.model, "train_loss_buffer", np.zeros((self.task_num, 0)))
        self.model.train_loss_buffer = np.zeros((self.task_num, max(epochs, held.shape[1])))
        self.model.train_loss_buffer[:, : held.shape[1]] = held
        self.model.epochs = epochs

    def _take_steps(self, asked: int | None, loaders: Loaders, validation: Loaders | None, epochs: int) -> None:
        """Settle how many steps an epoch has; refuse loaders without a length where it has to be known."""
        if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
            raise RecipeError(f"steps_per_epoch must be a whole number of at least 1, or None, found {asked!r}")
        found = per_task(self, loaders)
        self.steps_per_epoch, self.epoch_steps = asked, asked or batch_count(found.values())
        left = epochs - self.epoch
        again = "hand over what can be gone through again: a DataLoader, or an object whose __iter__ begins anew"
        if left > 1 and validation is not None and any(map(once, per_task(self, validation).values())):
            raise DataError(
                f"the validation loader is an iterator, which gives its batches once, and not {left} times: {again}"
            )
        if left > 1 and asked is None and any(map(once, found.values())):
            raise DataError(
                f"the training loader is an iterator, which gives its batches once, and there are {left} epochs: {again}; or say "
                "how long an epoch is with train(steps_per_epoch=...)"
            )
        if left < 1 or self.epoch_steps is not None:
            return
        who = {
            "several processes need": self.processes is not None,
            f"multi_input=True with {len(found)} loaders needs": len(found) > 1,
            f"{self.weighting}, which takes {self.samples} batches a step, needs": self.samples > 1,
        }
        for name, needs in who.items():
            if needs:
                raise DataError(
                    f"{name} as many steps in an epoch as is said, and a training loader has no length (__len__): give "
                    "train(steps_per_epoch=...)"
                )

    def _align(self, processes: Processes, loaders: Mapping[str, Loader]) -> None:
        """Let all processes draw, and shuffle, as the first one does; say where their loaders do not go together."""
        checkpoint.set_random_state(processes.from_first(checkpoint.random_state))
        sharded = {name: loader for name, loader in loaders.items() if isinstance(loader, ResidentLoader)}
        checkpoint.set_loader_states(sharded, processes.from_first(lambda: checkpoint.loader_states(sharded)))
        counts = processes.objects(batch_count(loaders.values()))
        if len(set(counts)) > 1:
            raise DataError(
                f"the processes' training loaders give {', '.join(map(str, counts))} batches an epoch; each process needs as many: "
                "use ResidentLoader, or a DistributedSampler"
            )

    def _epochs(self, epochs: int) -> Iterator[int]:
        with bar("training", epochs, self.epoch) if self.progress and writes() else nullcontext(tell) as advance:
            for epoch in range(self.epoch, epochs):
                tell(f"epoch {epoch + 1}/{epochs}")
                yield epoch
                advance(f"epoch {epoch + 1}/{epochs}")

    def _place(self, epoch: int, step: int) -> str:
        return f"epoch {epoch + 1}/{self.model.epochs}, step {step}/{self.epoch_steps or '?'}"

    def _one_epoch(self, epoch: int, train_dataloaders: Loaders, val_dataloaders: Loaders | None) -> None:
        started = time.perf_counter()
        self.model.epoch = epoch
        steps, losses, log = self._steps(epoch, train_dataloaders)
        means = log.means(losses)
        self.model.train_loss_buffer[:, epoch] = means
        results = {"train_s": time.perf_counter() - started}
        score = -float(means.sum())
        if val_dataloaders is not None:
            found = evaluate(self, val_dataloaders)
            results |= {f"val/{task}/{name}": value for task, scores in found.items() for name, value in scores.items()}
            score = selection.judge(self, epoch, found, val_dataloaders)
        self.steps.add_epoch(epoch, steps, results)
        self._trackers.log_epoch(epoch, {**_means(steps), **results})
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(score)
        elif self.scheduler is not None:
            self.scheduler.step()
        self.model.after_epoch(self, epoch)
        self.epoch = epoch + 1
        if self.run_dir is not None:
            checkpoint.save_training(self, train_dataloaders)
        stepping.tell(self, "epoch", epoch, {**_means(steps), **results})

    def _steps(self, epoch: int, loaders: Loaders) -> tuple[dict[str, Floats], Floats, StepLog]:
        """Train an epoch; return its steps as columns, their losses [steps, T], and what they were read from."""
        log, saved = StepLog(), self.run_dir is not None and epoch > 0
        self.model.train()
        self.update.forget()
        if "meter" in vars(self):
            for loss in self.meter.losses.values():
                loss._reinit()
        set_epoch(self, loaders, epoch)
        watched = any(
            hasattr(callback, "step") for callback in self.callbacks
        )  # who may average weights, or look at gradients
        with nullcontext() if watched else joined_heads(self.model, self.optimizer) as joint:
            if not saved:
                self._before_epoch.take(self)
            for batch in told(stepping.draw(self, loaders), partial(self._place, epoch)):
                stepping.step(self, batch, epoch, log, joint)
            self.update.finish(self.optimizer)
            if not len(log):
                raise DataError(f"epoch {epoch}: the training loader has no batch")
            self.faults.check()
            if self.processes is not None:  # batch norm's running numbers are of each process's rows
                self.processes.broadcast(self.model.buffers())
            columns = log.read(self.task_name, getattr(self.model, "trace_labels", {}))
            losses = np.stack([columns[f"loss/{task}"] for task in self.task_name], 1)
            fault = selection.fault(self, epoch, losses)
            if fault is not None and not saved:
                self._before_epoch.put_back(self)
        if fault is not None:
            kept = "the model is as it was before this epoch"
            if saved:
                kept = f"the last good checkpoint is {checkpoint.restore(self, None)}, and the model is as it says"
            advice = "Lower the learning rate, or look for values that are not finite in the inputs"
            raise DivergenceError(f"{fault}; {kept}. {advice}")
        return columns, losses, log

    def prepare_groups(self, train_dataloaders: Loaders, val_dataloaders: Loaders | None = None) -> None:
        """Learn how many groups each attribute has, where somebody needs groups; an error where there are none."""
        if self.auxiliary:
            who = f"auxiliary task {next(iter(self.auxiliary))!r} needs"
        elif self.group_modules:
            who = "group-specific heads need"
        elif isinstance(self.model, FairWeighting) and self.model.needs_groups:
            who = f"{self.weighting} needs"
        else:
            return
        given = [loaders for loaders in (train_dataloaders, val_dataloaders) if loaders is not None]
        found = [loader for loaders in given for loader in per_task(self, loaders).values()]
        self.n_groups = dict(self._declared_groups) or group_counts(found, endless=self.steps_per_epoch is not None)
        if self.processes is not None:
            known = self.processes.objects(self.n_groups)
            self.n_groups = {
                name: max(counts.get(name, 0) for counts in known)
                for name in dict.fromkeys(n for c in known for n in c)
            }
        empty = [name for name, count in self.n_groups.items() if count < 1]
        if empty:
            raise DataError(
                f"sensitive attribute {empty[0]!r}: no example of the training data has a known group (all ids are below 0), "
                f"and {who} it"
            )
        if not self.n_groups:
            raise HostError(
                f"{who} sensitive groups, and the training loader gives none: its labels need a "
                "'sensitive' dict attribute -> group ids, as libmtl_fair.data.ResidentLoader yields"
            )

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: ``epoch, step, loss/<task>``, a weighting's traces; epoch results on an epoch's last row."""
        return self.steps.frame

    @property
    def epochs(self) -> pd.DataFrame:
        """One row an epoch: means over its steps, and validation results as ``val/<task>/<metric>``."""
        return self.steps.epochs

    def test(self, test_dataloaders: Loaders, epoch: int | None = None, mode: str = "test", **_: object) -> Results:
        """Return task -> metric -> value over a loader (``loss`` and the task's metrics)."""
        return evaluate(self, test_dataloaders)

    def predict(self, loader: Loaders, *, embeddings: bool = False, maps: bool = True) -> Predictions:
        """Return outputs, scores, labels and groups of every example, on the CPU.

        ``embeddings=True`` also keeps what the heads received, [N, d] or one per task. ``maps=False`` keeps of outputs that are maps
        (or sequences) what metrics need, and not themselves, which many images have no room for.
        """
        return predict(self, loader, embeddings, maps)

    def group_metrics(self, loader: Loader, **options: Any) -> pd.DataFrame:
        """Return :class:`~libmtl_fair.metrics.GroupMetrics` of a loader's examples; no row is kept, however many there are.

        ``options`` are its own; ``auc=True`` keeps every score.
        """
        return group_metrics(self, loader, options)

    @overload
    def audit(
        self, loader: Loaders, delta: None = None, *, people: ConsistencyAudit | Features, **options: Any
    ) -> ConsistencyReport: ...

    @overload
    def audit(
        self,
        loader: Loaders,
        delta: float | Tensor | Floats,
        *,
        exact: bool = True,
        people: ConsistencyAudit | Features | None = None,
        **options: Any,
    ) -> AuditReport: ...

    def audit(
        self,
        loader: Loaders,
        delta: float | Tensor | Floats | None = None,
        *,
        exact: bool = True,
        people: ConsistencyAudit | Features | None = None,
        validation: Loaders | None = None,
        **options: Any,
    ) -> AuditReport | ConsistencyReport:
        """Return the fixed-delta audit (METHODS.md, 1.1) of the model's scores on a loader, or the audit of people (1.3).

        Parameters
        ----------
        delta : float or Tensor or Floats, optional
            Tolerance of the fixed-delta audit; ``options`` are its own.
        people : ConsistencyAudit or Features, optional
            What the loader's people are compared by, in its order: reference features [N, d], or a ConsistencyAudit.
            With ``delta`` too its report is the fixed-delta report's ``people``; without ``delta`` it is what is
            returned.
        validation : Loaders, optional
            Loader of validation data, which ranks refer to; None: the audit's reference scores, or the same people.
        """
        from libmtl_fair.metrics import ConsistencyAudit, FixedDeltaAudit
        from libmtl_fair.metrics.consistency import audit_people

        predictions, found = self.predict(loader, maps=False), None
        if people is not None:
            groups = {attribute: ids.numpy() for attribute, ids in predictions.groups.items()}
            audit = people if isinstance(people, ConsistencyAudit) else ConsistencyAudit(people, sensitive=groups)
            found = audit_people(
                audit, predictions, None if validation is None else self.predict(validation, maps=False)
            )
        if delta is not None:
            report = FixedDeltaAudit(delta, exact=exact, **options).run(predictions.scores)
            return dataclasses.replace(report, people=found)
        if found is None:
            raise DataError("audit needs delta, a tolerance, or people, the features that they are compared by")
        return found


def _means(columns: Mapping[str, Floats]) -> dict[str, float]:
    """Return the mean of each column over the values that are there, NaN where none is."""
    values = np.stack(list(columns.values()))
    count = (~np.isnan(values)).sum(1)
    means = np.where(count > 0, np.nansum(values, 1) / np.maximum(count, 1), np.nan)
    return dict(zip(columns, means.tolist()))
