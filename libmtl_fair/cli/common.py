"""What commands share: the app, how a command ends, how it speaks."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Never

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer import Option

import libmtl_fair
from libmtl_fair.errors import CheckpointError, DataError, FairMTLError, HostError, RecipeError
from libmtl_fair.shown import Screen

if TYPE_CHECKING:
    from libmtl_fair.report import RunFolder

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
out = Screen()
err = Screen(stderr=True)

Several = list[str] | None


@contextmanager
def _clean_exit(resume_hint: str) -> Iterator[None]:
    """Turn errors of ours into one message and an exit code, and an interruption into a way to go on."""

    def stop(*_: object) -> Never:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except FairMTLError as error:
        bad = isinstance(error, RecipeError | DataError | HostError | CheckpointError)
        say(f"[bold red]{'error' if bad else 'failed'}:[/] {escape(str(error))}", err)
        raise typer.Exit(BAD_INPUT if bad and not str(error).startswith("cannot write") else FAILED) from error
    except KeyboardInterrupt as error:
        say(f"interrupted; nothing finished is lost.{resume_hint}", err)
        raise typer.Exit(INTERRUPTED) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def command(resume_hint: str = "", **settings: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that ends cleanly; what needs torch is imported inside it, not for ``--help``.

    What trains uses one thread: fastest for small models on a CPU, and no fight with other processes for cores.
    """

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*args: object, **options: object) -> None:
            with _clean_exit(resume_hint):
                libmtl_fair.register_methods()
                if resume_hint and "OMP_NUM_THREADS" not in os.environ:
                    import torch

                    torch.set_num_threads(1)
                function(*args, **options)

        return app.command(context_settings=settings or None)(command)

    return wrap


def say(text: str, to: Console = out) -> None:
    """Print one line, wrapped by nobody."""
    to.print(text, soft_wrap=True, highlight=False)


def findings(run: RunFolder) -> None:
    """Say in plain sentences what a run, or a comparison, found."""
    from libmtl_fair.report.findings import findings

    for about, text in findings(run):
        out.print(f"[bold]{about}.[/] {escape(text)}", highlight=False)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; its cells are text, never markup."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    out.print(table)


def _version(asked: bool) -> None:
    if asked:
        say(f"libmtl-fair {libmtl_fair.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="show the version")] = False,
) -> None:
    """Fair multi-task learning for LibMTL.

    Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and resumable.
    """
