"""Flip twins: the same people with another sensitive value among their inputs (METHODS.md, 1.3; ours)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.data.dataset import Dataset


def flipped(data: Dataset, part: str) -> Iterator[tuple[str, Dataset]]:
    """Yield (attribute, data) with another sensitive value for everybody in a part, where the attribute is an input.

    Of G groups that training has a person of the g-th gets the (g + s)-th, counted round, for s = 1 .. G - 1: the other one of
    two, each other one of several. A group's value is its most frequent one among training people, of a number the median. Where
    the attribute's own column is no input, the columns that are declared to show it change. Who has no such group stays.
    """
    split, sources = data.splits()[part], data.encoder.sources
    for attribute, names in data.groups.items():
        shown = [column for column in data.tell_tale.get(attribute, ()) if column in data.inputs]
        own = [column for column in shown if column == data.card["groups"][attribute]["column"]]
        blocks = [[i for i, source in enumerate(sources) if source == column] for column in own or shown]
        train = data.train.groups[attribute]
        present = [g for g in range(len(names)) if bool((train == g).any())]
        if not blocks or len(present) < 2:
            continue
        place = torch.tensor([present.index(g) if g in present else -1 for g in range(len(names))] + [-1])
        at = place[split.groups[attribute]]
        known = torch.nonzero(at >= 0).flatten()
        for shift in range(1, len(present)):
            x = split.x.clone()
            for block in blocks:
                values = torch.stack([_typical(data.train.x[train == g][:, block]) for g in present])
                x[known[:, None], torch.tensor(block)] = values[(at[known] + shift) % len(present)]
            changed: dict[str, Any] = {part: replace(split, x=x)}
            yield attribute, replace(data, **changed)


def _typical(rows: Tensor) -> Tensor:
    """Return the most frequent row of a one-hot block; of a number (and of its gap) the median."""
    if rows.shape[1] == 1 or not bool(((rows == 0) | (rows == 1)).all()):
        return rows.median(dim=0).values
    found, counts = torch.unique(rows, dim=0, return_counts=True)
    return torch.as_tensor(found[counts.argmax()])
