"""Objects that show themselves as a summary: a title and a few named lines, as text and as HTML in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping

from libmtl_fair.shown import printable

Lines = Iterable[tuple[str, str]]
_MOST = 12
"""Names that a line lists."""


class Summarised:
    """Gives ``repr`` and ``_repr_html_`` of what :meth:`_summary` says."""

    def _summary(self) -> tuple[str, Lines]:
        """Return a title, and (name, text) of each line."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return the summary as text."""
        title, lines = self._summary()
        return printable("\n".join([title, *(f"  {name}: {text}" for name, text in lines)]))

    def _repr_html_(self) -> str:
        title, lines = self._summary()
        rows = (
            f"<tr><th scope='row' style='text-align:left'>{_safe(name)}</th><td style='text-align:left'>{_safe(text)}</td></tr>"
            for name, text in lines
        )
        return f"<table><caption style='text-align:left'>{_safe(title)}</caption>{''.join(rows)}</table>"


def listed(names: Iterable[str]) -> str:
    """Return names as a list of at most twelve.

    Examples
    --------
    >>> listed("abc")
    'a, b, c'
    >>> listed(str(i) for i in range(14))
    '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... (14)'
    """
    every = list(names)
    return ", ".join(every[:_MOST]) + (f", ... ({len(every)})" if len(every) > _MOST else "")


def shares(counts: Mapping[str, int]) -> str:
    """Return names with their share of all.

    Examples
    --------
    >>> shares({"f": 1, "m": 3})
    'f 25%, m 75%'
    """
    total = max(sum(counts.values()), 1)
    return listed(f"{name} {count / total:.0%}" for name, count in counts.items())


def _safe(text: str) -> str:
    return html.escape(printable(text))
