"""Stacked trials: M trainings of one architecture as one batched model, each with its own settings, seed and controller.

A member is a :class:`FairTrainer` whose weights live in slices of stacked tensors [M, ...]: one batched matrix product does a
layer of all members, one vectorised Adam their updates. Random draws (initial weights, order of rows, dropout, prototypes)
come from each member's own stream, in the order in which it would draw them alone, so that a member's training is the one it
would have had alone, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair.batch import FairBatch
from libmtl_fair.data import Dataset
from libmtl_fair.host import FairTrainer, evaluation, judging
from libmtl_fair.host.checkpoint import seed_everything
from libmtl_fair.host.optimizers import make_scheduler
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tasks import Task

SUPPORTED = "an MLP without norm, hard sharing, binary tasks, Adam, and EW or ReLiF with base EW"


def obstacle(recipe: Recipe, method: str, tasks: Sequence[Task]) -> str | None:
    """Return why a method cannot be stacked, or None."""
    spec, model, train = recipe.methods[method], recipe.model_for(method), recipe.train_for(method)
    optimizer = train.optimizer
    checks = (
        (spec.weighting in ("EW", "ReLiF"), f"weighting {spec.weighting}"),
        (spec.args.get("base", "EW") == "EW", f"base {spec.args.get('base')}"),
        (model.encoder == "mlp" and model.norm is None, f"encoder {model.encoder} with norm {model.norm}"),
        (model.architecture == "HPS", f"architecture {model.architecture}"),
        (spec.heads is None, "auxiliary fairness heads"),
        (optimizer.optim == "adam", f"optimiser {optimizer.optim}"),
        (not train.rep_grad, "rep_grad"),
        (all(task.kind == "binary" for task in tasks), "tasks that are not binary"),
    )
    return next((f"{why} (stacked: {SUPPORTED})" for fits, why in checks if not fits), None)


def shape(recipe: Recipe, method: str) -> tuple[Any, ...]:
    """Return what members of one stack have in common."""
    model, train = recipe.model_for(method), recipe.train_for(method)
    optimizer = train.optimizer
    return (model.hidden, train.epochs, train.batch_size, optimizer.betas, optimizer.eps)


@dataclass
class _Layer:
    weight: Tensor
    bias: Tensor


class Stack:
    """M trainers that train together.

    Parameters
    ----------
    trainers : new ones, of one shape, with a seed each; their models hold the result.
    data : of all of them.
    batch_size, epochs : of all of them.
    """

    def __init__(self, trainers: Sequence[FairTrainer], data: Dataset, batch_size: int, epochs: int) -> None:
        self.trainers, self.epochs = list(trainers), epochs
        first = self.trainers[0]
        self.device, self.tasks = first.device, list(first.task_name)
        seeds = [t.seed or 0 for t in self.trainers]
        self.loaders = [data.train.loader(batch_size, shuffle=True, seed=s, device=self.device) for s in seeds]
        self.val = data.val.loader(8192, device=self.device)
        self.streams = [_stream(seed) for seed in seeds]
        self.rates = [_dropout(t) for t in self.trainers]
        self.layers = [self._stacked(i) for i in range(len(first.model.encoder.blocks))]
        self.heads = self._stacked(None)
        self.parameters = [p for layer in [*self.layers, self.heads] for p in (layer.weight, layer.bias)]
        self.adam = StackedAdam(self.parameters, [t.optimizer for t in self.trainers])
        self._schedules = [_schedule(t) for t in self.trainers]

    def _linears(self, trainer: FairTrainer, index: int | None) -> list[nn.Linear]:
        if index is not None:
            return [trainer.model.encoder.blocks[index][0]]
        return [trainer.model.decoders[name] for name in self.tasks]

    def _stacked(self, index: int | None) -> _Layer:
        rows = [self._linears(trainer, index) for trainer in self.trainers]
        weight = torch.stack([torch.cat([linear.weight for linear in row]) for row in rows]).detach()
        bias = torch.stack([torch.cat([linear.bias for linear in row]) for row in rows]).detach().unsqueeze(1)
        return _Layer(weight.requires_grad_(), bias.requires_grad_())

    def train(self) -> None:
        """Train all members to the end; each model holds its best or last epoch, as its recipe says."""
        for _ in range(self.epochs):
            self.epoch()
        self.write_back()
        for trainer in self.trainers:
            if trainer.select == "best" and trainer.best["state"] is not None:
                judging.hold_best(trainer)

    def epoch(self) -> None:
        """Train one epoch, judge each member that keeps its best, move the learning rates."""
        for trainer in self.trainers:
            trainer.model.train()
        for batches in zip(*self.loaders):
            self.step(batches)
        best = [t for t in self.trainers if t.select == "best"]
        if best:
            self.write_back()
        for trainer in best:
            judging.judge(trainer, trainer.epoch, evaluation.evaluate(trainer, self.val))
        for i, (trainer, schedule) in enumerate(zip(self.trainers, self._schedules)):
            trainer.epoch += 1
            if schedule is not None:
                schedule.optimizer.step()
                schedule.step()
                self.adam.lr[i] = schedule.get_last_lr()[0]

    def step(self, batches: Sequence[tuple[Tensor, dict[str, Any]]]) -> Tensor:
        """Train one step of every member; return the losses [M, T]."""
        h = torch.stack([x for x, _ in batches])
        for layer in self.layers:
            h = self._dropped(torch.baddbmm(layer.bias, h, layer.weight.mT).relu())
        z = torch.baddbmm(self.heads.bias, h, self.heads.weight.mT)
        y = torch.stack([torch.stack([labels[t].to(z.dtype) for t in self.tasks], 1) for _, labels in batches])
        losses = _losses(z, y)
        total = losses.sum()
        for m, trainer in enumerate(self.trainers):
            if hasattr(trainer.model, "penalty") and trainer.model.settings.lipschitz:
                total = total + self._penalty(m, trainer, h[m], z[m], losses[m], batches[m][1])
        grads = torch.autograd.grad(total, self.parameters)
        self.adam.step(grads)
        return losses.detach()

    def _penalty(
        self, m: int, trainer: FairTrainer, h: Tensor, z: Tensor, losses: Tensor, labels: dict[str, Any]
    ) -> Tensor:
        batch = FairBatch(
            tasks=trainer.tasks,
            h=h,
            outputs={name: z[:, t : t + 1] for t, name in enumerate(self.tasks)},
            labels={name: labels[name] for name in self.tasks},
            losses=losses,
            groups=labels["sensitive"],
            epoch=trainer.epoch,
            step=trainer.global_step,
        )
        with _Stream(self.streams, m, self.device):
            term: Tensor = trainer.model.penalty(batch)
        trainer.global_step += 1
        return term

    def _dropped(self, h: Tensor) -> Tensor:
        if not any(self.rates):
            return h
        masks = torch.ones_like(h)
        for m, rate in enumerate(self.rates):
            if rate:
                with _Stream(self.streams, m, self.device):
                    masks[m] = torch.empty_like(h[m]).bernoulli_(1 - rate).div_(1 - rate)
        return h * masks

    @torch.no_grad()
    def write_back(self) -> None:
        """Give each trainer's model its slice of the stacked weights."""
        for index, layer in [*enumerate(self.layers), (None, self.heads)]:
            for m, trainer in enumerate(self.trainers):
                linears = self._linears(trainer, index)
                sizes = [linear.out_features for linear in linears]
                parts = zip(linears, torch.split(layer.weight[m], sizes), torch.split(layer.bias[m, 0], sizes))
                for linear, weight, bias in parts:
                    linear.weight.copy_(weight)
                    linear.bias.copy_(bias)


class StackedAdam:
    """Adam over stacked parameters [M, ...], a learning rate and weight decay for each member; torch's formula."""

    def __init__(self, parameters: Sequence[Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        groups = [optimizer.param_groups[0] for optimizer in optimizers]
        self.parameters = list(parameters)
        self.beta1, self.beta2 = groups[0]["betas"]
        self.eps = groups[0]["eps"]
        self.lr = torch.tensor([float(g["lr"]) for g in groups], dtype=torch.float64)
        first = self.parameters[0]
        decay = torch.tensor([float(g["weight_decay"]) for g in groups], dtype=first.dtype, device=first.device)
        self.decay = decay.view(-1, 1, 1)
        self.mean = [torch.zeros_like(p) for p in self.parameters]
        self.square = [torch.zeros_like(p) for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        """Update all parameters."""
        self.steps += 1
        first = self.parameters[0]
        size = (self.lr / (1 - self.beta1**self.steps)).to(first.dtype).to(first.device).view(-1, 1, 1)
        root = math.sqrt(1 - self.beta2**self.steps)
        for p, g, mean, square in zip(self.parameters, grads, self.mean, self.square):
            g = torch.addcmul(g, self.decay, p)
            mean.lerp_(g, 1 - self.beta1)
            square.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            p.sub_(size * mean / (square.sqrt().div_(root).add_(self.eps)))


def _losses(z: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy [M, T], means over rows with a label (NaN and -100 are missing)."""
    seen = y >= 0
    each = nn.functional.binary_cross_entropy_with_logits(z, y.masked_fill(~seen, 0.0), reduction="none")
    return (each * seen).sum(1) / seen.sum(1).clamp(min=1)


def _stream(seed: int) -> Tensor:
    """Return the state of torch's generator with which a trainer of this seed begins to train."""
    held = torch.get_rng_state()
    seed_everything(seed + 1)
    state = torch.get_rng_state()
    torch.set_rng_state(held)
    return state


class _Stream:
    """Within it, torch's global generator is a member's own."""

    def __init__(self, states: list[Tensor], member: int, device: torch.device) -> None:
        self._states, self._member, self._device = states, member, device

    def __enter__(self) -> None:
        self._held = torch.get_rng_state()
        torch.set_rng_state(self._states[self._member])

    def __exit__(self, *_: object) -> None:
        self._states[self._member] = torch.get_rng_state()
        torch.set_rng_state(self._held)


def _dropout(trainer: FairTrainer) -> float:
    rates = [m.p for m in trainer.model.encoder.modules() if isinstance(m, nn.Dropout)]
    return float(rates[0]) if rates else 0.0


def _schedule(trainer: FairTrainer) -> Any:
    """Return a scheduler that only counts: of an optimiser without real parameters."""
    if trainer.scheduler is None:
        return None
    rate = float(trainer.optimizer.param_groups[0]["initial_lr"])
    return make_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate), trainer.scheduler_param)
