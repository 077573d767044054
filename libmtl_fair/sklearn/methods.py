"""From ``method="fairmt"`` to a weighting, an architecture and auxiliary heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.libmtl import architecture_names, weighting_names
from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, OUR_WEIGHTINGS

_HEAD_OPTIONS = ("target", "conditional", "heads", "intersectional", "tasks", "bins", "sensitive")


@dataclass(frozen=True)
class Method:
    """How a method is trained.

    Attributes
    ----------
    weighting, architecture : names known to LibMTL.
    heads : loss of auxiliary fairness heads, or None.
    defaults : settings under those that the user gives.
    needs_groups : whether training needs ``sensitive_features``.
    least_tasks : how many tasks it needs.
    """

    weighting: str
    architecture: str = "HPS"
    heads: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    needs_groups: bool = True
    least_tasks: int = 1

    def arguments(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return (weight_args, arch_args, head options) of what the user gives in ``method_args``."""
        settings = getattr(OUR_ARCHITECTURES.get(self.architecture), "settings_class", None)
        of_architecture = set(settings.model_fields) if settings else set()
        weight, arch, heads = {}, {}, {}
        for name, value in {**self.defaults, **given}.items():
            if self.heads is not None and name in _HEAD_OPTIONS:
                heads[name] = value
            elif name in of_architecture:
                arch[name] = value
            else:
                weight[name] = value
        return weight, arch, heads


METHODS: dict[str, Method] = {
    "none": Method("EW", needs_groups=False),
    "relif": Method("ReLiF", needs_groups=False, least_tasks=2),
    "fairmt": Method("FairMT"),
    "fairbranch": Method("FBGrad", "FairBranch", least_tasks=2),
    "glf": Method("LambdaMix", heads="glf", defaults={"lam": 0.95}),
    "gld": Method("LambdaMix", heads="gld", defaults={"lam": 0.5}),
    "adversarial": Method("LambdaMix", heads="adversarial", defaults={"lam": 0.5}),
    **{name: Method("GroupRegulariser", defaults={"loss": name}) for name in ("bgl", "dpl", "fprl", "tprl")},
}
"""Methods by name; ``"none"`` is plain equal weighting. Shares ``lam`` of glf and gld are ours (methods.md, 4)."""


def method_names() -> list[str]:
    """Return the names that ``method`` takes, besides those of LibMTL's weightings.

    >>> "fairmt" in method_names()
    True
    """
    return list(METHODS)


def find_method(name: object) -> Method:
    """Return a method of ours, or a weighting of LibMTL by its name.

    Raises
    ------
    RecipeError : unknown, or not part of this installation.
    """
    others = [w for w in weighting_names() if w not in OUR_WEIGHTINGS]
    if name in others:
        return Method(str(name), needs_groups=False)
    if not isinstance(name, str) or name not in METHODS:
        raise RecipeError(unknown("method", name, [*METHODS, *others]))
    found = METHODS[name]
    if found.weighting not in weighting_names() or found.architecture not in architecture_names():
        raise RecipeError(f"method {name!r}: this installation has no {found.weighting} on {found.architecture}")
    return found


def check_method(name: str, method: Method, n_tasks: int, groups: Mapping[str, Any]) -> None:
    """Refuse a method that the data are not enough for.

    Raises
    ------
    RecipeError : it compares tasks and there is one only.
    DataError : it needs groups and none were given.
    """
    if n_tasks < method.least_tasks:
        raise RecipeError(
            f"method {name!r} compares tasks with each other: it needs at least {method.least_tasks}, found {n_tasks}. "
            "Fit FairMTLEstimator on a Y with more columns, or take a method for one task: 'fairmt', 'glf', 'dpl', ..."
        )
    if method.needs_groups and not groups:
        raise DataError(
            f"method {name!r} needs groups: give fit(X, Y, sensitive_features=...); in a Pipeline or a search also "
            "estimator.set_fit_request(sensitive_features=True). Without groups there are 'none' and 'relif'"
        )
