"""FairMT: task losses under fairness constraints over heterogeneous, partly labelled tasks, by primal-dual methods."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import Columns, FairBatch
from libmtl_fair.errors import CheckpointError, HostError, RecipeError, unknown
from libmtl_fair.functional._device import at_least, library, on_host
from libmtl_fair.libmtl.gradients import added, carry_representation_gradients
from libmtl_fair.libmtl.state import StepState
from libmtl_fair.methods.base import Penalty, Settings, Written
from libmtl_fair.methods.controllers import Pace, ShareController
from libmtl_fair.methods.fairmt.constraint import BinaryColumns, Constraint, MixedColumns, OutputColumns, evaluate
from libmtl_fair.methods.fairmt.duals import Duals, Found
from libmtl_fair.methods.fairmt.pursuit import FASTEST, SLOTS, Window, between_moves, decay_of, pursue
from libmtl_fair.methods.fairmt.settings import DEFAULT_TARGET, UNDECIDED, FairMTSettings
from libmtl_fair.methods.fairmt.task_weights import Gradients, TaskWeights, uniform
from libmtl_fair.methods.near_pairs import PRICE, REFERENCE, near_term
from libmtl_fair.methods.relif import LipschitzScales
from libmtl_fair.methods.targets import Target
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import AUXILIARY_PREFIX, Binary, Multilabel, Task

__all__ = ["FairMT", "FairMTSettings"]
_LOG = logging.getLogger(__name__)
SHORT = 100
"""Steps under which a multiplier at its bound says little: no warning then, unless it stayed there for nothing."""


@dataclass
class Fairness:
    """What fairness asks of a step: its gradient to each root (unscaled), its term, and its strength beside the losses (None: 1)."""

    grads: list[Tensor]
    roots: list[Tensor]
    sizes: tuple[int, ...]
    term: Tensor | None
    strength: Tensor | None


class FairMT(Penalty):
    r"""Task losses under fairness constraints over tasks of any kind, some of them unlabelled in places.

    ``form="constraints"`` (ours, the default): minimises :math:`\sum_t L_t` while, for every binary task and attribute, the
    difference of decisions between groups is at most what ``target`` says, by a multiplier of its own (METHODS.md, 2.5). The first
    epoch is plain. Records each step ``eta``, ``gap`` (of decisions, over the last epoch) and ``psi`` (smooth) of each
    constraint; :meth:`constraint_rows` says what was met.

    ``form="phi"`` (the source's): minimises :math:`\sum_t \alpha_t L_t` subject to :math:`\Phi \le \epsilon`, where :math:`\Phi` is
    the smoothed worst case of the tasks' asymmetric disparities (only groups worse than the best are moved). A step descends
    :math:`T (\sum_t \alpha_t L_t + \eta \Phi)`; then :math:`\eta \leftarrow \mathrm{clip}(\eta + \rho (\Phi - \epsilon))`. The
    factor T, the number of tasks with a label in the batch, is ours: with uniform alpha a step without a violated
    constraint is equal weighting's, at its learning rate. Records each step ``psi/<task>`` and ``w/<task>`` (NaN and 0 where
    absent), ``alpha/<task>`` (sums to 1), ``phi``, and ``eta`` after the dual update, which the next step uses.

    Auxiliary fairness tasks are in neither sum: their losses are added as they are (ours). Source: arXiv:2512.00469; what is
    ours is marked in the settings.
    """

    settings_class = FairMTSettings
    needs_known_kinds = True
    source = "arXiv:2512.00469"
    cost = "1.5 to 1.9 plain steps of a small network (docs/RESULTS.md)"
    needs_groups = True
    settings: FairMTSettings
    lipschitz: LipschitzScales | None
    near: ShareController | None
    running: Tensor | None = None
    presence: Tensor | None = None
    ring: Tensor | None = None
    recent: Tensor | None = None
    multipliers: Tensor | None = None
    strength: Tensor | None = None
    enough: Tensor | None = None
    lipschitz_state: Tensor | None = None
    cut: Tensor | None = None
    farther: Tensor | None = None
    decay: float = 0.0
    moved: int = 0
    past_steps: int = 0
    early_steps: int = 0
    epoch_length: int = 0
    _now: Pace = Pace(True, 0.0)

    def configure(self, settings: Settings) -> None:
        """Make the dual variable of the form phi; those of the constraints wait for the data."""
        super().configure(settings)
        self.dual = self.settings.dual()
        self.lipschitz = LipschitzScales(self.settings.relif()) if self.settings.lipschitz else None
        share = self.settings.near
        self.near = None if share is None else ShareController(share, initial=PRICE)
        self.needs_reference = share is not None
        self.to(self.device)
        self._constraint: Constraint | None = None
        self._duals: Duals | None = None
        self._main = [name for name in self.task_name if not name.startswith(AUXILIARY_PREFIX)]
        self._rows: Tensor | None = None  # of the main tasks, where there are others
        if len(self._main) < len(self.task_name):
            is_main = torch.tensor([name in self._main for name in self.task_name], device=self.device)
            self._rows, self._others = is_main.nonzero().squeeze(1), (~is_main).nonzero().squeeze(1)
        self.losses_from_outputs = self.settings.weighing == "proxy"
        self.needs_representation = self.losses_from_outputs or self.settings.lipschitz
        self._alpha = TaskWeights(self, self.settings, self._main)
        self._absent: set[str] = set()
        self._away: set[tuple[str, str]] = set()

    # -- the step -------------------------------------------------------------------------------------------------

    def step(self, batch: FairBatch, losses: Tensor) -> Tensor | None:
        """Descend with one backward pass through the encoder; the multipliers have moved."""
        if self.settings.weighing != "proxy":
            return super().step(batch, losses)
        return self._descend(batch, losses, self._fairness(batch))

    def penalty(self, batch: FairBatch) -> Written:
        """Return what fairness asks of the step, beside the sum of the losses or what the base makes of them."""
        found = self._fairness(batch)
        pairs = list(zip(found.roots, found.grads))
        if found.term is not None:
            pairs.append((found.term, torch.ones_like(found.term)))
        if found.strength is not None:
            pairs = [(root, g * found.strength.to(g.dtype)) for root, g in pairs]
        if self.near is not None:
            pairs += self._near(batch, self.near)
        if self.settings.form == "phi" and self.settings.weighing == "uniform":
            self._trace("alpha", uniform(self._observed(batch), torch.get_default_dtype()))
        return Written(pairs)

    def _observed(self, batch: FairBatch) -> Tensor:
        """Return which main tasks have a label in this batch, bool [T]."""
        if batch.matrices is not None:
            return batch.matrices.labelled > 0
        return torch.stack([batch.observed[name].any() for name in self._main])

    def _fairness(self, batch: FairBatch) -> Fairness:
        lipschitz, term = None, None
        if self.lipschitz is not None:
            scores, embedding = batch.score_matrix, batch.embedding
            lipschitz = self.lipschitz(scores.detach(), embedding.detach(), move=embedding.requires_grad).term
        tasks = [batch.task(name) for name in self._main] if self._constraint is None else []
        rule = self._constraint
        if rule is None:
            dtype = reduce(torch.promote_types, [z.dtype for z in batch.outputs.values()], torch.float32)
            rule = self._lay_out(tasks, batch.n_groups, batch.multi_input, dtype)
        strength = None
        with torch.no_grad():
            if self.settings.form == "phi":
                grads, share, eta = self._phi(batch, rule, lipschitz)
                strength = eta * self._observed(batch).sum()
            else:
                grads, share = self._constraints(batch, rule, lipschitz)
        if lipschitz is not None:
            value = lipschitz.attached(scores, embedding)
            term = share.to(value.dtype) * value
        outputs = [batch.outputs[name] for name in self._main] if batch.matrices is None else []
        sizes = tuple(1 if z.dim() == 1 else z.shape[1] for z in outputs) or (1,) * len(self._main)
        if batch.matrices is not None:
            roots = [batch.matrices.logits]
        elif isinstance(batch.outputs, Columns) and batch.outputs.names == tuple(self._main):
            roots, grads = [batch.outputs.matrix], [torch.cat([g.reshape(len(g), -1) for g in grads], 1)]
        else:
            roots = outputs
        grads = [g.reshape(z.shape).to(z.dtype) for g, z in zip(grads, roots, strict=True)]
        return Fairness(grads, roots, sizes, term, strength)

    # -- the source's form -----------------------------------------------------------------------------------------

    def _phi(
        self, batch: FairBatch, rule: Constraint, lipschitz: F.LipschitzTerm | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Move the running sums and eta; return the gradient of Phi to the outputs, w* of the Lipschitz term, and eta before."""
        blocks, members = self._blocks(batch, rule)
        found, self.running = evaluate(rule, rule.sums(blocks, members), self.running, lipschitz)
        eta = self.dual.value.clone()
        psi, w, present = torch.where(found.present, found.psi, torch.nan), found.w, found.present
        self.trace = {"phi": found.phi, "eta": self.dual.update(found.phi, present.any())}
        if lipschitz is not None:
            tasks = len(self._main)
            self.trace |= {"psi/lipschitz": psi[-1], "w/lipschitz": w[-1]}
            psi, w, present = psi[:tasks], w[:tasks], present[:tasks]
        self._note_presence(present)
        self._trace("psi", psi)
        self._trace("w", w)
        return rule.pull_back(blocks, members, found.to_sums), found.w[-1], eta

    def _note_presence(self, present: Tensor) -> None:
        self.presence = present.to(torch.float32) if self.presence is None else self.presence + present

    def _trace(self, name: str, values: Tensor) -> None:
        """Note a number a main task."""
        if self._rows is None:
            self.trace = {**self.trace, name: values}
        else:
            self.trace = {**self.trace, **{f"{name}/{task}": values[t] for t, task in enumerate(self._main)}}

    # -- constraints of their own ----------------------------------------------------------------------------------

    def _constraints(
        self, batch: FairBatch, rule: Constraint, lipschitz: F.LipschitzTerm | None
    ) -> tuple[list[Tensor], Tensor]:
        """Move sums and multipliers; return the gradient of all constraints to the main tasks' outputs, and the term's strength."""
        duals = self._duals
        assert duals is not None
        pace, length = self._pace(batch)
        if not self.past_steps:
            rows = len(next(iter(batch.outputs.values())))
            self.decay = decay_of(rows, batch.epoch_steps) if self.settings.ema is None else self.settings.ema
        noted = {"_now": pace, "past_steps": self.past_steps + 1}
        if not pace.settled:
            noted["early_steps"] = self.early_steps + 1
        self.__dict__.update(noted)  # as everywhere in a step: nn.Module's own way takes as long as an operation
        blocks, members = self._blocks(batch, rule)
        now, half = rule.sums(blocks, members), 2 * rule.n_rates
        if self.running is None or self.multipliers is None:
            self.running, self.multipliers = torch.zeros_like(now[..., : 2 * half]), duals.start()
        if not duals.fits(self.multipliers):
            raise CheckpointError(
                "FairMT: the checkpoint has constraints of an earlier version, or of another threshold, which cannot go on: train anew"
            )
        ring, recent = Window.rolled(self.ring, self.recent, now[..., half:], self.past_steps - 1, length)
        self.__dict__.update(ring=ring, recent=recent)
        found, every = None, between_moves(length)
        if pace.warm or not self.moved or self.past_steps % every == 0:
            found = duals.update(self.multipliers, recent, pace.each(every, FASTEST))
            used = found.strength
            strength = torch.zeros_like(self.multipliers[0]) if used is None else torch.as_tensor(used)
            self.__dict__.update(strength=strength, enough=torch.as_tensor(found.enough), moved=int(not pace.warm))
        assert self.strength is not None
        assert self.enough is not None
        if self.cut is not None:
            self._move_cuts(blocks, found)
        running, new = on_host(self.running), on_host(now)[..., : 2 * half]
        running *= self.decay
        running += new
        rates, counts = rule.rates(running[..., :half], running[..., half:])
        psi, there, slope = rule.lifted(rates, counts * on_host(self.enough), 0.0)
        if found is not None:
            self._record(duals, found, psi, there)
        individual = self._individual(lipschitz, pace, length)
        if pace.warm:
            return [torch.zeros_like(z) for z in self._targets_of(batch)], individual
        divisor = counts
        if self.settings.ema_gradient == "true":
            divisor = counts * ((1 - self.decay) / (1 - self.decay**self.past_steps))
        elif self.settings.ema_gradient == "batch":
            divisor = rule.rates(new[..., :half], new[..., half:])[1]
        to_sums = torch.as_tensor(duals.to_sums(slope, on_host(self.strength), divisor)).to(now.dtype)
        grads = rule.pull_back(blocks, members, to_sums)
        if batch.matrices is not None:
            return grads, individual
        own = iter(grads)
        return [next(own) if n in self._limited else torch.zeros_like(batch.outputs[n]) for n in self._main], individual

    def _cuts(
        self, duals: Duals, logits: Tensor, at: list[int] | None = None
    ) -> tuple[Tensor | None, list[Tensor | float]]:
        """Return the threshold [K] that smooth rates are of, and those that decide; ``at`` are the columns of the logits [B, K]."""
        if self.cut is None and "base_rate" in duals.cuts:
            self.cut = logits.new_zeros(duals.rule.n_rates, dtype=duals.rule.dtype)
            self.farther = torch.zeros_like(self.cut)
        if self.cut is None or self.farther is None:
            return None, [0.0]
        cut, farther = (x if at is None else x[at] for x in (self.cut, self.farther))
        return cut * farther, [0.0 if name == "half" else cut for name in duals.cuts]

    def _move_cuts(self, blocks: Sequence[BinaryColumns | MixedColumns], found: Found | None) -> None:
        """Move the running thresholds [K] towards those that choose as many as are positive, and note which are farther from the target.

        A step is that of Newton for logistic logits of the batch's spread, at most one spread, and three tenths of it where batches
        are large (more where an epoch has few).
        """
        assert self.cut is not None
        assert self.farther is not None
        assert self._duals is not None
        each = [block.people() for block in blocks if isinstance(block, BinaryColumns)]
        people, spread = (on_host(torch.cat(x, -1) if len(x) > 1 else x[0]) for x in zip(*each))
        positive, known = people[2], at_least(people[2] + people[3], 1)
        base = (positive / known).clip(0.5 / known, 1 - 0.5 / known)
        more = (people[-1] - people[-2]) / known  # chosen, less positive
        step = spread**0.5 * (more / (1.8 * base * (1 - base))).clip(-1, 1)
        cut, farther = on_host(self.cut), on_host(self.farther)
        cut += max(3 * (1 - self.decay), 1 / self.past_steps) * step
        if found is not None:
            farther[...] = 1.0 if len(self._duals.cuts) == 1 else found.farther

    def _targets_of(self, batch: FairBatch) -> list[Tensor]:
        return [batch.matrices.logits] if batch.matrices else [batch.outputs[name] for name in self._main]

    def _pace(self, batch: FairBatch) -> tuple[Pace, int]:
        """Return where the training is, and the steps of the window of decisions."""
        epochs = int(getattr(self, "epochs", 0) or 0)
        if batch.epoch_steps is None and batch.epoch == 0:  # a loader that does not say: its first epoch does
            if epochs == 1:
                raise HostError(
                    "FairMT: with one epoch the training loader must say how many batches it has (__len__), so that a part of "
                    "them can be plain; or give train(steps_per_epoch=...)"
                )
            self.epoch_length += 1
            return Pace(True, 0.0, False, SLOTS), SLOTS
        length = batch.epoch_steps or self.epoch_length
        total = max(epochs * length, self.past_steps + 1)
        return Pace.of(self.past_steps, length, total, FASTEST), length

    def _individual(self, lipschitz: F.LipschitzTerm | None, pace: Pace, length: int) -> Tensor:
        """Return the strength of ReLiF's term: a constraint of its own, on its mean over about an epoch."""
        if lipschitz is None:
            return torch.zeros((), device=self.device)
        value, first = lipschitz.value.double(), self.lipschitz_state is None
        if self.lipschitz_state is None:
            self.lipschitz_state = torch.stack([torch.full_like(value, 0.05).log(), value, value])
        log_eta, level, mean = self.lipschitz_state
        mean += (value - mean) / (1 if first else length)
        target, s = Target.read(self.settings.target or DEFAULT_TARGET), self.settings
        used = torch.zeros_like(value)
        if pace.warm:
            level.copy_(mean)
        else:
            asked = (target.bound * level).clamp(min=s.floor) if target.relative else target.bound
            error = (mean / (s.aim * asked) - 1).clamp(-1, 1)
            used = pursue(log_eta, torch.where(torch.isfinite(mean), error, 0.0), pace.gain, 1e-4, 1.0)
        self.trace = {**self.trace, "eta/lipschitz": log_eta.exp(), "psi/lipschitz": value}
        return used * math.log(2)

    def _near(self, batch: FairBatch, multiplier: ShareController) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the gradient of near people's gaps as one more constraint, on their mean beside plain training's."""
        if batch.reference is None:
            raise HostError(f"FairMT: near needs reference features, by which people are alike: {REFERENCE}")
        term, trace = near_term(batch, None, partial(multiplier.update, pace=self._now))
        self.trace = {**self.trace, **trace}
        return term.pairs

    def _record(self, duals: Duals, found: Found, psi: Any, there: Any) -> None:
        assert self.multipliers is not None
        xp, k = library(psi), duals.rule.n_rates
        if self.presence is None:
            self.presence = torch.zeros_like(self.multipliers[0], dtype=torch.float32)
        presence = on_host(self.presence)
        presence += found.present
        values = {
            "eta": xp.exp(on_host(self.multipliers)[0]),
            "gap": xp.where(found.present, found.gap, xp.nan),
            "psi": xp.where(there[..., :k] | there[..., k:], psi[..., :k] + psi[..., k:], xp.nan),
            "out_of_reach": found.unmet * 1.0,  # a copy
        }
        tensor = torch.from_numpy if xp is np else torch.flatten
        trace = {name: tensor(value.reshape(-1)) for name, value in values.items()}
        self.__dict__.update(trace=trace, trace_labels=duals.traced)

    # -- task weights ----------------------------------------------------------------------------------------------

    def _gradients(self, batch: FairBatch, losses: Tensor, found: Fairness) -> Gradients:
        """Return the gradient of each task's loss to its output; written out where all are plain cross-entropies."""
        if batch.matrices is not None and batch.standard_losses:
            with torch.no_grad():
                grads = [batch.matrices.loss_gradient(batch.score_matrix.detach().T)]
        elif batch.share is not None and batch.share.made_apart:
            grads = batch.share.gradients(losses if self._rows is None else losses[self._rows], self._main)
        else:
            main = losses if self._rows is None else losses.index_select(0, self._rows)
            keep = self._rows is not None  # the losses of further tasks were stacked with these
            each = torch.autograd.grad(main.sum(), found.roots, allow_unused=True, retain_graph=keep)
            grads = [torch.zeros_like(z) if g is None else g for z, g in zip(found.roots, each, strict=True)]
        return Gradients(found.roots, found.sizes, grads, found.grads, self._observed(batch), found.term)

    def _descend(self, batch: FairBatch, losses: Tensor, found: Fairness) -> Tensor:
        """Leave the gradient of the Lagrangian and of the auxiliary tasks' losses; return all tasks' weights."""
        grads = self._gradients(batch, losses, found)
        with torch.no_grad():
            count = grads.observed.sum().to(losses.dtype).clamp(min=1)
            strength = (torch.ones_like(count) if found.strength is None else found.strength).to(losses.dtype)
        alpha = self._alpha(batch, grads, strength / count)
        with torch.no_grad():
            weights = alpha * count
            each = zip(grads.losses, grads.fairness, grads.spread(weights), strict=True)
            total = [torch.addcmul(g * share, f, strength.to(g.dtype)) for g, f, share in each]
        further = [] if self._rows is None else [losses.index_select(0, self._others).sum()]
        beside: AbstractContextManager[None] = nullcontext()
        if grads.term is not None:
            term = strength.to(grads.term.dtype) * grads.term
            if self.rep_grad:
                beside = added(self, term)
            else:
                further.append(term)
        with beside:
            torch.autograd.backward([*grads.roots, *further], [*total, *map(torch.ones_like, further)])
            carry_representation_gradients(self)
        self._trace("alpha", alpha)
        if self._rows is not None:
            weights = torch.ones_like(losses).index_copy(0, self._rows, weights.to(losses.dtype))
        return weights

    # -- what a batch gives the constraint -------------------------------------------------------------------------

    def _lay_out(
        self, tasks: Sequence[Task], n_groups: Mapping[str, int], multi_input: bool, dtype: torch.dtype | None = None
    ) -> Constraint:
        """Return the layout of columns, groups and targets of the main tasks."""
        s = self.settings
        for name in s.attributes or ():
            if name not in n_groups:
                raise RecipeError(f"FairMT: {unknown('attribute', name, n_groups)}")
        n_groups = {name: n_groups[name] for name in s.attributes or n_groups}
        tasks = [task for task in tasks if s.form == "phi" or isinstance(task, Binary | Multilabel)]
        self._limited = [task.name for task in tasks]
        if not tasks:
            raise HostError(f"FairMT: {UNDECIDED}")
        widths = [task.out_features if task.has_rates else 0 for task in tasks]
        blocks = [[t] for t in range(len(tasks))] if multi_input else [list(range(len(tasks)))]
        rule = self._constraint = Constraint(s, tasks, widths, n_groups, blocks, self.device, dtype)
        if s.form == "constraints":
            attributes = s.crossed(n_groups)
            columns = [task.name for task, width in zip(tasks, widths) for _ in range(width)]
            self._duals = Duals(rule, columns, attributes, s.constrained(tasks, attributes), self.device)
        return rule

    def _blocks(self, batch: FairBatch, rule: Constraint) -> tuple[list[BinaryColumns | MixedColumns], list[Tensor]]:
        members = [rule.membership(batch.task_groups(self._limited[block[0]])) for block in rule.blocks]
        if batch.matrices is not None:
            logits, labels = batch.matrices.logits.detach(), batch.matrices.labels
            how = self._cuts(self._duals, logits) if self._duals is not None else ()
            return [BinaryColumns(logits, labels, rule.sharpness, *how)], members
        blocks: list[BinaryColumns | MixedColumns] = []
        for block in rule.blocks:
            if self._duals is not None:
                blocks.append(self._output_columns(block, batch.outputs, batch.labels, rule))
                continue
            names = [self._limited[t] for t in block]
            values, labels_of = [batch.outputs[name] for name in names], [batch.labels[name] for name in names]
            blocks.append(MixedColumns(rule, [rule.tasks[t] for t in block], values, labels_of))
        return blocks, members

    def _output_columns(
        self, block: Sequence[int], outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], rule: Constraint
    ) -> OutputColumns:
        """Return the columns of some tasks, with their decisions."""
        tasks, duals = [rule.tasks[t] for t in block], self._duals
        assert duals is not None
        names, at = {task.name for task in tasks}, None
        if len(rule.blocks) > 1:
            at = [k for k, name in enumerate(duals.columns) if name in names]
        values = [outputs[task.name].detach() for task in tasks]
        how = self._cuts(duals, values[0], at)
        return OutputColumns(tasks, values, [labels[task.name] for task in tasks], rule.sharpness, *how)

    # -- what came of it -------------------------------------------------------------------------------------------

    def constraint_rows(self, **parts: Predictions) -> list[dict[str, Any]]:
        """Return a row a constraint: task, attribute, target, tolerance, plain level, eta, at its bound, and each part's outcome.

        ``train``, unless it is among the ``parts`` (``val=...``: predictions), is what was decided in the last epoch of training. A
        part has ``<part>`` (the difference of decisions, freed of chance; None where there are too few people),
        ``<part>_error``, ``<part>_met`` and ``<part>_selected`` (the share passed). Empty where nothing was constrained, and of a
        checkpoint of an earlier version.
        """
        if self.recent is None or self.multipliers is None:
            return []
        rule, sums = self._constraint, {"train": self.recent}
        if rule is None:  # of a checkpoint
            known = next(iter(parts.values()))
            tasks = [task for task in known.tasks if task.name in self._main]
            counts = {name: len(names) for name, names in known.group_names.items()}
            rule = self._lay_out(tasks, counts, self.multi_input)
        duals = self._duals
        assert duals is not None
        if not duals.fits(self.multipliers):
            return []  # of an earlier version
        with torch.no_grad():
            for part, found in parts.items():
                outputs, labels, groups = (
                    {k: v.to(self.device) for k, v in values.items()}
                    for values in (found.outputs, found.labels, found.groups)
                )
                if self.multi_input or any(name not in groups for name in rule.attributes):
                    continue  # no one table of people
                given = rule.tasks, [outputs[t.name] for t in rule.tasks], [labels[t.name] for t in rule.tasks], 1.0
                cut = base_cuts(OutputColumns(*given))
                columns = OutputColumns(*given, None, [0.0 if name == "half" else cut for name in duals.cuts])
                sums[part] = (rule.membership(groups).mT @ columns.table.to(rule.dtype))[:, columns.width :]
            return duals.rows(self.multipliers, **sums)

    def admits(self, predictions: Callable[[], Predictions]) -> bool:
        """Whether the model of now may be chosen for its utility: these decisions are allowed, and half of the training is over.

        Before that the multipliers have not had time, and a model that has learned little treats everybody alike. Allowed is half a
        standard error above the tolerance: the most useful of many epochs is one whose difference chance made look small.
        """
        if self.settings.form == "phi":
            return True
        early = self.past_steps <= self.early_steps
        rows = self.constraint_rows(val=predictions()) if not early else []
        kept = [row["val"] <= row["tolerance"] + row["val_error"] / 2 for row in rows if row.get("val") is not None]
        return not early and all(kept)

    def after_epoch(self, trainer: StepState, epoch: int) -> None:
        """Say once which tasks had no two groups to compare in any step of an epoch; at the end, what could not be met."""
        parent = getattr(super(), "after_epoch", None)
        if parent is not None:
            parent(trainer, epoch)
        if self.presence is None:
            return
        seen = (self.presence > 0).tolist()
        self.presence.zero_()
        names = self._duals.labels if self._duals else self._main
        flat = [x for row in seen for x in row] if self._duals else seen
        wanted = set(self._duals.wanted) if self._duals else set(names)
        absent = [n for n, here in zip(names, flat, strict=True) if not here and n in wanted and n not in self._absent]
        if absent:
            self._absent.update(absent)
            warnings.warn(
                f"FairMT: no step of epoch {epoch} had two groups of at least {self.settings.min_count:g} labelled examples "
                f"for {', '.join(absent)}; fairness of these tasks was not trained",
                stacklevel=2,
            )
        if self.multipliers is not None:
            self._say_unmet(epoch + 1 == int(getattr(self, "epochs", 0)))

    def _say_unmet(self, last: bool) -> None:
        """Log once which constraints are out of reach; at the end warn of those that were not met."""
        worst: dict[tuple[str, str], dict[str, Any]] = {}
        for row in sorted(self.constraint_rows(), key=lambda each: (each["train"] or 0.0) / each["tolerance"]):
            worst[row["task"], row["attribute"]] = row
        for key, row in worst.items():
            away, unmet = row["out_of_reach"], not row.get("train_met", True)
            found = f"{row['train'] or 0.0:.3f} of training decisions where {row['tolerance']:.3f} is tolerated"
            if last and unmet and row["at_bound"] and (away or self.past_steps >= SHORT):
                warnings.warn(
                    f"FairMT: {key[0]}, {key[1]}: {row['target']} was not met: {found}, with its multiplier at its bound. "
                    + (f"{row['said']}. " if away else "")
                    + "It cannot be met at the cost that the bound allows: ask for less, or train longer",
                    stacklevel=3,
                )
            elif away and key not in self._away:
                self._away.add(key)
                _LOG.warning("FairMT: %s, %s: %s is out of reach: %s. %s", *key, row["target"], found, row["said"])


def base_cuts(columns: BinaryColumns) -> Tensor:
    """Return the logits [K] from which on as many of those with a label are chosen as are positive; 0 without any."""
    known, positive = (columns.positive + columns.negative) > 0, columns.positive.sum(0)
    ordered = columns.logits.masked_fill(~known, torch.inf).sort(0).values
    count = known.sum(0)
    at = (count - positive).clamp(min=0).minimum((count - 1).clamp(min=0)).long()
    return torch.where(count > 0, ordered.gather(0, at.unsqueeze(0)).squeeze(0), 0.0)
