"""What the parts of a training share: LibMTL's composed model, and the trainer's state."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypeAlias, TypedDict, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from libmtl_fair.errors import HostError
from libmtl_fair.faults import Faults
from libmtl_fair.files import Json
from libmtl_fair.libmtl.history import History
from libmtl_fair.libmtl.hooks import next_batch, prepare_dataloaders
from libmtl_fair.libmtl.loading import Trainer
from libmtl_fair.libmtl.losses import Entry, LossBank, tasks_of
from libmtl_fair.libmtl.update import Update
from libmtl_fair.predictions import Predictions
from libmtl_fair.processes import Processes
from libmtl_fair.tasks import AUXILIARY_PREFIX, Binary

Loader: TypeAlias = Iterable[Any]
"""Yields ``(x, labels)``; labels are a dict task -> tensor, with group ids under ``"sensitive"``."""
Loaders: TypeAlias = "Loader | Mapping[str, Loader]"
"""A loader, or with ``multi_input`` one a task."""
Results: TypeAlias = dict[str, dict[str, float]]
"""Task -> metric -> value; ``loss`` is the mean over observed labels."""
Plain: TypeAlias = Any
"""What a checkpoint may hold: tensors, numbers, texts, lists and dicts of them."""


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
    grad_index: list[int]
    grad_dim: int
    train_loss_buffer: npt.NDArray[np.float64]
    backward: Callable[..., Tensor | npt.NDArray[np.float64] | None]
    get_share_params: Callable[[], Iterator[nn.Parameter]]
    fair_watchers: int = 0
    fair_processes: Processes | None = None
    fair_own: tuple[nn.Parameter, ...] = ()
    takes_precision: bool = False

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:  # what a method or an architecture adds
            ...

    def structure(self) -> Plain:
        """Return what a branching model needs to be rebuilt before its weights are loaded; None for any other."""
        return None

    def restore_structure(self, structure: Plain) -> None:
        """Rebuild what :meth:`structure` gave."""

    def admits(self, predictions: Callable[[], Predictions]) -> bool:
        """Whether the model of now may be kept as the best, whatever its utility: a constraint may say no."""
        return True

    def constraint_rows(self, **parts: Predictions) -> list[Json]:
        """Return what came of each constraint that was set, in training and in these predictions."""
        return []

    def bind_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Take note of the optimiser; a branching model's new parameters join it."""

    def before_step(self, trainer: TrainingState, losses: Callable[[], Tensor]) -> None:
        """Look ahead before a step; ``losses`` runs the model on the step's batch and returns its losses [T], attached."""

    def after_step(self, trainer: StepState, step: int) -> None:
        """Look at the trainer after a step."""

    def after_epoch(self, trainer: StepState, epoch: int) -> None:
        """Look at the trainer after an epoch."""


@runtime_checkable
class TakesGroups(Protocol):
    """A head that needs the groups of the examples that come next."""

    def take_groups(self, groups: Mapping[str, Tensor] | None) -> None:
        """Keep attribute -> group ids [B] until the next forward pass."""


class Keeper:
    """Shows a module's input to whoever watches; that of a copy of the module, or of one that was saved, watches nothing."""

    def __init__(self, hook: RepresentationHook | FeatureHook | None = None, task: str = "") -> None:
        self._hook, self._task = hook, task

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep what the module receives."""
        if self._hook is not None:
            self._hook.keep(self._task, module, inputs[0])

    def after(self, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what the module gives."""
        self(module, (output,))

    def __reduce__(self) -> tuple[type[Keeper], tuple[()]]:
        """Come back watching nothing."""
        return Keeper, ()


class RepresentationHook:
    """Keeps what each head received in the last forward pass; some models do so themselves while somebody watches."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._own: Callable[[], Tensor | dict[str, Tensor] | None] | None = getattr(model, "take_representation", None)
        self.seen: dict[str, Tensor] = {}
        watched = [] if self._own else model.task_name
        self._handles = [model.decoders[t].register_forward_pre_hook(Keeper(self, t)) for t in watched]
        model.fair_watchers += 1

    def keep(self, task: str, _: nn.Module, value: Tensor) -> None:
        """Keep what a head received."""
        self.seen[task] = value

    def take(self) -> Tensor | dict[str, Tensor]:
        """Return the representation [B, d] where the heads shared one, else one per task; forget it."""
        own = self._own() if self._own is not None else None
        if own is not None:
            return own
        if self._model.rep_grad:  # detached: what reaches it goes on to the encoder with what reaches the others
            leaves: dict[str, Tensor] = dict(self._model.rep_tasks)
            return leaves if isinstance(self._model.rep, dict) else leaves[self._model.task_name[0]]
        seen, self.seen = self.seen, {}
        return shared_or_each(seen)

    def remove(self) -> None:
        """Take the hooks off the heads."""
        self._model.fair_watchers -= 1
        for handle in self._handles:
            handle.remove()


class FeatureHook:
    """Keeps the feature maps of heads whose tasks' audit score is made of them, of the first forward pass since it was asked.

    A head says what its feature map is by ``feature_layer``, a submodule (or its path) whose output it is; without it that is what
    its last layer with weights receives.

    Parameters
    ----------
    heads : mapping of str to nn.Module
        Task -> head.
    in_training : bool
        Whether only passes in training mode count.
    """

    def __init__(self, heads: Mapping[str, nn.Module], in_training: bool = False) -> None:
        self.seen: dict[str, Tensor] = {}
        self._in_training = in_training
        self._handles = [self._watch(task, head) for task, head in heads.items()]

    def _watch(self, task: str, head: nn.Module) -> RemovableHandle:
        named = getattr(head, "feature_layer", None)
        keeper = Keeper(self, task)
        if named is not None:
            layer = head.get_submodule(named) if isinstance(named, str) else named
            return layer.register_forward_hook(keeper.after)
        layers = [m for m in head.modules() if any(p.dim() >= 2 for p in m.parameters(recurse=False))]
        if not layers:
            raise HostError(
                f"task {task!r}: its audit score is of its head's feature map, and its head, {type(head).__name__}, has no layer with "
                "weights; name one by the head's attribute feature_layer"
            )
        return layers[-1].register_forward_pre_hook(keeper)

    def keep(self, task: str, module: nn.Module, value: Tensor) -> None:
        """Keep a feature map."""
        if module.training or not self._in_training:
            self.seen.setdefault(task, value)

    def take(self) -> dict[str, Tensor]:
        """Return task -> feature map, and forget them."""
        seen, self.seen = self.seen, {}
        return seen

    def remove(self) -> None:
        """Take the hooks off the heads."""
        for handle in self._handles:
            handle.remove()


def shared_or_each(seen: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """Return what the heads received: one tensor where they share it."""
    if not seen:
        raise HostError("no head was called in the forward pass, so there is no representation to look at")
    first = next(iter(seen.values()))
    return first if all(h is first for h in seen.values()) and len(seen) > 1 else seen


class Best(TypedDict):
    """The best epoch so far: validation score and results, weights and branches; whether its model met its constraints."""

    epoch: int | None
    score: float
    results: Results | None
    state: dict[str, Tensor] | None
    structure: Plain
    admitted: NotRequired[bool]


class StepState:
    """What one step needs to know, in FairTrainer and in a loop of the user's own.

    Attributes
    ----------
    tasks : dict of str to Task or None
        Task name -> task, None where its kind is not known; ``auxiliary`` are there in training only, ``main_tasks``
        are the others' names; ``binary`` the main tasks where all are binary and have one input, else empty.
    model : Model
        The weighting; in a trainer the whole model.
    weight_args : dict of str to object
        What ``model.backward`` is called with.
    representation : RepresentationHook, optional
        What the heads received, where the weighting asks for it.
    n_groups : dict of str to int
        Attribute -> number of groups.
    epoch_steps : int or None
        Steps of an epoch, None where nobody says; ``global_step`` those done.
    """

    model: Model
    representation: RepresentationHook | None = None
    features: FeatureHook | None = None
    weighting: str
    weight_args: dict[str, object]
    n_groups: dict[str, int]
    multi_input: bool
    epoch: int
    global_step: int
    epoch_steps: int | None
    processes: Processes | None = None

    def take_tasks(self, task_dict: Mapping[str, Mapping[str, object]]) -> None:
        """Learn what is trained."""
        if not task_dict:
            raise HostError("task_dict is empty; it needs at least one task")
        self.task_dict: dict[str, Entry] = {name: dict(entry) for name, entry in task_dict.items()}
        self.task_name, self.task_num = list(task_dict), len(task_dict)
        self.tasks, self.losses = tasks_of(self.task_dict), LossBank(self.task_dict)
        self.auxiliary: dict[str, Any] = {name: task for name, task in self.tasks.items() if task and task.auxiliary}
        self.main_tasks = [name for name in self.tasks if name not in self.auxiliary]
        reserved = [name for name in self.main_tasks if name.startswith(AUXILIARY_PREFIX)]
        if reserved:
            raise HostError(
                f"task {reserved[0]!r}: names that start with {AUXILIARY_PREFIX!r} are for auxiliary fairness heads; rename it"
            )
        if not self.main_tasks:
            raise HostError("task_dict has auxiliary tasks only; it needs at least one main task")
        binary = not self.multi_input and all(isinstance(self.tasks[name], Binary) for name in self.main_tasks)
        self.binary = tuple(self.main_tasks) if binary else ()

    def watch_features(self, heads: Mapping[str, nn.Module] | nn.ModuleDict, in_training: bool = False) -> FeatureHook:
        """Return what keeps the feature maps of tasks whose scores are made of them."""
        needed = {name: heads[name] for name, task in self.tasks.items() if task and task.needs_features}
        return FeatureHook(needed, in_training)

    @property
    def own_losses(self) -> bool:
        """Whether losses are :attr:`losses`' and not a user's."""
        return True

    def compute_losses(self, preds: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """Return the losses of all tasks, [T]."""
        return self.losses(preds, labels)


class TrainingState(StepState, Trainer):  # type: ignore[misc]
    """What steps, evaluation, checkpoints and selection read of a trainer, and change.

    Attributes
    ----------
    samples : int
        Batches that a step takes.
    steps_per_epoch : int or None
        Steps of an epoch where the user says; the loaders' pass otherwise.
    """

    steps_per_epoch: int | None = None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau | None
    group_modules: list[TakesGroups]
    kwargs: dict[str, dict[str, object]]
    samples: int
    faults: Faults
    device: torch.device
    run_dir: Path | None
    rep_grad: bool
    select: str
    select_by: Callable[[Results], float] | None
    prepare_optimizer: Callable[[], None]
    update: Update
    callbacks: Sequence[object]

    def start_afresh(self) -> None:
        """Forget all training."""
        self.epoch = self.global_step = 0
        self.epoch_steps, self.n_groups = None, {}
        self.steps = History()
        self.best: Best = {"epoch": None, "score": float("-inf"), "results": None, "state": None, "structure": None}
        self.first_results: Results | None = None
        self.last_structure: Plain = None

    _prepare_dataloaders = prepare_dataloaders

    @cached_property
    def meter(self) -> Any:
        """LibMTL's meter, for what a user's subclass asks of it (``meter.losses[task]._update_loss``); nothing here goes by it."""
        kept = {name: self.task_dict[name] for name in self.main_tasks}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a table's head
            return import_module("LibMTL._record")._PerformanceMeter(kept, self.multi_input)

    def _process_data(self, loader: list[Any]) -> Any:
        """Return the next ``(x, labels)`` of [loader, iterator]; LibMTL's hook."""
        return next_batch(loader)

    def forward4loss(self, model: Model, inputs: Any, gts: Any, return_preds: bool = False) -> Any:
        """Return the losses [T] of a batch, or of one a task, and the outputs if asked for; a hook of LibMTL's git main."""
        if self.multi_input:
            preds = {task: self.process_preds(model(inputs[task], task)[task], task) for task in self.task_name}
        else:
            preds = self.process_preds(model(inputs))
        losses = self.compute_losses(preds, gts)
        return (losses, preds) if return_preds else losses

    def _is_ours(self, *names: str) -> bool:
        """Whether methods are those below and not a user's."""
        return all(getattr(type(self), n) is getattr(TrainingState, n) and n not in vars(self) for n in names)

    @property
    def own_losses(self) -> bool:
        """Whether losses are :attr:`losses`' and not those of a user's ``_compute_loss`` or ``forward4loss``."""
        return self._is_ours("_compute_loss", "forward4loss")

    @property
    def own_forward(self) -> bool:
        """Whether a step does not go through a ``forward4loss`` of the user's."""
        return self._is_ours("forward4loss")

    @property
    def own_batches(self) -> bool:
        """Whether batches are the loaders' and not those of a user's ``_prepare_dataloaders`` or ``_process_data``."""
        return self._is_ours("_prepare_dataloaders", "_process_data")

    @property
    def own_outputs(self) -> bool:
        """Whether outputs go through a ``process_preds`` of the user's."""
        return getattr(self.process_preds, "__func__", None) is not Trainer.process_preds

    def _compute_loss(self, preds: Any, gts: Any, task_name: str | None = None) -> Tensor:
        """Return the losses of all tasks [T], or of one; LibMTL's hook, which a user's subclass may override."""
        return self.losses(preds, gts) if task_name is None else self.losses.one(task_name, preds, gts)

    def compute_losses(self, preds: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """Return the losses of all tasks, [T]."""
        if not self.multi_input or self.own_losses:
            losses: object = self._compute_loss(preds, labels)
            if not isinstance(losses, Tensor):
                raise HostError(
                    f"_compute_loss must return the tasks' losses, a tensor [T], found {type(losses).__name__}"
                )
            return losses
        return torch.stack([self._compute_loss(preds[t], labels[t], t) for t in self.task_name])
