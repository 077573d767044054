"""Modules that come when asked for (PEP 562), and the module names of version 0.1, which answer with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from libmtl_fair.errors import HostError

_MOVED = {
    "arrays": "metrics.arrays",
    "data.loader": "data.rows",
    "libmtl": "host",
    "libmtl.checkpoint_selection": "host.judging",
    "libmtl.compat": "host.healing",
    "libmtl.compat_weightings": "host.healed_weightings",
    "libmtl.evaluate": "host.evaluation",
    "libmtl.loggers": "trackers",
    "libmtl.losses": "host.objectives",
    "libmtl.step": "host.stepping",
    "methods": "weighting",
    "methods.base": "host.plugin",
    "methods.controllers": "controllers",
    "methods.fairbranch": "architecture",
    "methods.fairbranch.conflicts": "metrics.conflicts",
    "methods.fairbranch.fbgrad": "weighting.fbgrad weighting.robust",
    "methods.fairmt.fairmt": "weighting.fairmt",
    "methods.heads.auxiliary": "architecture.auxiliary_heads architecture.auxiliary_tasks",
    "methods.heads.group_losses": "group_losses",
    "methods.heads.lambda_mix": "weighting.lambda_mix",
    "methods.heads.modules": "architecture.group_heads",
    "methods.regulariser": "weighting.group_regularisers",
    "metrics.audit": "metrics.exact metrics.deltas metrics.sampling",
    "metrics.drift": "metrics.shrinkage",
    "metrics.fairlearn_bridge": "metrics.barycentres metrics.post_processing",
    "metrics.group_metrics": "metrics.groups",
    "metrics.rates": "metrics.counts",
    "metrics.scores": "metrics.group_auc metrics.group_regression",
    "recipe.schema": "recipe.problems",
    "recipe.sections": "recipe.fields",
    "report.page": "report.compare_page report.html",
    "report.plots": "report.gallery report.pareto",
    "report.protocol": "report.facts",
    "report.summary": "report.gains report.shrinkage",
    "report.tables": "report.sections",
    "tune.artifacts": "tune.dashboard tune.keeping",
    "tune.budget": "tune.queue tune.stale",
    "tune.objectives": "tune.measures",
    "tune.plan": "tune.identity tune.objective",
    "tune.results": "tune.agreement",
    "tune.storage": "tune.journal",
}
OLD_NAMES = {old: new for new, every in _MOVED.items() for old in every.split()}
"""Module of version 0.1 -> where its content is now; submodules that are not named kept their own name."""


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package; ``homes``: module -> its names, or "" for the module itself."""
    where = {name: module for module, names in homes.items() for name in names.split() or [module]}

    def attribute(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"libmtl_fair.{where[name]}")
        found: object = module if where[name] == name else getattr(module, name)
        sys.modules[package].__dict__[name] = found
        return found

    return attribute, lambda: sorted({*sys.modules[package].__dict__, *where})


def optional(module: str, extra: str, product: str = "") -> ModuleType:
    """Return an optional module; HostError names the extra that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        name = product or module.partition(".")[0]
        raise HostError(f"{name} is not installed: pip install 'libmtl_fair[{extra}]'") from error


def _moved(name: str) -> str | None:
    old, rest = name.removeprefix("libmtl_fair."), ""
    while old not in OLD_NAMES:
        old, dot, last = old.rpartition(".")
        if not dot:
            return None
        rest = f".{last}{rest}"
    return f"libmtl_fair.{OLD_NAMES[old]}{rest}"


class OldNames(MetaPathFinder, Loader):
    """Finds a module of version 0.1 under its present name, asked only after Python found none."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old name."""
        known = name.startswith("libmtl_fair.") and _moved(name) is not None
        return ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a module that hands on what the present one has."""
        new = str(_moved(spec.name))
        present, old = import_module(new), ModuleType(spec.name, f"See {new}.")
        warnings.warn(f"{spec.name} is {new} now; the old name goes in the next version", DeprecationWarning, 2)
        old.__dict__.update(__path__=[], __getattr__=lambda name: getattr(present, name))
        return old

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""
