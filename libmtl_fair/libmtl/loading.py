"""Import LibMTL, whatever state torchvision and LibMTL's other requirements are in.

LibMTL's package imports ``torchvision.models.utils``, which torchvision dropped in 2021; its git main also imports
cvxpy, qpsolvers and torch_geometric at start, for a few of its methods. So stand-ins take those names in
``sys.modules`` while LibMTL is imported, and are taken away right after. Nothing else is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, NoReturn

import torch

from libmtl_fair.errors import HostError

Lineage = Literal["package", "git main"]


class _Absent(ModuleType):
    """Stands for a package that is not installed: harmless until one of its functions is called."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        package = self.__name__

        def missing(*_: object, **__: object) -> NoReturn:
            raise HostError(f"this LibMTL method needs {package}, which is not installed: pip install {package}")

        return missing


def _stand_ins() -> dict[str, ModuleType]:
    models, utils = ModuleType("torchvision.models"), ModuleType("torchvision.models.utils")
    vars(utils)["load_state_dict_from_url"] = torch.hub.load_state_dict_from_url
    vars(models)["utils"] = utils
    vision = ModuleType("torchvision")
    vars(vision)["models"] = models
    optional = [name for name in ("cvxpy", "qpsolvers", "torch_geometric") if name not in sys.modules]
    absent = [_Absent(name) for name in optional if importlib.util.find_spec(name) is None]
    return {module.__name__: module for module in (vision, models, utils, *absent)}


@contextmanager
def _replaced(stand_ins: dict[str, ModuleType]) -> Iterator[None]:
    """Put the stand-ins into ``sys.modules``; on leaving, put back whatever was there."""

    def taken_out() -> dict[str, ModuleType]:
        hidden = [name for name in sys.modules if name in stand_ins or name.startswith("torchvision.")]
        return {name: sys.modules.pop(name) for name in hidden}

    before = taken_out()
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        taken_out()
        sys.modules.update(before)


def load_libmtl() -> ModuleType:
    """Return the package ``LibMTL``, imported."""
    loaded = sys.modules.get("LibMTL")
    if loaded is not None and hasattr(loaded, "Trainer"):
        return loaded
    _forget_libmtl()
    try:
        with _replaced(_stand_ins()):
            return importlib.import_module("LibMTL")
    except (ImportError, AttributeError, RuntimeError, SyntaxError) as error:
        _forget_libmtl()
        said = (
            f"LibMTL was found but does not import ({type(error).__name__}: {error}); reinstall it: pip install libmtl"
        )
        if isinstance(error, ModuleNotFoundError):
            said = f"LibMTL needs the module {error.name!r}, which is not installed: pip install {error.name}"
            if error.name == "LibMTL":
                said = "LibMTL is not installed: pip install libmtl (or put a clone of its git main on sys.path)"
        raise HostError(said) from error


def _forget_libmtl() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "LibMTL"]:
        del sys.modules[name]


libmtl = load_libmtl()
weighting_namespace, architecture_namespace, config_module, trainer_module = (
    importlib.import_module(f"LibMTL.{name}") for name in ("weighting", "architecture", "config", "trainer")
)
LINEAGE: Lineage = "git main" if hasattr(trainer_module, "weighting_method") else "package"
"""Which LibMTL is installed: the package of 2021 takes classes, git main takes names."""
AbsWeighting: type[Any] = weighting_namespace.AbsWeighting
AbsArchitecture: type[Any] = architecture_namespace.AbsArchitecture
Trainer: type[Any] = libmtl.Trainer
AbsLoss: type[Any] = importlib.import_module("LibMTL.loss").AbsLoss
AbsMetric: type[Any] = importlib.import_module("LibMTL.metrics").AbsMetric
