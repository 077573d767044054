"""How inputs become those of the same people with another sensitive value: flip twins (METHODS.md, 1.3 and 1.4; ours)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """How one attribute's value among the inputs changes.

    Attributes
    ----------
    attribute : str
        Its name.
    columns : Tensor of int64 [c]
        Where the encoded inputs show it.
    values : Tensor [P, c]
        What they hold for each of the P groups that training has.
    place : Tensor of int64 [G + 1]
        Row of ``values`` of each group; -1 for one that training has not, and last for the unknown group -1.
    """

    attribute: str
    columns: Tensor
    values: Tensor
    place: Tensor

    @property
    def shifts(self) -> range:
        """Return what can be added to a group: 1 .. P - 1."""
        return range(1, len(self.values))

    def twins(self, x: Tensor, groups: Tensor, shift: int) -> Tensor:
        """Return inputs [B, F] with the value of the group that is ``shift`` further, counted round; who has no group stays."""
        at = self.place[groups]
        values = self.values.to(x.dtype)[(at + shift) % len(self.values)]
        changed = torch.where((at >= 0).unsqueeze(1), values, x.index_select(1, self.columns))
        return x.index_copy(1, self.columns, changed)

    def to(self, device: torch.device) -> Flip:
        """Return the same on a device."""
        return replace(
            self, columns=self.columns.to(device), values=self.values.to(device), place=self.place.to(device)
        )


@dataclass(frozen=True)
class Twins:
    """How inputs become their flip twins: a :class:`Flip` of each attribute that they show."""

    flips: tuple[Flip, ...]

    def at(self, x: Tensor, groups: Mapping[str, Tensor], turn: int) -> Tensor:
        """Return the twins [B, F] of inputs: each attribute and each other group takes its turn."""
        turns = [(flip, shift) for flip in self.flips for shift in flip.shifts]
        flip, shift = turns[turn % len(turns)]
        return flip.twins(x, groups[flip.attribute], shift)

    def to(self, device: torch.device) -> Twins:
        """Return the same on a device."""
        return Twins(tuple(flip.to(device) for flip in self.flips))


def fit_twins(
    sources: Sequence[str],
    x: Tensor,
    groups: Mapping[str, Tensor],
    n_groups: Mapping[str, int],
    shown: Mapping[str, Collection[str]],
    own: Mapping[str, str],
) -> Twins | None:
    """Return how encoded training inputs become their flip twins; None where no attribute is among them.

    Of G groups that training has a person of the g-th gets the (g + s)-th, counted round, for s = 1 .. G - 1: the other one of
    two, each other one of several. A group's value is its most frequent one among training people, of a number the median. Where
    the attribute's own column is no input, the columns that are declared to show it change. Who has no such group stays.

    Parameters
    ----------
    sources : sequence of str
        Source column of each encoded input.
    x : Tensor [N, F]
        Encoded training inputs.
    groups : mapping of str to Tensor
        Attribute -> ids [N], -1 unknown.
    n_groups : mapping of str to int
        Attribute -> number of groups.
    shown : mapping of str to collection of str
        Attribute -> source columns that show it, inputs or not.
    own : mapping of str to str
        Attribute -> its own source column.
    """
    flips = []
    for attribute, ids in groups.items():
        found = [column for column in shown.get(attribute, ()) if column in sources]
        names = [column for column in found if column == own.get(attribute)] or found
        blocks = [[i for i, source in enumerate(sources) if source == column] for column in names]
        present = [g for g in range(n_groups[attribute]) if bool((ids == g).any())]
        if blocks and len(present) > 1:
            values = torch.stack([torch.cat([_typical(x[ids == g][:, block]) for block in blocks]) for g in present])
            place = [present.index(g) if g in present else -1 for g in range(n_groups[attribute])]
            columns = torch.tensor([i for block in blocks for i in block])
            flips.append(Flip(attribute, columns, values, torch.tensor([*place, -1])))
    return Twins(tuple(flips)) if flips else None


def _typical(rows: Tensor) -> Tensor:
    """Return the most frequent row of a one-hot block; of a number (and of its gap) the median."""
    if rows.shape[1] == 1 or not bool(((rows == 0) | (rows == 1)).all()):
        return rows.median(dim=0).values
    found, counts = torch.unique(rows, dim=0, return_counts=True)
    return torch.as_tensor(found[counts.argmax()])
