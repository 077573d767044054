"""M trainings as one: a layer of all members is one batched matrix product, gradients are written out, one Adam moves all.

A member is a :class:`FairTrainer` whose weights are a row of one matrix [M, P]. Random draws come from each member's own stream,
so that its training is the one that it would have had alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libmtl_fair.data import Dataset
from libmtl_fair.data.loader import epoch_order
from libmtl_fair.data.reference import narrowed
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.libmtl import checkpoint_selection as judging
from libmtl_fair.libmtl import evaluate as evaluation
from libmtl_fair.tune.stacked.layers import Adam, Batch, Inputs, Room, Weights
from libmtl_fair.tune.stacked.members import Member
from libmtl_fair.tune.stacked.parts import Step, parts_of


class Rows:
    """Training data on a device: ``x`` [N, F], ``y`` [N, T] (NaN where missing), ``groups`` (each [N]), ``reference`` [N, r]."""

    def __init__(self, data: Dataset, device: torch.device) -> None:
        split, self.device = data.train, device
        self.x = Inputs(split.x.to(device))
        self.tasks = tuple(task.name for task in data.tasks)
        y = torch.stack([split.labels[name].to(split.x.dtype) for name in self.tasks], 1).to(device)
        self.y = torch.where(y < 0, torch.nan, y)
        self.complete = not bool(self.y.isnan().any())
        self.groups = {name: ids.to(device) for name, ids in split.groups.items()}
        features = None if split.reference is None else narrowed(split.reference.features(split.x))
        self.reference = None if features is None else features.to(device)
        self.val = data.val.loader(8192, device=device)


class Stack:
    """Trainers of binary tasks that train together, an epoch at a time, as ``members`` in the order of the rows of weights.

    ``judge_all``: judge every member after each epoch, not only those that keep their best epoch.
    """

    def __init__(self, rows: Rows, batch_size: int, judge_all: bool = False) -> None:
        self.rows, self.batch_size, self.judge_all = rows, batch_size, judge_all
        self.members: list[Member] = []
        self._weights: Weights | None = None
        self._room = Room()

    @property
    def trainers(self) -> list[FairTrainer]:
        """Return the members' trainers."""
        return [member.trainer for member in self.members]

    def change(self, add: Sequence[FairTrainer] = (), drop: Sequence[FairTrainer] = ()) -> None:
        """Take in new trainers (of one shape) and let others go, which keep what they have learned."""
        if self._weights is None:
            if not add:
                return
            self._weights = Weights(add[0])
            group = add[0].optimizer.param_groups[0]
            self._adam = Adam(group["betas"], group["eps"], self._weights.flat)
        kept = [m for m, trainer in enumerate(self.trainers) if not any(trainer is gone for gone in drop)]
        for trainer in add:
            trainer.prepare_groups(self.rows.val)
            trainer.epoch_steps = -(-len(self.rows.y) // self.batch_size)
        self.members = [self.members[m] for m in kept] + [
            Member(trainer, self.rows.reference is not None) for trainer in add
        ]
        self._weights.change(kept, self.trainers, add)
        self._adam.change(kept, add)
        for trainer in drop:
            Weights.release(trainer)
        self._room = Room()
        self._parts = parts_of(self.members)

    @property
    def weights(self) -> Weights:
        """The weights of all members; a HostError says that there was none yet."""
        if self._weights is None:
            raise HostError("the stack has no members")
        return self._weights

    def epoch(self) -> dict[int, float]:
        """Train one epoch; return place -> validation score of the members that are judged."""
        for member in self.members:
            member.trainer.model.train()
            member.trainer.model.epoch = member.trainer.epoch
        orders = torch.stack(
            [epoch_order(m.seed, m.trainer.epoch, len(self.rows.y), self.rows.device) for m in self.members]
        )
        with torch.no_grad():
            for rows in torch.split(orders, self.batch_size, 1):
                self._step(rows)
        for part in self._parts:
            part.save()
        scores: dict[int, float] = {}
        for m, member in enumerate(self.members):
            if (self.judge_all or member.trainer.select == "best") and self.finite(m):
                found = evaluation.evaluate(member.trainer, self.rows.val)
                scores[m] = judging.judge(member.trainer, member.trainer.epoch, found, self.rows.val)
            self._adam.rates[m] = member.end_epoch()
        return scores

    def finite(self, m: int) -> bool:
        """Whether a member's weights are numbers."""
        return bool(self.weights.flat[m].isfinite().all())

    def _step(self, rows: Tensor) -> None:
        """Train one step of every member on its own rows [M, B] of the data."""
        *blocks, heads = self.weights.layers
        batch, room = self.rows.x.take(rows, self._room), self._room
        received: list[tuple[Tensor, Tensor | None]] = []  # by the layers after the first, and what dropout left of it
        h = batch.forward(blocks[0], room)
        for i, layer in enumerate([*blocks[1:], heads], 1):
            mask = self._mask(h.relu_())
            received.append((h if mask is None else h.mul_(mask), mask))
            out = room(f"h{i}", (*rows.shape, layer.bias.shape[2]), h) if layer is not heads else None
            h = torch.baddbmm(layer.bias, h, layer.weight, out=out)
        y = self.rows.y.index_select(0, rows.flatten()).view(*rows.shape, -1)
        data = self.rows.groups, self.rows.complete, self.rows.reference
        step = Step(h, received[-1][0], heads.weight, y, rows, *data)
        self._backward(batch, received, *self._objective(step))
        self._adam.step(self.weights.flat, self.weights.grad)

    def _mask(self, h: Tensor) -> Tensor | None:
        """Return what dropout multiplies h [M, B, d] by, None where no member has it."""
        kept = [(m, member.generator, 1 - member.dropout) for m, member in enumerate(self.members) if member.dropout]
        if not kept:
            return None
        mask = torch.ones_like(h)
        for m, generator, share in kept:
            mask[m].bernoulli_(share, generator=generator).div_(share)
        return mask

    def _objective(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the gradients to the logits [M, B, C] and, past the heads, to the representations [M, B, d]."""
        if len(self._parts) == 1:
            return self._parts[0].gradients(step)
        to_z, to_h = torch.empty_like(step.z), None
        for part in self._parts:
            to_z[part.places], further = part.gradients(step.of(part.places))
            if further is not None:
                to_h = torch.zeros_like(step.h) if to_h is None else to_h
                to_h[part.places] = further
        return to_z, to_h

    def _backward(
        self, batch: Batch, received: list[tuple[Tensor, Tensor | None]], gradient: Tensor, further: Tensor | None
    ) -> None:
        """Write the gradient of all weights from those to the logits and to what the heads received."""
        first, *grads = self.weights.grads
        layers = self.weights.layers[1:]
        for index, (h, mask) in reversed(list(enumerate(received))):
            torch.bmm(h.mT, gradient, out=grads[index].weight)
            torch.sum(gradient, 1, keepdim=True, out=grads[index].bias)
            gradient = torch.bmm(gradient, layers[index].weight.mT, out=self._room(f"g{index}", tuple(h.shape), h))
            if further is not None and index == len(grads) - 1:
                gradient.add_(further)
            if mask is not None:
                gradient.mul_(mask)
            torch.ops.aten.threshold_backward.grad_input(gradient, h, 0, grad_input=gradient)
        batch.backward(gradient, first)
