"""Where an epoch's numbers go while training runs: JSON lines always, TensorBoard, MLflow and W&B where they are installed.

A tracker is anything with ``log_epoch(epoch, values)``; ``start(trainer)`` and ``finish()`` are called if it has them.
``FairTrainer(..., loggers=["tensorboard", MyTracker()])`` takes names and objects.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from libmtl_fair._imports import optional
from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.files import append_text, write_text
from libmtl_fair.libmtl.state import TrainingState

EPOCHS = "epochs.jsonl"
_NOT_MLFLOW = re.compile(r"[^\w\-. :/]")


class Tracker(Protocol):
    """Takes the numbers of an epoch: means over its steps, and validation results."""

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Take the numbers of an epoch."""


class JsonLines:
    """One JSON object an epoch, appended to a file; a resumed run replaces the epochs it trains again.

    >>> import tempfile
    >>> tracker = JsonLines(Path(tempfile.mkdtemp()) / "epochs.jsonl")
    >>> tracker.log_epoch(0, {"loss/income": 0.5, "val/income/AUC": float("nan")})
    >>> print(tracker.path.read_text(), end="")
    {"epoch": 0, "loss/income": 0.5, "val/income/AUC": null}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def start(self, trainer: TrainingState) -> None:
        """Keep what a run that is continued has logged; a fresh run starts afresh."""
        kept: dict[int, str] = {}
        if trainer.epoch > 0 and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                found = re.match(
                    r'\{"epoch": (\d+)\b[^\ufffd]*\}$', line
                )  # one that a kill cut off, or damaged, is left out
                if found and int(found[1]) < trainer.epoch:
                    kept[int(found[1])] = line
        write_text(self.path, "".join(f"{line}\n" for line in kept.values()))

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add an epoch; numbers that are not finite become null."""
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append_text(self.path, json.dumps({"epoch": epoch, **plain}) + "\n")


class TensorBoard:
    """Scalars for TensorBoard; needs the extra ``libmtl_fair[tensorboard]`` (HostError without it).

    ``log_dir`` takes the event files; None is ``tensorboard`` in the trainer's ``run_dir``, else ``runs/tensorboard``.
    """

    def __init__(self, log_dir: str | Path | None = None) -> None:
        self.log_dir = log_dir
        self._writer_class = optional("torch.utils.tensorboard", "tensorboard", "TensorBoard").SummaryWriter

    def start(self, trainer: TrainingState) -> None:
        """Open the event file; epochs that a resumed run trains again are purged."""
        folder = self.log_dir or (trainer.run_dir or Path("runs")) / "tensorboard"
        self._writer = self._writer_class(log_dir=str(folder), purge_step=trainer.epoch or None)

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write one scalar a number that is finite."""
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def finish(self) -> None:
        """Close the event file."""
        self._writer.close()


class MLflow:
    """A run of MLflow, on its own settings' server; needs the extra ``libmtl_fair[mlflow]`` (HostError without it).

    ``experiment`` and ``run_name`` are as in MLflow; None takes its defaults. An active run is used, and left active.
    """

    def __init__(self, experiment: str | None = None, run_name: str | None = None) -> None:
        self.experiment, self.run_name, self._own = experiment, run_name, False
        self._mlflow = optional("mlflow", "mlflow", "MLflow")

    def start(self, trainer: TrainingState) -> None:
        """Start a run, unless one is active, and log the method's settings."""
        if self._mlflow.active_run() is None:
            if self.experiment is not None:
                self._mlflow.set_experiment(self.experiment)
            self._mlflow.start_run(run_name=self.run_name)
            self._own = True
        settings = {"weighting": trainer.weighting, "seed": trainer.seed, **trainer.kwargs["weight_args"]}
        self._mlflow.log_params({_NOT_MLFLOW.sub("_", name): value for name, value in settings.items()})

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log the numbers that are finite."""
        found = {_NOT_MLFLOW.sub("_", name): float(value) for name, value in values.items() if math.isfinite(value)}
        self._mlflow.log_metrics(found, step=epoch)

    def finish(self) -> None:
        """End the run that :meth:`start` started."""
        if self._own:
            self._mlflow.end_run()
            self._own = False


class WandB:
    """A run of Weights & Biases, by its own settings; needs the extra ``libmtl_fair[wandb]`` (HostError without it).

    ``project`` and ``name`` are as in W&B; None takes its defaults. A run that has begun is used, and left open. Without a network:
    ``WANDB_MODE=offline``.
    """

    def __init__(self, project: str | None = None, name: str | None = None) -> None:
        self.project, self.name, self._own = project, name, False
        self._wandb = optional("wandb", "wandb", "W&B")

    def start(self, trainer: TrainingState) -> None:
        """Start a run, unless one has begun, and note the method's settings."""
        if self._wandb.run is None:
            folder = None if trainer.run_dir is None else str(trainer.run_dir)
            self._wandb.init(project=self.project, name=self.name, dir=folder)
            self._own = True
        settings = {"weighting": trainer.weighting, "seed": trainer.seed, **trainer.kwargs["weight_args"]}
        self._wandb.config.update(settings, allow_val_change=True)

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log the numbers that are finite."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._wandb.log({"epoch": epoch, **finite})

    def finish(self) -> None:
        """End the run that :meth:`start` started."""
        if self._own:
            self._wandb.finish()
            self._own = False


_BY_NAME = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class Trackers:
    """All trackers of one trainer, called together; those that have no ``start`` or ``finish`` go without."""

    def __init__(self, loggers: Iterable[str | Tracker], run_dir: Path | None) -> None:
        if isinstance(loggers, str):
            raise RecipeError(f"loggers must be a list, such as [{loggers!r}], found {loggers!r}")
        self._all: list[Tracker] = []
        for item in (*loggers, *([] if run_dir is None else [JsonLines(run_dir / EPOCHS)])):
            if isinstance(item, str) and item not in _BY_NAME:
                raise RecipeError(unknown("logger", item, _BY_NAME))
            made = _BY_NAME[item]() if isinstance(item, str) else item
            if not hasattr(made, "log_epoch"):
                raise RecipeError(f"a logger needs log_epoch(epoch, values), found {type(item).__name__}: {item!r}")
            self._all.append(made)

    def start(self, trainer: TrainingState) -> None:
        """Say that training starts, or goes on, at ``trainer.epoch``."""
        for tracker in self._all:
            getattr(tracker, "start", lambda trainer: None)(trainer)

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Hand over the numbers of an epoch."""
        for tracker in self._all:
            tracker.log_epoch(epoch, values)

    def finish(self) -> None:
        """Say that training ended."""
        for tracker in self._all:
            getattr(tracker, "finish", lambda: None)()
