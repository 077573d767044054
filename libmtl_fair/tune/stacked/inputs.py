"""What the first layer of all members receives: rows of the data, dense or as their few entries that are not zero.

With one-hot columns, a product is a weighted sum of a few rows of weights, and the gradient of a feature's weights one over the
examples that have it: sums of bags, which cost in proportion to the entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from libmtl_fair.tune.stacked.weights import Layer, Room

FEW = 0.15
"""Share of the features that a row may have as entries: there, bags take as long as products with 32 outputs, half with 128."""


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
