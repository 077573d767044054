"""Import LibMTL, whatever state torchvision and LibMTL's other requirements are in.

LibMTL's package imports ``torchvision.models.utils``, which torchvision dropped in 2021; its git main also imports
cvxpy, qpsolvers and torch_geometric at start, for a few of its methods. So stand-ins take the names that are missing in
``sys.modules`` while LibMTL is imported, and are taken away right after. torchvision itself is neither imported nor hidden:
whoever asks for it meanwhile (torch_geometric and transformers do) finds what is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Literal, NoReturn

import torch

from libmtl_fair.errors import HostError

Lineage = Literal["package", "git main"]


_OPTIONAL = ("cvxpy", "qpsolvers", "torch_geometric")


class _Absent(ModuleType):
    """Stands for a package that cannot be had, and why: harmless until one of its functions is called."""

    def __init__(self, name: str, why: str = "") -> None:
        super().__init__(name)
        self.__dict__["__why__"] = why or f"which is not installed: pip install {name}"

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        said = f"this LibMTL method needs {self.__name__}, {self.__dict__['__why__']}"

        def missing(*_: object, **__: object) -> NoReturn:
            raise HostError(said)

        return missing


def _stand_ins(broken: Mapping[str, str]) -> dict[str, ModuleType]:
    """Return name -> module for what LibMTL imports and cannot be had; each has a spec, which importers may ask for."""
    utils = ModuleType("torchvision.models.utils")
    vars(utils)["load_state_dict_from_url"] = torch.hub.load_state_dict_from_url
    absent = [_Absent(name, broken.get(name, "")) for name in _OPTIONAL if name in broken or not _installed(name)]
    found = {module.__name__: module for module in (utils, *absent) if module.__name__ not in sys.modules}
    for name, module in found.items():
        module.__spec__ = ModuleSpec(name, None)
    return found


def _installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _broken() -> dict[str, str]:
    """Return what of LibMTL's requirements is installed and does not import -> why; nothing of it stays loaded."""
    found = {}
    for name in filter(_installed, _OPTIONAL):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever a package's own import raises
            found[name] = f"which does not import here ({type(error).__name__}: {error})"
            _forget(name)
    return found


@contextmanager
def _present(stand_ins: dict[str, ModuleType]) -> Iterator[None]:
    """Put the stand-ins into ``sys.modules`` for a while."""
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


def load_libmtl() -> ModuleType:
    """Return the package ``LibMTL``, imported."""
    loaded = sys.modules.get("LibMTL")
    if loaded is not None and hasattr(loaded, "Trainer"):
        return loaded
    broken: dict[str, str] = {}
    for again in (False, True):
        try:
            return _imported(broken)
        except Exception as error:  # noqa: BLE001 - of LibMTL, or of what it imports for a few of its methods
            failed, broken = error, {} if again else _broken()
        if not broken:
            break
    said = f"LibMTL was found but does not import ({type(failed).__name__}: {failed}); reinstall it: pip install libmtl"
    if isinstance(failed, ModuleNotFoundError):
        said = f"LibMTL needs the module {failed.name!r}, which is not installed: pip install {failed.name}"
        if failed.name == "LibMTL":
            said = "LibMTL is not installed: pip install libmtl (or put a clone of its git main on sys.path)"
    raise HostError(said) from failed


def _imported(broken: Mapping[str, str]) -> ModuleType:
    _forget("LibMTL")
    try:
        with _present(_stand_ins(broken)):
            return importlib.import_module("LibMTL")
    except Exception:
        _forget("LibMTL")
        raise


def _forget(package: str) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
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
