"""Sensitive attributes of a metric: sizes, names, unknown ids, intersections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.metrics.group_rows import RESERVED
from libmtl_fair.metrics.rates import check_option

JOIN = " & "
UNKNOWN = "unknown"


class Attributes:
    """Attributes and their intersections, with the rule for unknown ids.

    Attributes
    ----------
    sizes : attribute (or intersection) -> number of groups shown. names : attribute -> their names.
    """

    def __init__(
        self,
        n_groups: Mapping[str, int],
        missing: str,
        group_names: Mapping[str, Sequence[str]] | None,
        intersections: bool | Iterable[Sequence[str]] | None,
    ) -> None:
        """Check names and sizes."""
        check_option("rule for missing", missing, ("drop", "group", "error"))
        if not n_groups:
            raise RecipeError("GroupMetrics needs at least one sensitive attribute, for example n_groups={'sex': 2}")
        self.declared, self.missing = dict(n_groups), missing
        self.names = {a: self._names(a, g, (group_names or {}).get(a)) for a, g in n_groups.items()}
        self.crossed = self._crossings(intersections)
        for parts in self.crossed.values():
            self.names[JOIN.join(parts)] = [JOIN.join(names) for names in product(*(self.names[p] for p in parts))]
        self.sizes = {a: len(names) for a, names in self.names.items()}
        self.reset()

    def reset(self) -> None:
        """Forget what went wrong so far."""
        self._bad: dict[str, Tensor] = {}
        self._unknown: dict[str, Tensor] = {}

    def merge(self, other: Attributes) -> None:
        """Take over what went wrong elsewhere."""
        for mine, theirs in ((self._bad, other._bad), (self._unknown, other._unknown)):
            for attribute, count in theirs.items():
                mine[attribute] = mine.get(attribute, 0) + count.to(
                    mine[attribute].device if attribute in mine else count.device
                )

    def ids(self, groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ids int64 [B] of every attribute and intersection; unknown ones as the rule says."""
        found: dict[str, Tensor] = {}
        for attribute, size in self.declared.items():
            if attribute not in groups:
                raise DataError(f"groups lack attribute {attribute!r}; found: {', '.join(groups) or '(none)'}")
            given = groups[attribute].detach().long()
            self._count(self._bad, attribute, (given < -1) | (given >= size))
            self._count(self._unknown, attribute, given == -1)
            known = given.clamp(-1, size - 1)
            found[attribute] = torch.where(known < 0, size, known) if self.missing == "group" else known
        if len({len(i) for i in found.values()}) > 1:
            raise DataError(f"groups must have one length, found { {a: len(i) for a, i in found.items()} }")
        for name, parts in self.crossed.items():
            found[name] = self._cross([found[p] for p in parts], [self.sizes[p] for p in parts])
        return found

    def check(self) -> None:
        """Raise for ids outside of their range, or unknown ones under ``missing="error"``; synchronises."""
        for attribute, count in self._bad.items():
            if int(count):
                raise DataError(
                    f"attribute {attribute!r}: {int(count)} group ids lie outside of -1..{self.declared[attribute] - 1}; "
                    f"n_groups declares {self.declared[attribute]} groups"
                )
        for attribute, count in self._unknown.items():
            if self.missing == "error" and int(count):
                raise DataError(
                    f"attribute {attribute!r}: {int(count)} rows have no known group; pass missing='drop' or "
                    "missing='group', or fill them in"
                )

    @staticmethod
    def _cross(ids: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        code, known = torch.zeros_like(ids[0]), torch.ones_like(ids[0], dtype=torch.bool)
        for part, size in zip(ids, sizes):
            code, known = code * size + part, known & (part >= 0)
        return torch.where(known, code, -1)

    @staticmethod
    def _count(into: dict[str, Tensor], attribute: str, flags: Tensor) -> None:
        count = flags.sum()
        into[attribute] = into[attribute] + count if attribute in into else count

    def _names(self, attribute: str, size: int, given: Sequence[str] | None) -> list[str]:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise RecipeError(f"n_groups[{attribute!r}] must be an integer of at least 1, found {size!r}")
        names = [str(i) for i in range(size)] if given is None else [str(n) for n in given]
        if len(names) != size or len(set(names)) != size:
            raise RecipeError(f"group_names[{attribute!r}] must be {size} different names, found {names}")
        taken = set(names) & {*RESERVED, UNKNOWN if self.missing == "group" else RESERVED[0]}
        if taken:
            raise RecipeError(
                f"a group of {attribute!r} is named {taken.pop()!r}, which the table uses itself; rename it"
            )
        return [*names, UNKNOWN] if self.missing == "group" else names

    def _crossings(self, given: bool | Iterable[Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
        if not given:
            return {}
        crossings = [tuple(self.declared)] if given is True else [tuple(parts) for parts in given]
        for parts in crossings:
            for part in parts:
                if part not in self.declared:
                    raise RecipeError(unknown("attribute in intersections", part, self.declared))
            if len(set(parts)) < 2:
                raise RecipeError(f"an intersection crosses at least two attributes, found {list(parts)}")
        return {JOIN.join(parts): parts for parts in crossings}
