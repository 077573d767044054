"""From ``method="fairmt"`` to a weighting, an architecture and auxiliary heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, resolve_weighting, weighting_names
from libmtl_fair.recipe.sections import Heads


@dataclass(frozen=True)
class Method:
    """How a method is trained: names known to LibMTL, the loss of its fairness heads, settings under the user's."""

    weighting: str
    architecture: str = "HPS"
    heads: str | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    needs_groups: bool = True
    least_tasks: int = 1

    def arguments(
        self, given: Mapping[str, object]
    ) -> tuple[dict[str, object], dict[str, object], dict[str, object] | None]:
        """Return (weight_args, arch_args, arguments of the heads or None) of what the user gives in ``method_args``."""
        settings = getattr(OUR_ARCHITECTURES.get(self.architecture), "settings_class", None)
        arch: dict[str, object] = dict.fromkeys(settings.model_fields) if settings else {}
        of_heads = set(Heads.model_fields) - {"loss"} if self.heads else set()
        every = {**self.defaults, **given}
        heads = {"loss": self.heads, **{name: value for name, value in every.items() if name in of_heads}}
        weight = {name: value for name, value in every.items() if name not in of_heads and name not in arch}
        return weight, {name: every[name] for name in arch if name in every}, heads if self.heads else None


METHODS: dict[str, Method] = {
    "none": Method("EW", needs_groups=False),
    "relif": Method("ReLiF", needs_groups=False),
    "fairmt": Method("FairMT"),
    "fairbranch": Method("FBGrad", "FairBranch", least_tasks=2),
    "glf": Method("LambdaMix", heads="glf"),
    "gld": Method("LambdaMix", heads="gld", defaults={"lam": 0.5}),
    "adversarial": Method("LambdaMix", heads="adversarial", defaults={"lam": 0.5}),
    **{name: Method("GroupRegulariser", defaults={"loss": name}) for name in ("bgl", "dpl", "fprl", "tprl")},
}
"""Methods by name; ``"none"`` is plain equal weighting. Shares ``lam`` of glf and gld are ours (METHODS.md, 4)."""


def method_names() -> list[str]:
    """Return the names that ``method`` takes, besides those of registered weightings.

    >>> "fairmt" in method_names()
    True
    """
    return list(METHODS)


def find_method(name: object) -> Method:
    """Return a method by its name here, or a weighting of LibMTL, of ours or of another package by its own."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    if isinstance(name, str) and (":" in name or name in weighting_names()):
        return Method(name, needs_groups=getattr(resolve_weighting(name), "needs_groups", False))
    raise RecipeError(unknown("method", name, [*METHODS, *weighting_names()]))


def check_method(name: str, method: Method, n_tasks: int, groups: Mapping[str, object]) -> None:
    """Refuse a method that the data are not enough for: one task to compare, or no groups."""
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
