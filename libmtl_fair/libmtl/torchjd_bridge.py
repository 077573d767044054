"""TorchJD's aggregators as LibMTL weightings: ``torchjd:UPGrad``. TorchJD is an extra, and is imported when one is asked for.

The weights come from the tasks' gradients as LibMTL's weightings get them (:mod:`~libmtl_fair.libmtl.gradients`): of the shared
parameters, of the representation under ``rep_grad=True``, summed over all processes. Most look at their Gram matrix only.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Strict, create_model
from torch import Tensor, nn

from libmtl_fair.errors import HostError, RecipeError, unknown
from libmtl_fair.libmtl.compat_weightings import Record, recorded
from libmtl_fair.libmtl.loading import AbsWeighting
from libmtl_fair.methods.base import Declared, setting

PREFIX = "torchjd:"
_SEVERAL = ("MoDo", "SDMGrad")
"""They weigh a batch by the gradients of another: their matrix is no Gram matrix."""
_COORDINATES = ("GradDrop", "TrimmedMean")
"""Their result is no sum of the tasks' gradients."""
_NUMBERS = Annotated[
    tuple[float, ...], Strict(False), BeforeValidator(lambda v: v.tolist() if isinstance(v, Tensor) else v)
]
_OVER = "over"
"""Setting: which weighting CRMOGM smooths; a recipe's ``weighting`` is CRMOGM itself."""


class TorchJDSettings(Declared):
    """Settings of one of TorchJD's aggregators, as its constructor has them; its own checks are run when they are made."""

    made_from: ClassVar[type[nn.Module]]
    required: ClassVar[tuple[str, ...]] = ()
    label: ClassVar[str] = ""

    def check(self) -> None:
        """Make one, for two tasks, and say what it objects to."""
        for name in self.required:
            if getattr(self, name) is None:
                raise self.refused(name, f"{name} must be given: {self.described_as(name)}")
        try:
            self.make(2)
        except ImportError as error:
            raise RecipeError(f"{self.label}: {error}") from None
        except (ValueError, TypeError) as error:
            names = [name for name in type(self).model_fields if name in str(error)]
            raise self.refused(names[0] if names else "", str(error).rstrip(".")) from None

    def make(self, n_tasks: int, like: Tensor | None = None) -> nn.Module:
        """Return the aggregator for so many tasks, and gradients ``like`` these."""
        kind: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
        given: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        values = {n: torch.tensor(v, **kind) if isinstance(v, tuple) else v for n, v in given.items() if v is not None}
        if (inner := values.pop(_OVER, None)) is not None:
            values["weighting"] = weighting_of(str(inner)).made_by().make(n_tasks, like).weighting
        known = inspect.signature(self.made_from).parameters
        if "n_tasks" in known:
            values["n_tasks"] = n_tasks
        if "projector" in known and importlib.util.find_spec("qpsolvers") is None:
            values["projector"] = _projector()
        return self.made_from(**values)

    @classmethod
    def described(cls) -> list[dict[str, str]]:
        """Return a row a setting, as :meth:`Declared.described`; lists of numbers are called so."""
        rows = super().described()
        for row in rows:
            lists = row["type"] in ("Optional", "Union")
            row.update({"type": "list of numbers", "range": "one a task, or null"} if lists else {})
        return rows

    @classmethod
    def described_as(cls, name: str) -> str:
        """Return what TorchJD says of a setting."""
        return cls.model_fields[name].description or "TorchJD has no default"

    @classmethod
    def refused(cls, name: str, message: str, *within: str) -> RecipeError:
        """Return the error that a setting is refused with."""
        error = RecipeError(f"{cls.label}: {message}")
        error.where = (name, *within) if name else ()
        return error


class TorchJDWeighting(AbsWeighting):  # type: ignore[misc]
    """A LibMTL weighting that weighs as one of TorchJD's aggregators; its subclasses are made by :func:`weighting_of`."""

    settings_class: ClassVar[type[TorchJDSettings]]
    made_by: ClassVar[type[TorchJDSettings]]
    source: ClassVar[str] = "TorchJD"
    cost: ClassVar[str] = "one gradient of the shared parameters a task; some solve on the CPU"
    torchjd: Held

    def init_param(self) -> None:
        """Have no aggregator yet: its settings come with the first step."""
        self.torchjd = Held()

    def backward(self, losses: Tensor, **settings: Any) -> Record | None:
        """Leave the aggregated gradient in ``.grad``; return the tasks' weights, or None where there are none."""
        name = self.made_by.label  # as the base of a method, settings_class is the method's
        found = self._get_grads(losses, mode="backward")
        per_grads, grads = found if self.rep_grad else (None, found)
        if self.torchjd.aggregator is None:
            self.torchjd.aggregator = self.made_by.from_args(name, settings).make(self.task_num, grads)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "You are solving a parameterized problem that is not DPP")  # NashMTL
                weights, vector = self.torchjd.aggregate(grads.detach())
        except ValueError as error:
            raise HostError(f"{name}: {error}") from error
        if weights is None and self.rep_grad:
            if name.removeprefix(PREFIX) in _COORDINATES:
                raise HostError(f"{name} works on parameter gradients: use rep_grad=False")
            weights = torch.linalg.lstsq(grads.T.double(), vector.double().unsqueeze(1), driver="gelsd").solution[:, 0]
        if weights is None:
            self._reset_grad(vector)
            return None
        self._backward_new_grads(weights.to(grads.dtype), per_grads=per_grads, grads=grads)
        return recorded(self, weights)


class Held:
    """An aggregator of TorchJD, with what it remembers: nothing of it is a parameter of the model."""

    def __init__(self) -> None:
        self.aggregator: nn.Module | None = None
        self._waiting: Sequence[Mapping[str, object]] = ()

    def aggregate(self, grads: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the weights [T] where it has any, and the aggregated gradient [P], of gradients [T, P]."""
        made = self.aggregator
        assert made is not None
        weigh: Any = (
            made if type(made).__name__.endswith("Weighting") else made.weighting if _weighs(type(made)) else None
        )
        if self._waiting:  # what it remembers is shaped, and keyed, by the first gradients that it sees
            with torch.random.fork_rng(devices=[grads.device] if grads.device.type == "cuda" else []):
                (weigh or made)(grads)
            for module, state in zip(made.modules(), self._waiting):
                for name, value in state.items():
                    held = getattr(module, name, None)
                    setattr(module, name, _put_back(value, held if isinstance(held, Tensor) else grads))
            self._waiting = ()
        if weigh is None:
            return None, made(grads)
        weights: Tensor = weigh(grads)
        return weights, weights @ grads

    def held_state(self) -> list[dict[str, object]]:
        """Return what it remembers, module by module: tensors, arrays (marked) and plain values."""
        return [
            {
                name: {"array": torch.from_numpy(value.copy())} if isinstance(value, np.ndarray) else value
                for name, value in {**vars(module), **module._buffers}.items()
                if name not in _PLAIN and isinstance(value, _REMEMBERED)
            }
            for module in (() if self.aggregator is None else self.aggregator.modules())
        ]

    def take_state(self, state: Sequence[Mapping[str, object]]) -> None:
        """Take what :meth:`held_state` gave; it is put back at the next step."""
        self._waiting = state


_PLAIN = frozenset(vars(nn.Module()))
_REMEMBERED = (Tensor, np.ndarray, bool, int, float, str, types.NoneType)


def _put_back(value: object, like: Tensor) -> object:
    if isinstance(value, Tensor):
        return value.to(like.device)
    return value["array"].numpy().copy() if isinstance(value, dict) else value


def _projector() -> object:
    """Return TorchJD's projector onto the dual cone where its QP solver is not installed: the same problem, by SciPy's NNLS (ours)."""
    from scipy.linalg import cholesky
    from scipy.optimize import nnls

    class Projector(import_module("torchjd.linalg").DualConeProjector):  # type: ignore[misc]
        def __call__(self, U: Tensor, G: Tensor) -> Tensor:
            gram, trace = G.detach().double().cpu().numpy(), float(G.diagonal().sum())
            root = cholesky((gram / trace if trace >= _EPS else gram * 0) + _EPS * np.eye(len(gram)))
            rows = U.detach().double().cpu().numpy().reshape(-1, len(gram))
            found = np.stack([u + nnls(root, -root @ u)[0] for u in rows]).reshape(U.shape)
            return torch.as_tensor(found, device=G.device, dtype=G.dtype)

        def __reduce__(self) -> tuple[Any, ...]:
            return _projector, ()

    return Projector()


_EPS = 1e-4
"""What TorchJD's own projector takes as no gradient at all, and adds to the diagonal."""


def _module() -> types.ModuleType:
    try:
        return import_module("torchjd.aggregation")
    except ImportError as error:
        raise HostError(
            f"a weighting of TorchJD needs torchjd ({error}): pip install 'libmtl_fair[torchjd]'"
        ) from error


def _weighs(cls: type[object]) -> bool:
    return any(base.__name__ == "WeightedAggregator" for base in cls.__mro__)


@cache
def torchjd_names() -> list[str]:
    """Return the aggregators that can be named, without the prefix.

    Raises
    ------
    HostError
        TorchJD is not installed.
    """
    found: dict[str, type[nn.Module]] = {name: getattr(_module(), name) for name in _module().__all__}
    plain = {n for n, cls in found.items() if not inspect.isabstract(cls) and not n.endswith("Weighting")}
    alone = {n.removesuffix("Weighting") for n in found if n.endswith("Weighting")} - {"", *_SEVERAL}
    return sorted({*plain, *alone} - {"WeightedAggregator", "GramianWeightedAggregator"})


@cache
def weighting_of(name: str) -> type[TorchJDWeighting]:
    """Return the LibMTL weighting for one of TorchJD's aggregators, by its name there.

    Raises
    ------
    HostError
        TorchJD is not installed, or has no such aggregator, or one that takes several batches a step.

    Examples
    --------
    >>> [row["name"] for row in weighting_of("AlignedMTL").settings_class.described()]
    ['pref_vector', 'scale_mode']
    """
    if name in _SEVERAL:
        raise HostError(f"{PREFIX}{name} takes independent batches a step; LibMTL's git main has it as {name!r}")
    if name not in torchjd_names():
        raise HostError(unknown("aggregator of TorchJD", name, torchjd_names()))
    module = _module()
    cls = getattr(module, name, None) or getattr(module, f"{name}Weighting")
    made_by = _settings_of(name, cls)
    place = {"__module__": __name__, "__qualname__": name, "settings_class": made_by, "made_by": made_by}
    summary = _prose(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0])
    return type(PREFIX + name, (TorchJDWeighting,), {**place, "__doc__": summary})


def _prose(text: str) -> str:
    """Return a passage of TorchJD's documentation without its markup."""
    text = re.sub(r":math:`[^`]*`", "...", " ".join(text.split()))
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`|`([^`<]+?) ?<[^>]*>`_", r"\1\2", text)


def __getattr__(name: str) -> type[TorchJDWeighting]:  # by which a pickled model finds the classes that it is made of
    if name.startswith("_") or name not in torchjd_names():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return weighting_of(name)


def _settings_of(name: str, cls: type[nn.Module]) -> type[TorchJDSettings]:
    """Return the settings that plain values can give, from the constructor's signature and documentation."""
    said = dict(re.findall(r":param (\w+):\s*((?:.|\n)*?)(?=\n\s*:param|\n\s*\n|\Z)", cls.__doc__ or ""))
    fields: dict[str, Any] = {}
    required = []
    for key, parameter in inspect.signature(cls).parameters.items():
        help = _prose(said.get(key, "").split(". ")[0]).rstrip(".")
        if key == "weighting":
            fields[_OVER] = (str, setting("UPGrad", "which of TorchJD's weightings is smoothed, at its defaults"))
            continue
        kind, choices = _plain(_hint(cls, parameter.annotation))
        if kind is None or key == "n_tasks":
            continue
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        if parameter.default is inspect.Parameter.empty:
            required.append(key)
        expected = "a list of numbers, one a task" if kind is _NUMBERS else None
        fields[key] = (kind | None, setting(default, help or key, choices=choices, expected=expected))
    made = create_model(f"{name}Settings", __base__=TorchJDSettings, __module__=__name__, **fields)
    made.made_from, made.required, made.label = cls, tuple(required), PREFIX + name
    return made


def _hint(cls: type[nn.Module], written: object) -> object:
    """Return an annotation as it was meant, None where its names are only imported for type checkers."""
    try:
        return eval(written, vars(sys.modules[cls.__module__])) if isinstance(written, str) else written
    except NameError:
        return None


def _plain(hint: object) -> tuple[Any, list[str] | None]:
    """Return the type of a setting that plain values can give and its choices; None where they cannot."""
    if typing.get_origin(hint) is Literal:
        return str, list(typing.get_args(hint))
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kinds = [_NUMBERS if part is Tensor else part for part in parts if part in (Tensor, float, int, bool, str)]
    if not kinds:
        return None, None
    return (kinds[0] if len(kinds) == 1 else kinds[0] | kinds[1]), None
