"""Layers of all members: weights as one matrix [M, P], Adam on it, memory used again, and what the first layer receives.

Rows of the data come dense or as their few entries that are not zero: with one-hot columns, a product is a weighted sum of a few
rows of weights, and the gradient of a feature's weights one over the examples that have it: sums of bags, which cost in
proportion to the entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from libmtl_fair.libmtl import FairTrainer

FEW = 0.15
"""Share of the features that a row may have as entries: there, bags take as long as products with 32 outputs, half with 128."""


class Room:
    """Tensors that are written anew in each step, kept: memory of that size costs more to get than to fill."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the tensor of a name and shape; its values are those of its last use."""
        if (name, shape) not in self._held:
            self._held[name, shape] = like.new_empty(shape)
        return self._held[name, shape]


@dataclass(frozen=True)
class Layer:
    """Views of one layer of all members: ``weight`` [M, in, out] (the transpose of ``nn.Linear``'s), ``bias`` [M, 1, out].

    In memory the longer of in and out comes last, which matrix products with few columns are several times faster for.
    """

    weight: Tensor
    bias: Tensor


def own_linears(trainer: FairTrainer) -> list[list[nn.Linear]]:
    """Return a trainer's layers, each as the linear modules that are its columns: the encoder's, then all heads that have weights."""
    model = trainer.model
    blocks = [[block[0]] for block in model.encoder.blocks]
    heads = [model.decoders[name] for name in trainer.task_name]
    return [*blocks, [head for head in heads if type(head) is nn.Linear]]


class Weights:
    """One row of weights a member, ``flat`` and ``grad`` [M, P], with views of each layer (the last: the heads), also in its modules."""

    def __init__(self, trainer: FairTrainer) -> None:
        linears = own_linears(trainer)
        self.sizes = [(row[0].in_features, sum(linear.out_features for linear in row)) for row in linears]
        like = linears[0][0].weight
        self._set(like.new_empty((0, sum(i * o + o for i, o in self.sizes))), [])

    def _set(self, flat: Tensor, trainers: Sequence[FairTrainer]) -> None:
        self.flat, self.grad = flat, torch.zeros_like(flat)
        self.layers, self.grads = self._views(self.flat), self._views(self.grad)
        for m, trainer in enumerate(trainers):
            for row, layer in zip(own_linears(trainer), self.layers):
                sizes = [linear.out_features for linear in row]
                parts = zip(row, torch.split(layer.weight[m], sizes, 1), torch.split(layer.bias[m, 0], sizes))
                for linear, weight, bias in parts:
                    linear.weight.data, linear.bias.data = weight.t(), bias

    def _views(self, flat: Tensor) -> list[Layer]:
        found, start = [], 0
        for i, o in self.sizes:
            weight = flat[:, start : start + i * o]
            weight = weight.view(len(flat), i, o) if i < o else weight.view(len(flat), o, i).mT
            bias = flat[:, start + i * o : start + i * o + o].view(len(flat), 1, o)
            found.append(Layer(weight, bias))
            start += i * o + o
        return found

    @torch.no_grad()
    def change(self, kept: Sequence[int], trainers: Sequence[FairTrainer], new: Sequence[FairTrainer]) -> None:
        """Keep some rows and append those of new members; ``trainers`` are the members afterwards."""
        rows = [torch.cat([part for row in own_linears(t) for part in _joined(row)]).unsqueeze(0) for t in new]
        self._set(torch.cat([self.flat[list(kept)], *rows]), trainers)

    @staticmethod
    def release(trainer: FairTrainer) -> None:
        """Give a member's modules weights of their own again."""
        for row in own_linears(trainer):
            for linear in row:
                for parameter in (linear.weight, linear.bias):
                    parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)


def _joined(row: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Return a layer's weights and biases, each as one vector in the order of :class:`Layer`."""
    weight = torch.cat([linear.weight.detach() for linear in row])  # [out, in]
    weight = weight.t() if weight.shape[1] < weight.shape[0] else weight
    return weight.reshape(-1), torch.cat([linear.bias.detach() for linear in row])


class Adam:
    """Adam over [M, P], a learning rate, a weight decay and a count of steps for each member; torch's formula."""

    def __init__(self, betas: tuple[float, float], eps: float, like: Tensor) -> None:
        self.betas, self.eps = betas, eps
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.rates: list[float] = []
        self.decays: list[float] = []
        self.steps = torch.zeros(0)  # float and on the CPU, as torch's own Adam keeps them

    def change(self, kept: Sequence[int], new: Sequence[FairTrainer]) -> None:
        """Keep the state of some members, and begin that of new ones."""
        groups = [trainer.optimizer.param_groups[0] for trainer in new]
        self.rates = [self.rates[m] for m in kept] + [float(group["lr"]) for group in groups]
        self.decays = [self.decays[m] for m in kept] + [float(group["weight_decay"]) for group in groups]
        self.steps = torch.cat([self.steps[list(kept)], torch.zeros(len(new))])
        zeros = self.mean.new_zeros((len(new), self.mean.shape[1]))
        self.mean, self.square = (torch.cat([held[list(kept)], zeros]) for held in (self.mean, self.square))

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=self.mean.dtype).to(self.mean.device).unsqueeze(1)

    @torch.no_grad()
    def step(self, flat: Tensor, grad: Tensor) -> None:
        """Update all weights from their gradient, which it may change."""
        way = self._rows if flat.device.type == "cpu" else self._together
        way(flat, grad)

    def _rows(self, flat: Tensor, grad: Tensor) -> None:
        """Update row by row with torch's fused kernel, called directly: what ``torch.optim`` does before costs twice as much."""
        self.steps += 1
        first, second = self.betas
        rows = zip(*(held.unbind() for held in (flat, grad, self.mean, self.square, self.steps)))
        for (weights, slope, mean, square, step), rate, decay in zip(rows, self.rates, self.decays):
            torch._fused_adam_(
                [weights], [slope], [mean], [square], [], [step],
                lr=rate, beta1=first, beta2=second, weight_decay=decay, eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip

    def _together(self, flat: Tensor, grad: Tensor) -> None:
        """Update all rows at once: ``lr / (1 - b1^t) mean / (sqrt(square) / root + eps)`` with ``root = sqrt(1 - b2^t)``."""
        self.steps += 1
        first, second = self.betas
        if any(self.decays):
            grad.addcmul_(flat, self._column(self.decays))
        self.mean.lerp_(grad, 1 - first)
        self.square.mul_(second).addcmul_(grad, grad, value=1 - second)
        counts = self.steps.tolist()
        roots = [(1 - second**count) ** 0.5 for count in counts]
        sizes = [rate * root / (1 - first**count) for rate, root, count in zip(self.rates, roots, counts)]
        eps = self._column([self.eps * root for root in roots])
        flat.addcdiv_(self.mean, self.square.sqrt().add_(eps).div_(self._column(sizes)), value=-1)


@dataclass(frozen=True)
class Dense:
    """Features ``x`` [M, B, F]."""

    x: Tensor

    def forward(self, layer: Layer, room: Room) -> Tensor:
        """Return ``x w + b`` [M, B, out], in memory that the next step may use again."""
        out = room("first", (*self.x.shape[:2], layer.bias.shape[2]), self.x)
        return torch.baddbmm(layer.bias, self.x, layer.weight, out=out)

    def backward(self, gradient: Tensor, grads: Layer) -> None:
        """Write ``x' g`` and the sum of g."""
        torch.bmm(self.x.mT, gradient, out=grads.weight)
        torch.sum(gradient, 1, keepdim=True, out=grads.bias)


@dataclass(frozen=True)
class Sparse:
    """Entries of the examples, the last a one for the bias: values and places [M, B, K], ``m (F + 1) + feature`` for member m."""

    places: Tensor
    values: Tensor

    def forward(self, layer: Layer, room: Room) -> Tensor:
        """Return ``x w + b``, a bag for each example."""
        members, features, width = layer.weight.shape
        table = room("table", (members, features + 1, width), layer.weight)
        table[:, :features], table[:, features:] = layer.weight, layer.bias
        places, values = self.places.flatten(0, 1), self.values.flatten(0, 1)
        out = embedding_bag(places, table.flatten(0, 1), mode="sum", per_sample_weights=values)
        return out.view(*self.places.shape[:2], width)

    def backward(self, gradient: Tensor, grads: Layer) -> None:
        """Write ``x' g`` and the sum of g, a bag for each place: its entries, in the order of the examples."""
        members, features, width = grads.weight.shape
        count, places = members * (features + 1), self.places.flatten()
        # numpy sorts short integers by radix, in a fifth of the time, and divides in a third
        order = places.numpy().astype(np.min_scalar_type(count)).argsort(kind="stable")
        examples = torch.from_numpy(order // self.places.shape[2])
        values = self.values.flatten().index_select(0, torch.from_numpy(order))
        sizes = torch.bincount(places, minlength=count)
        starts, table = sizes.cumsum(0) - sizes, gradient.flatten(0, 1)
        found = embedding_bag(examples, table, starts, mode="sum", per_sample_weights=values)
        weight, bias = torch.split(found.view(members, features + 1, width), [features, 1], 1)
        grads.weight.copy_(weight)
        grads.bias.copy_(bias)


Batch = Dense | Sparse
"""The examples of one step of all members, M times B."""


class Inputs:
    """The features of the training data, ``x`` [N, F]; on the CPU their entries where they are few."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._entries = _entries(x) if x.device.type == "cpu" else None

    def take(self, rows: Tensor, room: Room) -> Batch:
        """Return the examples of all members at their own rows [M, B] of the data."""
        flat, shape = rows.flatten(), (*rows.shape, -1)
        if self._entries is None:
            x = room("x", (len(flat), self.x.shape[1]), self.x)
            return Dense(torch.index_select(self.x, 0, flat, out=x).view(shape))
        places, values = (held.index_select(0, flat).view(shape) for held in self._entries)
        firsts = torch.arange(len(rows), dtype=places.dtype) * (self.x.shape[1] + 1)
        return Sparse(places.add_(firsts.view(-1, 1, 1)), values)


def _entries(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return features and values [N, K] of the entries of each row, and of the bias; None where they are not few."""
    held = x != 0
    most = int(held.sum(1).max())
    if most + 1 > FEW * x.shape[1]:
        return None
    places = held.to(torch.uint8).topk(most, 1).indices
    bias = places.new_full((len(x), 1), x.shape[1])
    return torch.cat([places, bias], 1).int(), torch.cat([x.gather(1, places), torch.ones_like(x[:, :1])], 1)
