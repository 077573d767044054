"""FBGrad: fairness gradients for heads and branches, corrected where tasks of one branch conflict."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.compat_weightings import recorded
from libmtl_fair.libmtl.gradients import add_gradients, flatten
from libmtl_fair.methods.base import FairWeighting, Names, Settings, setting
from libmtl_fair.methods.fairbranch.blocks import find_blocks
from libmtl_fair.methods.fairbranch.fbgrad_plan import Found, Plan, Shared, coefficients, gradients, shares
from libmtl_fair.methods.fairbranch.robust import robust_losses

if TYPE_CHECKING:
    from libmtl_fair.metrics.conflicts import ConflictRecord

WHERE = ("branches", "everywhere", "none")


class FBGradSettings(Settings):
    """Hyperparameters of :class:`FBGrad` (methods.md, 3)."""

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
        "``branches``: fairness gradients reach heads and branches, corrected in branches; ``everywhere``: the shared trunk "
        "as well (ablation; on hard sharing the whole encoder); ``none``: heads and branches, uncorrected (ablation)",
        choices=WHERE,
    )
    intra_task: bool = setting(
        True, "lambda_t = 0 where fairness and accuracy conflict on the task's own head; False keeps ``strength``"
    )
    sensitive: Names | None = setting(None, "sensitive attributes that count; None for all that the loader gives")
    record_conflicts: bool = setting(
        False, "on the first batch of each epoch, note the angles between the tasks' gradients in each layer"
    )


Pairs = list[tuple[Tensor, Tensor]]
"""(parameter, gradient)."""


class FBGrad(FairWeighting):
    r"""Fairness gradients for heads and branches; conflicts between tasks of a branch are projected away.

    With accuracy losses :math:`L_t` and robust log losses :math:`F_t = \sum_y \max_g L_t | y, g` the step descends
    :math:`\sum_t \nabla L_t + \sum_t \lambda_t \tilde\nabla F_t`. In a branch, :math:`\tilde\nabla F_t` is
    :math:`\nabla F_t` projected off the original :math:`\nabla F_s` of every other task s of that branch it conflicts with
    (in task order, zero gradients skipped); on a head it is :math:`\nabla F_t`; on the shared trunk it is 0.
    :math:`\lambda_t` is 0 where :math:`\langle \nabla L_t, \nabla F_t \rangle < 0` on the task's own head, else
    ``strength``. Source: arXiv:2310.13746; more than two tasks a branch, and ``where="everywhere"``, are ours.

    Made for :class:`~libmtl_fair.FairBranch`. On an architecture without branches, ``where="branches"``
    corrects nothing and reaches the heads only: it says so once.

    Cost: tasks without a common branch are served by the same backward pass, so a step takes as many partial passes (heads
    and shared branches, not the trunk) as the largest branch has tasks: two for any number of pairs, four after a second
    merge, T for ``where="everywhere"``. Tasks alone on their branches take one for all of them together, in which, with equal
    weights, accuracy and fairness are one sum. Beside them there is the ordinary backward, and for another base one to the
    heads. MLP 100-128-64-32, batch 256, CPU: .80 to .86 of a PCGrad step in LibMTL's own Trainer with 5 tasks, .31 to .36
    with 20; of PCGrad in FairTrainer 1.05 to 1.15 and .61 to .72 (benchmarks/fairbranch_step.py). Batching the passes with
    ``is_grads_batched`` was 4 to 15 % slower than one after the other.

    Records each step: ``robust/<task>`` (F_t), ``lambda/<task>``, ``conflicts`` (pairs of tasks in conflict in a branch).

    Raises
    ------
    HostError : ``rep_grad=True``; an architecture without heads of its own for each task.
    RecipeError : a setting out of range, or an unknown sensitive attribute.
    """

    settings_class = FBGradSettings
    needs_groups = True
    looks_at_heads = True
    source = "arXiv:2310.13746"
    settings: FBGradSettings
    conflict_cosines: Tensor | None
    conflict_epochs: Tensor

    def configure(self, settings: Settings) -> None:
        """Take the settings; say where the architecture leaves nothing to correct."""
        super().configure(settings)
        if self.rep_grad:
            raise HostError("FBGrad works on the gradients of branch parameters: use rep_grad=False")
        if self.settings.where != "everywhere" and not hasattr(self, "branch_parameters"):
            warnings.warn(
                "FBGrad: this architecture has no branches, so fairness gradients reach the heads only and nothing is "
                "corrected; use architecture='FairBranch', or where='everywhere'",
                stacklevel=2,
            )
        self._plan: Plan | None = None
        self._plan_tree: Any = None
        self._plan_tasks: tuple[str, ...] = ()
        self._plan_flags: list[tuple[Tensor, bool]] = []
        self._recorded_epoch = -1
        self.conflict_cosines = None

    def step(self, batch: FairBatch, losses: Tensor) -> Any:
        """Leave accuracy gradients (the base weighting's) plus corrected fairness gradients in ``.grad``."""
        robust = robust_losses(batch, batch.main, self.settings.sensitive)
        main = losses if len(batch.main) == len(losses) else losses[self._positions(batch)]
        if self.settings.record_conflicts and batch.epoch != self._recorded_epoch:
            self._record(batch, main, robust)
        plan = self._planned(batch.main)
        equal = self.settings.base == "EW" and main is losses
        accuracy = gradients([main.sum()], plan.common if equal else plan.head_parameters)
        fairness = self._fairness_gradients(plan, batch, robust, accuracy)
        if equal:  # the base's sum of losses, derived by each parameter once
            fairness += _found(gradients([(main + self.trace["lambda"] * robust).sum()], plan.joined), plan.joined)
            add_gradients(_found(accuracy, plan.common))
            weights: Any = recorded(self, torch.ones_like(losses))
        else:
            fairness += _found(gradients([(self.trace["lambda"] * robust).sum()], plan.joined), plan.joined)
            weights = self.base_backward(losses)
        add_gradients(fairness)
        return weights

    def _positions(self, batch: FairBatch) -> list[int]:
        names = list(batch.tasks)
        return [names.index(name) for name in batch.main]

    # -- which parameters ----------------------------------------------------------------------------------------

    def _planned(self, tasks: tuple[str, ...]) -> Plan:
        """Return the plan for the current tree; made anew when a branch event, or freezing, changed it."""
        tree = getattr(self, "tree", None)
        known = self._plan is not None and tree is self._plan_tree and tasks == self._plan_tasks
        if not known or any(p.requires_grad != trained for p, trained in self._plan_flags):
            self._plan, self._plan_tree, self._plan_tasks = self._make_plan(tasks), tree, tasks
            self._plan_flags = [(p, p.requires_grad) for p in self.parameters()]
        assert self._plan is not None
        return self._plan

    def _make_plan(self, tasks: tuple[str, ...]) -> Plan:
        heads = [[p for p in self.decoders[task].parameters() if p.requires_grad] for task in tasks]
        found = shares(self)
        if self.settings.where == "everywhere":
            taken = {id(p) for _, parameters in found for p in parameters}
            taken |= {id(p) for p in (*self.decoders.parameters(), *self._parameters.values())}
            found.append((tasks, [p for p in self.parameters() if id(p) not in taken]))
        sets = []
        for group, parameters in found:
            members = tuple(i for i, task in enumerate(tasks) if task in group)
            trainable = [p for p in parameters if p.requires_grad]
            if members and trainable:
                sets.append(Shared(members, trainable))
        trainable = [p for p in self.parameters() if p.requires_grad]
        return Plan.of(sets, heads, trainable, correct=self.settings.where != "none")

    # -- gradients -----------------------------------------------------------------------------------------------

    def _fairness_gradients(self, plan: Plan, batch: FairBatch, robust: Tensor, accuracy: Found) -> Pairs:
        """Return (parameter, lambda-weighted fairness gradient) for heads and corrected sets; keeps the graph."""
        outputs = [batch.outputs[task] for task in batch.main]
        cotangents = torch.autograd.grad(robust.sum(), outputs, retain_graph=True)
        grads = plan.gradients(outputs, cotangents)
        strength, pairs = self._intra_task(plan, robust, grads, accuracy)
        conflicts = robust.new_zeros(())
        for sets in plan.buckets():
            rows = torch.stack([plan.rows(s, grads) for s in sets])
            gram = rows @ rows.mT
            conflicts = conflicts + (gram < 0).triu(1).sum()
            weights = torch.stack([strength[list(s.tasks)] for s in sets]).unsqueeze(1) @ coefficients(gram)
            for s, total in zip(sets, (weights @ rows).squeeze(1)):
                pairs += _split(total, s.parameters)
        self.trace = {"robust": robust.detach(), "lambda": strength, "conflicts": conflicts}
        return pairs

    def _intra_task(self, plan: Plan, robust: Tensor, grads: list[Found], accuracy: Found) -> tuple[Tensor, Pairs]:
        """Return lambda_t [M], and (parameter, lambda_t grad F_t) for the heads."""
        strength = torch.full_like(robust.detach(), self.settings.strength)
        parameters = plan.head_parameters
        if not parameters:
            return strength, []
        fairness = flatten(plan.head_rows(grads), parameters)
        if self.settings.intra_task:
            product = fairness * flatten([accuracy[id(p)] for p in parameters], parameters)
            inner = product.new_zeros(len(strength)).index_add(0, plan.owner, product)
            strength = strength.where(inner >= 0, 0.0)
        return strength, _split(fairness * strength[plan.owner], parameters)

    # -- what is recorded ----------------------------------------------------------------------------------------

    @property
    def conflicts(self) -> ConflictRecord:
        """Angles between the tasks' gradients, accuracy and fairness, in each layer: one batch an epoch.

        Raises
        ------
        HostError : nothing was recorded.
        """
        from libmtl_fair.metrics.conflicts import ConflictRecord

        cosines = self.conflict_cosines
        if cosines is None:
            raise HostError("FBGrad: no conflicts were recorded; set record_conflicts=True and train an epoch")
        layers = tuple(f"block {i + 1}" for i in range(cosines.shape[2]))
        tasks = tuple(self.task_name[: cosines.shape[-1]])  # main tasks come first
        return ConflictRecord(tasks, layers, tuple(self.conflict_epochs.tolist()), cosines)

    def _record(self, batch: FairBatch, losses: Tensor, robust: Tensor) -> None:
        """Add this batch to the record; 2 T backward passes, once an epoch."""
        from libmtl_fair.metrics.conflicts import layer_cosines

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


def _found(grads: Found, parameters: list[Tensor]) -> Pairs:
    return [(p, g) for p in parameters if (g := grads[id(p)]) is not None]


def _split(joined: Tensor, parameters: list[Tensor]) -> Pairs:
    """Take a vector of all parameters' gradients apart."""
    parts = torch.split(joined, [p.numel() for p in parameters])
    return [(p, part.view_as(p)) for p, part in zip(parameters, parts)]
