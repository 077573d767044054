"""FairMT's hyperparameters, checked when made."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.functional.simplex import AGGREGATION_SOLVERS
from libmtl_fair.methods.base import Names, Settings, setting
from libmtl_fair.methods.controllers import DualAscent
from libmtl_fair.methods.relif import ReLiFSettings
from libmtl_fair.methods.targets import Target, chosen, read_table
from libmtl_fair.tasks import Binary, Multilabel, Task

_LIPSCHITZ = ("prototypes", "k", "beta", "mu", "quantile", "scaling", "scale_ema", "detach_distance", "task_pairs")

DEFAULT_TARGET = "eo <= 30%"
UNDECIDED = "none of the tasks is binary, so none has decisions to constrain; form='phi' takes any kind"
_PHI_ONLY = ("epsilon", "mu", "rho", "eta_0", "eta_max", "solver", "normalise", "centred", "rank_one", "error")
_IMPLY_PHI = (*_PHI_ONLY, "proxy", "ema_gradient")
_PHI_DEFAULTS: Mapping[str, Any] = {"sharpness": 1.0, "min_count": 10, "ema": 0.9, "ema_gradient": "decayed"}
PAPER: Mapping[str, Any] = {
    "form": "phi", "alpha": "proxy", "rank_one": True, "ema": 0.0, "min_count": 1, "normalise": False, "centred": False,
}  # fmt: skip
"""Sections 2.1 to 2.4 of METHODS.md as published. ``preset="paper"`` puts them under those given."""


class FairMTSettings(Settings):
    """Hyperparameters of :class:`FairMT` (METHODS.md, 2).

    Where a setting of the published form alone is given (epsilon, mu, rho, eta_0, ...) and no target, the form is ``"phi"``, whose
    own defaults are sharpness 1, min_count 10, ema_gradient "decayed", alpha "proxy".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}
    aliases: ClassVar[Mapping[str, str]] = {"constraint": "target", "constraints": "targets"}

    preset: str | None = setting(None, '``"paper"``: as published', choices=("paper",))
    form: str = setting(
        "constraints",
        '``"constraints"``: a multiplier of its own for every binary task and attribute, raised by the decisions; ``"phi"``: the '
        "source's one constraint Phi <= epsilon on soft scores",
        ours=True,
        choices=("constraints", "phi"),
    )
    target: str | None = setting(
        None,
        f'"eo <= 0.05", or "eo <= 30%" of what plain training has; eo, eop or dp. None is "{DEFAULT_TARGET}"',
        ours=True,
        search=["eo <= 60%", "eo <= 45%", "eo <= 30%", "eo <= 20%", "eo <= 10%"],
    )
    targets: Mapping[str, Any] = setting(
        {}, "task -> its own target, or attribute -> target; without ``target`` only these are constrained", ours=True
    )
    floor: float = setting(0.02, "least difference that a target in % asks for", ours=True, gt=0, le=1)
    aim: float = setting(
        0.75,
        "share of the tolerance that the multipliers aim at, so that what training decisions keep holds for other people too",
        ours=True,
        gt=0,
        le=1,
    )
    threshold: str = setting(
        "both",
        'decisions: ``"half"``, at 0.5, ``"base_rate"``, where as many are chosen as are positive, or both: the gradient is at the one '
        "that is farther from what is asked, and nothing is gained by passing everybody or nobody",
        ours=True,
        choices=("both", "half", "base_rate"),
    )
    smooth: float = setting(
        0.3,
        "a difference of smooth rates below it is pursued in proportion; 0 pursues any difference with full strength, and overshoots",
        ours=True,
        expected="a number of at least 0",
        ge=0,
    )
    epsilon: float = setting(
        0.05, "disparity Phi that is tolerated, >= 0", ours=True, expected="a finite number", allow_inf_nan=False
    )
    mu: float = setting(0.5, "smoothing of the worst case over tasks", expected="above 0", gt=0)
    rho: float = setting(0.05, "step of the dual variable, >= 0", expected="a finite number", allow_inf_nan=False)
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
        '``"proxy"`` (default of the form phi), ``"uniform"`` (default), or ``"base"``: another LibMTL weighting, named by '
        "``base``",
        choices=("proxy", "uniform", "base"),
    )
    rank_one: bool = setting(False, "the source's form of the head proxy")
    normalise: bool = setting(
        True, "divide by the number of groups that can differ, so that attributes compare", ours=True
    )
    centred: bool = setting(True, "Phi lies between the mean and the largest psi, whatever mu and T are", ours=True)
    fpr_weight: float = setting(
        1.0,
        "weight of the FPR part of a disparity against the TPR part (the source's is 1). The FPR part lowers the scores of "
        "the group that the TPR part takes as its reference: 0 lifts only, and keeps that group's TPR",
        ours=True,
        expected="a number of at least 0",
        ge=0,
        search=(0.3, 1.0),
    )
    sharpness: float = setting(
        4.0,
        "rates are means of sigmoid(sharpness * logit): above 1 nearer to decisions at 0.5 (the source's is 1)",
        ours=True,
        expected="above 0",
        gt=0,
        search=(2.0, 6.0),
    )
    symmetric: bool = setting(False, "the ablation: largest minus smallest rate, gradient to both sides")
    reference: str = setting(
        "max",
        '``"lcb"``: the group whose rate has the best confidence bound sets the bar (ours)',
        choices=("max", "lcb"),
    )
    ema: float | None = setting(
        None,
        "decay of the running sums per group; 0 takes each batch alone. None is .9, in epochs of under 10 batches what spans "
        "one, and in small batches what spans 2,560 people but at most a quarter of an epoch; form phi: .9",
        ours=True,
        ge=0,
        lt=1,
    )
    ema_gradient: str = setting(
        "true",
        'at the running value ``"decayed"``: its own gradient, 1 - ema of the batch rate\'s; ``"batch"``: the batch rate\'s; '
        '``"true"``: the batch sum over the mean count of a batch',
        ours=True,
        choices=("decayed", "batch", "true"),
    )
    min_count: float = setting(
        5,
        "groups with fewer examples of a class (in an epoch; form phi: in the decayed count) are absent",
        ours=True,
        expected="above 0",
        gt=0,
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
    near: float | None = setting(
        None,
        "share of plain training's own inconsistency between people who are alike that is kept as one more constraint, by a multiplier "
        "of its own (ReLiF's near pairs, whose ``share`` it is); null: none",
        ours=True,
        gt=0,
        le=1,
    )
    lipschitz_args: Mapping[str, Any] = setting({}, "its settings, as ReLiF's: " + ", ".join(_LIPSCHITZ))

    def __init__(self, *values: Any, **named: Any) -> None:
        given = {**dict(zip(type(self).model_fields, values)), **named}
        targeted = any(given.get(name) for name in ("target", "targets"))
        if "form" not in given and not targeted and any(name in given for name in _IMPLY_PHI):
            given["form"] = "phi"
        super().__init__(**{**(_PHI_DEFAULTS if given.get("form") == "phi" else {}), **given})

    @classmethod
    def search_space(cls, given: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        """Return setting -> what a study searches unless told: of the form phi where ``given`` settings are its, else of what they ask."""
        try:
            made = cls.from_args("FairMT", given or {})
        except RecipeError:
            made = cls()
        if made.form != "phi":
            found, metric = super().search_space(), Target.read(made.target or DEFAULT_TARGET).metric
            found["target"] = {
                "choices": [str(Target.read(c)._replace(metric=metric)) for c in found["target"]["choices"]]
            }
            return found
        ranges = {"epsilon": (0.005, 0.1), "mu": (0.1, 1.0), "rho": (0.01, 0.5)}
        return {name: {"low": low, "high": high, "log": True} for name, (low, high) in ranges.items()}

    def check(self) -> None:
        """Check what concerns several settings."""
        for name in ("target", "targets"):
            if self.form == "phi" and getattr(self, name):
                raise self.refused(name, f"{name} is not of the form phi, which has epsilon: leave one of them out")
        for name in _PHI_ONLY if self.form == "constraints" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise self.refused(
                    name,
                    f"{name} is a setting of the published form, one constraint on soft scores: write form: phi without a "
                    'target, or target: "eo <= 0.05" without it',
                )
        try:
            name = "target"
            _ = self.target is None or Target.read(self.target)
            name = "targets"
            read_table(self.targets)
        except RecipeError as error:
            raise self.refused(name, str(error), *error.where) from None
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
        if self.near is not None and (self.form == "phi" or self.weighing == "proxy"):
            raise self.refused(
                "near", "near is a constraint beside others: it needs form='constraints', and alpha='uniform' or a base"
            )
        self.dual()
        self.relif()

    def check_names(self, tasks: Sequence[Task], attributes: Collection[str]) -> None:
        """Check which tasks and attributes are constrained."""
        super().check_names(tasks, attributes)
        if self.form == "constraints":
            self.constrained(tasks, self.crossed(attributes))

    def crossed(self, attributes: Collection[str]) -> list[str]:
        """Return the names of what is compared: the attributes chosen, or all of them as one."""
        names = list(self.attributes or attributes)
        return ["*".join(names)] if self.intersectional and len(names) > 1 else names

    def constrained(self, tasks: Sequence[Task], attributes: Sequence[str]) -> dict[tuple[str, str], Target]:
        """Return (task, attribute) -> what is asked; a RecipeError where one is unknown, or nothing decided."""
        decided = [task.name for task in tasks if isinstance(task, Binary | Multilabel)]
        if not decided:
            raise self.refused("weighting", f"{UNDECIDED}; found {', '.join(task.name for task in tasks)}")
        try:
            return chosen(self.target, self.targets, DEFAULT_TARGET, decided, attributes)
        except RecipeError as error:
            raise self.refused("targets", str(error), *error.where) from None

    @property
    def weighing(self) -> str:
        """What weights the tasks: ``"proxy"``, ``"uniform"`` or ``"base"``."""
        usual = "proxy" if self.form == "phi" else "uniform"
        return self.alpha or (usual if self.base == "EW" else "base")

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
