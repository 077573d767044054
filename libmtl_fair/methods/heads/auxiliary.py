"""Auxiliary fairness heads: ordinary LibMTL tasks that exist in training only (METHODS.md, section 4).

Their labels follow from a main task's labels and the groups.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, HostError, RecipeError, unknown
from libmtl_fair.libmtl.losses import entry, tasks_of
from libmtl_fair.methods.heads.group_losses import (
    GROUP_LOSSES,
    Compared,
    GroupLoss,
    class_count,
    class_indicator,
    mean_losses,
)
from libmtl_fair.methods.heads.modules import Adversary, DetachedHead, GroupHeads, fresh_copy
from libmtl_fair.models import Heads
from libmtl_fair.tasks import AUXILIARY_PREFIX, MAIN_SHARE, Task

TARGETS = ("main", "label", "label+accuracy", "group")
LOSSES = (*GROUP_LOSSES, "adversarial", "group_specific")
TaskDict = dict[str, dict[str, Any]]


class AuxiliaryLabels(NamedTuple):
    """What an auxiliary task is trained on in one step: the main tasks' labels, ids [B] and number of groups of its attributes."""

    labels: Mapping[str, Tensor]
    groups: tuple[Tensor, ...]
    n_groups: tuple[int, ...]

    def crossed(self) -> tuple[Tensor, int]:
        """Return ids [B], -1 unknown, and number of groups of all attributes as one."""
        one = len(self.groups) == 1
        return (self.groups[0], self.n_groups[0]) if one else F.cross_groups(self.groups, self.n_groups)


@dataclass(frozen=True)
class AuxiliaryTask(Task):
    """A task that exists in training only. FairTrainer makes its labels by :meth:`labels_from`.

    Parameters
    ----------
    mains : tuple of Task, default ()
        The main tasks whose labels it uses: one, or all for a shared head.
    attributes : tuple of str, default ()
        Sensitive attributes; several are crossed.
    """

    mains: tuple[Task, ...] = ()
    attributes: tuple[str, ...] = ()
    kind: ClassVar[str] = "auxiliary"
    auxiliary: ClassVar[bool] = True
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {}

    @property
    def source(self) -> str:
        """The main task whose examples it sees where tasks have inputs of their own.

        Raises
        ------
        HostError
            It is shared by main tasks, which then have no examples in common.
        """
        if len(self.mains) > 1:
            raise HostError(
                f"auxiliary task {self.name!r}: heads='shared' needs one input for all tasks; use 'per_task'"
            )
        return self.mains[0].name

    @property
    def main_share(self) -> float:
        """Return the share of the main tasks that LambdaMix takes beside this one unless it is told (ours, measured)."""
        return MAIN_SHARE

    @property
    def most_groups(self) -> float:
        """Number of groups that its head tells apart."""
        return math.inf

    def labels_from(
        self, labels: Mapping[str, Tensor], groups: Mapping[str, Tensor], n_groups: Mapping[str, int]
    ) -> AuxiliaryLabels:
        """Return the labels of a step from the main tasks' labels and attribute -> group ids.

        Raises
        ------
        DataError
            An attribute that the loader does not give, or more groups than the head tells apart.
        """
        for name in self.attributes:
            if name not in groups:
                raise DataError(f"auxiliary task {self.name!r}: {unknown('sensitive attribute', name, groups)}")
        ids, sizes = tuple([groups[a] for a in self.attributes]), tuple([n_groups[a] for a in self.attributes])
        if math.prod(sizes) > self.most_groups:
            raise DataError(
                f"auxiliary task {self.name!r}: its head tells {self.most_groups} groups apart, and the loader has "
                f"{math.prod(sizes)}; give their number to add_fairness_heads"
            )
        return AuxiliaryLabels(labels, ids, sizes)


@dataclass(frozen=True)
class DisparityTask(AuxiliaryTask):
    """The disparity of the groups' losses (or scores) under the head's outputs, summed over its main tasks.

    ``accuracy=True`` adds the mean task loss, so that the head also learns the task. The output joins those of the
    main tasks, [B, sum of their widths].
    """

    disparity: GroupLoss = field(default_factory=GroupLoss)
    accuracy: bool = False

    @property
    def main_share(self) -> float:
        """Return .99 for gaps of rates, which move the encoder more than gaps of losses, and .9 for GLD, which is quadratic in them."""
        return {"gap": 0.99, "lift": 0.99, "gld": 0.9}.get(self.disparity.loss, MAIN_SHARE)

    @property
    def out_features(self) -> int:
        """Number of outputs of all its main tasks."""
        return sum(task.out_features for task in self.mains)

    def loss(self, output: Tensor, labels: AuxiliaryLabels) -> Tensor:  # type: ignore[override]
        """Return the disparity (scalar); 0 with zero gradient with fewer than two groups in the step."""
        return self.losses([self], [output], [labels])[0]

    @staticmethod
    def losses(tasks: Sequence[DisparityTask], outputs: Sequence[Tensor], labels: Sequence[AuxiliaryLabels]) -> Tensor:
        """Return the losses of several such tasks, [S]; those of one disparity and the same groups are computed at once."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, (task, known) in enumerate(zip(tasks, labels)):
            alike.setdefault((id(task.disparity), task.accuracy, *map(id, known.groups)), []).append(i)
        found: dict[int, Tensor] = {}
        made: dict[tuple[int, ...], Compared] = {}  # heads that repeat the main heads say the same for every attribute
        for places in alike.values():
            first, many = tasks[places[0]], [len(tasks[i].mains) for i in places]
            mains = [main for i in places for main in tasks[i].mains]
            parts = [part for i in places for part in tasks[i]._split(outputs[i])]
            truth = labels[places[0]].labels
            key = (id(first.disparity), id(truth), *map(id, parts))
            if key not in made:
                made[key] = first.disparity.columns(mains, parts, truth)
            values = first.disparity.compare(made[key], *labels[places[0]].crossed())
            if first.accuracy:
                values = values + mean_losses(mains, parts, truth)
            if len(alike) == 1 and max(many) == 1:
                return values
            found |= zip(
                places, [part.sum() for part in torch.split(values, many)] if max(many) > 1 else values.unbind()
            )
        return torch.stack([found[i] for i in range(len(tasks))])

    def _split(self, output: Tensor) -> Sequence[Tensor]:
        if len(self.mains) == 1:
            return [output]
        return torch.split(output.flatten(1), [task.out_features for task in self.mains], dim=1)


@dataclass(frozen=True)
class AdversaryTask(AuxiliaryTask):
    """Cross-entropy of predicting the group from the representation; its head reverses the gradient.

    ``conditional=True`` gives every class an adversary of its own, as equalised odds asks for. The output is
    [B, K * G]: K classes of the main task (of all main tasks, one after another; 1 if not conditional), G groups.
    """

    conditional: bool = True
    bins: int = 4
    n_groups: int = 2

    @property
    def most_groups(self) -> int:
        """Number of groups."""
        return self.n_groups

    @property
    def out_features(self) -> int:
        """Number of classes times number of groups."""
        classes = sum(class_count(task, self.bins) for task in self.mains) if self.conditional else 1
        return classes * self.n_groups

    def loss(self, output: Tensor, labels: AuxiliaryLabels) -> Tensor:  # type: ignore[override]
        """Return the mean cross-entropy over known groups (scalar); 0 with zero gradient with fewer than two groups."""
        groups, _ = labels.crossed()
        member = F.group_indicator(groups, self.n_groups, output.dtype)
        weight = member.sum(1, keepdim=True)
        if self.conditional:
            weight = weight * torch.cat(
                [class_indicator(task, labels.labels[task.name], self.bins) for task in self.mains], 1
            )
        weight = weight / weight.sum().clamp(min=1) * ((member.sum(0) > 0).sum() >= 2)
        logits = output.reshape(len(output), -1, self.n_groups).transpose(1, 2)
        target = groups.clamp(min=0)[:, None].expand(-1, logits.shape[2])
        return (nnf.cross_entropy(logits, target, reduction="none") * weight).sum()


def add_fairness_heads(
    task_dict: Mapping[str, Mapping[str, Any]],
    decoders: Mapping[str, nn.Module],
    loss: str | Sequence[str] = "glf",
    sensitive: Sequence[str] | Mapping[str, int | Sequence[str]] = (),
    target: str | None = None,
    conditional: bool | None = None,
    heads: str = "per_task",
    *,
    intersectional: bool = False,
    tasks: Sequence[str] | None = None,
    bins: int = 4,
    sharpness: float | None = None,
    n_groups: Mapping[str, int] | None = None,
    in_features: int | None = None,
) -> tuple[TaskDict, nn.ModuleDict]:
    """Return ``task_dict`` and ``decoders`` with one auxiliary fairness task per main task and sensitive attribute.

    The tasks are named ``fair:<main>/<attribute>`` and come after the main ones, so every LibMTL weighting and
    architecture sees them. :class:`FairTrainer` makes their labels; predictions, metrics and selection leave them out;
    :func:`drop_fairness_heads` removes them. To reduce differences in equalised odds use ``loss="gap"`` with the weighting
    ``LambdaMix``, ``lam`` from 0.8 to 0.95 **(ours)**.

    Parameters
    ----------
    task_dict, decoders : mapping of str to mapping of str to object, mapping of str to nn.Module
        As LibMTL takes them; both are left as they are.
    loss : str or sequence of str, default "glf"
        A disparity of group losses (``glf``, ``gld``, ``bgl``) or of scores (``gap``, ``lift``, ``dpl``, ``fprl``,
        ``tprl``); ``adversarial``; several of these, each a task of its own (``fair:<main>/<attribute>/<loss>`` from
        the second on); or ``group_specific``: no auxiliary task, but one main head per group (see :class:`GroupHeads`).
    sensitive : sequence of str or mapping of str to int or sequence of str, default ()
        Attributes as the loader names them; a mapping also says their number of groups, or the groups' names.
    target : str, optional
        What the head says. ``"main"`` **(ours, default)**: what the main head says, which stays fixed, so that the
        encoder alone is moved; ``"label"`` (as published): a head of its own, trained by the disparity alone;
        ``"label+accuracy"``: that also learns the task; ``"group"``: the group, for ``adversarial`` only.
    conditional : bool, optional
        Compare groups within each class (quantile bin, for regression) **(ours, default)**, as equalised odds asks for;
        False compares them as a whole, as published. None is True, but for ``dpl``.
    heads : str, default "per_task"
        ``"per_task"``, or ``"shared"``: one auxiliary task per attribute, with the sum over the main tasks.
    intersectional : bool, default False
        Cross all attributes into one.
    tasks : sequence of str, optional
        Main tasks that get heads; default all.
    bins : int, default 4
        Quantile bins of a regression target.
    sharpness : float, optional
        Of the scores in ``gap``, ``dpl``, ``fprl``, ``tprl``; see :class:`GroupLoss` **(ours)**.
    n_groups : mapping of str to int, optional
        Attribute -> number of groups, where it must be known beforehand (``adversarial``, ``group_specific``).
    in_features : int, optional
        Width of the representation; default is that of the main head's first linear layer.

    Raises
    ------
    RecipeError
        Options that are unknown or exclude each other, or a main task named ``fair:...``.

    Examples
    --------
    >>> from libmtl_fair import Binary, task_dict
    >>> tasks, heads = add_fairness_heads(task_dict([Binary("income")]), {"income": nn.Linear(8, 1)}, sensitive=("sex",))
    >>> list(tasks)
    ['income', 'fair:income/sex']
    """
    if not isinstance(loss, str):
        entries, modules = {name: dict(values) for name, values in task_dict.items()}, dict(decoders.items())
        for each in loss:
            entries, made = add_fairness_heads(
                entries, modules, each, sensitive, target, conditional, heads, intersectional=intersectional, tasks=tasks,
                bins=bins, sharpness=sharpness, n_groups=n_groups, in_features=in_features,
            )  # fmt: skip
            modules = dict(made.items())
        return entries, Heads(modules)
    adversarial, specific = loss == "adversarial", loss == "group_specific"
    target = target or ("group" if adversarial else "main")
    _one_of("fairness loss", loss, LOSSES)
    _one_of("heads", heads, ("per_task", "shared"))
    _one_of("target", target, TARGETS)
    if adversarial != (target == "group") and not specific:
        raise RecipeError(f"target 'group' and loss 'adversarial' go together: found target={target!r}, loss={loss!r}")
    names, mains = _attributes(sensitive), _mains(task_dict, decoders, tasks)
    disparity = GroupLoss()
    if loss in GROUP_LOSSES:
        disparity = GroupLoss(loss=loss, conditional=conditional, bins=bins, sharpness=sharpness)
    for main in mains:
        disparity.check_task(main)
    maps = [main.name for main in mains if main.summed]
    if maps and (specific or heads == "shared"):
        what = "loss 'group_specific'" if specific else "heads='shared'"
        raise RecipeError(
            f"{what} is for outputs that are rows, and task {maps[0]!r} gives one at every place of an example"
        )
    if specific and len(names) > 1 and not intersectional:
        raise RecipeError(
            f"group_specific has one head per group of one attribute, found {', '.join(names)}: choose one, or intersectional=True"
        )
    sizes = dict(n_groups or {})
    if isinstance(sensitive, Mapping):
        sizes |= {name: given if isinstance(given, int) else len(given) for name, given in sensitive.items()}
    unsized = [name for name in names if name not in sizes]
    if unsized and (adversarial or specific):
        raise RecipeError(
            f"loss {loss!r} needs the number of groups of {unsized[0]!r} before training: give "
            f"sensitive={{{unsized[0]!r}: 2}}, or n_groups={{{unsized[0]!r}: 2}}"
        )
    entries = {name: dict(values) for name, values in task_dict.items()}
    modules = dict(decoders.items())
    if specific:
        counts = [sizes[name] for name in names]
        modules |= {main.name: GroupHeads(modules[main.name], names, counts) for main in mains}
        return entries, Heads(modules)
    for attributes in (names,) if intersectional else tuple((name,) for name in names):
        for chosen in [mains] if heads == "shared" else [(main,) for main in mains]:
            name = (
                f"{AUXILIARY_PREFIX}{'+'.join(main.name for main in chosen)}/{'*'.join(attributes).replace('.', '_')}"
            )
            held = [n for n in (name, f"{name}/{loss}") if n in entries]
            if taken := next((n for n in held if _loss_of(entries[n]["task"]) == loss), None):
                raise RecipeError(
                    f"there is already a task {taken!r}, of loss {loss!r}; add each loss of an attribute once"
                )
            name = f"{name}/{loss}" if name in entries else name
            own = [decoders[main.name] for main in chosen]
            task: AuxiliaryTask
            if adversarial:
                count = math.prod(sizes[attribute] for attribute in attributes)
                task = AdversaryTask(name, chosen, attributes, conditional is not False, bins, count)
                modules[name] = Adversary(in_features or _width(name, own[0]), task.out_features)
            else:
                task = DisparityTask(name, chosen, attributes, disparity, target == "label+accuracy")
                followed = [main.name for main in chosen]
                modules[name] = DetachedHead(followed, own) if target == "main" else fresh_copy(*own)
            entries[name] = entry(task)
    return entries, Heads(modules)


def _loss_of(task: Task) -> str:
    return task.disparity.loss if isinstance(task, DisparityTask) else "adversarial"


def _one_of(what: str, value: str, options: Collection[str]) -> None:
    if value not in options:
        raise RecipeError(unknown(what, value, options))


def _attributes(sensitive: Sequence[str] | Mapping[str, object]) -> tuple[str, ...]:
    if isinstance(sensitive, str):
        raise RecipeError(f"sensitive must be a sequence of attributes, such as ({sensitive!r},), found {sensitive!r}")
    names = tuple(sensitive)
    if not names:
        raise RecipeError("sensitive is empty: name at least one attribute of the loader, such as ('sex',)")
    if len(set(names)) < len(names):
        raise RecipeError(f"sensitive names an attribute twice: {', '.join(names)}")
    return names


def _mains(
    task_dict: Mapping[str, Mapping[str, Any]], decoders: Mapping[str, nn.Module], chosen: Sequence[str] | None
) -> tuple[Task, ...]:
    known: dict[str, Task] = {}
    for name, task in tasks_of(task_dict).items():
        if isinstance(task, AuxiliaryTask):
            continue
        if name.startswith(AUXILIARY_PREFIX):
            raise RecipeError(
                f"main task {name!r}: names that start with {AUXILIARY_PREFIX!r} are for fairness heads; rename it"
            )
        if name not in decoders:
            raise RecipeError(f"no decoder (head) for task {name!r}; decoders has: {', '.join(decoders) or 'none'}")
        if task is not None:
            known[name] = task
        elif chosen is None or name in chosen:
            raise RecipeError(
                f"task {name!r}: its kind is not known, so it has no group losses; build task_dict with lf.task_dict"
            )
    for name in chosen or ():
        _one_of("task", name, known)
    return tuple(task for name, task in known.items() if chosen is None or name in chosen)


def _width(name: str, head: nn.Module) -> int:
    for module in head.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise RecipeError(
        f"{name}: the main head has no linear layer that tells the representation's width; give in_features"
    )


def drop_fairness_heads(model_or_trainer: object) -> nn.Module:
    """Return a copy of a trained model without its auxiliary tasks: what to export. The original stays as it is.

    The copy's outputs are those of the original for every main task. It is for inference: a weighting's own state
    still counts all tasks.
    """
    model = getattr(model_or_trainer, "model", model_or_trainer)
    assert isinstance(model, nn.Module)
    held = [v for module in model.modules() for v in vars(module).values() if isinstance(v, torch.Tensor)]
    clone: Any = copy.deepcopy(model, {id(v): None for v in held if not v.is_leaf})  # what the last step left behind
    names = [name for name in clone.task_name if name.startswith(AUXILIARY_PREFIX)]
    for module in clone.modules():
        if isinstance(module, nn.ModuleDict):
            for name in names:
                module.pop(name) if name in module else None
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "fairness_head", False):
                del module._forward_pre_hooks[key]
    clone.task_name = [name for name in clone.task_name if name not in names]
    clone.task_num = len(clone.task_name)
    made: nn.Module = clone.eval()
    return made
