"""Text of users, names above all, as files and screens may show it: nothing in it is obeyed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

if TYPE_CHECKING:
    import pandas as pd

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_FORMULA = re.compile(r"[=+\-@\t\r]")


def printable(text: str) -> str:
    r"""Return the text with control characters, which a terminal or an editor would obey, as their escapes.

    Examples
    --------
    >>> print(printable("clear\x1b[2J"))
    clear\x1b[2J
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def csv_text(frame: pd.DataFrame) -> str:
    """Return a frame as CSV for people: printable, and no text that a spreadsheet takes for a formula (it gets a ``'`` in front).

    Examples
    --------
    >>> import pandas as pd
    >>> csv_text(pd.DataFrame({"=a": ["-b", "c"], "d": [-1.5, 2.0]})).splitlines()
    ["'=a,d", "'-b,-1.5", 'c,2.0']
    """
    safe = frame.rename(columns=_unformula).apply(lambda column: column.map(_unformula))
    return printable(str(safe.to_csv(index=False, lineterminator="\n")))


def _unformula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


class Screen(Console):
    """rich's console, with every text on it printable."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is shown; colours are rich's own, never a name's."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)
