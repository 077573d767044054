"""A progress bar on the error stream, where that is a terminal; what runs inside it says behind it how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from libmtl_fair.shown import Screen

_Item = TypeVar("_Item")
_EVERY = 0.5
"""Seconds between two texts of one epoch."""
_open: list[Callable[[str], None]] = []


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Show a bar of ``total`` steps; calling what it gives advances it by one and sets the text behind it.

    Inside another bar there is no second one: its text stands behind the other's.
    """
    if _open:
        yield tell
        return
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[note]}")
    with Progress(*columns, console=Screen(stderr=True), transient=True) as progress:
        job, base = progress.add_task(title, total=total, completed=done, note="getting ready"), [""]

        def advance(text: str) -> None:
            base[0] = f"{text}: "
            progress.update(job, advance=1, note=text)

        _open.append(lambda text: progress.update(job, note=base[0] + text))
        try:
            yield advance
        finally:
            _open.pop()


def tell(text: str) -> None:
    """Set the text behind the bar that is open, after its own; nothing where none is."""
    if _open:
        _open[-1](text)


def told(items: Iterable[_Item], text: Callable[[int], str]) -> Iterator[_Item]:
    """Yield items and tell, every half second while a bar is open, ``text`` of how many were done."""
    if not _open:
        yield from items
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if (now := time.monotonic()) - last >= _EVERY:
            last = now
            tell(text(done))
        yield item
