"""FairMT's hyperparameters, checked when made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from libmtl_fair.errors import unknown
from libmtl_fair.functional.simplex import AGGREGATION_SOLVERS
from libmtl_fair.methods.base import Names, Settings, setting
from libmtl_fair.methods.controllers import DualAscent
from libmtl_fair.methods.relif import ReLiFSettings

_LIPSCHITZ = ("prototypes", "k", "beta", "mu", "quantile", "scaling", "scale_ema", "detach_distance", "task_pairs")


class FairMTSettings(Settings):
    """Hyperparameters of :class:`FairMT` (METHODS.md, 2)."""

    epsilon: float = setting(
        0.05,
        "disparity Phi that is tolerated, >= 0",
        ours=True,
        expected="a finite number",
        allow_inf_nan=False,
        search=(0.005, 0.1, "log"),
    )
    mu: float = setting(
        0.5, "smoothing of the worst case over tasks", expected="above 0", gt=0, search=(0.1, 1.0, "log")
    )
    rho: float = setting(
        0.05,
        "step of the dual variable, >= 0",
        expected="a finite number",
        allow_inf_nan=False,
        search=(0.01, 0.5, "log"),
    )
    eta_0: float = setting(
        0.0, "start of the dual variable, in [0, eta_max]", expected="a finite number", allow_inf_nan=False
    )
    eta_max: float = setting(10.0, "bound of the dual variable, > 0", expected="a finite number", allow_inf_nan=False)
    proxy: str = setting(
        "head",
        'gradients that alpha is chosen from: ``"head"`` (closed form, no extra backward pass), ``"representation"`` '
        '(autograd to what the heads receive, any head), ``"full"`` (all shared parameters, a backward pass a task)',
        choices=("head", "representation", "full"),
    )
    alpha: str | None = setting(
        None,
        '``"proxy"`` (default), ``"uniform"``, or ``"base"``: another LibMTL weighting, named by ``base``',
        choices=("proxy", "uniform", "base"),
    )
    rank_one: bool = setting(False, "the source's form of the head proxy")
    normalise: bool = setting(
        True, "divide by the number of groups that can differ, so that attributes compare", ours=True
    )
    fpr_weight: float = setting(
        1.0,
        "weight of the FPR part of a disparity against the TPR part (the source's is 1). The FPR part lowers the scores of "
        "the group that the TPR part takes as its reference: 0 lifts only, and keeps that group's TPR",
        ours=True,
        expected="a number of at least 0",
        ge=0,
    )
    sharpness: float = setting(
        1.0,
        "rates are means of sigmoid(sharpness * logit): above 1 nearer to decisions at 0.5 (the source's is 1)",
        ours=True,
        expected="above 0",
        gt=0,
    )
    symmetric: bool = setting(False, "the ablation: largest minus smallest rate, gradient to both sides")
    reference: str = setting(
        "max",
        '``"lcb"``: the group whose rate has the best confidence bound sets the bar (ours)',
        choices=("max", "lcb"),
    )
    ema: float = setting(0.9, "decay of the running sums per group; 0 takes each batch alone", ours=True, ge=0, lt=1)
    ema_gradient: str = setting(
        "decayed",
        '``"batch"``: the batch rate\'s full gradient at the running value',
        ours=True,
        choices=("decayed", "batch"),
    )
    min_count: float = setting(
        10, "groups with fewer (decayed) examples are absent", ours=True, expected="above 0", gt=0
    )
    intersectional: bool = setting(False, "cross the attributes instead of averaging over them")
    attributes: Names | None = setting(
        None,
        "which sensitive attributes to constrain; None takes all",
        expected="at least one attribute, or null",
        min_length=1,
    )
    error: str = setting(
        "squared",
        'a regression task\'s error: standardised squared, absolute, or ``"ccc"`` (1 - CCC of a group)',
        choices=("squared", "absolute", "ccc"),
    )
    solver: str = setting("exact", "of the aggregation", choices=AGGREGATION_SOLVERS)
    lipschitz: bool = setting(
        False, "ReLiF's term is one more disparity, so that individual and group fairness are one constraint", ours=True
    )
    lipschitz_args: Mapping[str, Any] = setting({}, "its settings, as ReLiF's: " + ", ".join(_LIPSCHITZ))

    def check(self) -> None:
        """Check what concerns several settings."""
        if self.reference == "lcb" and self.symmetric:
            raise self.refused("reference", "reference='lcb' names a best group, symmetric=True has none; choose one")
        if self.base != "EW" and self.alpha not in (None, "base"):
            raise self.refused(
                "alpha",
                f"base={self.base!r} weights the tasks, and so does alpha={self.alpha!r}; leave one of them out",
            )
        if self.base == "EW" and self.alpha == "base":
            raise self.refused("alpha", "alpha='base' needs base, the name of a LibMTL weighting such as 'GradNorm'")
        if self.rank_one and (self.proxy != "head" or self.weighing != "proxy"):
            raise self.refused(
                "rank_one", "rank_one=True is a form of the head proxy: it needs proxy='head', alpha='proxy'"
            )
        self.dual()
        self.relif()

    @property
    def weighing(self) -> str:
        """What weights the tasks: ``"proxy"``, ``"uniform"`` or ``"base"``."""
        return self.alpha or ("proxy" if self.base == "EW" else "base")

    def dual(self) -> DualAscent:
        """Return the controller of eta."""
        return DualAscent(self.rho, self.epsilon, initial=self.eta_0, maximum=self.eta_max)

    def relif(self) -> ReLiFSettings:
        """Return the settings of the Lipschitz term."""
        if self.lipschitz_args and not self.lipschitz:
            raise self.refused(
                "lipschitz_args", "lipschitz_args are given, but lipschitz is False; set it, or leave them out"
            )
        for name in self.lipschitz_args:
            if name not in _LIPSCHITZ:
                raise self.refused("lipschitz_args", f"lipschitz_args: {unknown('setting', name, _LIPSCHITZ)}")
        return ReLiFSettings(**self.lipschitz_args)
