"""FairMT's hyperparameters, checked when made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.functional.simplex import AGGREGATION_SOLVERS
from libmtl_fair.methods.base import Settings
from libmtl_fair.methods.controllers import DualAscent
from libmtl_fair.methods.fairmt.rates import Lift
from libmtl_fair.methods.relif import ReLiFSettings

_CHOICES: Mapping[str, Sequence[Any]] = {
    "proxy": ("head", "representation", "full"),
    "alpha": (None, "proxy", "uniform", "base"),
    "reference": ("max", "lcb"),
    "ema_gradient": ("decayed", "batch"),
    "error": ("squared", "absolute", "ccc"),
    "solver": AGGREGATION_SOLVERS,
}
_LIPSCHITZ = ("prototypes", "k", "beta", "mu", "quantile", "scaling", "scale_ema", "detach_distance", "task_pairs")


@dataclass(frozen=True)
class FairMTSettings(Settings):
    """Hyperparameters of :class:`FairMT` (methods.md, 2).

    Parameters
    ----------
    epsilon : disparity Phi that is tolerated, >= 0 (default ours).
    mu : smoothing of the worst case over tasks, > 0.
    rho, eta_0, eta_max : step, start and bound of the dual variable.
    proxy : gradients that alpha is chosen from: ``"head"`` (closed form, no extra backward pass), ``"representation"``
        (autograd to what the heads receive, any head), ``"full"`` (all shared parameters, a backward pass a task).
    alpha : ``"proxy"`` (default), ``"uniform"``, or ``"base"``: another LibMTL weighting, named by ``base``.
    rank_one : the source's form of the head proxy.
    normalise : divide by the number of groups that can differ, so that attributes compare (ours).
    fpr_weight : weight of the FPR part of a disparity against the TPR part, >= 0 (ours; the source's is 1). The FPR part
        lowers the scores of the group that the TPR part takes as its reference: 0 lifts only, and keeps that group's TPR.
    sharpness : rates are means of sigmoid(sharpness * logit): above 1 nearer to decisions at 0.5 (ours; the source's is 1).
    symmetric : the ablation: largest minus smallest rate, gradient to both sides.
    reference : ``"max"``, or ``"lcb"``: the group whose rate has the best confidence bound sets the bar (ours).
    ema : decay of the running sums per group; 0 takes each batch alone (ours).
    ema_gradient : ``"decayed"``, or ``"batch"``: the batch rate's full gradient at the running value (ours).
    min_count : groups with fewer (decayed) examples are absent (ours).
    intersectional : cross the attributes instead of averaging over them.
    attributes : which sensitive attributes to constrain; None takes all.
    error : a regression task's error: ``"squared"`` (standardised), ``"absolute"``, or ``"ccc"`` (1 - CCC of a group).
    solver : of the aggregation: ``"exact"`` or ``"frank-wolfe"``.
    lipschitz : ReLiF's term is one more disparity, so that individual and group fairness are one constraint (ours).
    lipschitz_args : its settings, as ReLiF's: ``prototypes``, ``k``, ``beta``, ``mu``, ``quantile``, ``scaling``,
        ``scale_ema``, ``detach_distance``, ``task_pairs``.
    base, base_args : the LibMTL weighting that balances the tasks where ``alpha`` is ``"base"``.
    """

    epsilon: float = 0.05
    mu: float = 0.5
    rho: float = 0.05
    eta_0: float = 0.0
    eta_max: float = 10.0
    proxy: str = "head"
    alpha: str | None = None
    rank_one: bool = False
    normalise: bool = True
    fpr_weight: float = 1.0
    sharpness: float = 1.0
    symmetric: bool = False
    reference: str = "max"
    ema: float = 0.9
    ema_gradient: str = "decayed"
    min_count: float = 10
    intersectional: bool = False
    attributes: Sequence[str] | None = None
    error: str = "squared"
    solver: str = "exact"
    lipschitz: bool = False
    lipschitz_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every range."""
        for name, options in _CHOICES.items():
            if getattr(self, name) not in options:
                known = [o for o in options if o is not None]
                raise RecipeError(f"FairMT: {unknown(name, getattr(self, name), known)}")
        self.need("mu", _number(self.mu) and self.mu > 0, "above 0")
        self.need("ema", _number(self.ema) and 0 <= self.ema < 1, "in [0, 1)")
        self.need("min_count", _number(self.min_count) and self.min_count > 0, "above 0")
        self.need("fpr_weight", _number(self.fpr_weight) and self.fpr_weight >= 0, "a number of at least 0")
        self.need("sharpness", _number(self.sharpness) and self.sharpness > 0, "above 0")
        if isinstance(self.attributes, str):
            object.__setattr__(self, "attributes", (self.attributes,))
        self.need("attributes", self.attributes is None or len(self.attributes) > 0, "at least one attribute, or null")
        if self.reference == "lcb" and self.symmetric:
            raise RecipeError("FairMT: reference='lcb' names a best group, symmetric=True has none; choose one")
        self._check_alpha()
        self.dual()
        self.relif()

    def _check_alpha(self) -> None:
        if self.base != "EW" and self.alpha not in (None, "base"):
            raise RecipeError(
                f"FairMT: base={self.base!r} weights the tasks, and so does alpha={self.alpha!r}; leave one of them out"
            )
        if self.base == "EW" and self.alpha == "base":
            raise RecipeError("FairMT: alpha='base' needs base, the name of a LibMTL weighting such as 'GradNorm'")
        if self.rank_one and (self.proxy != "head" or self.weighing != "proxy"):
            raise RecipeError("FairMT: rank_one=True is a form of the head proxy: it needs proxy='head', alpha='proxy'")

    @property
    def weighing(self) -> str:
        """What weights the tasks: ``"proxy"``, ``"uniform"`` or ``"base"``."""
        return self.alpha or ("proxy" if self.base == "EW" else "base")

    def dual(self) -> DualAscent:
        """Return the controller of eta."""
        for name in ("epsilon", "rho", "eta_0", "eta_max"):
            self.need(name, _number(getattr(self, name)), "a finite number")
        return DualAscent(self.rho, self.epsilon, initial=self.eta_0, maximum=self.eta_max)

    def lift(self) -> Lift:
        """Return how disparities are measured."""
        return Lift(
            self.symmetric, self.normalise, self.reference, self.min_count, self.error, self.fpr_weight, self.sharpness
        )

    def relif(self) -> ReLiFSettings:
        """Return the settings of the Lipschitz term."""
        if self.lipschitz_args and not self.lipschitz:
            raise RecipeError("FairMT: lipschitz_args are given, but lipschitz is False; set it, or leave them out")
        for name in self.lipschitz_args:
            if name not in _LIPSCHITZ:
                raise RecipeError(f"FairMT: lipschitz_args: {unknown('setting', name, _LIPSCHITZ)}")
        return ReLiFSettings(**self.lipschitz_args)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
