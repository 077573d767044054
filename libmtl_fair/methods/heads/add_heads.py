"""Auxiliary fairness heads: ordinary LibMTL tasks that exist in training only (methods.md, section 4)."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.libmtl.losses import entry, tasks_of
from libmtl_fair.methods.heads.fairness_tasks import AdversaryTask, AuxiliaryTask, DisparityTask
from libmtl_fair.methods.heads.group_losses import GROUP_LOSSES, GroupLoss
from libmtl_fair.methods.heads.modules import Adversary, DetachedHead, GroupHeads, fresh_copy
from libmtl_fair.tasks import AUXILIARY_PREFIX, Task

TARGETS = ("main", "label", "label+accuracy", "group")
LOSSES = (*GROUP_LOSSES, "adversarial", "group_specific")
TaskDict = dict[str, dict[str, Any]]


def add_fairness_heads(
    task_dict: Mapping[str, Mapping[str, Any]],
    decoders: Mapping[str, nn.Module],
    loss: str = "glf",
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
    task_dict, decoders : as LibMTL takes them; both are left as they are.
    loss : a disparity of group losses (``glf``, ``gld``, ``bgl``) or of scores (``gap``, ``dpl``, ``fprl``, ``tprl``);
        ``adversarial``; or ``group_specific``: no auxiliary task, but one main head per group (see :class:`GroupHeads`).
    sensitive : attributes as the loader names them; a mapping also says their number of groups, or the groups' names.
    target : what the head says. ``"main"`` **(ours, default)**: what the main head says, which stays fixed, so that the
        encoder alone is moved; ``"label"`` (as published): a head of its own, trained by the disparity alone;
        ``"label+accuracy"``: that also learns the task; ``"group"``: the group, for ``adversarial`` only.
    conditional : compare groups within each class (quantile bin, for regression) **(ours, default)**, as equalised odds
        asks for; False compares them as a whole, as published. None is True, but for ``dpl``.
    heads : ``"per_task"``, or ``"shared"``: one auxiliary task per attribute, with the sum over the main tasks.
    intersectional : cross all attributes into one.
    tasks : main tasks that get heads; default all.
    bins : quantile bins of a regression target.
    sharpness : of the scores in ``gap``, ``dpl``, ``fprl``, ``tprl``; see :class:`GroupLoss` **(ours)**.
    n_groups : attribute -> number of groups, where it must be known beforehand (``adversarial``, ``group_specific``).
    in_features : width of the representation; default is that of the main head's first linear layer.

    Raises
    ------
    RecipeError : options that are unknown or exclude each other, or a main task named ``fair:...``.

    >>> from libmtl_fair import Binary, task_dict
    >>> tasks, heads = add_fairness_heads(task_dict([Binary("income")]), {"income": nn.Linear(8, 1)}, sensitive=("sex",))
    >>> list(tasks)
    ['income', 'fair:income/sex']
    """
    adversarial, specific = loss == "adversarial", loss == "group_specific"
    target = target or ("group" if adversarial else "main")
    _one_of("fairness loss", loss, LOSSES)
    _one_of("heads", heads, ("per_task", "shared"))
    _one_of("target", target, TARGETS)
    if adversarial != (target == "group") and not specific:
        raise RecipeError(f"target 'group' and loss 'adversarial' go together: found target={target!r}, loss={loss!r}")
    names, mains = _attributes(sensitive), _mains(task_dict, decoders, tasks)
    disparity = GroupLoss(loss, conditional, bins, sharpness) if loss in GROUP_LOSSES else GroupLoss()
    for main in mains:
        disparity.check(main)
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
        return entries, nn.ModuleDict(modules)
    for attributes in (names,) if intersectional else tuple((name,) for name in names):
        for chosen in [mains] if heads == "shared" else [(main,) for main in mains]:
            name = (
                f"{AUXILIARY_PREFIX}{'+'.join(main.name for main in chosen)}/{'*'.join(attributes).replace('.', '_')}"
            )
            if name in entries:
                raise RecipeError(f"there is already a task {name!r}; add each attribute once")
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
    return entries, nn.ModuleDict(modules)


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
    raise RecipeError(
        f"{name}: the main head has no linear layer that tells the representation's width; give in_features"
    )


def drop_fairness_heads(model_or_trainer: object) -> nn.Module:
    """Return a copy of a trained model without its auxiliary tasks: what to export. The original stays as it is.

    The copy's outputs are those of the original for every main task. It is for inference: a weighting's own state
    still counts all tasks.
    """
    model: Any = getattr(model_or_trainer, "model", model_or_trainer)
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
