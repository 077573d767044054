"""FairTrainer: LibMTL's Trainer on any device, with fairness methods, exact resume and a structured history."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from libmtl_fair.batch import FairBatch
from libmtl_fair.data.loader import resolve_device
from libmtl_fair.errors import CheckpointError, FairMTLError, HostError, RecipeError
from libmtl_fair.files import write_text
from libmtl_fair.host import batches, checkpoint, evaluation
from libmtl_fair.host.history import History, StepLog
from libmtl_fair.host.loading import Trainer
from libmtl_fair.host.model import RepresentationHook, compose
from libmtl_fair.host.objectives import LossBank, tasks_of
from libmtl_fair.host.optimizers import make_optimizer, make_scheduler
from libmtl_fair.host.plugin import FairWeighting
from libmtl_fair.host.registry import resolve_architecture, resolve_weighting
from libmtl_fair.predictions import Predictions

if TYPE_CHECKING:
    from libmtl_fair.metrics import AuditReport

Selector = Callable[[evaluation.Results], float]
_SAMPLES = {"MoDo": 3, "SDMGrad": 3}
"""Batches that one step of a LibMTL weighting takes, where it is more than one."""


class DivergenceError(FairMTLError):
    """A loss was not finite; the model holds the last good state."""


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
        self.rep_grad, self.multi_input = rep_grad, multi_input
        self.run_dir = Path(run_dir or save_path) if run_dir or save_path else None  # type: ignore[arg-type]
        self.resume, self.seed, self.progress = resume, seed, progress
        self.select, self.select_by = select, select_by
        self.optim_param, self.scheduler_param = dict(optim_param), scheduler_param
        self.losses = LossBank(self.task_dict)
        self.kwargs = {"weight_args": dict(weight_args or {}), "arch_args": dict(arch_args or {})}
        if seed is not None:
            checkpoint.seed_everything(seed)
        self._prepare_model(weighting, architecture, encoder_class, decoders)
        self._prepare_optimizer(self.optim_param, scheduler_param)
        self._reset_progress()
        if load_path is not None:
            self._load_weights(Path(load_path))

    def _reset_progress(self) -> None:
        self._history = History()
        self.epoch = self.global_step = 0
        self.best: dict[str, Any] = {"epoch": None, "score": float("-inf"), "results": None, "state": None}
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
        self._is_fair = isinstance(self.model, FairWeighting)
        self._hook = RepresentationHook(self.model) if self._is_fair else None
        self._samples = _SAMPLES.get(self.weighting, 1)

    def _prepare_optimizer(self, optim_param: Mapping[str, Any], scheduler_param: Mapping[str, Any] | None) -> None:
        self.optimizer = make_optimizer(self.model, optim_param)
        self.scheduler = make_scheduler(self.optimizer, scheduler_param)

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
        epochs : in all; a resumed run goes on to this number.
        return_weight : return the tasks' weights of every step, [T, steps] numpy, NaN where a weighting has none.

        Raises
        ------
        DivergenceError : a loss was not finite: says epoch, step and task; the last good state is kept.
        DataError : a loader that does not fit.
        CheckpointError : a run folder that cannot be written, or a checkpoint that does not fit.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise RecipeError(f"epochs must be a whole number of at least 0, found {epochs!r}")
        if val_dataloaders is None and self.select == "best" and epochs > 0:
            warnings.warn(
                "no validation loader: the last epoch is kept (an epoch is never chosen on test data)", stacklevel=2
            )
        if self.seed is not None and self.epoch == 0:
            checkpoint.seed_everything(self.seed + 1)
        if self.resume and self.epoch == 0:
            self._resume(train_dataloaders)
        self._prepare_groups(train_dataloaders, val_dataloaders)
        self._train_buffer(epochs)
        for epoch in self._epochs(epochs):
            self._one_epoch(epoch, train_dataloaders, val_dataloaders)
        if self.select == "best" and self.best["state"] is not None:
            self.model.load_state_dict(self.best["state"])
        if test_dataloaders is not None:
            self.test_results = evaluation.evaluate(self, test_dataloaders)
        return self._weights() if return_weight else None

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
        before = self._state() if self.run_dir is None else None
        log = StepLog()
        self.model.train()
        for batch in self._steps(train_dataloaders):
            self._step(batch, epoch, log)
        steps = log.read({"loss": self.task_name, "weight": self.task_name, "psi": self.task_name})
        self._check_finite(epoch, steps, before)
        means = [steps[f"loss/{task}"].mean() for task in self.task_name]
        self.model.train_loss_buffer[:, epoch] = means
        results = {"train_s": time.perf_counter() - started}
        score = None
        if val_dataloaders is not None:
            found = evaluation.evaluate(self, val_dataloaders)
            results |= {f"val/{task}/{name}": value for task, scores in found.items() for name, value in scores.items()}
            score = self._judge(epoch, found)
        self._history.add_epoch(epoch, steps, results)
        if self.scheduler is not None:
            plateau = self.scheduler_param is not None and self.scheduler_param["scheduler"] == "reduce"
            self.scheduler.step(*([score if score is not None else -sum(means)] if plateau else []))
        after = getattr(self.model, "after_epoch", None)
        if after is not None:
            after(self, epoch)
        self.epoch = epoch + 1
        self._save(train_dataloaders)

    def _steps(self, loaders: Any) -> Iterator[Any]:
        """Yield what one step needs: a batch, a batch a task, or several batches for MoDo and SDMGrad."""
        if not self.multi_input and self._samples == 1:
            yield from loaders
            return
        per_task = loaders if self.multi_input else {"": loaders}
        streams = {task: batches.endless(per_task[task]) for task in (self.task_name if self.multi_input else [""])}
        for _ in range(max(len(per_task[task]) for task in streams)):
            drawn = [{task: next(stream) for task, stream in streams.items()} for _ in range(self._samples)]
            parts = drawn if self.multi_input else [d[""] for d in drawn]
            yield parts if self._samples > 1 else parts[0]

    def _step(self, batch: Any, epoch: int, log: StepLog) -> None:
        self.optimizer.zero_grad()
        parts = batch if self._samples > 1 else [batch]
        made = [self._losses(part) for part in parts]
        losses = made[0][0] if self._samples == 1 else torch.stack([m[0] for m in made])
        if self._is_fair:
            self.model.fair_batch = self._fair_batch(made[0], epoch)
        weights = self.model.backward(losses, **self._weight_args)
        self.optimizer.step()
        if hasattr(self.model, "update_w"):
            with torch.no_grad():
                self.model.update_w(self._losses(parts[0])[0].detach())
        self.global_step += 1
        values: dict[str, Tensor] = {"loss": losses if self._samples == 1 else losses[-1]}
        if weights is not None:
            values["weight"] = torch.as_tensor(weights)
        if self._is_fair:
            values.update(self.model.trace)
        log.add(values)

    def _losses(self, part: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Any]:
        """Return (losses [T], outputs, labels, groups) of one batch, or of one batch a task."""
        if not self.multi_input:
            inputs, labels, groups = batches.split(part, self.device, self.task_name)
            preds = evaluation.forward(self, inputs)
            return self._compute_losses(preds, labels), preds, labels, groups
        preds: dict[str, Tensor] = {}
        labels: dict[str, Tensor] = {}
        groups: Any = {}
        for task in self.task_name:
            inputs, truth, groups[task] = batches.split(part[task], self.device, [task])
            preds |= evaluation.forward(self, inputs, task)
            labels |= truth
        return self._compute_losses(preds, labels), preds, labels, groups

    def _compute_losses(self, preds: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        if type(self)._compute_loss is not Trainer._compute_loss:
            if not self.multi_input:
                return self._compute_loss(preds, labels)  # type: ignore[no-any-return]
            return torch.stack([self._compute_loss(preds[t], labels[t], t) for t in self.task_name])
        return self.losses(preds, labels)

    def _fair_batch(self, made: tuple[Any, ...], epoch: int) -> FairBatch:
        losses, preds, labels, groups = made
        assert self._hook is not None
        return FairBatch(
            tasks=self.tasks,
            h=self._hook.take(),
            outputs=preds,
            labels=labels,
            losses=losses,
            groups=groups,
            n_groups=self._n_groups,
            multi_input=self.multi_input,
            epoch=epoch,
            step=self.global_step,
        )

    def _prepare_groups(self, train_dataloaders: Any, val_dataloaders: Any) -> None:
        if not (self._is_fair and self.model.needs_groups):
            return
        found = [
            list(x.values()) if self.multi_input else [x] for x in (train_dataloaders, val_dataloaders) if x is not None
        ]
        self._n_groups = batches.group_counts([loader for part in found for loader in part])
        if not self._n_groups:
            raise HostError(
                f"{self.weighting} needs sensitive groups, and the training loader gives none: its labels need a "
                "'sensitive' dict attribute -> group ids, as libmtl_fair.data.ResidentLoader yields"
            )

    def _train_buffer(self, epochs: int) -> None:
        import numpy as np

        held = getattr(self.model, "train_loss_buffer", np.zeros((self.task_num, 0)))
        buffer = np.zeros((self.task_num, max(epochs, held.shape[1])))
        buffer[:, : held.shape[1]] = held
        self.model.train_loss_buffer = buffer
        self.model.epochs = epochs

    # -- judging, saving ----------------------------------------------------------------------------------------

    def _check_finite(self, epoch: int, steps: pd.DataFrame, before: Mapping[str, Tensor] | None) -> None:
        losses = steps[[f"loss/{task}" for task in self.task_name]]
        bad = ~losses.map(lambda v: v == v and abs(v) != float("inf"))
        weights_bad = not all(bool(torch.isfinite(p).all()) for p in self.model.parameters())
        if not bad.any(axis=None) and not weights_bad:
            return
        kept = "the model is as it was before this epoch"
        if before is not None:
            self.model.load_state_dict(before)
        elif self.run_dir is not None and (self.run_dir / "last.pt").exists():
            self._restore(checkpoint.load(self.run_dir / "last.pt", self.device), None)
            kept = f"the last good checkpoint is {self.run_dir / 'last.pt'}"
        advice = "Lower the learning rate, or look for values that are not finite in the inputs"
        if not bad.any(axis=None):
            raise DivergenceError(f"epoch {epoch}: a parameter is not finite after the last step; {kept}. {advice}")
        step = int(bad.any(axis=1).to_numpy().argmax())
        task = self.task_name[int(bad.iloc[step].to_numpy().argmax())]
        raise DivergenceError(
            f"the loss of task {task!r} is {losses.iloc[step][f'loss/{task}']} in epoch {epoch}, step {step} of the epoch; {kept}. {advice}"
        )

    def _judge(self, epoch: int, results: evaluation.Results) -> float:
        if self._first is None:
            self._first = results
        weights = {task: entry["weight"] for task, entry in self.task_dict.items()}
        score = self.select_by(results) if self.select_by else evaluation.improvement(results, self._first, weights)
        if score > self.best["score"] or self.best["epoch"] is None:
            self.best = {"epoch": epoch, "score": score, "results": results, "state": self._state()}
            if self.run_dir is not None:
                checkpoint.save(self.run_dir / "best.pt", {"model": self.best["state"], "epoch": epoch})
        return score

    def _state(self) -> dict[str, Any]:
        return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in self.model.state_dict().items()}

    def _loader_states(self, loaders: Any) -> dict[str, Any]:
        named = loaders if self.multi_input else {"": loaders}
        return {task: x.state_dict() for task, x in named.items() if hasattr(x, "state_dict")}

    def _save(self, loaders: Any) -> None:
        if self.run_dir is None:
            return
        structure = getattr(self.model, "structure", None)
        content = {
            "fingerprint": checkpoint.fingerprint(self.model),
            "structure": structure() if structure else None,
            "method": self.weighting,
            "tasks": self.task_name,
            "epoch": self.epoch,
            "step": self.global_step,
            "model": self.model.state_dict(),
            "attributes": checkpoint.attributes(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "random": checkpoint.random_state(),
            "loaders": self._loader_states(loaders),
            "history": self._history.to_csv(),
            "best": self.best,
            "first": self._first,
        }
        checkpoint.save(self.run_dir / "last.pt", content)
        write_text(self.run_dir / "history.csv", content["history"])

    def _resume(self, loaders: Any) -> None:
        assert self.run_dir is not None
        path = self.run_dir / "last.pt"
        if path.exists():
            content = checkpoint.load(path, self.device)
            if content["tasks"] != self.task_name or content["method"] != self.weighting:
                raise CheckpointError(
                    f"checkpoint {path} was made with {content['method']} on tasks {content['tasks']}, this run is "
                    f"{self.weighting} on {self.task_name}; use another run_dir"
                )
            self._restore(content, loaders)

    def _restore(self, content: dict[str, Any], loaders: Any) -> None:
        if content["structure"] is not None:
            self.model.restore_structure(content["structure"])
            self._prepare_optimizer(self.optim_param, self.scheduler_param)
        checkpoint.check_fits(self.run_dir or Path("checkpoint"), self.model, content["fingerprint"])
        self.model.load_state_dict(content["model"])
        checkpoint.set_attributes(self.model, content["attributes"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(content["scheduler"])
        self._history = History.from_csv(content["history"])
        self.best, self._first = content["best"], content["first"]
        self.epoch, self.global_step = content["epoch"], content["step"]
        if loaders is not None:
            for task, state in content["loaders"].items():
                (loaders[task] if self.multi_input else loaders).load_state_dict(state)
        checkpoint.set_random_state(content["random"])

    def _load_weights(self, path: Path) -> None:
        path = path / "best.pt" if path.is_dir() else path
        content = checkpoint.load(path, self.device)
        self.model.load_state_dict(content["model"])

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
