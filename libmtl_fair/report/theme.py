"""Look of the plots: a palette that colour-blind readers can tell apart, on light and on dark paper."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl

REFERENCE = "#7f7f7f"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6FDF", "#A6761D")
"""Okabe and Ito's colours (without black and yellow, which vanish on dark or light paper) and two more."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "h")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
INK, GRID = "#1b1b1f", "#d8d8de"

RC: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "savefig.dpi": 150,
    "hatch.linewidth": 0.5,
}


@contextmanager
def themed(salt: str = "libmtl_fair") -> Iterator[None]:
    """Draw with this theme; a name in a script that the font lacks is no reason for a warning."""
    settings: Any = {**RC, "svg.hashsalt": salt}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        yield


def colours(methods: Sequence[str]) -> dict[str, str]:
    """Colour of each method: grey for the first, the reference.

    >>> colours(["plain", "relif"])
    {'plain': '#7f7f7f', 'relif': '#0072B2'}
    """
    return {name: REFERENCE if i == 0 else PALETTE[(i - 1) % len(PALETTE)] for i, name in enumerate(methods)}


def label(text: object, longest: int = 40) -> str:
    """Text for a plot: shortened, on one line, and never hidden from a legend by a leading underscore."""
    line = " ".join(str(text).split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return f" {line}" if line.startswith("_") else line


def slug(text: object) -> str:
    """A file name from any text.

    >>> slug("hours > 40?")
    'hours_40'
    """
    return re.sub(r"[^A-Za-z0-9]+", "_", str(text)).strip("_")[:60] or "unnamed"
