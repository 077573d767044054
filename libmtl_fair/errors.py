"""Errors of this package: every message says what was wrong, where, what was expected, and what to do."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class FairMTLError(ValueError):
    """Base of all errors that libmtl_fair raises on purpose; ``where`` names the entry of a recipe, if it is about one."""

    where: tuple[str, ...] = ()


class RecipeError(FairMTLError):
    """A recipe, a setting of a method, or a command line does not make sense."""


class DataError(FairMTLError):
    """A table, loader, label or group does not fit what was declared."""


class HostError(FairMTLError):
    """LibMTL cannot be loaded, or a model, weighting or architecture does not fit."""


class CheckpointError(FairMTLError):
    """A checkpoint or a run folder cannot be written, read or continued."""


class DamagedFileError(CheckpointError):
    """A file is not as it was written: bytes changed, lost or added."""


class ProcessError(FairMTLError):
    """Another process of a training has ended, or does not answer."""


def about(section: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let DataErrors of a function say that they are about an entry of ``section``: its first argument, a name or what has one."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except DataError as error:
                error.where = error.where or (section, str(getattr(args[0], "name", args[0])))
                raise

        return wrapped

    return decorate


def near(name: str, options: Iterable[str]) -> str | None:
    """Return the option whose spelling is nearest to ``name``, or None if none is near.

    >>> near("wieghting", ["weighting", "architecture"])
    'weighting'
    """
    known = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return known[found[0]] if found else None


def unknown(what: str, name: object, options: Iterable[str]) -> str:
    """Say that ``name`` is no known ``what``: the near name first, then all of them.

    >>> unknown("dataset", "adlut", ["adult", "compas"])
    "unknown dataset 'adlut'; did you mean 'adult'? Known: adult, compas"
    """
    options = sorted(options)
    guess = near(str(name), options)
    hint = f"; did you mean {guess!r}?" if guess else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(options) or '(none)'}"
