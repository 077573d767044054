"""Names: our weightings and architectures in LibMTL's namespaces and options, and any name or class back to a class."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from libmtl_fair.errors import HostError, RecipeError, near, unknown
from libmtl_fair.files import Json
from libmtl_fair.libmtl.loading import (
    LINEAGE,
    AbsArchitecture,
    AbsWeighting,
    architecture_namespace,
    config_module,
    weighting_namespace,
)
from libmtl_fair.libmtl.optimizers import prepare_forgotten

Prepare = Callable[[argparse.Namespace], tuple[Json, ...]]
"""LibMTL's ``prepare_args``: options -> what a trainer takes."""
OUR_WEIGHTINGS: dict[str, type[Any]] = {}
OUR_ARCHITECTURES: dict[str, type[Any]] = {}
"""Name, or ``module:Class`` once it was resolved -> class with ``settings_class``."""
BILEVEL = ("MOML", "FORUM", "AutoLambda")
ENTRY_POINTS = "libmtl_fair.methods"
"""Entry point group in which other packages offer methods."""
TORCHJD = "torchjd:"
"""What a weighting of TorchJD's is named with."""
_TORCHJD_ARGS = "torchjd_args"
_OTHER_LINEAGE = {
    "RLW.dist": "it takes no 'dist': git main always draws the weights from a normal distribution; leave it out",
    "GradVac.group_type": "it takes no 'group_type': only git main compares gradients layer by layer; leave it out",
}
"""Settings that one lineage has and the other lacks; only reached where it is lacking."""


class _Kind(NamedTuple):
    what: str
    base: type[nn.Module]
    namespace: ModuleType
    ours: dict[str, type[Any]]

    def names(self) -> list[str]:
        """Return the names of the usable classes in LibMTL's namespace."""
        found = ((n, v) for n, v in vars(self.namespace).items() if isinstance(v, type))
        return sorted(n for n, v in found if issubclass(v, self.base) and v is not self.base and ":" not in n)

    def resolve(self, wanted: str | type[nn.Module]) -> type[nn.Module]:
        """Return the class for a name, a ``module:Class`` or a class."""
        if isinstance(wanted, type) or ":" in wanted:
            cls = wanted if isinstance(wanted, type) else self._elsewhere(wanted)
            if not issubclass(cls, self.base):
                raise HostError(
                    f"{self.what} {cls.__name__} is no LibMTL {self.what}: subclass LibMTL.{self.what}.{self.base.__name__}"
                )
            if isinstance(wanted, str) and hasattr(cls, "settings_class"):
                self.ours[wanted] = cls
            return cls
        if wanted not in self.names():
            raise HostError(unknown(self.what, wanted, self.names()))
        found: type[nn.Module] = getattr(self.namespace, wanted)
        return found

    def _elsewhere(self, wanted: str) -> type[object]:
        """Return one of TorchJD's aggregators as a weighting, or the class of a ``module:Class``."""
        if self.base is not AbsWeighting or not wanted.startswith(TORCHJD):
            return _imported(self.what, wanted)
        from libmtl_fair.libmtl.torchjd_bridge import weighting_of

        found = weighting_of(wanted.removeprefix(TORCHJD))
        setattr(self.namespace, wanted, found)  # where LibMTL's own scripts look it up
        return found


_WEIGHTING = _Kind("weighting", AbsWeighting, weighting_namespace, OUR_WEIGHTINGS)
_ARCHITECTURE = _Kind("architecture", AbsArchitecture, architecture_namespace, OUR_ARCHITECTURES)


def register(*classes: type[nn.Module]) -> None:
    """Give classes to LibMTL under their own names: namespaces and command-line options. Twice is as good as once.

    Raises
    ------
    HostError
        What is neither a weighting nor an architecture, or has the name of one of LibMTL's or ours.
    """
    for cls in classes:
        kind = next((k for k in (_WEIGHTING, _ARCHITECTURE) if isinstance(cls, type) and issubclass(cls, k.base)), None)
        if kind is None:
            raise HostError(
                f"register takes subclasses of LibMTL.weighting.AbsWeighting or LibMTL.architecture.AbsArchitecture, found {cls!r}"
            )
        held = getattr(kind.namespace, cls.__name__, None)
        package = str(getattr(held, "__module__", "")).partition(".")[0]
        if package in ("LibMTL", "libmtl_fair") and package != cls.__module__.partition(".")[0]:
            raise HostError(
                f"{package} has {kind.what} {cls.__name__!r} of its own; give yours another name, or hand over the class itself"
            )
        kind.ours[cls.__name__] = cls
        setattr(kind.namespace, cls.__name__, cls)
        if cls.__name__ not in kind.namespace.__all__:
            kind.namespace.__all__.append(cls.__name__)
        _add_options(cls)
    if f"--{_TORCHJD_ARGS}" not in config_module.LibMTL_args._option_string_actions:
        help = "settings of a weighting of TorchJD, as JSON: --weighting torchjd:CAGrad --torchjd_args '{\"c\": 0.4}'"
        config_module.LibMTL_args.add_argument(f"--{_TORCHJD_ARGS}", type=_value, default={}, help=help)
    if not hasattr(config_module.prepare_args, "wraps"):
        config_module.prepare_args = _wrap_prepare_args(config_module.prepare_args)  # type: ignore[attr-defined]


def discover() -> None:
    """Register the methods that installed packages offer as entry points; warn of those that cannot be had."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            cls = point.load()
            if not (isinstance(cls, type) and issubclass(cls, (AbsWeighting, AbsArchitecture))):
                raise TypeError("it is neither a LibMTL weighting nor an architecture")
            if cls.__name__ in {*weighting_names(), *architecture_names()}:
                raise ValueError(f"the name {cls.__name__} is taken")
            register(cls)
        except (ImportError, AttributeError, SyntaxError, TypeError, ValueError, RuntimeError) as error:
            warnings.warn(f"method {point.name!r} ({point.value}) is left out: {error}", stacklevel=2)


def weighting_names() -> list[str]:
    """Return every weighting that can be named: LibMTL's and ours."""
    return _WEIGHTING.names()


def architecture_names() -> list[str]:
    """Return every architecture that can be named: LibMTL's and ours."""
    return _ARCHITECTURE.names()


def resolve_weighting(weighting: str | type[nn.Module]) -> type[nn.Module]:
    """Return the weighting class for a name, a ``my_package.module:Class`` or a class."""
    if weighting in BILEVEL:
        raise HostError(
            f"{weighting} trains on two levels inside the Trainer of LibMTL's git main: call lf.heal() there and use LibMTL.Trainer"
        )
    return _WEIGHTING.resolve(weighting)


def resolve_architecture(architecture: str | type[nn.Module]) -> type[nn.Module]:
    """Return the architecture class for a name, a ``my_package.module:Class`` or a class."""
    return _ARCHITECTURE.resolve(architecture)


def _imported(what: str, text: str) -> type[object]:
    module, _, name = text.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise HostError(f"{what} {text!r}: expected a name, or 'my_package.module:Class'")
    try:
        found = import_module(module)
    except (ImportError, SyntaxError) as error:
        raise HostError(
            f"{what} {text!r}: module {module!r} cannot be imported ({error}); install it, or put its folder on PYTHONPATH"
        ) from error
    cls = getattr(found, name, None)
    if not isinstance(cls, type):
        guess = near(name, [n for n, value in vars(found).items() if isinstance(value, type)])
        raise HostError(
            f"{what} {text!r}: {module} has no class {name!r}" + (f"; did you mean {guess!r}?" if guess else "")
        )
    return cls


@cache
def _default_args(name: str) -> Mapping[str, object]:
    params = config_module.LibMTL_args.parse_args([])
    params.weighting, params.arch = name, "HPS"
    with contextlib.redirect_stdout(io.StringIO()):
        kwargs, _, _ = config_module.prepare_args(params)
    return dict(kwargs["weight_args"])


def weight_args(cls: type[nn.Module], given: Mapping[str, object]) -> dict[str, object]:
    """Return the hyperparameters of a LibMTL weighting: LibMTL's defaults, then those given, in either lineage's names.

    A user's subclass takes its LibMTL parent's defaults, and any name of its own. A weighting that declares its settings checks them.
    """
    declared = getattr(cls, "settings_class", None)
    if declared is not None:
        return dict(declared.from_args(cls.__name__, given).model_dump())
    name = _parent(cls, _WEIGHTING, "")
    if not name:
        return dict(given)
    parent = getattr(weighting_namespace, name)
    args = dict(_default_args(name))
    for key, value in given.items():
        match = next((d for d in args if key in (d, f"{name}_{d}") or d == f"{name}_{key}"), None)
        if match is None and parent is cls:
            reason = _OTHER_LINEAGE.get(f"{name}.{key.removeprefix(f'{name}_')}", unknown("setting", key, args))
            raise RecipeError(f"{name} (LibMTL, {LINEAGE}): {reason}")
        args[match or key] = value
    return args


def resolve_any(name: str) -> type[nn.Module]:
    """Return the class of a weighting or architecture that can be named."""
    return (_WEIGHTING if name in _WEIGHTING.names() else _ARCHITECTURE).resolve(name)


def described(name: str) -> list[dict[str, str]]:
    """Return a row a setting of a weighting or architecture, as ``Declared.described``; of LibMTL's weightings names and defaults."""
    cls = resolve_any(name)
    declared = getattr(cls, "settings_class", None)
    if declared is not None:
        return list(declared.described())
    parent = _parent(cls, _WEIGHTING, "")
    rows = _default_args(parent) if parent else {}
    empty = dict.fromkeys(("range", "search", "help"), "")
    return [
        {**empty, "name": key, "type": type(value).__name__, "default": str(value), "source": "LibMTL"}
        for key, value in rows.items()
    ]


def _parent(cls: type[nn.Module], kind: _Kind, default: str) -> str:
    """Return the name of LibMTL's own class that a class is or derives from, whose options are its options too."""
    libmtls = {getattr(kind.namespace, name): name for name in kind.names() if name not in kind.ours}
    return next((libmtls[c] for c in cls.__mro__ if c in libmtls), default)


def _options(cls: type[nn.Module]) -> dict[str, str]:
    """Return setting -> name of its command-line option, of a class that declares settings."""
    settings = getattr(cls, "settings_class", None)
    return {name: f"{cls.__name__.lower()}_{name}" for name in (settings.model_fields if settings else ())}


def _add_options(cls: type[nn.Module]) -> None:
    parser: argparse.ArgumentParser = config_module.LibMTL_args
    settings = getattr(cls, "settings_class", None)
    for name, option in _options(cls).items():
        if settings and f"--{option}" not in parser._option_string_actions:
            help = f"{name} of {cls.__name__} (default: {settings.model_fields[name].default})"
            parser.add_argument(f"--{option}", type=_value, default=None, help=help)


def _value(text: str) -> object:
    """Read a command-line value: a number, true, false, null, a list or mapping as JSON; anything else is text."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text


def _given(cls: type[nn.Module] | None, params: argparse.Namespace) -> Json:
    found = {name: getattr(params, option, None) for name, option in (_options(cls) if cls else {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def _wrap_prepare_args(original: Prepare) -> Prepare:
    """Let ``prepare_args`` know our names, and the optimisers and schedulers that it accepts but forgets to prepare.

    What LibMTL prepares itself goes through unchanged. The base of a weighting of ours takes its hyperparameters from
    LibMTL's options: ``--relif_base GradNorm --alpha 1``.
    """

    @wraps(original)
    def prepare_args(params: argparse.Namespace) -> tuple[Json, ...]:
        if params.weighting.startswith(TORCHJD):
            resolve_weighting(params.weighting)
        else:
            _check_name("weighting", params.weighting, [*weighting_names(), *BILEVEL, "DIY"])
        _check_name("architecture", params.arch, [*architecture_names(), "DIY"])
        weighting, architecture = OUR_WEIGHTINGS.get(params.weighting), OUR_ARCHITECTURES.get(params.arch)
        forgotten = prepare_forgotten(params)
        if weighting is None and architecture is None and not forgotten:
            return original(params)
        plain, given = copy.copy(params), _given(weighting, params)
        fields = getattr(getattr(weighting, "settings_class", None), "model_fields", {})
        base = str(given.get("base", fields["base"].default)) if "base" in fields else ""
        if base.startswith(TORCHJD):
            resolve_weighting(base)
            plain.weighting = "EW"
        elif base:
            plain.weighting = base
            _check_name("base weighting", base, [n for n in weighting_names() if n not in OUR_WEIGHTINGS])
        elif weighting:
            plain.weighting = _parent(weighting, _WEIGHTING, "EW")
        if architecture:
            plain.arch = _parent(architecture, _ARCHITECTURE, "HPS")
        for what in forgotten:
            setattr(plain, what, {"optim": "adam", "scheduler": None}[what])
        with contextlib.redirect_stdout(io.StringIO()):
            kwargs, optim_param, scheduler_param = original(plain)
        optim_param = forgotten.get("optim", optim_param)
        scheduler_param = forgotten.get("scheduler", scheduler_param)
        further = dict(getattr(params, _TORCHJD_ARGS, None) or {})
        if weighting and fields:
            if base:
                further = further if base.startswith(TORCHJD) else {}
                base_args = {**kwargs["weight_args"], **further, **given.pop("base_args", {})}
                given = {**given, "base_args": base_args} if base_args else given
            kwargs["weight_args"] = given if base else {**given, **further}
            weighting.settings_class.from_args(weighting.__name__, kwargs["weight_args"])
        kwargs["arch_args"].update(_given(architecture, params))
        config_module._display(params, kwargs, optim_param, scheduler_param)
        return kwargs, optim_param, scheduler_param

    prepare_args.__dict__["wraps"] = original
    return prepare_args


def _check_name(what: str, name: str, options: Iterable[str]) -> None:
    if name not in options:
        raise RecipeError(unknown(what, name, options))
