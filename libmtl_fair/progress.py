"""A progress bar on the error stream, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from libmtl_fair.shown import Screen


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Show a bar of ``total`` steps; calling what it gives advances it by one and sets the text behind it."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[note]}")
    with Progress(*columns, console=Screen(stderr=True), transient=True) as progress:
        job = progress.add_task(title, total=total, completed=done, note="")
        yield lambda text: progress.update(job, advance=1, note=text)
