"""Group-specific decomposition: a shared encoder with one head per group (baseline of methods.md, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.methods.heads.modules import fresh_copy


class GroupHeads(nn.Module):
    """One head per group; an example goes through that of its group, in training and in prediction.

    An example of unknown group gets the mean of the heads' outputs **(ours)**. Prediction needs the groups, which
    :class:`FairTrainer` hands over by :meth:`take_groups`; without them every example counts as unknown.

    Parameters
    ----------
    head : the main head; each group gets a head of its shape, with parameters of its own.
    attributes : sensitive attributes; several are crossed.
    n_groups : number of groups of each.

    Raises
    ------
    RecipeError : no attribute, or fewer than two groups.
    """

    def __init__(self, head: nn.Module, attributes: Sequence[str], n_groups: Sequence[int]) -> None:
        super().__init__()
        total = 1
        for count in n_groups:
            total *= count
        if not attributes or len(attributes) != len(n_groups) or total < 2:
            raise RecipeError(
                f"group_specific needs at least two groups, found {dict(zip(attributes, n_groups))}; choose another attribute"
            )
        self.attributes = tuple(attributes)
        self.n_groups = tuple(n_groups)
        self.heads = nn.ModuleList(fresh_copy(head) for _ in range(total))
        self._groups: Tensor | None = None

    def take_groups(self, groups: Mapping[str, Tensor] | None) -> None:
        """Take attribute -> group ids [B] of the next forward pass; None: unknown.

        Raises
        ------
        DataError : an attribute that the loader does not give.
        """
        if not groups:
            self._groups = None
            return
        for name in self.attributes:
            if name not in groups:
                raise DataError(f"group-specific heads: {unknown('sensitive attribute', name, groups)}")
        self._groups, _ = F.cross_groups([groups[a] for a in self.attributes], self.n_groups)

    def forward(self, h: Tensor) -> Tensor:
        """Return each example's output from its group's head."""
        groups, self._groups = self._groups, None
        outputs = torch.stack([head(h) for head in self.heads])
        mean = outputs.mean(0)
        if groups is None:
            return mean
        chosen = outputs[groups.clamp(min=0), torch.arange(len(h), device=h.device)]
        known = (groups >= 0).reshape(-1, *[1] * (chosen.dim() - 1))
        return torch.where(known, chosen, mean)
