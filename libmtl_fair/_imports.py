"""Modules that come when asked for (PEP 562), and the module names of version 0.1, which answer with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OLD_NAMES: Mapping[str, str] = {
    "architecture": "methods.fairbranch",
    "architecture.auxiliary_heads": "methods.heads.auxiliary",
    "architecture.auxiliary_tasks": "methods.heads.auxiliary",
    "architecture.group_heads": "methods.heads.modules",
    "controllers": "methods.controllers",
    "group_losses": "methods.heads.group_losses",
    "host": "libmtl",
    "host.evaluation": "libmtl.evaluate",
    "host.healed_weightings": "libmtl.compat_weightings",
    "host.healing": "libmtl.compat",
    "host.judging": "libmtl.checkpoint_selection",
    "host.objectives": "libmtl.losses",
    "host.plugin": "methods.base",
    "host.stepping": "libmtl.step",
    "report.compare_page": "report.page",
    "report.facts": "report.protocol",
    "report.gains": "report.summary",
    "report.gallery": "report.plots",
    "report.html": "report.page",
    "report.pareto": "report.plots",
    "report.sections": "report.tables",
    "report.shrinkage": "report.summary",
    "metrics.barycentres": "metrics.post_processing",
    "metrics.counts": "metrics.rates",
    "metrics.deltas": "metrics.tolerance",
    "metrics.exact": "metrics.audit",
    "metrics.group_auc": "metrics.scores",
    "metrics.group_regression": "metrics.scores",
    "metrics.groups": "metrics.group_metrics",
    "metrics.sampling": "metrics.tolerance",
    "metrics.shrinkage": "metrics.drift",
    "trackers": "libmtl.loggers",
    "tune.agreement": "tune.results",
    "tune.dashboard": "tune.artifacts",
    "tune.identity": "tune.plan",
    "tune.journal": "tune.storage",
    "tune.keeping": "tune.artifacts",
    "tune.measures": "tune.objectives",
    "tune.objective": "tune.plan",
    "tune.queue": "tune.budget",
    "tune.samplers": "tune.study",
    "tune.stale": "tune.budget",
    "weighting": "methods",
    "weighting.fairmt": "methods.fairmt.fairmt",
    "weighting.fbgrad": "methods.fairbranch.fbgrad",
    "weighting.group_regularisers": "methods.regulariser",
    "weighting.lambda_mix": "methods.heads.lambda_mix",
    "weighting.robust": "methods.fairbranch.fbgrad",
}
"""Module of version 0.1 -> where its content is now; submodules that are not named kept their own name."""


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose attributes live in other modules.

    Parameters
    ----------
    package : its ``__name__``.
    homes : module below ``libmtl_fair`` -> the names to take from it, or "" for the module itself.
    """
    where = {name: module for module, names in homes.items() for name in names.split() or [module]}

    def attribute(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"libmtl_fair.{where[name]}")
        found: object = module if where[name] == name else getattr(module, name)
        sys.modules[package].__dict__[name] = found
        return found

    return attribute, lambda: sorted({*sys.modules[package].__dict__, *where})


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
