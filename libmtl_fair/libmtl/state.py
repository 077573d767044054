"""What the parts of a training share: LibMTL's composed model, and the trainer's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from libmtl_fair.libmtl.history import History
from libmtl_fair.libmtl.loading import Trainer
from libmtl_fair.libmtl.losses import Entry, LossBank
from libmtl_fair.tasks import Task

Loader: TypeAlias = Iterable[Any]
"""Yields ``(x, labels)``; labels are a dict task -> tensor, with group ids under ``"sensitive"``."""
Loaders: TypeAlias = "Loader | Mapping[str, Loader]"
"""A loader, or with ``multi_input`` one a task."""
Results: TypeAlias = dict[str, dict[str, float]]
"""Task -> metric -> value; ``loss`` is the mean over observed labels."""
Plain: TypeAlias = Any
"""What a checkpoint may hold: tensors, numbers, texts, lists and dicts of them."""
Scheduler: TypeAlias = "torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau"


class Model(nn.Module):
    """LibMTL's composed model, architecture and weighting at once. Its last base: what others may define does nothing here."""

    task_name: list[str]
    task_num: int
    device: torch.device
    rep_grad: bool
    multi_input: bool
    encoder: Any
    decoders: nn.ModuleDict
    rep: Tensor | dict[str, Tensor]
    rep_tasks: dict[str, Tensor]
    epoch: int
    epochs: int
    train_loss_buffer: npt.NDArray[np.float64]
    backward: Callable[..., Tensor | npt.NDArray[np.float64] | None]
    get_share_params: Callable[[], Iterator[nn.Parameter]]
    fair_watchers: int = 0

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:  # what a method or an architecture adds
            ...

    def structure(self) -> Plain:
        """Return what a branching model needs to be rebuilt before its weights are loaded; None for any other."""
        return None

    def restore_structure(self, structure: Plain) -> None:
        """Rebuild what :meth:`structure` gave."""

    def bind_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Take note of the optimiser; a branching model's new parameters join it."""

    def after_step(self, trainer: TrainingState, step: int) -> None:
        """Look at the trainer after a step."""

    def after_epoch(self, trainer: TrainingState, epoch: int) -> None:
        """Look at the trainer after an epoch."""


@runtime_checkable
class TakesGroups(Protocol):
    """A head that needs the groups of the examples that come next."""

    def take_groups(self, groups: Mapping[str, Tensor] | None) -> None:
        """Keep attribute -> group ids [B] until the next forward pass."""


class Representation(Protocol):
    """Keeps what each head received in the last forward pass."""

    def take(self) -> Tensor | dict[str, Tensor]:
        """Return the representation [B, d] where the heads shared one, else one per task; forget it."""


class Best(TypedDict):
    """The best epoch so far: validation score and results, weights and branches."""

    epoch: int | None
    score: float
    results: Results | None
    state: dict[str, Tensor] | None
    structure: Plain


class TrainingState(Trainer):  # type: ignore[misc]
    """What steps, evaluation, checkpoints and selection may read of a trainer, and change."""

    # what is trained
    task_dict: dict[str, Entry]
    task_name: list[str]
    tasks: dict[str, Task | None]
    main_tasks: list[str]
    auxiliary: dict[str, Any]
    """Name -> auxiliary task; there in training only."""
    binary: tuple[str, ...]
    """The main tasks where all are binary and have one input, else empty."""
    losses: LossBank
    model: Model
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    # how
    weighting: str
    weight_args: dict[str, Any]
    """What ``model.backward`` is called with."""
    kwargs: dict[str, dict[str, Any]]
    optim_param: dict[str, Any]
    scheduler_param: Mapping[str, Any] | None
    device: torch.device
    rep_grad: bool
    multi_input: bool
    seed: int | None
    run_dir: Path | None
    select: str
    select_by: Callable[[Results], float] | None
    representation: Representation | None
    """What the heads received, where the weighting asks for it."""
    samples: int
    """Batches that a step takes."""
    group_modules: Sequence[TakesGroups]
    # where it stands
    epoch: int
    global_step: int
    n_groups: dict[str, int]
    steps: History
    best: Best
    first_results: Results | None
    last_structure: Plain

    @property
    def own_losses(self) -> bool:
        """Whether losses are :attr:`losses`' and not those of a user's ``_compute_loss``."""
        return type(self)._compute_loss is TrainingState._compute_loss and "_compute_loss" not in vars(self)

    @property
    def own_outputs(self) -> bool:
        """Whether outputs go through a ``process_preds`` of the user's."""
        return getattr(self.process_preds, "__func__", None) is not Trainer.process_preds

    def _compute_loss(self, preds: Any, gts: Any, task_name: str | None = None) -> Tensor:
        """Return the losses of all tasks [T], or of one; LibMTL's hook, which a user's subclass may override."""
        return self.losses(preds, gts) if task_name is None else self.losses.one(task_name, preds, gts)

    def compute_losses(self, preds: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """Return the losses of all tasks, [T]."""
        if not self.multi_input:
            return self._compute_loss(preds, labels)
        if self.own_losses:
            return self.losses(preds, labels)
        return torch.stack([self._compute_loss(preds[t], labels[t], t) for t in self.task_name])

    def prepare_optimizer(self) -> None:
        """Make optimiser and scheduler for the model as it is now."""
        raise NotImplementedError
