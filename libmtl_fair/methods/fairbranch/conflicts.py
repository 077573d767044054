"""Conflicts between the tasks' gradients: how many and at what angle, per layer and epoch, accuracy and fairness apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from libmtl_fair.errors import DataError, unknown
from libmtl_fair.functional import gradient_cosines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("accuracy", "fairness")
"""Which losses the gradients are of."""


def layer_cosines(losses: Tensor, layers: Sequence[Mapping[str, Sequence[Tensor]]], tasks: Sequence[str]) -> Tensor:
    """Return the cosine between each two tasks' gradients in each layer, [L, T, T]; keeps the graph.

    ``layers``: for each layer, task -> the parameters that it runs through; NaN where two tasks do not share them, or a gradient is
    zero. Takes T backward passes and waits for nothing.

    >>> w = torch.ones(2, requires_grad=True)
    >>> layer_cosines(torch.stack([w[0], -w[0]]), [{"a": [w], "b": [w]}], ["a", "b"])
    tensor([[[ 1., -1.],
             [-1.,  1.]]])
    """
    inputs = list({p: None for layer in layers for owned in layer.values() for p in owned if p.requires_grad})
    grads: dict[str, dict[Tensor, Tensor]] = {task: {} for task in tasks}
    for loss, found in zip(losses, grads.values() if inputs else ()):
        gradient = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        found.update(zip(inputs, gradient))
    return torch.stack([_cosines(layer, grads) for layer in layers])


def _cosines(layer: Mapping[str, Sequence[Tensor]], grads: Mapping[str, Mapping[Tensor, Tensor]]) -> Tensor:
    rows, owners = [], [tuple(map(id, layer[task])) for task in grads]
    for task, found in grads.items():
        flat = [found.get(p, torch.zeros_like(p)).flatten() for p in layer[task]]
        rows.append(torch.cat(flat) if flat else torch.zeros(0))
    stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # layers of different size share nothing
    shared = torch.tensor([[a == b and bool(a) for b in owners] for a in owners], device=stacked.device)
    alive = (stacked != 0).any(1)
    return gradient_cosines(stacked).masked_fill(~(shared & alive[:, None] & alive), torch.nan)


@dataclass(frozen=True)
class ConflictRecord:
    """Cosines between the tasks' gradients over training, of layers from the input up.

    ``cosines`` are [E, 2, L, T, T], accuracy then fairness; NaN where two tasks do not share the layer.
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    epochs: tuple[int, ...]
    cosines: Tensor

    def __post_init__(self) -> None:
        """Check the shape."""
        shape, found = (len(self.epochs), 2, len(self.layers), *[len(self.tasks)] * 2), tuple(self.cosines.shape)
        if found != shape:
            raise DataError(f"conflicts: cosines must be {shape} (epochs, kinds, layers, tasks, tasks), found {found}")

    def frame(self) -> pd.DataFrame:
        """Return one row per epoch, layer, kind and pair that shares the layer: ``cosine`` and ``angle`` in degrees."""
        first, second = np.triu_indices(len(self.tasks), 1)
        pairs = self.cosines.double().cpu().numpy()[..., first, second]
        e, k, layer, pair = (index.ravel() for index in np.indices(pairs.shape))
        names, at = (self.layers, KINDS, self.tasks, self.tasks), (layer, k, first[pair], second[pair])
        columns = zip(("layer", "kind", "task_a", "task_b"), names, at)
        shown = {column: np.asarray(each, dtype=object)[rows] for column, each, rows in columns}
        epochs = np.asarray(self.epochs, dtype=np.int64)[e]
        frame = pd.DataFrame({"epoch": epochs, **shown, "cosine": pairs.ravel()})
        frame["angle"] = np.degrees(np.arccos(np.clip(frame["cosine"], -1, 1)))
        return frame.dropna(subset="cosine").reset_index(drop=True)

    def counts(self) -> pd.DataFrame:
        """Return one row per epoch, layer and kind: ``pairs`` that share it, ``conflicts`` among them, mean ``angle``."""
        frame = self.frame().assign(conflict=lambda rows: rows["cosine"] < 0)
        by = frame.groupby(["epoch", "layer", "kind"], sort=False, observed=True, as_index=False)
        return by.agg(pairs=("cosine", "size"), conflicts=("conflict", "sum"), angle=("angle", "mean"))

    def plot(self, value: str = "conflicts") -> Figure:
        """Return heat maps of layers by epochs, see :func:`conflict_heatmap`."""
        return conflict_heatmap(self, value)


def conflict_heatmap(record: ConflictRecord, value: str = "conflicts") -> Figure:
    """Return two heat maps, accuracy and fairness: ``conflicts`` (number of pairs) or mean ``angle`` (degrees).

    Rows are layers, the input below; columns are epochs; a cell that no two tasks share is empty.
    """
    from libmtl_fair.report.theme import conflict_map

    if value not in ("conflicts", "angle"):
        raise DataError(unknown("value of a conflict heat map", value, ["conflicts", "angle"]))
    if not record.epochs:
        raise DataError("no conflicts were recorded: train with record_conflicts=True")
    return conflict_map(record.counts(), value, record.layers, record.epochs)
