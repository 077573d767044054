"""FairMT: task losses under one fairness constraint over heterogeneous, partly labelled tasks, by a primal-dual method."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from libmtl_fair.batch import Columns, FairBatch
from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.libmtl.gradients import add_gradients, carry_representation_gradients, extra_gradients
from libmtl_fair.libmtl.state import TrainingState
from libmtl_fair.methods.base import FairWeighting, Settings
from libmtl_fair.methods.fairmt.constraint import BinaryColumns, Constraint, Found, MixedColumns, evaluate
from libmtl_fair.methods.fairmt.settings import FairMTSettings
from libmtl_fair.methods.fairmt.task_weights import Gradients, TaskWeights
from libmtl_fair.methods.relif import LipschitzScales
from libmtl_fair.tasks import AUXILIARY_PREFIX, Regression, Task

__all__ = ["FairMT", "FairMTSettings"]


@dataclass
class Fairness:
    """The constraint in one step: what was found, the gradient of Phi to each root, and w* times the Lipschitz term."""

    found: Found
    grads: list[Tensor]
    roots: list[Tensor]
    sizes: tuple[int, ...]
    term: Tensor | None


class FairMT(FairWeighting):
    r"""Task losses under one fairness constraint over tasks of any kind, some of them unlabelled in places.

    Minimises :math:`\sum_t \alpha_t L_t` subject to :math:`\Phi \le \epsilon`, where :math:`\Phi` is the smoothed worst case of the
    tasks' asymmetric disparities (only groups worse than the best are moved). A step descends
    :math:`T (\sum_t \alpha_t L_t + \eta \Phi)`; then :math:`\eta \leftarrow \mathrm{clip}(\eta + \rho (\Phi - \epsilon))`. The
    factor T, the number of tasks with a label in the batch, is ours: with uniform alpha a step without a violated
    constraint is equal weighting's, at its learning rate. Auxiliary fairness tasks are in neither sum: their losses are added
    as they are (ours). Source: arXiv:2512.00469; what is ours is marked in the settings.

    Records each step: ``psi/<task>`` and ``w/<task>`` (NaN and 0 where absent), ``alpha/<task>`` (sums to 1), ``phi``, and
    ``eta`` after the dual update, which the next step uses.
    """

    settings_class = FairMTSettings
    source = "arXiv:2512.00469"
    cost = "1.7 to 1.9 plain steps with 2 to 40 tasks (docs/RESULTS.md)"
    needs_groups = True
    settings: FairMTSettings
    lipschitz: LipschitzScales | None
    running: Tensor | None = None
    presence: Tensor | None = None

    def configure(self, settings: Settings) -> None:
        """Make the dual variable."""
        super().configure(settings)
        self.dual = self.settings.dual()
        self.lipschitz = LipschitzScales(self.settings.relif()) if self.settings.lipschitz else None
        self.to(self.device)
        self._constraint: Constraint | None = None
        self._main = [name for name in self.task_name if not name.startswith(AUXILIARY_PREFIX)]
        self._rows: Tensor | None = None  # of the main tasks, where there are others
        if len(self._main) < len(self.task_name):
            is_main = torch.tensor([name in self._main for name in self.task_name], device=self.device)
            self._rows, self._others = is_main.nonzero().squeeze(1), (~is_main).nonzero().squeeze(1)
        self._alpha = TaskWeights(self, self.settings, self._main)
        self._absent: set[str] = set()

    # -- the step -------------------------------------------------------------------------------------------------

    def step(self, batch: FairBatch, losses: Tensor) -> Tensor | None:
        """Descend the Lagrangian with one backward pass through the encoder, then raise or lower eta."""
        found = self._measure(batch)
        eta = self.dual.value.clone()
        if self.settings.weighing == "base":
            alpha, weights = None, self._with_base(losses, found, eta)
        else:
            grads = self._gradients(batch, losses, found)
            alpha, weights = self._descend(batch, losses, grads, eta)
        self._record(found, alpha)
        return weights

    def _measure(self, batch: FairBatch) -> Fairness:
        """Move the running sums; return psi, Phi, w* and the gradient of Phi to the outputs."""
        rule, lipschitz = self._constraint or self._make_constraint(batch), None
        if self.lipschitz is not None:
            scores, embedding = batch.score_matrix, batch.embedding
            lipschitz = self.lipschitz(scores.detach(), embedding.detach(), move=embedding.requires_grad).term
        with torch.no_grad():
            blocks, members = self._blocks(batch, rule)
            now = rule.sums(blocks, members)
            found, self.running = evaluate(rule, now, self.running, lipschitz)
            grads = rule.pull_back(blocks, members, found.to_sums)
        term = None
        if lipschitz is not None:
            value = lipschitz.attached(scores, embedding)
            term = found.w[-1].to(value.dtype) * value
        outputs = [batch.outputs[name] for name in self._main] if batch.matrices is None else []
        if batch.matrices is not None:
            roots = [batch.matrices.logits]
        elif isinstance(batch.outputs, Columns) and batch.outputs.names == tuple(self._main):
            roots, grads = [batch.outputs.matrix], [torch.cat([g.reshape(len(g), -1) for g in grads], 1)]
        else:
            roots = outputs
        sizes = tuple(1 if z.dim() == 1 else z.shape[1] for z in outputs) or (1,) * len(self._main)
        return Fairness(found, [g.reshape(z.shape) for g, z in zip(grads, roots, strict=True)], roots, sizes, term)

    def _gradients(self, batch: FairBatch, losses: Tensor, found: Fairness) -> Gradients:
        """Return the gradient of each task's loss to its output; written out where all are plain cross-entropies."""
        if batch.matrices is None:
            observed = torch.stack([batch.observed[name].any() for name in self._main])
        else:
            observed = batch.matrices.labelled > 0
        if batch.matrices is not None and batch.standard_losses:
            with torch.no_grad():
                grads = [batch.matrices.loss_gradient(batch.score_matrix.detach().T)]
        else:
            main = losses if self._rows is None else losses.index_select(0, self._rows)
            keep = self._rows is not None  # the losses of further tasks were stacked with these
            each = torch.autograd.grad(main.sum(), found.roots, allow_unused=True, retain_graph=keep)
            grads = [torch.zeros_like(z) if g is None else g for z, g in zip(found.roots, each, strict=True)]
        return Gradients(found.roots, found.sizes, grads, found.grads, observed, found.term)

    def _descend(self, batch: FairBatch, losses: Tensor, grads: Gradients, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the gradient of the Lagrangian and of the auxiliary tasks' losses; return alpha and all tasks' weights."""
        alpha = self._alpha(batch, grads, eta)
        with torch.no_grad():
            count = grads.observed.sum().to(alpha.dtype)
            weights, strength = alpha * count, eta * count
            shares = grads.spread(weights)
            each = zip(grads.losses, grads.fairness, shares, strict=True)
            total = [torch.addcmul(g * share, f, strength.to(g.dtype)) for g, f, share in each]
        further = [] if self._rows is None else [losses.index_select(0, self._others).sum()]
        extra = []
        if grads.term is not None:
            term = strength.to(grads.term.dtype) * grads.term
            extra = extra_gradients(self, term) if self.rep_grad else []
            further += [] if self.rep_grad else [term]
        torch.autograd.backward([*grads.roots, *further], [*total, *map(torch.ones_like, further)])
        carry_representation_gradients(self)
        add_gradients(extra)
        if self._rows is not None:
            weights = torch.ones_like(losses).index_copy(0, self._rows, weights.to(losses.dtype))
        return alpha, weights

    def _with_base(self, losses: Tensor, found: Fairness, eta: Tensor) -> Tensor | None:
        """Let the base weighting balance the losses, and add the gradient of T eta Phi."""
        strength = eta * len(self._main)
        roots, grads = list(found.roots), [strength.to(g.dtype) * g for g in found.grads]
        if found.term is not None:
            roots.append(found.term)
            grads.append(strength.to(found.term.dtype))
        extra = extra_gradients(self, roots, grads)
        weights = self.base_backward(losses)
        add_gradients(extra)
        return weights

    def _record(self, fairness: Fairness, alpha: Tensor | None) -> None:
        assert self.presence is not None
        found = fairness.found
        psi, w, present = torch.where(found.present, found.psi, torch.nan), found.w, found.present
        trace = {"phi": found.phi, "eta": self.dual.update(found.phi, present.any())}
        if self.lipschitz is not None:
            tasks = len(self._main)
            trace |= {"psi/lipschitz": psi[-1], "w/lipschitz": w[-1]}
            psi, w, present = psi[:tasks], w[:tasks], present[:tasks]
        self.presence.add_(present)
        traces = {"psi": psi, "w": w} | ({} if alpha is None else {"alpha": alpha})
        if self._rows is not None:
            traces = {f"{key}/{name}": v[t] for key, v in traces.items() for t, name in enumerate(self._main)}
        self.trace = trace | traces

    # -- what a batch gives the constraint -------------------------------------------------------------------------

    def _make_constraint(self, batch: FairBatch) -> Constraint:
        tasks = [batch.task(name) for name in self._main]
        for name in self.settings.attributes or ():
            if name not in batch.n_groups:
                raise RecipeError(f"FairMT: {unknown('attribute', name, batch.n_groups)}")
        n_groups = {name: batch.n_groups[name] for name in self.settings.attributes or batch.n_groups}
        widths = [_width(task, batch.outputs[task.name]) for task in tasks]
        blocks = [[t] for t in range(len(tasks))] if batch.multi_input else [list(range(len(tasks)))]
        self._constraint = Constraint(self.settings, tasks, widths, n_groups, blocks, self.device)
        if self.presence is None:
            self.presence = torch.zeros(len(tasks), device=self.device)
        return self._constraint

    def _blocks(self, batch: FairBatch, rule: Constraint) -> tuple[list[BinaryColumns | MixedColumns], list[Tensor]]:
        blocks: list[BinaryColumns | MixedColumns] = []
        members = [rule.membership(batch.task_groups(self._main[block[0]])) for block in rule.blocks]
        if batch.matrices is not None:
            return [BinaryColumns(batch.matrices.logits.detach(), batch.matrices.labels, rule.sharpness)], members
        for block in rule.blocks:
            names = [self._main[t] for t in block]
            values, labels = [batch.outputs[name] for name in names], [batch.labels[name] for name in names]
            blocks.append(MixedColumns(rule, [rule.tasks[t] for t in block], values, labels))
        return blocks, members

    def after_epoch(self, trainer: TrainingState, epoch: int) -> None:
        """Say once which tasks had no two groups to compare in any step of an epoch."""
        parent = getattr(super(), "after_epoch", None)
        if parent is not None:
            parent(trainer, epoch)
        if self.presence is None:
            return
        seen = (self.presence > 0).tolist()
        self.presence.zero_()
        absent = [name for name, here in zip(self._main, seen, strict=True) if not here and name not in self._absent]
        if absent:
            self._absent.update(absent)
            warnings.warn(
                f"FairMT: no step of epoch {epoch} had two groups of at least {self.settings.min_count:g} labelled examples "
                f"for {', '.join(absent)}; fairness of these tasks was not trained",
                stacklevel=2,
            )


def _width(task: Task, output: Tensor) -> int:
    """Return the number of classification columns of a task, 0 for regression."""
    if isinstance(task, Regression):
        return 0
    probabilities = task.probabilities(output.detach())
    return 1 if probabilities.dim() == 1 else probabilities.shape[1]
