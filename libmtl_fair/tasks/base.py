"""What every task has: labels, loss, probabilities and audit score; and the register of kinds.

A task says what its labels and outputs mean. From that follow the masked loss that LibMTL trains on, the metric it
shows, the probabilities that group metrics read, and the score in [0, 1] that the fixed-delta audit compares
(METHODS.md, section 0). Labels that are missing are ``NaN`` (float labels) or ``-100`` (integer labels).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.files import Json

IGNORE_INDEX = -100
"""Integer label of an example whose label is missing (PyTorch's ``ignore_index``)."""

AUXILIARY_PREFIX = "fair:"
"""Names of auxiliary fairness tasks start with this; names of other tasks must not."""

MAIN_SHARE = 0.98
"""Share of the main tasks' losses beside those of auxiliary fairness tasks unless it is told (ours, measured)."""

_NORMAL_Q10 = -1.2815515655446004

KINDS: dict[str, type[Task]] = {}
"""Task kinds by name, as recipes spell them; :func:`registered` adds one."""


def with_nan(labels: Tensor) -> Tensor:
    """Return labels as floats, NaN where missing."""
    if labels.is_floating_point():
        return labels
    return torch.where(labels == IGNORE_INDEX, torch.nan, labels.to(torch.get_default_dtype()))


@dataclass(frozen=True)
class Task:
    """One task of a multi-task model. Use :class:`Binary`, :class:`Multiclass`, :class:`Multilabel`, :class:`Regression`.

    A subclass of one of these is of its kind. A kind of one's own derives from this class, has a ``kind`` and defines
    :meth:`example_losses`, :meth:`probabilities` and :meth:`score`; it trains, predicts and is audited by its score. Methods
    and metrics of groups know the kinds of :data:`KINDS` only, and say so.

    Parameters
    ----------
    name : str
        Key of the task in labels, outputs, heads and tables.
    """

    name: str
    kind: ClassVar[str] = "task"
    auxiliary: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = True
    single: ClassVar[bool] = True
    """Whether an example has one answer, and not one a step or place."""
    summed: ClassVar[bool] = False
    """Whether metrics are made of sums over examples: :meth:`statistics` and :meth:`native`."""
    has_rates: ClassVar[bool] = True
    """Whether groups have rates of decisions; else they are compared by the errors of their examples."""
    needs_features: ClassVar[bool] = False
    """Whether the audit score is of the head's feature map."""
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {"Loss": ("loss", 0)}
    """Metric as LibMTL shows it -> its name here, and 1 where higher is better."""
    headline: ClassVar[str] = "Loss"
    """The metric of :attr:`shown` that stands for the task."""

    def __init_subclass__(cls) -> None:
        """Let what derives from a known kind be of that kind."""
        known = next((kind for base in cls.__mro__[1:] if (kind := vars(base).get("kind")) in KINDS), None)
        if known is not None:
            cls.kind = known

    def __post_init__(self) -> None:
        """Check what every kind has in common."""
        if not isinstance(self.name, str) or not self.name:
            raise RecipeError(f"a task's name must be a non-empty string, found {self.name!r}")

    @property
    def out_features(self) -> int:
        """Number of outputs that the task's head needs."""
        return 1

    def flat(self, labels: Tensor) -> Tensor:
        """Return labels [B] for [B] or [B, 1]."""
        return labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels

    def observed(self, labels: Tensor) -> Tensor:
        """Return which examples have a label: bool [B]."""
        return with_nan(self.flat(labels)).isfinite()

    @property
    def labels_are(self) -> str:
        """What labels of this kind are, for messages."""
        return "finite numbers, NaN where missing"

    def wrong(self, labels: Tensor) -> Tensor:
        """Return which values are no labels of this kind, bool like ``labels``; a missing label is none of them."""
        return torch.isinf(labels)

    def example_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example, [B]; 0, with zero gradient, where the label is missing."""
        raise NotImplementedError

    def count(self, labels: Tensor) -> Tensor:
        """Return how many labels :meth:`loss` is the mean over (scalar)."""
        return self.observed(labels).sum()

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over observed labels (scalar); 0 with zero gradient if there is none."""
        return self.example_losses(output, labels).sum() / self.count(labels).clamp(min=1)

    def statistics(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return of each example the numbers whose sums make the metrics, [B, K]."""
        raise NotImplementedError

    def coverage(self, labels: Tensor) -> Tensor:
        """Return each example's share of places that have a label, [B]: what predictions without maps keep of labels."""
        raise NotImplementedError

    def native(self, statistics: Tensor) -> dict[str, Tensor]:
        """Return metric -> value [...] of summed :meth:`statistics` [..., K]."""
        raise NotImplementedError

    def utility(self, results: Mapping[str, float]) -> float:
        """Return one number of an evaluation's results, higher is better."""
        return results[self.headline]

    def probabilities(self, output: Tensor) -> Tensor:
        """Return probabilities, or the predicted value for regression: [B] or [B, C]."""
        raise NotImplementedError

    def log_odds(self, output: Tensor) -> Tensor:
        """Return the log-odds of each probability, or the predicted value for regression: [B] or [B, C]."""
        return output

    def score(self, output: Tensor) -> Tensor:
        """Return the audit score of each example, [B], in [0, 1]: its highest probability (METHODS.md, section 0)."""
        p = self.probabilities(output)
        return p if p.dim() == 1 else p.amax(dim=-1)

    def raw_score(self, output: Tensor, labels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Return the audit score before a range squashes it, [B].

        Parameters
        ----------
        output : Tensor
            Of the head.
        labels : Tensor, optional
            Say which places of an example are valid; without them all are.
        features : Tensor, optional
            The head's feature map [B, C, h, w], of kinds that need it.
        """
        return self.score(output)

    def example_scores(self, output: Tensor, labels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Return the audit score of each example, [B], in [0, 1]; see :meth:`raw_score`."""
        return self.raw_score(output, labels, features)


class Ranged(Task):
    """A task whose raw score is squashed to [0, 1] by the range of a reference model's, ``clip((s - q10) / (q90 - q10 + 1e-6), 0, 1)``."""

    score_range: tuple[float, float] | None

    @property
    def default_range(self) -> tuple[float, float]:
        """Range of the score where no reference model has frozen one: that of a standard normal's middle 80 % **(ours)**."""
        return _NORMAL_Q10, -_NORMAL_Q10

    def squash(self, raw: Tensor) -> Tensor:
        """Return raw scores [B] in [0, 1]."""
        low, high = self.score_range or self.default_range
        return ((raw - low) / (high - low + 1e-6)).clamp(0, 1)

    def example_scores(self, output: Tensor, labels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Return the raw score squashed by the range, [B]."""
        return self.squash(self.raw_score(output, labels, features))

    def with_score_range(self, raw_scores: Tensor) -> Self:
        """Return this task with its score range frozen to the 10 % and 90 % quantiles of a reference model's raw scores [N]."""
        values = raw_scores.detach().reshape(-1).double().cpu()
        values = values[torch.isfinite(values)]
        if not len(values):
            raise DataError(f"task {self.name!r}: the reference model has no finite output to take a score range from")
        low, high = torch.quantile(values, torch.tensor([0.1, 0.9], dtype=values.dtype)).tolist()
        return self.ranged((low, high))

    def ranged(self, score_range: tuple[float, float]) -> Self:
        """Return this task with a frozen score range."""
        changes: Json = {"score_range": score_range}
        return replace(self, **changes)


T = TypeVar("T", bound=Task)


def registered(cls: type[T]) -> type[T]:
    """Enter a class in :data:`KINDS` under its ``kind``: recipes, saved predictions and methods know it from then on."""
    KINDS[cls.kind] = cls
    return cls


def need_count(task: str, field: str, found: object, least: int) -> None:
    """Raise RecipeError unless ``found`` is an integer of at least ``least``."""
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise RecipeError(f"task {task!r}: {field} must be an integer of at least {least}, found {found!r}")


def need_known_kinds(who: str, tasks: Iterable[Task | None]) -> None:
    """Raise RecipeError where a task is of a kind of one's own."""
    for task in tasks:
        if task is not None and task.kind not in KINDS and not task.auxiliary:
            raise RecipeError(
                f"{who} knows {', '.join(sorted(KINDS))} tasks, and {task.name!r} is of a kind of your own, {task.kind!r} "
                f"({type(task).__name__}): derive it from the class of one of these, or leave it out"
            )


def task_to_dict(task: Task) -> Json:
    """Return a task as plain values, its kind among them."""
    return {"kind": task.kind, **asdict(task)}


def task_from_dict(values: Json) -> Task:
    """Read what :func:`task_to_dict` gave, from JSON too.

    >>> from libmtl_fair.tasks import Binary
    >>> task_from_dict(task_to_dict(Binary("income")))
    Binary(name='income')
    """
    fields: Json = {
        name: tuple(item) if isinstance(item, list) else item for name, item in values.items() if name != "kind"
    }
    return KINDS[values["kind"]](**fields)
