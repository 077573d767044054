"""FairMT: task losses under one fairness constraint over heterogeneous, partly labelled tasks, by a primal-dual method."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import Columns, FairBatch, Matrices
from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.libmtl.gradients import add_gradients, carry_representation_gradients, extra_gradients
from libmtl_fair.methods.base import FairWeighting, Settings
from libmtl_fair.methods.fairmt import host
from libmtl_fair.methods.fairmt.blocks import BinaryBlock, Block, MixedBlock
from libmtl_fair.methods.fairmt.proxies import Outputs
from libmtl_fair.methods.fairmt.rates import Layout, disparity
from libmtl_fair.methods.fairmt.settings import FairMTSettings
from libmtl_fair.methods.fairmt.task_weights import Fairness, TaskWeights
from libmtl_fair.methods.relif import LipschitzScales
from libmtl_fair.tasks import AUXILIARY_PREFIX, Regression, Task, with_nan

__all__ = ["FairMT", "FairMTSettings"]


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
        self._layout: Layout | None = None
        self._main = [name for name in self.task_name if not name.startswith(AUXILIARY_PREFIX)]
        self._rows: Tensor | None = None  # of the main tasks, where there are others
        if len(self._main) < len(self.task_name):
            is_main = torch.tensor([name in self._main for name in self.task_name], device=self.device)
            self._rows, self._others = is_main.nonzero().squeeze(1), (~is_main).nonzero().squeeze(1)
        self._alpha = TaskWeights(self, self.settings, self._main)
        self._absent: set[str] = set()

    # -- the step -------------------------------------------------------------------------------------------------

    def step(self, batch: FairBatch, losses: Tensor) -> Any:
        """Descend the Lagrangian with one backward pass through the encoder, then raise or lower eta."""
        parts = batch.outputs
        whole = parts.matrix if isinstance(parts, Columns) and parts.names == tuple(self._main) else None
        outputs = Outputs([parts[name] for name in self._main], batch.matrices, whole)
        lipschitz = self._lipschitz(batch)
        with torch.no_grad():
            fairness = self.fairness(batch, outputs, lipschitz)
        eta = self.dual.value.clone()
        if self.settings.weighing == "base":
            alpha, weights = None, self._with_base(losses, outputs, fairness, eta)
        else:
            main = losses if self._rows is None else losses.index_select(0, self._rows)
            grads = self._loss_gradients(batch, outputs, main, fairness)
            others = None if self._rows is None else losses.index_select(0, self._others).sum()
            alpha, weights = self._descend(batch, outputs, grads, fairness, eta, others)
        self._record(fairness, alpha)
        return weights

    def _lipschitz(self, batch: FairBatch) -> tuple[Tensor, Tensor] | None:
        """Return ReLiF's term, attached to the graph, and whether it has a pair; None without it."""
        if self.lipschitz is None:
            return None
        scores, embedding = batch.score_matrix, batch.embedding
        term = self.lipschitz(scores, embedding, move=embedding.requires_grad).term
        return F.written(term.value, (scores, term.to_scores), (embedding, term.to_embeddings)), (
            torch.ones_like(term.rate, dtype=torch.bool) if term.some is None else term.some
        )

    def fairness(self, batch: FairBatch, outputs: Outputs, lipschitz: tuple[Tensor, Tensor] | None = None) -> Fairness:
        """Move the running sums; return psi, Phi, w* and the gradient of Phi to each of ``outputs.tensors``."""
        s = self.settings
        layout = self._layout or self._make_layout(batch)
        blocks, members = self._blocks(batch, outputs, layout)
        now = _group_sums(layout, blocks, members)
        if self.running is None or not s.ema:
            self.running = now
        else:
            torch.add(now, self.running, alpha=s.ema, out=self.running)
        sums, counts = self.running[:, : layout.n_summed], self.running[:, layout.n_summed :]
        divisor = counts if s.ema_gradient == "decayed" else now[:, layout.n_summed :]
        if lipschitz is None and host.fits(layout, sums):
            psi, present, phi, w, slope = host.constraint(layout, sums, counts, divisor, s.mu, s.solver)
            term = None
        else:
            found = disparity(layout, sums, counts)
            psi, present = found.psi, found.present
            if lipschitz is not None:
                psi = torch.cat([psi, lipschitz[0].detach().to(psi.dtype).unsqueeze(0)])
                present = torch.cat([present, lipschitz[1].unsqueeze(0)])
            phi, w = F.aggregate_disparities(psi, s.mu, present, s.solver)
            slope = found.slope(w[: len(self._main)], divisor)
            term = None if lipschitz is None else (w[-1], lipschitz[0])
        grads = self._pull_back(layout, blocks, members, slope, outputs)
        return Fairness(psi, present, phi, w, grads, term, self._observed(batch, blocks), blocks)

    def _loss_gradients(self, batch: FairBatch, outputs: Outputs, losses: Tensor, fairness: Fairness) -> list[Tensor]:
        """Return the gradient of each task's loss to its output; written out where all are plain cross-entropies."""
        block = fairness.blocks[0]
        if batch.standard_losses and outputs.joined and isinstance(block, BinaryBlock):
            with torch.no_grad():
                return [block.loss_gradient()]
        return outputs.gradients(losses, keep=self._rows is not None)

    def _descend(
        self,
        batch: FairBatch,
        outputs: Outputs,
        grads: list[Tensor],
        fairness: Fairness,
        eta: Tensor,
        others: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Leave the gradient of the Lagrangian and of the auxiliary tasks' losses; return alpha and all tasks' weights."""
        alpha = self._alpha(batch, outputs, grads, fairness, eta)
        with torch.no_grad():
            count = fairness.observed.sum().to(alpha.dtype)
            weights, strength = alpha * count, eta * count
            total = self._combine(outputs, grads, fairness.grads, weights, strength)
        term = fairness.lipschitz(strength)
        extra = extra_gradients(self, term) if term is not None and self.rep_grad else []
        further = [t for t in (others, None if self.rep_grad else term) if t is not None]
        torch.autograd.backward([*outputs.tensors, *further], [*total, *map(torch.ones_like, further)])
        carry_representation_gradients(self)
        add_gradients(extra)
        if self._rows is not None:
            weights = torch.ones_like(batch.losses).index_copy(0, self._rows, weights.to(batch.losses.dtype))
        return alpha, weights

    def _combine(
        self, outputs: Outputs, grads: list[Tensor], fairness: list[Tensor], weights: Tensor, strength: Tensor
    ) -> list[Tensor]:
        """Return weights . grads + strength * fairness for each of ``outputs.tensors``."""
        if outputs.joined:
            index = self._alpha.column_task(outputs.widths)
            per_column = weights if index is None else weights[index]
            return [torch.addcmul(grads[0] * per_column, fairness[0], strength)]
        return [weights[t] * g + strength * f for t, (g, f) in enumerate(zip(grads, fairness, strict=True))]

    def _with_base(self, losses: Tensor, outputs: Outputs, fairness: Fairness, eta: Tensor) -> Any:
        """Let the base weighting balance the losses, and add the gradient of T eta Phi."""
        strength = eta * len(self._main)
        pairs = zip(outputs.tensors, fairness.grads, strict=True)
        terms = [(z * (strength * g)).sum() for z, g in pairs]
        term = fairness.lipschitz(strength)
        extra = extra_gradients(self, torch.stack([*terms, *([] if term is None else [term])]).sum())
        weights = self.base_backward(losses)
        add_gradients(extra)
        return weights

    def _record(self, fairness: Fairness, alpha: Tensor | None) -> None:
        assert self.presence is not None
        psi, w, present = torch.where(fairness.present, fairness.psi, torch.nan), fairness.w, fairness.present
        trace = {"phi": fairness.phi, "eta": self.dual.update(fairness.phi, present.any())}
        if self.lipschitz is not None:
            tasks = len(self._main)
            trace |= {"psi/lipschitz": psi[-1], "w/lipschitz": w[-1]}
            psi, w, present = psi[:tasks], w[:tasks], present[:tasks]
        self.presence.add_(present)
        traces = {"psi": psi, "w": w} | ({} if alpha is None else {"alpha": alpha})
        if self._rows is not None:
            traces = {f"{key}/{name}": v[t] for key, v in traces.items() for t, name in enumerate(self._main)}
        self.trace = trace | traces

    # -- from batches to sums and back ----------------------------------------------------------------------------

    def _make_layout(self, batch: FairBatch) -> Layout:
        tasks = [batch.task(name) for name in self._main]
        self._attributes = self._chosen_attributes(batch)
        counts = [batch.n_groups[name] for name in self._attributes]
        self._crossed = counts if self.settings.intersectional and len(counts) > 1 else []
        total = [torch.Size(self._crossed).numel()] if self._crossed else counts
        widths = [_width(task, batch.outputs[task.name]) for task in tasks]
        blocks = [[t] for t in range(len(tasks))] if batch.multi_input else [list(range(len(tasks)))]
        self._layout = Layout(tasks, widths, total, blocks, self.settings.lift(), self.device)
        if self.presence is None:
            self.presence = torch.zeros(len(tasks), device=self.device)
        return self._layout

    def _chosen_attributes(self, batch: FairBatch) -> list[str]:
        for name in self.settings.attributes or ():
            if name not in batch.n_groups:
                raise RecipeError(f"FairMT: {unknown('attribute', name, batch.n_groups)}")
        return list(self.settings.attributes or batch.n_groups)

    def _blocks(self, batch: FairBatch, outputs: Outputs, layout: Layout) -> tuple[list[Block], list[Tensor]]:
        blocks: list[Block] = []
        members = []
        names = self._main
        for index in layout.blocks:
            tasks = [layout.tasks[t] for t in index]
            values = [outputs.outputs[t] for t in index]
            groups = batch.task_groups(names[index[0]])
            members.append(layout.membership(groups, self._attributes, self._crossed))
            if layout.single_logits and outputs.single:
                matrices = outputs.matrices
                if matrices is None:
                    joint = (
                        outputs.tensors[0] if outputs.joined else torch.cat([z.reshape(len(z), 1) for z in values], 1)
                    )
                    truth = torch.stack([with_nan(batch.labels[names[t]]) for t in index], 1)
                    matrices = Matrices(joint, truth, (truth - truth).eq_(0).sum(0))
                blocks.append(BinaryBlock(matrices, layout.lift.sharpness))
            else:
                labels = [batch.labels[names[t]] for t in index]
                blocks.append(MixedBlock(tasks, values, labels, layout.lift, layout.owner.dtype))
        return blocks, members

    def _pull_back(
        self, layout: Layout, blocks: list[Block], members: list[Tensor], slope: Tensor, outputs: Outputs
    ) -> list[Tensor]:
        """Return the gradient to each of ``outputs.tensors`` from that to the sums [A * G, M]."""
        parts: list[Tensor] = []
        for b, (block, member) in enumerate(zip(blocks, members, strict=True)):
            columns = slope if layout.order is None else slope[:, layout.columns[b]]
            found = block.pull_back(member @ columns)
            if isinstance(block, BinaryBlock) and not outputs.joined:
                found = list(torch.split(found[0], 1, 1))
            parts += found
        if outputs.joined:
            return [parts[0] if len(parts) == 1 else torch.cat(parts, 1)]
        return [g.reshape(z.shape) for g, z in zip(parts, outputs.tensors, strict=True)]

    def _observed(self, batch: FairBatch, blocks: list[Block]) -> Tensor:
        """Return which tasks have a label in this batch: bool [T]."""
        if len(blocks) == 1 and isinstance(blocks[0], BinaryBlock):
            return blocks[0].labelled > 0
        return torch.stack([batch.observed[name].any() for name in self._main])

    def after_epoch(self, trainer: Any, epoch: int) -> None:
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


def _group_sums(layout: Layout, blocks: list[Block], members: list[Tensor]) -> Tensor:
    """Return sums and counts by group of all blocks, [A * G, 2M]."""
    parts = [member.T @ block.summed for block, member in zip(blocks, members, strict=True)]
    if len(parts) == 1:
        return parts[0]
    assert layout.order is not None
    halves = [part.view(len(part), 2, -1) for part in parts]
    return torch.cat(halves, 2)[:, :, layout.order].flatten(1)
