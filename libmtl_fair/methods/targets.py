"""What a user asks of groups in a sentence, "eo <= 0.05" or "eo <= 30%", for every task and attribute."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from libmtl_fair.errors import RecipeError, unknown

METRICS: Mapping[str, str] = {
    "eo": "eo", "equalized_odds": "eo", "equalised_odds": "eo",
    "eop": "eop", "equal_opportunity": "eop",
    "dp": "dp", "demographic_parity": "dp",
}  # fmt: skip
"""Names that a sentence may use: equalised odds, equal opportunity, demographic parity; the largest difference of groups."""

_SENTENCE = re.compile(r"\s*([A-Za-z_]+)\s*(?:<=|=<|<|≤)\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(%?)\s*\Z")
_EXAMPLE = 'write "eo <= 0.05" (eo, eop or dp; a difference) or "eo <= 30%" (of what plain training has)'


class Target(NamedTuple):
    """``metric`` at most ``bound``: a difference in (0, 1], or where ``relative`` a share of plain training's.

    >>> Target.read("eo <= 30%")
    Target(metric='eo', bound=0.3, relative=True)
    >>> str(Target("dp", 0.05, False))
    'dp <= 0.05'
    """

    metric: str
    bound: float
    relative: bool

    @classmethod
    def read(cls, sentence: object) -> Target:
        """Read a sentence; a RecipeError says what to write."""
        found = _SENTENCE.match(sentence) if isinstance(sentence, str) else None
        if found is None:
            raise RecipeError(f"target {sentence!r} is no constraint: {_EXAMPLE}")
        name, number, percent = found.groups()
        metric = METRICS.get(name.lower())
        if metric is None:
            raise RecipeError(f"target {sentence!r}: {unknown('metric', name, METRICS)}; {_EXAMPLE}")
        bound = float(number) / (100 if percent else 1)
        if not 0 < bound <= 1:
            raise RecipeError(
                f"target {sentence!r}: the bound must be above 0 and at most {'100%' if percent else '1'}"
            )
        return cls(metric, bound, bool(percent))

    def __str__(self) -> str:
        """Return the sentence."""
        return f"{self.metric} <= {100 * self.bound:g}%" if self.relative else f"{self.metric} <= {self.bound:g}"

    def tolerance(self, level: float, floor: float) -> float:
        """Return the difference that is tolerated where plain training has ``level``."""
        return max(floor, self.bound * level) if self.relative else self.bound


def read_table(targets: Mapping[str, object]) -> dict[str, Target | dict[str, Target]]:
    """Read ``{task: sentence}`` or ``{task: {attribute: sentence}}``."""
    found: dict[str, Target | dict[str, Target]] = {}
    for task, entry in targets.items():
        if isinstance(entry, Mapping):
            if not entry:
                raise _at(f"targets.{task} names no attribute: {_EXAMPLE} for each, or one for all of them", task)
            found[task] = {str(name): _read(sentence, task, str(name)) for name, sentence in entry.items()}
        else:
            found[task] = _read(entry, task)
    return found


def _read(sentence: object, *where: str) -> Target:
    try:
        return Target.read(sentence)
    except RecipeError as error:
        raise _at(str(error), *where) from None


def _at(message: str, *where: str) -> RecipeError:
    """Return an error about an entry of the targets."""
    error = RecipeError(message)
    error.where = where
    return error


def chosen(
    target: str | None, targets: Mapping[str, object], default: str, tasks: Sequence[str], attributes: Sequence[str]
) -> dict[tuple[str, str], Target]:
    """Return (task, attribute) -> its constraint.

    ``targets`` name tasks and attributes of their own; ``target`` is everybody else's. With ``targets`` alone, what they do not
    name is not constrained; with neither, ``default`` holds for all.

    Raises
    ------
    RecipeError
        A task or attribute that there is none of, or that has no decisions; ``where`` is the entry of the targets.
    """
    table = read_table(targets)
    general = Target.read(target or default) if target or not table else None
    for task, asked in table.items():
        if task not in tasks:
            raise _at(f"targets: {unknown('binary task', task, tasks)}", task)
        for name in asked if isinstance(asked, dict) else ():
            if name not in attributes:
                raise _at(f"targets.{task}: {unknown('attribute', name, attributes)}", task, name)
    found: dict[tuple[str, str], Target] = {}
    for task in tasks:
        entry: Target | dict[str, Target] | None = table.get(task, general)
        for name in attributes:
            own = entry.get(name, general) if isinstance(entry, dict) else entry
            if own is not None:
                found[task, name] = own
    return found
