"""Names: our weightings and architectures in LibMTL's namespaces and options, and any name or class back to a class."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from libmtl_fair.errors import HostError, RecipeError, unknown
from libmtl_fair.libmtl.loading import (
    LINEAGE,
    AbsArchitecture,
    AbsWeighting,
    architecture_namespace,
    config_module,
    weighting_namespace,
)
from libmtl_fair.libmtl.optimizers import prepare_forgotten

OUR_WEIGHTINGS: dict[str, type[Any]] = {}
OUR_ARCHITECTURES: dict[str, type[Any]] = {}
BILEVEL = ("MOML", "FORUM", "AutoLambda")


def register(*classes: type[Any]) -> None:
    """Give classes to LibMTL under their own names: namespaces and command-line options. Twice is as good as once."""
    for cls in classes:
        is_weighting = issubclass(cls, AbsWeighting)
        ours, namespace = (
            (OUR_WEIGHTINGS, weighting_namespace) if is_weighting else (OUR_ARCHITECTURES, architecture_namespace)
        )
        ours[cls.__name__] = cls
        setattr(namespace, cls.__name__, cls)
        if cls.__name__ not in namespace.__all__:
            namespace.__all__.append(cls.__name__)
        _add_options(cls)
    if not hasattr(config_module.prepare_args, "wraps"):
        config_module.prepare_args = _wrap_prepare_args(config_module.prepare_args)  # type: ignore[attr-defined]


def names(namespace: Any, base: type[Any]) -> list[str]:
    """Return the names of the usable classes in a LibMTL namespace."""
    found = ((n, v) for n, v in vars(namespace).items() if isinstance(v, type))
    return sorted(n for n, v in found if issubclass(v, base) and v is not base)


def weighting_names() -> list[str]:
    """Return every weighting that can be named: LibMTL's and ours."""
    return names(weighting_namespace, AbsWeighting)


def architecture_names() -> list[str]:
    """Return every architecture that can be named: LibMTL's and ours."""
    return names(architecture_namespace, AbsArchitecture)


def resolve_weighting(weighting: str | type[Any]) -> type[Any]:
    """Return the weighting class for a name or a class.

    Raises
    ------
    HostError : unknown, or no LibMTL weighting.
    """
    if isinstance(weighting, str) and weighting in BILEVEL:
        raise HostError(
            f"{weighting} trains on two levels inside the Trainer of LibMTL's git main: call lf.heal() there and use LibMTL.Trainer"
        )
    return _resolve(weighting, "weighting", AbsWeighting, weighting_namespace)


def resolve_architecture(architecture: str | type[Any]) -> type[Any]:
    """Return the architecture class for a name or a class.

    Raises
    ------
    HostError : unknown, or no LibMTL architecture.
    """
    return _resolve(architecture, "architecture", AbsArchitecture, architecture_namespace)


def _resolve(wanted: str | type[Any], what: str, base: type[Any], namespace: Any) -> type[Any]:
    if isinstance(wanted, type):
        if not issubclass(wanted, base):
            raise HostError(f"{what} {wanted.__name__} is no LibMTL {what}: subclass LibMTL.{what}.{base.__name__}")
        return wanted
    options = names(namespace, base)
    if wanted not in options:
        raise HostError(unknown(what, wanted, options))
    found: type[Any] = getattr(namespace, wanted)
    return found


@cache
def _default_args(name: str, arch: str = "HPS") -> Mapping[str, Any]:
    params = config_module.LibMTL_args.parse_args([])
    params.weighting, params.arch = name, arch
    with contextlib.redirect_stdout(io.StringIO()):
        kwargs, _, _ = config_module.prepare_args(params)
    return dict(kwargs["weight_args"])


def weight_args(cls: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a LibMTL weighting: LibMTL's defaults, then those given, in either lineage's names.

    A user's subclass takes its LibMTL parent's defaults, and any name of its own.

    Raises
    ------
    RecipeError : a name that this weighting does not take.
    """
    parent = next((c for c in cls.__mro__ if _is_libmtls(c)), None)
    if parent is None:
        return dict(given)
    name = parent.__name__
    args = dict(_default_args(name))
    for key, value in given.items():
        match = next((d for d in args if key in (d, f"{name}_{d}") or d == f"{name}_{key}"), None)
        if match is None and parent is cls:
            other = _OTHER_LINEAGE.get((name, key.removeprefix(f"{name}_")))
            reason = f": {other}" if other else f": {unknown('setting', key, args)}"
            raise RecipeError(f"{name} (LibMTL, {LINEAGE}){reason}")
        args[match or key] = value
    return args


_OTHER_LINEAGE = {
    ("RLW", "dist"): "it takes no 'dist': git main always draws the weights from a normal distribution; leave it out",
    (
        "GradVac",
        "group_type",
    ): "it takes no 'group_type': only git main compares gradients layer by layer; leave it out",
}
"""Settings that one lineage has and the other lacks; only reached where it is lacking."""


def _is_libmtls(cls: type[Any]) -> bool:
    known = getattr(weighting_namespace, cls.__name__, None) is cls
    return known and cls is not AbsWeighting and cls.__name__ not in OUR_WEIGHTINGS


def _options(cls: type[Any]) -> Mapping[str, Any]:
    settings = getattr(cls, "settings_class", None)
    return settings.model_fields if settings else {}


def _option_name(cls: type[Any], field_name: str) -> str:
    return f"{cls.__name__.lower()}_{field_name}"


def _add_options(cls: type[Any]) -> None:
    parser: argparse.ArgumentParser = config_module.LibMTL_args
    for name, field in _options(cls).items():
        option = "--" + _option_name(cls, name)
        if option not in parser._option_string_actions:
            help = f"{name} of {cls.__name__} (default: {field.default})"
            parser.add_argument(option, type=_value, default=None, help=help)


def _value(text: str) -> Any:
    """Read a command-line value: a number, true, false, null, a list or mapping as JSON; anything else is text."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text


def _given(cls: type[Any], params: argparse.Namespace) -> dict[str, Any]:
    found = {name: getattr(params, _option_name(cls, name), None) for name in _options(cls)}
    return {name: value for name, value in found.items() if value is not None}


def _wrap_prepare_args(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let ``prepare_args`` know our names, and the optimisers and schedulers that it accepts but forgets to prepare.

    What LibMTL prepares itself goes through unchanged. The base of a weighting of ours takes its hyperparameters from
    LibMTL's options: ``--relif_base GradNorm --alpha 1``.
    """

    def prepare_args(params: argparse.Namespace) -> Any:
        _check_name("weighting", params.weighting, [*weighting_names(), *BILEVEL, "DIY"])
        _check_name("architecture", params.arch, [*architecture_names(), "DIY"])
        weighting, architecture = OUR_WEIGHTINGS.get(params.weighting), OUR_ARCHITECTURES.get(params.arch)
        forgotten = prepare_forgotten(params)
        if weighting is None and architecture is None and not forgotten:
            return original(params)
        plain, given = copy.copy(params), _given(weighting, params) if weighting else {}
        if weighting:
            plain.weighting = str(given.get("base", weighting.settings_class.model_fields["base"].default))
            _check_name("base weighting", plain.weighting, [n for n in weighting_names() if n not in OUR_WEIGHTINGS])
        plain.arch = "HPS" if architecture else params.arch
        for what in forgotten:
            setattr(plain, what, {"optim": "adam", "scheduler": None}[what])
        with contextlib.redirect_stdout(io.StringIO()):
            kwargs, optim_param, scheduler_param = original(plain)
        optim_param = forgotten.get("optim", optim_param)
        scheduler_param = forgotten.get("scheduler", scheduler_param)
        if weighting:
            base_args = {**kwargs["weight_args"], **given.pop("base_args", {})}
            kwargs["weight_args"] = {**given, "base_args": base_args} if base_args else given
            weighting.settings_class.from_args(weighting.__name__, kwargs["weight_args"])
        if architecture:
            kwargs["arch_args"].update(_given(architecture, params))
        config_module._display(params, kwargs, optim_param, scheduler_param)
        return kwargs, optim_param, scheduler_param

    prepare_args.__doc__ = original.__doc__
    prepare_args.__dict__["wraps"] = original
    return prepare_args


def _check_name(what: str, name: str, options: list[str]) -> None:
    if name not in options:
        raise RecipeError(unknown(what, name, options))
