"""FBGrad: fairness gradients for heads and branches, corrected where tasks of one branch conflict."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import HostError, RecipeError, unknown
from libmtl_fair.libmtl.gradients import add_gradients, flatten, gradients, need_visible
from libmtl_fair.methods.base import FairWeighting, Names, Settings, setting
from libmtl_fair.methods.fairbranch.blocks import find_blocks
from libmtl_fair.methods.fairbranch.tree import BranchTree
from libmtl_fair.tasks import Binary, BinarySequence, Multiclass, Multilabel, decisions

if TYPE_CHECKING:
    from libmtl_fair.methods.fairbranch.conflicts import ConflictRecord


def robust_losses(batch: FairBatch, tasks: Sequence[str], attributes: Sequence[str] | None = None) -> Tensor:
    r"""Return :math:`F_t = \sum_y \max_g L_t | y, g` for each of ``tasks``, [M], attached to the graph.

    Over observed labels and known groups; a cell without examples is absent. Several sensitive attributes: the sum.
    Multiclass: y runs over the classes. Multilabel: the mean over labels of the binary loss **(ours)**; sequences: every step
    is an example **(ours)**. Regression, and
    kinds without classes: the worst group's mean error. ``attributes`` are those that count; None for all.
    """
    columns = {
        name: batch.outputs[name].reshape(len(batch.outputs[name]), -1) for name in tasks if _is_yes_or_no(batch, name)
    }
    found: dict[str, Tensor] = {}
    for names in [[name] for name in columns] if batch.multi_input else [list(columns)][: len(columns)]:
        logits = torch.cat([columns[name] for name in names], dim=1).T
        labels = torch.cat(
            [batch.labels[name].to(logits.dtype).reshape(columns[name].shape) for name in names], dim=1
        ).T
        losses = nnf.binary_cross_entropy_with_logits(logits, labels.where(labels == 1, 0.0), reduction="none")
        robust = _robust(batch, names[0], attributes, losses, labels, 2)
        if len(robust) == len(tasks) == len(names):
            return robust
        parts = torch.split(robust, [columns[name].shape[1] for name in names])
        found |= {name: part.mean() for name, part in zip(names, parts)}
    for name in tasks:
        if name not in found:
            found[name] = (
                _robust_steps(batch, name, task, attributes)
                if isinstance(task := batch.task(name), BinarySequence)
                else _robust(batch, name, attributes, batch.example_losses[name], *_classes(batch, name))
            )
    return torch.stack([found[name] for name in tasks])


def _is_yes_or_no(batch: FairBatch, name: str) -> bool:
    task = batch.task(name)
    return isinstance(task, Multilabel) or (isinstance(task, Binary) and batch.outputs[name].shape[1:] in ((), (1,)))


def _classes(batch: FairBatch, name: str) -> tuple[Tensor, int]:
    """Return class ids [B], outside of the classes where there is no label, and their number."""
    task, labels = batch.task(name), batch.labels[name]
    if isinstance(task, (Binary, Multiclass)):
        return labels, 2 if isinstance(task, Binary) else batch.outputs[name].shape[1]
    return torch.where(task.observed(labels), 0, -1), 1


def _robust_steps(batch: FairBatch, name: str, task: BinarySequence, attributes: Sequence[str] | None) -> Tensor:
    """Return the robust loss of a sequence's steps, each an example of its person's group."""
    losses, _ = task.step_losses(batch.outputs[name], batch.labels[name])
    _, _, labels, steps = decisions(task, batch.outputs[name], batch.labels[name])
    return _robust(batch, name, attributes, losses.reshape(-1), labels, 2, steps)


def _robust(
    batch: FairBatch,
    name: str,
    attributes: Sequence[str] | None,
    losses: Tensor,
    classes: Tensor,
    n_classes: int,
    steps: int = 1,
) -> Tensor:
    groups = batch.task_groups(name)
    if steps > 1:
        groups = {attribute: ids.repeat_interleave(steps) for attribute, ids in groups.items()}
    for attribute in attributes or ():
        if attribute not in groups:
            raise RecipeError(f"FBGrad: {unknown('sensitive attribute', attribute, list(groups))}")
    chosen = groups if attributes is None else attributes
    parts = [F.robust_log_loss(losses, classes, groups[a], batch.n_groups[a], n_classes) for a in chosen]
    return torch.stack(parts).sum(0)


class Shared(NamedTuple):
    """Trainable parameters that some tasks have in common; the tasks by their positions among the main ones, in order."""

    tasks: tuple[int, ...]
    parameters: list[Tensor]


class Plan:
    """What each backward pass is for. Tasks of one pass share nothing that is corrected, so one pass serves them all.

    Made from ``sets`` of parameters that tasks share, those of each task's head, and all that can be trained.

    Attributes
    ----------
    corrected : list of ParameterSet
        Sets that several tasks share, where each task's fairness gradient is needed apart.
    joined : list of Tensor
        Parameters that take the tasks' fairness gradients as a sum: ``uncorrected``, sets of one task, or all of them.
    heads : list of list of Tensor
        Parameters of all heads, in task order; ``owner`` is which task each number in them belongs to.
    common : list of Tensor
        What the sum of the accuracy losses is derived by on its own, heads first: all but the joined ones.
    passes : list of list of int
        Positions of the tasks of each pass for fairness gradients in corrected sets.
    """

    def __init__(
        self,
        sets: Sequence[Shared],
        heads: list[list[Tensor]],
        parameters: Iterable[Tensor],
        correct: bool = True,
        uncorrected: Sequence[Tensor] = (),
    ) -> None:
        self.corrected = [s for s in sets if correct and len(s.tasks) > 1]
        self.joined = [*uncorrected, *(p for s in sets if not correct or len(s.tasks) == 1 for p in s.parameters)]
        self.heads = [p for head in heads for p in head]
        sizes = torch.tensor([sum(p.numel() for p in head) for head in heads])
        self.owner = torch.arange(len(heads)).repeat_interleave(sizes).to(self.heads[0].device if self.heads else "cpu")
        corrected = [p for s in self.corrected for p in s.parameters]
        taken = {id(p) for p in (*self.heads, *self.joined, *corrected)}
        self.common = [*self.heads, *(p for p in parameters if id(p) not in taken), *corrected]
        self.passes: list[list[int]] = []
        for task in range(len(heads)):  # each goes into the first pass that holds none of its rivals
            rivals = {other for s in self.corrected if task in s.tasks for other in s.tasks}
            home = next((tasks for tasks in self.passes if rivals.isdisjoint(tasks)), None)
            if home is None:
                self.passes.append([task])
            else:
                home.append(task)

    def rows(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[tuple[list[Shared], Tensor]]:
        """Return the tasks' gradients in the corrected sets [n, tasks, P], for all n sets of one size; keeps the graph.

        ``cotangents`` are the gradients of each task's fairness loss to its own output.
        """
        own: dict[tuple[int, int], Tensor] = {}
        for tasks in self.passes:
            served = [(k, t, s.parameters) for k, s in enumerate(self.corrected) for t in s.tasks if t in tasks]
            inputs = [p for _, _, parameters in served for p in parameters]
            found = iter(gradients([outputs[t] for t in tasks], inputs, [cotangents[t] for t in tasks]))
            own |= {(k, t): flatten([next(found) for _ in ps], ps) for k, t, ps in served}
        alike: dict[tuple[int, int], list[int]] = {}
        for k, s in enumerate(self.corrected):
            alike.setdefault((len(s.tasks), len(own[k, s.tasks[0]])), []).append(k)
        return [
            (
                [self.corrected[k] for k in places],
                torch.stack([torch.stack([own[k, t] for t in self.corrected[k].tasks]) for k in places]),
            )
            for places in alike.values()
        ]


class FBGradSettings(Settings):
    """Hyperparameters of :class:`FBGrad` (METHODS.md, 3)."""

    aliases: ClassVar[Mapping[str, str]] = {"lambda": "strength"}

    strength: float = setting(
        1.0,
        "lambda, the weight of a task's fairness loss",
        expected="a number of at least 0",
        ge=0,
        allow_inf_nan=False,
    )
    where: str = setting(
        "branches",
        "``branches``: corrected in branches; the trunk takes the uncorrected fairness gradients; ``everywhere``: corrected on "
        "the trunk too (ours; on hard sharing the whole encoder); ``branches-only``: none on the trunk (ours); ``none``: the "
        "uncorrected sum of equation (6), the vanilla fair multi-task baseline",
        choices=("branches", "everywhere", "branches-only", "none"),
    )
    conflicts: str = setting(
        "block",
        "what a conflict is tested on: ``block``, the parameters of each block of a group, or ``branch``, all of them joined (ours)",
        choices=("block", "branch"),
    )
    intra_task: bool = setting(
        True, "lambda_t = 0 where fairness and accuracy conflict on the task's own head; False keeps ``strength``"
    )
    sensitive: Names | None = setting(None, "sensitive attributes that count; None for all that the loader gives")
    record_conflicts: bool = setting(
        False, "on the first batch of each epoch, note the angles between the tasks' gradients in each layer"
    )


class FBGrad(FairWeighting):
    r"""Fairness gradients beside accuracy gradients; conflicts between tasks of a branch are projected away.

    With accuracy losses :math:`L_t` and robust log losses :math:`F_t = \sum_y \max_g L_t | y, g` the step descends
    :math:`\sum_t \nabla L_t + \sum_t \lambda_t \tilde\nabla F_t`. In each block of a branch, :math:`\tilde\nabla F_t` is
    :math:`\nabla F_t` projected off the original :math:`\nabla F_s` of every other task s of that branch it conflicts with
    (in task order, zero gradients skipped); on heads and on the shared trunk it is :math:`\nabla F_t`.
    :math:`\lambda_t` is 0 where :math:`\langle \nabla L_t, \nabla F_t \rangle < 0` on the task's own head, else
    ``strength``. Source: arXiv:2310.13746, equation (6) and Algorithm 1; more than two tasks a branch, the head as the place
    of the test for lambda, ``conflicts="branch"``, and ``where`` of ``"everywhere"`` and ``"branches-only"`` are ours.

    Made for :class:`~libmtl_fair.FairBranch`. On an architecture without branches there is nothing to correct but for
    ``where="everywhere"``: it says so once.

    Records each step: ``robust/<task>`` (F_t), ``lambda/<task>``, ``conflicts`` (pairs of tasks in conflict in a branch).

    Raises
    ------
    HostError
        ``rep_grad=True``; an architecture without heads of its own for each task.
    RecipeError
        A setting out of range, or an unknown sensitive attribute.
    """

    settings_class = FBGradSettings
    needs_known_kinds = True
    needs_groups = True
    looks_at_heads = True
    takes_branches_apart = True
    source = "arXiv:2310.13746"
    cost = (
        "beside the ordinary backward pass as many partial ones (heads and shared branches) as the largest branch has tasks: "
        "tasks without a common branch share one; T for where=everywhere"
    )
    settings: FBGradSettings
    needs_representation = False
    conflict_cosines: Tensor | None
    conflict_epochs: Tensor

    def configure(self, settings: Settings) -> None:
        """Take the settings; say where the architecture leaves nothing to correct."""
        super().configure(settings)
        if self.rep_grad:
            raise HostError("FBGrad works on the gradients of branch parameters: use rep_grad=False")
        where = self.settings.where
        if where in ("branches", "branches-only") and not hasattr(self, "branch_parameters"):
            reached = "reach the whole encoder uncorrected" if where == "branches" else "reach the heads only"
            warnings.warn(
                f"FBGrad: this architecture has no branches, so fairness gradients {reached}; use architecture='FairBranch', "
                "or where='everywhere'",
                stacklevel=2,
            )
        self._plan: tuple[Plan, BranchTree | None, tuple[str, ...], list[tuple[Tensor, bool]]] | None = None
        self._recorded_epoch = -1
        self.conflict_cosines = None

    def step(self, batch: FairBatch, losses: Tensor) -> Tensor | None:
        """Leave accuracy gradients (the base weighting's) plus corrected fairness gradients in ``.grad``."""
        robust = robust_losses(batch, batch.main, self.settings.sensitive)
        names = list(batch.tasks)
        main = losses if len(batch.main) == len(losses) else losses[[names.index(name) for name in batch.main]]
        if self.settings.record_conflicts and batch.epoch != self._recorded_epoch:
            if batch.share is not None:
                raise HostError("FBGrad: record_conflicts is of a training in one process")
            self._record(batch, main, robust)
        need_visible(self, losses)
        plan = self._planned(batch.main)
        equal = self.settings.base == "EW" and main is losses
        to = plan.common if equal else plan.heads
        accuracy = gradients(main.sum(), to)
        fairness = self._fairness_gradients(plan, batch, robust, accuracy[: len(plan.heads)])
        joined = self.trace["lambda"] * robust
        if equal:  # the base's sum of losses, derived by each parameter once
            joined = main + joined
            add_gradients(zip(to, accuracy))
        fairness += zip(plan.joined, gradients(joined.sum(), plan.joined))
        weights: Tensor | None = torch.ones_like(losses) if equal else self.base_backward(losses)
        add_gradients(fairness)
        return weights

    def _planned(self, tasks: tuple[str, ...]) -> Plan:
        """Return the plan for the current tree; made anew when a branch event, or freezing, changed it."""
        tree: BranchTree | None = getattr(self, "tree", None)
        if self._plan is not None:
            plan, its_tree, its_tasks, flags = self._plan
            if tree is its_tree and tasks == its_tasks and all(p.requires_grad == trained for p, trained in flags):
                return plan
        self._plan = self._make_plan(tasks), tree, tasks, [(p, p.requires_grad) for p in self.parameters()]
        return self._plan[0]

    def _make_plan(self, tasks: tuple[str, ...]) -> Plan:
        where, by_block = self.settings.where, self.settings.conflicts == "block"
        found = [(group, list(parameters)) for group, parameters in getattr(self, "branch_parameters", _none)(by_block)]
        taken = {id(p) for _, parameters in found for p in parameters}
        taken |= {id(p) for p in (*self.decoders.parameters(), *self._parameters.values())}
        trunk = [p for p in self.parameters() if id(p) not in taken]
        if where == "everywhere":
            layers = [layer[tasks[0]] for layer in self._layers(tasks)] if by_block else []
            blocks = [[p for p in layer if id(p) not in taken] for layer in layers]
            placed = {id(p) for block in blocks for p in block}
            found += [(tasks, block) for block in (*blocks, [p for p in trunk if id(p) not in placed])]
        sets = []
        for group, parameters in found:
            members = tuple(i for i, task in enumerate(tasks) if task in group)
            trainable = [p for p in parameters if p.requires_grad]
            if members and trainable:
                sets.append(Shared(members, trainable))
        heads = [[p for p in self.decoders[task].parameters() if p.requires_grad] for task in tasks]
        uncorrected = [p for p in trunk if p.requires_grad] if where in ("branches", "none") else []
        return Plan(sets, heads, [p for p in self.parameters() if p.requires_grad], where != "none", uncorrected)

    def _fairness_gradients(
        self, plan: Plan, batch: FairBatch, robust: Tensor, accuracy: Sequence[Tensor | None]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return (parameter, lambda-weighted fairness gradient) for heads and corrected sets; keeps the graph.

        ``accuracy`` are the accuracy gradients of the heads.
        """
        outputs = [batch.outputs[task] for task in batch.main]
        cotangents = torch.autograd.grad(robust.sum(), outputs, retain_graph=True)
        strength, conflicts = torch.full_like(robust.detach(), self.settings.strength), robust.new_zeros(())
        pairs: list[tuple[Tensor, Tensor | None]] = []
        if plan.heads:
            fairness = flatten(gradients(outputs, plan.heads, cotangents), plan.heads)
            if self.settings.intra_task:
                product = batch.total(fairness) * batch.total(flatten(accuracy, plan.heads))
                inner = product.new_zeros(len(strength)).index_add(0, plan.owner, product)
                strength = strength.where(inner >= 0, 0.0)
            pairs += _split(fairness * strength[plan.owner], plan.heads)
        for sets, rows in plan.rows(outputs, cotangents):
            known = batch.total(rows)
            gram = known @ known.mT
            conflicts = conflicts + F.conflict_count(gram).sum()
            weights = torch.stack([strength[list(s.tasks)] for s in sets]).unsqueeze(1) @ F.conflict_coefficients(gram)
            for s, total in zip(sets, (weights @ rows).squeeze(1)):
                pairs += _split(total, s.parameters)
        self.trace = {"robust": robust.detach(), "lambda": strength, "conflicts": conflicts}
        return pairs

    @property
    def conflicts(self) -> ConflictRecord:
        """Angles between the tasks' gradients, accuracy and fairness, in each layer: one batch an epoch.

        Raises
        ------
        HostError
            Nothing was recorded.
        """
        from libmtl_fair.methods.fairbranch.conflicts import ConflictRecord

        cosines = self.conflict_cosines
        if cosines is None:
            raise HostError("FBGrad: no conflicts were recorded; set record_conflicts=True and train an epoch")
        layers = tuple(f"block {i + 1}" for i in range(cosines.shape[2]))
        tasks = tuple(self.task_name[: cosines.shape[-1]])  # main tasks come first
        return ConflictRecord(tasks, layers, tuple(self.conflict_epochs.tolist()), cosines)

    def _record(self, batch: FairBatch, losses: Tensor, robust: Tensor) -> None:
        """Add this batch to the record; 2 T backward passes, once an epoch."""
        from libmtl_fair.methods.fairbranch.conflicts import layer_cosines

        layers = self._layers(batch.main)
        found = torch.stack([layer_cosines(kind, layers, batch.main) for kind in (losses, robust)]).unsqueeze(0)
        epoch = torch.tensor([batch.epoch], device=found.device)
        held = self.conflict_cosines
        self.conflict_epochs = epoch if held is None else torch.cat([self.conflict_epochs, epoch])
        self.conflict_cosines = found if held is None else torch.cat([held, found])
        self._recorded_epoch = batch.epoch

    def _layers(self, tasks: tuple[str, ...]) -> list[dict[str, list[Tensor]]]:
        """Return, for each layer, task -> parameters: the encoder's blocks where they can be told, else all as one."""
        if hasattr(self, "layer_parameters"):
            found: list[dict[str, list[Tensor]]] = self.layer_parameters()
            return found
        try:
            blocks: list[list[Tensor]] = [list(nn.ModuleList(b).parameters()) for b in find_blocks(self.encoder)]
        except (HostError, AttributeError):
            blocks = [list(self.get_share_params())]
        return [{task: block for task in tasks} for block in blocks]


def _none(by_block: bool) -> list[tuple[tuple[str, ...], list[Tensor]]]:
    """Return the branches of an architecture that has none."""
    return []


def _split(joined: Tensor, parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Take a vector of all parameters' gradients apart."""
    parts = torch.split(joined, [p.numel() for p in parameters])
    return [(p, part.view_as(p)) for p, part in zip(parameters, parts)]
