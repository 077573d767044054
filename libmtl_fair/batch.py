"""What a training step hands on: outputs and labels as one matrix where they are one, and what a fairness method may see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from libmtl_fair import functional as F
from libmtl_fair.errors import HostError
from libmtl_fair.functional.near import near_rows, nearness
from libmtl_fair.processes import Processes
from libmtl_fair.tasks import Task, with_nan


class Columns(Mapping[str, Tensor]):
    """Tensors that are columns of one matrix, by name; they are taken apart only when somebody asks for one.

    Parameters
    ----------
    names, matrix : tuple of str, Tensor
        [B, C], in the order of the columns.
    widths : sequence of int, optional
        How many columns each has, [B, width]; None is one each, as [B].
    others : mapping of str to Tensor, optional
        Further tensors, which are not in the matrix.

    Examples
    --------
    >>> labels = Columns(("a", "b"), torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    >>> labels["b"].tolist(), list(labels)
    ([1.0, 3.0], ['a', 'b'])
    """

    def __init__(
        self,
        names: tuple[str, ...],
        matrix: Tensor,
        widths: Sequence[int] | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.names, self.matrix, self.widths, self.others = names, matrix, widths, others or {}

    @cached_property
    def _parts(self) -> dict[str, Tensor]:
        parts = self.matrix.unbind(1) if self.widths is None else torch.split(self.matrix, list(self.widths), -1)
        return {**dict(zip(self.names, parts)), **self.others}

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.names, *self.others))

    def __len__(self) -> int:
        return len(self.names) + len(self.others)

    def matrix_of(self, names: tuple[str, ...]) -> Tensor | None:
        """Return the columns [B, T] of these names if they lie side by side, one each; else None."""
        if names == self.names and self.matrix.dim() == 2 and self.matrix.shape[1] == len(names):
            return self.matrix
        if self.matrix.dim() != 2 or names[0] not in self.names:
            return None
        first = self.names.index(names[0])
        widths = self.widths or [1] * len(self.names)
        last = first + len(names)
        if self.names[first:last] != names or any(width != 1 for width in widths[first:last]):
            return None
        return self.matrix.narrow(1, sum(widths[:first]), len(names))


def beside(values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return ``values`` and ``others`` together; columns of a matrix stay that."""
    if isinstance(values, Columns):
        return Columns(values.names, values.matrix, values.widths, {**values.others, **others})
    return {**values, **others}


def joined(values: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor | None:
    """Return the outputs or labels of these names, [B] or [B, 1] each, as one matrix [B, T]; None where they are no such.

    As it lies there, or stacked. A missing label is NaN, also among integers.
    """
    found = values.matrix_of(names) if isinstance(values, Columns) else None
    if found is not None:
        return with_nan(found)
    parts = [values[name] for name in names]
    shapes = {part.shape if isinstance(part, Tensor) else torch.Size() for part in parts}
    if not all(len(shape) == 1 or shape[1:] == (1,) for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        return None
    parts = [with_nan(part) if len(shapes) == 1 else with_nan(part.reshape(-1)) for part in parts]
    return torch.stack(parts, 1) if parts[0].dim() == 1 else torch.cat(parts, 1)


class Matrices(NamedTuple):
    """Main tasks that are all binary, of one logit each and of the same examples.

    ``logits`` [B, T], which ``outputs`` are columns of; ``labels`` [B, T], NaN where missing; ``labelled`` [T], how many.
    """

    logits: Tensor
    labels: Tensor
    labelled: Tensor

    def loss_gradient(self, probabilities: Tensor) -> Tensor:
        """Return the gradient of each task's mean cross-entropy to its logits, [B, T]; 0 where there is no label."""
        return F.mean_cross_entropy_gradient(probabilities, self.labels, self.labelled).to(self.logits.dtype)


@dataclass
class Share:
    """A process's share of a step whose batch all see.

    Attributes
    ----------
    sizes : mapping of str to list of int
        Task -> rows of each process.
    outputs : mapping of str to Tensor
        What this process made, which the gathered outputs hang on.
    h : Tensor or dict of str to Tensor, optional
        What its heads received.
    made_apart : bool
        Whether the losses were made from ``outputs``, each process its own, and not from the gathered ones.
    """

    processes: Processes
    sizes: Mapping[str, Sequence[int]]
    outputs: Mapping[str, Tensor]
    h: Tensor | dict[str, Tensor] | None = None
    made_apart: bool = False

    def rows(self, task: str) -> slice:
        """Return where in the batch this process's rows are."""
        return self.processes.rows(self.sizes[task])

    def whole(self, task: str, *values: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Return mappings to [rows of a task, ...] with the rows of all processes; matrices stay such."""
        tensors = [part for value in values for part in _parts(value)]
        found = iter(self.processes.gather(tensors, self.sizes[task]))
        return [_rebuilt(value, found) for value in values]

    def every(self, value: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Return [rows, ...] with the rows of all processes, or the same task by task."""
        if isinstance(value, Tensor):
            return self.processes.gather([value], next(iter(self.sizes.values())))[0]
        return self.each(value)

    def each(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return task -> [rows, ...] with the rows of all processes."""
        return {task: self.processes.gather([part], self.sizes[task])[0] for task, part in values.items()}

    def near(self, features: Tensor, task: str) -> F.Near:
        """Return :func:`F.near_others` of the features [B, r] of all rows: each process looks for the nearest to its own."""
        sizes = self.sizes[task]
        own = self.processes.rows(sizes)
        found = self.processes.gather([x.unsqueeze(1) for x in near_rows(features, own.start, own.stop)], sizes)
        return nearness(features, *(x.squeeze(1) for x in found))

    def gradients(self, losses: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        """Return the gradient of the sum of losses made apart to each task's output, of all processes' rows; keeps the graph."""
        outputs = [self.outputs[task] for task in tasks]
        each = torch.autograd.grad(losses.sum(), outputs, allow_unused=True, retain_graph=True)
        grads = [torch.zeros_like(z) if g is None else g for z, g in zip(outputs, each)]
        return [self.processes.gather([g], self.sizes[t])[0] for t, g in zip(tasks, grads)]


def _parts(values: Mapping[str, Tensor]) -> list[Tensor]:
    return [values.matrix, *values.others.values()] if isinstance(values, Columns) else list(values.values())


def _rebuilt(like: Mapping[str, Tensor], parts: Iterator[Tensor]) -> Mapping[str, Tensor]:
    if isinstance(like, Columns):
        return Columns(like.names, next(parts), like.widths, {name: next(parts) for name in like.others})
    return {name: next(parts) for name in like}


@dataclass
class FairBatch:
    """One step of training, before the gradient is taken. Everything is on the model's device.

    Attributes
    ----------
    tasks : mapping of str to Task or None
        Task name -> task, in ``task_dict`` order; None where its kind is not known.
    h : Tensor or dict of str to Tensor
        What the heads received, [B, d], or task -> [B, d] where the tasks' representations differ; sequences and maps have more
        dimensions, and ``embedding`` pools them.
    outputs : mapping of str to Tensor
        Task -> head output after ``process_preds``; without ``matrices`` the losses hang on each.
    labels : mapping of str to Tensor
        Task -> labels, NaN or -100 where missing; what an auxiliary task trains on is its own (``AuxiliaryLabels``).
    losses : Tensor
        [T], attached to the graph.
    groups : mapping of str to Tensor or mapping of str to mapping of str to Tensor
        Attribute -> int64 [B], -1 unknown. With one input per task: task -> attribute -> int64 [B].
    n_groups : mapping of str to int
        Attribute -> number of groups.
    epoch, step : int, default 0
        0-based; ``step`` counts over the whole training.
    standard_losses : bool, default False
        Whether every loss is its task's own ``Task.loss``, so that its gradient may be written out.
    matrices : Matrices, optional
        Of the main tasks, where all are binary ones of a single logit; the losses hang on its ``logits``.
    reference : Tensor or mapping of str to Tensor, optional
        [B, r], by whose Euclidean distance examples are alike or not; with one input per task: task -> [B, r]. There
        where the loader gives it and the weighting says ``needs_reference``.
    epoch_steps : int, optional
        Steps of an epoch; None where the loader does not say.
    twins : mapping of str to Tensor, optional
        Task -> outputs for the same people with another sensitive value, attached to a graph of their own. There where the
        loader can make them and the weighting says ``needs_twins``.
    share : Share, optional
        Which part of the batch is this process's; None where it is the only one.
    features : mapping of str to Tensor
        Task -> its head's feature map [B, C, h, w], of kinds whose audit score is made of it.
    """

    tasks: Mapping[str, Task | None]
    h: Tensor | dict[str, Tensor]
    outputs: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    losses: Tensor
    groups: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]]
    n_groups: Mapping[str, int] = field(default_factory=dict)
    multi_input: bool = False
    epoch: int = 0
    step: int = 0
    standard_losses: bool = False
    matrices: Matrices | None = None
    reference: Tensor | Mapping[str, Tensor] | None = None
    epoch_steps: int | None = None
    twins: Mapping[str, Tensor] | None = None
    share: Share | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over all processes of what is of this process's rows; the value itself where it is alone."""
        return value if self.share is None else self.share.processes.total(value)

    @property
    def received(self) -> Tensor | dict[str, Tensor]:
        """What the heads received in this process: ``h`` where it is alone."""
        return self.h if self.share is None or self.share.h is None else self.share.h

    def task(self, name: str) -> Task:
        """Return a task whose kind is known.

        Raises
        ------
        HostError
            The kind of this task could not be told from its loss.
        """
        task = self.tasks[name]
        if task is None:
            raise HostError(
                f"task {name!r}: its kind is not known, so it has no audit score and no group rates. Build its "
                f"task_dict entry with lf.task_dict, or add 'task': lf.Binary({name!r}) (or Multiclass, ...) to it"
            )
        return task

    def task_groups(self, name: str) -> Mapping[str, Tensor]:
        """Return attribute -> group ids [B] for the examples of one task."""
        return self.groups[name] if self.multi_input else self.groups  # type: ignore[return-value]

    @cached_property
    def near(self) -> dict[str, F.Near]:
        """Main task -> each example's nearest other one in the batch, and how near they are; empty where there is no reference."""
        if isinstance(self.reference, Tensor):
            return dict.fromkeys(self.main, self._near(self.reference, self.main[0]))
        return {name: self._near(features, name) for name, features in (self.reference or {}).items()}

    def _near(self, features: Tensor, task: str) -> F.Near:
        return F.near_others(features) if self.share is None else self.share.near(features, task)

    @cached_property
    def main(self) -> tuple[str, ...]:
        """Names of the tasks that are no auxiliary ones; scores, example losses and observed labels are theirs."""
        return tuple(name for name, task in self.tasks.items() if task is None or not task.auxiliary)

    @cached_property
    def observed(self) -> dict[str, Tensor]:
        """Task -> bool [B], True where it has a label."""
        return {name: self.task(name).observed(self.labels[name]) for name in self.main}

    @cached_property
    def example_losses(self) -> dict[str, Tensor]:
        """Task -> loss of each example [B], 0 where it has no label; attached to the graph."""
        return {name: self.task(name).example_losses(self.outputs[name], self.labels[name]) for name in self.main}

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Task -> audit score of each example [B], attached to the graph."""
        return {
            name: self.task(name).example_scores(self.outputs[name], self.labels[name], self.features.get(name))
            for name in self.main
        }

    def loss_gradient(self, losses: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return where the gradient of ``share`` times the sum of the losses starts, and the gradient there.

        That is at the logits, where the losses' derivative is written out; else at the losses themselves.
        """
        if self.matrices is None or not self.standard_losses or len(losses) > len(self.main):
            return losses, torch.full_like(losses, share)
        scores = self.__dict__.get("score_matrix")
        with torch.no_grad():
            grad = self.matrices.loss_gradient(torch.sigmoid(self.matrices.logits) if scores is None else scores.T)
        return self.matrices.logits, grad if share == 1 else grad.mul_(share)

    @cached_property
    def score_matrix(self) -> Tensor:
        """Audit scores of all main tasks, [T, B]; NaN past the end of a task that has fewer examples in this step."""
        if self.matrices is not None:
            return torch.sigmoid(self.matrices.logits).T
        rows = list(self.scores.values())
        longest = max(len(r) for r in rows)
        return torch.stack([pad(r, (0, longest - len(r)), value=float("nan")) for r in rows])

    @cached_property
    def embedding(self) -> Tensor:
        """Representations as [B, d] where all tasks share one, else [T, B, d] of main tasks (zeros past a task's end)."""
        if isinstance(self.h, Tensor):
            return F.pooled(self.h)
        rows = {name: F.pooled(self.h[name]) for name in self.main}
        widths = {name: row.shape[1] for name, row in rows.items()}
        if len(set(widths.values())) > 1:
            raise HostError(
                f"the tasks' representations differ in width {widths}; distances between them need one width"
            )
        longest = max(map(len, rows.values()))
        return torch.stack([pad(row, (0, 0, 0, longest - len(row))) for row in rows.values()])
