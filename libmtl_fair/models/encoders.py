"""The register of encoders: what recipes may name, what each takes, and its pretrained weights."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from libmtl_fair.errors import DataError, RecipeError, unknown

_INPUTS = {1: "rows of numbers [n_features]", 2: "sequences [steps, n_features]", 3: "images [channels, height, width]"}


@dataclass(frozen=True)
class EncoderKind:
    """An encoder that recipes name.

    Parameters
    ----------
    name : str
        As ``model.encoder`` spells it.
    make : callable
        Takes the width of the input (features, features of a step, or channels) and the ``encoder_args``; returns a module
        whose ``out_features`` is the width of its representation.
    dims : int
        Of one example's input: 1 for rows, 2 for sequences, 3 for images.
    """

    name: str
    make: Callable[..., nn.Module]
    dims: int

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the ``encoder_args`` that it takes."""
        return tuple(inspect.signature(self.make).parameters)[1:]

    def __call__(self, input_shape: Sequence[int], args: Mapping[str, object] | None = None) -> nn.Module:
        """Return a new encoder for inputs of this shape, without the batch.

        Raises
        ------
        DataError
            Inputs of another kind.
        RecipeError
            An argument that it does not take, or a value that does not fit.
        """
        if len(input_shape) != self.dims:
            raise DataError(
                f"encoder {self.name!r} takes {_INPUTS[self.dims]}, and these data have inputs of shape {list(input_shape)}"
            )
        for name in args or {}:
            if name not in self.arguments:
                raise RecipeError(unknown(f"argument of encoder {self.name!r}", name, self.arguments))
        try:
            return self.make(input_shape[-1 if self.dims == 2 else 0], **(args or {}))
        except (TypeError, AttributeError) as error:
            raise RecipeError(f"encoder {self.name!r} cannot be made of {dict(args or {})}: {error}") from error


@cache
def torchvision_models() -> tuple[Any, str]:
    """Return ``torchvision.models``, or None, and why it does not import (absent, or made for another torch)."""
    before = set(sys.modules)
    try:
        return import_module("torchvision.models"), ""
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        for name in set(sys.modules) - before:  # half loaded
            if name.partition(".")[0] == "torchvision":
                del sys.modules[name]
        return None, str(error)


ENCODERS: dict[str, EncoderKind] = {}
"""Encoders by name, as recipes spell them; :func:`registered` adds one."""

Make = TypeVar("Make", bound=Callable[..., nn.Module])


def registered(name: str, dims: int) -> Callable[[Make], Make]:
    """Return a decorator that enters a class or function in :data:`ENCODERS`.

    Parameters
    ----------
    name, dims : str, int
        See :class:`EncoderKind`.
    """

    def enter(make: Make) -> Make:
        ENCODERS[name] = EncoderKind(name, make, dims)
        return make

    return enter


def encoder_for(name: str) -> EncoderKind:
    """Return the encoder of that name.

    Raises
    ------
    RecipeError
        No such encoder.

    Examples
    --------
    >>> encoder_for("mlp")((10,), {"hidden": [8, 4]}).out_features
    4
    """
    if name not in ENCODERS:
        raise RecipeError(unknown("encoder", name, ENCODERS))
    return ENCODERS[name]
