"""Import LibMTL, whatever state torchvision and LibMTL's other requirements are in.

LibMTL's package imports ``torchvision.models.utils``, which torchvision dropped in 2021; its git main also imports
cvxpy, qpsolvers and torch_geometric at start, for a few of its methods. So stand-ins take those names in
``sys.modules`` while LibMTL is imported, and are taken away right after. Nothing else is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch

from libmtl_fair.errors import HostError

Lineage = Literal["package", "git main"]
_VISION = ("torchvision", "torchvision.models", "torchvision.models.utils")
_OPTIONAL = ("cvxpy", "qpsolvers", "torch_geometric")


class _Absent(ModuleType):
    """Stands for a package that is not installed: harmless until one of its functions is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        package = self.__name__

        def missing(*_: Any, **__: Any) -> Any:
            raise HostError(f"this LibMTL method needs {package}, which is not installed: pip install {package}")

        return missing


def _stand_ins() -> dict[str, ModuleType]:
    modules = {name: ModuleType(name) for name in _VISION}
    modules["torchvision"].models = modules["torchvision.models"]  # type: ignore[attr-defined]
    modules["torchvision.models"].utils = modules["torchvision.models.utils"]  # type: ignore[attr-defined]
    modules["torchvision.models.utils"].load_state_dict_from_url = torch.hub.load_state_dict_from_url  # type: ignore[attr-defined]
    for name in _OPTIONAL:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            modules[name] = _Absent(name)
    return modules


@contextmanager
def _replaced(stand_ins: dict[str, ModuleType]) -> Iterator[None]:
    """Put the stand-ins into ``sys.modules``; on leaving, put back whatever was there."""

    def hidden(name: str) -> bool:
        return name in stand_ins or name.startswith("torchvision.")

    before = {name: module for name, module in sys.modules.items() if hidden(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if hidden(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def load_libmtl() -> ModuleType:
    """Return the package ``LibMTL``, imported.

    Raises
    ------
    HostError : LibMTL is not installed, or fails to import for a reason that is not known here.
    """
    loaded = sys.modules.get("LibMTL")
    if loaded is not None and hasattr(loaded, "Trainer"):
        return loaded
    _forget("LibMTL")
    try:
        with _replaced(_stand_ins()):
            return importlib.import_module("LibMTL")
    except ModuleNotFoundError as error:
        _forget("LibMTL")
        if error.name == "LibMTL":
            raise HostError(
                "LibMTL is not installed: pip install libmtl (or put a clone of its git main on sys.path)"
            ) from error
        raise HostError(
            f"LibMTL needs the module {error.name!r}, which is not installed: pip install {error.name}"
        ) from error
    except (ImportError, AttributeError, RuntimeError, SyntaxError) as error:
        _forget("LibMTL")
        raise HostError(
            f"LibMTL was found but does not import ({type(error).__name__}: {error}); reinstall it: pip install libmtl"
        ) from error


def _forget(package: str) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        del sys.modules[name]


def lineage(libmtl: ModuleType) -> Lineage:
    """Return which LibMTL this is: the package of 2021 takes classes, git main takes names."""
    trainer = importlib.import_module("LibMTL.trainer")
    return "git main" if hasattr(trainer, "weighting_method") else "package"


libmtl = load_libmtl()
LINEAGE: Lineage = lineage(libmtl)
"""Which LibMTL is installed."""

weighting_namespace: ModuleType = importlib.import_module("LibMTL.weighting")
architecture_namespace: ModuleType = importlib.import_module("LibMTL.architecture")
config_module: ModuleType = importlib.import_module("LibMTL.config")
trainer_module: ModuleType = importlib.import_module("LibMTL.trainer")
AbsWeighting: type[Any] = weighting_namespace.AbsWeighting
AbsArchitecture: type[Any] = architecture_namespace.AbsArchitecture
Trainer: type[Any] = libmtl.Trainer
AbsLoss: type[Any] = importlib.import_module("LibMTL.loss").AbsLoss
AbsMetric: type[Any] = importlib.import_module("LibMTL.metrics").AbsMetric
