"""TAG: how much a step for one task helps each other, by looking ahead; and which tasks to train together because of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import DataError, HostError
from libmtl_fair.libmtl.checkpoint import random_state_kept
from libmtl_fair.libmtl.gradients import gradients, shared_parameters
from libmtl_fair.libmtl.loading import architecture_namespace
from libmtl_fair.methods.base import FairWeighting, Settings, setting

if TYPE_CHECKING:
    import pandas as pd

    from libmtl_fair.libmtl.state import TrainingState

AFFINITY = "affinity"
"""What the history's columns of affinities begin with: ``affinity/<source>/<target>``."""
MOST_TASKS = 12
"""Of how many tasks the best grouping is looked for: the search takes 4^T numbers."""


class TAGSettings(Settings):
    """Hyperparameters of :class:`TAG` (METHODS.md, 6)."""

    affinity_every: int = setting(10, "look ahead on every n-th step; the source takes every step", ours=True, ge=1)
    networks: int = setting(
        2, "how many networks, at most, a recipe trains after the joint training, one a group of tasks", ours=True, ge=1
    )


class TAG(FairWeighting):
    r"""Plain joint training that records how much a step for one task lowers the loss of each other.

    On every ``affinity_every``-th step the batch is run once more, and for each task i the optimiser takes the step of
    :math:`L_i` alone on the shared parameters. With :math:`L_j` before and after it, on the same batch and with the same random draws,

    .. math:: Z_{i \to j} = 1 - L_j(\theta_{|i}) / L_j(\theta).

    Weights, buffers, random states and the optimiser are then put back as they were: the training is that of ``base``, bit by bit.
    History (``affinity/<i>/<j>``) and :attr:`trace` have the affinities; :func:`affinities` is their mean, :func:`group_tasks` what
    follows from it. In a recipe the method is all of it: this training, the groups, and a network a group trained with ``base``.

    A task that has no label in the batch, or a loss that is not above 0, has none there **(ours)**. Source: arXiv:2109.04617
    (Fifty et al., NeurIPS 2021).

    Raises
    ------
    HostError
        An architecture that is not hard sharing (HPS), ``rep_grad=True``, an encoder that is not trained, a step of several batches.
    RecipeError
        A setting out of range.
    """

    settings_class = TAGSettings
    settings: TAGSettings | None
    needs_representation = False
    source: ClassVar[str] = "arXiv:2109.04617"
    cost: ClassVar[str] = (
        "on every affinity_every-th step, of T tasks: T backward passes, T steps and T + 1 forward passes more"
    )
    trace_labels: Mapping[str, Sequence[str]]

    def configure(self, settings: Settings) -> None:
        """Refuse a model whose shared parameters are not those of one encoder."""
        super().configure(settings)
        if not isinstance(self, architecture_namespace.HPS):
            raise HostError(
                "TAG runs the model again after a step on what all tasks share: use FairTrainer with architecture 'HPS' (hard sharing)"
            )
        if self.rep_grad:
            raise HostError("TAG takes steps on the shared parameters: use rep_grad=False")

    def before_step(self, trainer: TrainingState, losses: Callable[[], Tensor]) -> None:
        """Look ahead, where it is this step's turn; ``losses`` runs the model on the step's batch and returns [T], attached."""
        assert self.settings is not None
        self.trace = {}
        if trainer.global_step % self.settings.affinity_every:
            return
        if trainer.samples > 1:
            raise HostError(f"TAG takes one batch a step, and its base {self.settings.base} takes {trainer.samples}")
        shared = shared_parameters(self)
        if not shared:
            raise HostError("TAG takes steps on the shared parameters, and the encoder has none that are trained")
        main = trainer.main_tasks
        places = [trainer.task_name.index(task) for task in main]
        with _as_it_was(self, trainer.optimizer, shared) as put_back:

            def now() -> Tensor:
                with random_state_kept():
                    return losses()[places]

            before = now()
            steps = [gradients([loss], shared) for loss in before]
            before = before.detach()
            put_back()
            after = []
            for grads in steps:
                for parameter, grad in zip(shared, grads):
                    parameter.grad = grad
                if trainer.processes is not None:
                    trainer.processes.add_up(shared)
                trainer.optimizer.step()
                with torch.no_grad():
                    after.append(now())
                put_back()
        found = 1 - torch.stack(after) / before
        known = before > 0
        found = found.where(known & known[:, None], torch.nan)
        if trainer.representation is not None:
            trainer.representation.take()
        if trainer.features is not None:
            trainer.features.take()
        rows = {f"{AFFINITY}/{task}": row for task, row in zip(main, found)}
        self.__dict__.update(trace=rows, trace_labels=dict.fromkeys(rows, main))

    def step(self, batch: FairBatch, losses: Tensor) -> Tensor | None:
        """Leave the gradient of the base."""
        return self.base_backward(losses)


@contextmanager
def _as_it_was(
    model: nn.Module, optimizer: torch.optim.Optimizer, shared: Sequence[Tensor]
) -> Iterator[Callable[[], None]]:
    """Within it the optimiser may step on the ``shared`` parameters, and what is yielded puts all back; at the end, gradients too."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [(p, p.grad) for p in parameters]
    states = [(p, optimizer.state.get(p)) for p in shared]
    values = [p.detach().clone() for p in shared]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]

    def put_back() -> None:
        with torch.no_grad():
            for parameter, value in zip(shared, values):
                parameter.copy_(value)
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))
        for parameter in parameters:
            parameter.grad = None
        for parameter, state in states:
            optimizer.state.pop(parameter, None)
            if state is not None:
                optimizer.state[parameter] = {
                    name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
                }

    try:
        put_back()  # what the optimiser changes from here on are copies
        yield put_back
    finally:
        put_back()
        for parameter, grad in grads:
            parameter.grad = grad
        for parameter, state in states:
            if state is not None:
                optimizer.state[parameter] = state


def affinities(history: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """Return the mean affinities of a training, [T, T]: a row a source i, a column a target j; NaN where none was recorded.

    Parameters
    ----------
    history : DataFrame
        ``FairTrainer.history`` of a training with :class:`TAG`, or its ``history.csv``.
    tasks : sequence of str
        Names of its tasks.

    Raises
    ------
    DataError
        A history without affinities of these tasks.
    """
    import pandas as pd

    names = [[f"{AFFINITY}/{i}/{j}" for j in tasks] for i in tasks]
    if lacking := [name for row in names for name in row if name not in history.columns]:
        raise DataError(f"the history has no column {lacking[0]!r}; affinities are recorded by the weighting TAG")
    values = [history[row].mean().to_numpy() for row in names]
    return pd.DataFrame(np.stack(values), index=list(tasks), columns=list(tasks))


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that one network is trained on, and those of them that it answers for."""

    tasks: tuple[str, ...]
    serves: tuple[str, ...]


def group_tasks(affinity: pd.DataFrame, networks: int) -> tuple[TaskGroup, ...]:
    r"""Return at most ``networks`` groups of tasks whose total affinity is the highest; exact.

    A task j in a group g gets :math:`\operatorname{mean}_{i \in g, i \ne j} Z_{i \to j}`. Groups may overlap; a task is served by the
    group in which it gets most, and the mean over tasks of what they get is made as large as it can be. A task by itself gets
    nothing: no group has one task alone, and what a task does for itself (the diagonal) does not count, as in the source's code. Of
    groupings that are equally good it is one with the fewest groups, and of small ones; affinities that are not known count as 0
    **(ours)**. Source: arXiv:2109.04617, which searches by branch and bound; the way, over the sets of tasks that a group
    serves, is ours.

    Parameters
    ----------
    affinity : DataFrame
        [T, T], as :func:`affinities` gives it: Z from the row's task to the column's.
    networks : int
        Budget, at least 1.

    Raises
    ------
    DataError
        Not a square table of finite numbers, more than 12 tasks, or no network.

    Examples
    --------
    >>> import pandas as pd
    >>> z = pd.DataFrame([[0, .4, -.1], [.3, 0, -.2], [.1, .2, 0]], index=list("abc"), columns=list("abc"))
    >>> for group in group_tasks(z, 2):
    ...     print(group)
    TaskGroup(tasks=('a', 'b'), serves=('a', 'b'))
    TaskGroup(tasks=('a', 'c'), serves=('c',))
    """
    names = [str(name) for name in affinity.columns]
    if names != [str(name) for name in affinity.index] or len(set(names)) < len(names) or not names:
        raise DataError(
            f"affinity: expected the same tasks as rows and columns, found {list(affinity.index)} and {names}"
        )
    if networks < 1:
        raise DataError(f"networks must be at least 1, found {networks}")
    need_few(len(names))
    values = affinity.to_numpy(dtype=float)
    if np.isinf(values).any():
        raise DataError("affinity: expected finite numbers, found an infinite one")
    if len(names) == 1:
        return (TaskGroup((names[0],), (names[0],)),)
    chosen = _best(np.nan_to_num(values), networks)
    groups = [TaskGroup(*(tuple(n for i, n in enumerate(names) if bits >> i & 1) for bits in pair)) for pair in chosen]
    return tuple(sorted(groups, key=lambda group: names.index(group.serves[0])))


def need_few(n_tasks: int) -> None:
    """Refuse more tasks than the best grouping can be found of."""
    if n_tasks > MOST_TASKS:
        raise DataError(f"TAG: the best groups are looked for among at most {MOST_TASKS} tasks, found {n_tasks}")


def _best(z: NDArray[np.float64], networks: int) -> list[tuple[int, int]]:
    """Return (group, those it serves) of the best grouping; sets of tasks are bits of a number."""
    n = len(z)
    sets = np.arange(1 << n)
    member = (sets[:, None] >> np.arange(n) & 1).astype(bool)
    size = member.sum(1)
    gets = member @ np.where(np.eye(n, dtype=bool), 0, z) / np.maximum(size - 1, 1)[:, None]
    by_size = sets[np.argsort(size, kind="stable")][n + 1 :]  # of two tasks and more
    worth, by = (
        np.full(len(sets), -np.inf),
        np.zeros(len(sets), dtype=int),
    )  # of serving just these tasks, and by which group
    for served in sets[1:]:
        groups = by_size[(by_size & served) == served]
        totals = gets[groups][:, member[served]].sum(1)
        best = int(totals.argmax())
        worth[served], by[served] = totals[best], groups[best]
    full, tables, taken = len(sets) - 1, [worth], [sets]
    for _ in range(1, min(networks, n)):  # one more group: it serves the lowest task and some others
        more, last = tables[-1].copy(), np.zeros(len(sets), dtype=int)
        for wanted in sets[1:]:
            low = wanted & -wanted
            parts = sets[((sets & ~wanted) == 0) & ((sets & low) > 0) & (sets < wanted)]
            totals = worth[parts] + tables[-1][wanted ^ parts]
            if len(parts) and totals.max() > more[wanted]:
                more[wanted], last[wanted] = totals.max(), parts[int(totals.argmax())]
        tables.append(more)
        taken.append(last)
    top = tables[-1][full]
    level = next(k for k, table in enumerate(tables) if table[full] >= top - 1e-12 * max(1.0, abs(top)))
    found: dict[int, int] = {}
    left = full
    while left:
        served = int(taken[level][left]) if level else left
        level -= 1
        if not served:  # one more group is no better here
            continue
        found[int(by[served])] = found.get(int(by[served]), 0) | served
        left ^= served
    return list(found.items())
