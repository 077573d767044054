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
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


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
    return printable(str(for_spreadsheets(frame).to_csv(index=False, lineterminator="\n")))


def for_spreadsheets(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame whose names and texts are printable, and none of them a formula; numbers spelt as text stay."""
    safe = {name: column if column.dtype.kind in "biuf" else column.map(_cell) for name, column in frame.items()}
    return type(frame)(safe, index=frame.index).rename(columns=_cell)


def _cell(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    return printable(f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell)


class Screen(Console):
    """rich's console, with every text on it printable."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is shown; colours are rich's own, never a name's."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)
