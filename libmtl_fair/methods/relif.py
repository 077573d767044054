"""ReLiF: near people get near ranks (ours, the default of tables), or as published a Lipschitz regulariser across tasks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.functional.lipschitz import PROTOTYPES
from libmtl_fair.methods.base import Penalty, Settings, Written, setting
from libmtl_fair.methods.controllers import Controller, Pace, ShareController, ViolationController
from libmtl_fair.methods.near_pairs import ENOUGH, PRICE, REFERENCE, near_term
from libmtl_fair.predictions import Predictions

SCALE_FLOOR = 1e-4
DISTANCE_FLOOR = 1e-3
PAIRS = ("near", "random")
_LOG = logging.getLogger(__name__)
NO_TWINS = (
    "there are none here: no sensitive value is among the inputs (unaware, or sensitive_inputs: false), the loader is not a "
    "ResidentLoader of a table, or the step is one of your own; give the loader their inputs: ResidentLoader(..., twins=x), [N, ...]"
)

PAPER: Mapping[str, Any] = {
    "pairs": "random",
    "prototypes": "confident",
    "k": 8,
    "target": 0.24,
    "eta": 1e-3,
    "lambda_max": 1.0,
    "task_pairs": None,
}
"""The published settings for NYUv2. ``preset="paper"`` puts them under those given, ``"eicu"`` those for eICU."""

SHARE = 0.7
"""Of plain training's own inconsistency, at which the default stops paying (ours)."""
_TIMES = {"eta", "warmup"}
_NEAR = frozenset(("lam", "share", "floor", "flip"))
_BOTH = frozenset(("base", "base_args", "pairs", "eta", "warmup", "rate_ema"))


class ReLiFSettings(Settings):
    """Hyperparameters of :class:`ReLiF` (METHODS.md, 1.2 and 1.4): of near pairs ``lam``, ``share``, ``floor``; of random ones the rest.

    ``eta``, ``warmup`` and ``rate_ema`` belong to the controllers of both.
    """

    aliases: ClassVar[Mapping[str, str]] = {"lambda": "lam"}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER, "eicu": {**PAPER, "target": 0.16}}

    preset: str | None = setting(
        None,
        '``"paper"`` or ``"eicu"`` takes the published settings for what is not given; None takes ours',
        choices=("paper", "eicu"),
    )
    pairs: str | None = setting(
        None,
        "near: people who are alike by the loader's reference, within tasks; random: prototypes of different tasks, the "
        "published form's; null: as the settings given say, else near where there is a reference",
        ours=True,
        choices=PAIRS,
    )
    lam: float | None = setting(
        None,
        "lambda, the weight of near pairs' gaps; null gives each task its own, so that .01 less of R has one price in AUC (or R²) "
        "everywhere, .0014 times how close the batch's near pairs are, and less below an R of .25: who are not alike are not drawn "
        "together, and a task that knows little is asked for little; and it pays no more once R is at .7 of plain training's own",
        ours=True,
        expected=">= 0",
        ge=0,
        search=(0.01, 0.15, "log"),
    )
    flip: float = setting(
        0.0,
        "weight of the gaps between people and their flip twins, who have another sensitive value; above 0 a second forward pass",
        ours=True,
        expected=">= 0",
        ge=0,
    )
    share: float | None = setting(
        None,
        "of plain training's own inconsistency (at the end of a warm-up, which is plain), that a controller keeps by moving "
        "lambda within lam / 5 to 3 lam; null keeps a lam that is given, and else aims at .7 with at most its price. Unless eta or "
        "warmup is given, in units of the run: a third of it is plain, and a step of log lambda is 15 / steps",
        ours=True,
        gt=0,
        le=1,
    )
    floor: float = setting(0.05, "least inconsistency that ``share`` aims at", ours=True, gt=0, le=1)
    prototypes: str = setting(
        "random", "which examples of a task are compared; published: confident", ours=True, choices=PROTOTYPES
    )
    k: int | None = setting(
        None,
        "prototypes a task and step; default 64 (random) or 8 (confident)",
        ours=True,
        expected="a whole number of at least 1",
        ge=1,
        search=(16, 128, "log"),
    )
    target: float = setting(
        0.10, "violation rate r* that the controller aims at", ours=True, ge=0, le=1, search=(0.01, 0.2, "log")
    )
    eta: float = setting(0.02, "step of the controller", ours=True, ge=0, search=(0.01, 0.3, "log"))
    lambda_min: float = setting(0.01, "least weight of the regulariser")
    lambda_max: float = setting(10.0, "largest weight of the regulariser", ours=True, search=(1.0, 20.0, "log"))
    lambda_0: float = setting(0.1, "weight of the regulariser at the start")
    warmup: int = setting(100, "steps before the controller acts", expected=">= 0 steps", ge=0)
    rate_ema: float = setting(0.1, "share of the new value in the running rate", gt=0, le=1)
    scale_ema: float = setting(0.1, "share of the new value in the running scales", gt=0, le=1)
    beta: float = setting(0.1, "of the Huber gap", expected="above 0", gt=0, search=(0.05, 0.5, "log"))
    mu: float = setting(0.05, "of the huberised hinge", expected="above 0", gt=0)
    quantile: float = setting(0.95, "of gaps and distances, which sets the scales", gt=0, le=1)
    scaling: bool = setting(True, "False is the ablation tau = kappa = 1")
    control: bool = setting(True, "False is the ablation with static lambda = ``lambda_0``")
    lipschitz: bool = setting(True, "False is the ablation without the term; the rates are still recorded")
    detach_distance: bool = setting(False, "no gradient through distances; can collapse the model")
    task_pairs: int | None = setting(
        3,
        "task pairs compared a step, drawn anew each time, so that a step's cost does not grow with T (T - 1) / 2; "
        "three tasks have three. None compares all, as published",
        ours=True,
        ge=1,
    )

    def check(self) -> None:
        """Check what concerns several settings."""
        form, given = self.form, self.model_fields_set
        other = given & _NEAR if form == "random" else given - _NEAR - _BOTH if form == "near" else ()
        if other:
            name, own = min(other), "near" if form == "random" else "random"
            raise self.refused(name, f"{name} is a setting of pairs={own!r}, and pairs={form!r}; leave one of them out")
        if self.control and not 0 <= self.lambda_min <= self.lambda_0 <= self.lambda_max:
            ends = f"lambda_min={self.lambda_min} and lambda_max={self.lambda_max}"
            raise self.refused("lambda_0", f"lambda_0 must be between {ends}, found {self.lambda_0!r}")
        self.controller()
        self.share_controller()
        if self.detach_distance:
            warnings.warn(
                "ReLiF: detach_distance=True can collapse the model: the gap scale shrinks with the gaps", stacklevel=3
            )

    @property
    def form(self) -> str | None:
        """``"near"`` or ``"random"``, as given or as the settings given belong to; None where nothing says."""
        given = self.model_fields_set
        return self.pairs or ("random" if given - _NEAR - _BOTH else "near" if given & _NEAR else None)

    @classmethod
    def search_space(cls, given: Mapping[str, object] | None = None) -> dict[str, dict[str, Any]]:
        """Return the ranges that a study searches: of all settings, or of the form that ``given`` asks for."""
        found = super().search_space()
        if given is None:
            return found
        near = cls.from_args("ReLiF", given).form != "random"
        return {name: entry for name, entry in found.items() if (name in _NEAR) == near}

    @property
    def prototypes_per_task(self) -> int:
        """Number of prototypes a task and step."""
        return self.k or (64 if self.prototypes == "random" else 8)

    def share_controller(self) -> ShareController | None:
        """Return the controller of near pairs' lambda; None where it is static."""
        make = partial(
            ShareController, floor=self.floor, step_size=self.eta, warmup=self.warmup, smoothing=self.rate_ema
        )
        if self.share is not None:
            return make(self.share, initial=PRICE if self.lam is None else self.lam)
        if self.lam is not None or self.form == "random" or self.model_fields_set & _TIMES:
            return None
        return make(SHARE, initial=PRICE, lowest=0.02, highest=1.0)

    def pace(self, step: int, steps: int | None) -> Pace | None:
        """Return where the near pairs' controller is at a step (0-based) of a run of ``steps``; None where it goes by settings."""
        if not steps or self.model_fields_set & _TIMES:
            return None
        return Pace(step < max(1, steps // 3), Pace.of(step, 1, steps).gain)

    def controller(self) -> ViolationController:
        """Return the controller of lambda."""
        return ViolationController(
            self.target,
            self.eta,
            initial=self.lambda_0,
            minimum=self.lambda_min if self.control else min(self.lambda_min, self.lambda_0),
            maximum=self.lambda_max if self.control else max(self.lambda_max, self.lambda_0),
            warmup=self.warmup,
            smoothing=self.rate_ema,
            static=not self.control,
        )


class Lipschitz(NamedTuple):
    """The term of one step and the scales in use: all [...]; ``term`` has its derivatives."""

    term: F.LipschitzTerm
    tau: Tensor
    kappa: Tensor


class LipschitzScales(Controller):
    """L_lip of METHODS.md, 1.2, with its running scales: a huberised hinge of scaled score gaps over scaled distances.

    The scales follow the 95 % quantiles of gaps and distances; they are buffers [..., 2], saved with the model.
    """

    numbers: ClassVar[tuple[str, ...]] = ("beta", "mu", "scale_ema", "k")
    scales: Tensor
    scales_started: Tensor

    def __init__(self, settings: ReLiFSettings) -> None:
        super().__init__()
        self.settings = settings
        self.beta: float | Tensor = settings.beta
        self.mu: float | Tensor = settings.mu
        self.k: int | Tensor = settings.prototypes_per_task
        self.scale_ema = settings.scale_ema
        self.register_buffer("scales", torch.ones(2))
        self.register_buffer("scales_started", torch.tensor(False))

    def forward(
        self, scores: Tensor, embeddings: Tensor, *, move: bool = True, generator: F.Generators = None
    ) -> Lipschitz:
        """Return the term of this step's prototype pairs, scores [..., T, B], after moving the scales.

        ``move`` asks for the derivative to the embeddings too.

        Raises
        ------
        RecipeError
            Fewer than two tasks.
        """
        s, sizes = self.settings, None
        if scores.shape[-2] < 2:
            raise RecipeError("the Lipschitz term compares tasks with each other: it needs at least two tasks")
        if isinstance(self.k, Tensor) and bool((self.k != self.k[0]).any()):
            sizes = self.k
        term = F.lipschitz_derivatives(
            scores,
            embeddings,
            int(self.k.max()) if isinstance(self.k, Tensor) else self.k,
            self._move_scales,
            mode=s.prototypes,
            generator=generator,
            max_task_pairs=s.task_pairs,
            sizes=sizes,
            beta=self.beta if isinstance(self.beta, float) else self.beta.to(scores.dtype),
            mu=self.mu if isinstance(self.mu, float) else self.mu.to(scores.dtype),
            min_distance=DISTANCE_FLOOR,
            detach_distance=s.detach_distance or not move,
        )
        tau, kappa = self.scales.clone().unbind(-1) if s.scaling else torch.ones_like(self.scales).unbind(-1)
        return Lipschitz(term, tau, kappa)

    def _move_scales(self, gap: Tensor, distance: Tensor, mask: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Move tau and kappa towards this step's quantiles; the first step sets them; no pair leaves them."""
        s = self.settings
        if not s.scaling or not gap.shape[-1]:
            return 1.0, 1.0
        found = F.masked_quantiles([gap, distance], s.quantile, mask)
        xp, found, ok, n = self._arrays(found, None if mask is None else mask.any(-1, keepdim=True))
        share = n.scale_ema if isinstance(n.scale_ema, float) else n.scale_ema[..., None]
        moved = xp.where(n.scales_started[..., None], n.scales + share * (found - n.scales), found)
        self._keep(
            scales=xp.where(ok, xp.where(moved > SCALE_FLOOR, moved, SCALE_FLOOR), n.scales),
            scales_started=n.scales_started | ok[..., 0],
        )
        tau, kappa = self.scales.to(gap.dtype).unbind(-1)
        return tau, kappa


class ReLiF(Penalty):
    r"""People who are alike get closer ranks (near pairs, ours), or as published a controlled Lipschitz regulariser.

    Near pairs, the default where the loader gives a reference: :math:`L_{MTL} + \lambda \sum_t R_t + \varphi \sum_t F_t`,
    :math:`R_t = \mathrm{mean}_i |f_t(x_i) - f_t(x_{n(i)})| / G(f_t)`, n(i) being the batch's nearest other example in the
    reference, f half logit and half probability, G their Gini mean difference over the batch, with gradient: shrinking gains
    nothing; F (``flip``, off by default) is the same between people and their flip twins. It claims no more than that people alike
    except in what the reference leaves out get closer ranks. Records ``lambda``, ``inconsistency``, the mean of R (METHODS.md, 1.3,
    with f in place of ranks and the batch's people), and with ``flip`` ``flip_gap``, the mean of F.

    Random pairs, as published: :math:`L_{MTL} + \lambda L_{lip}` with
    :math:`L_{lip} = \mathrm{mean}\, \phi_\mu(\rho_\beta(\Delta s)/\tau - d/\kappa)` over cross-task prototype pairs, and
    :math:`\lambda \leftarrow \mathrm{clip}(\lambda (1 + \eta (\tilde r - r^*)))` where :math:`\tilde r` is the running
    share of pairs whose margin is positive. Source: arXiv:2606.10632; random prototypes and their defaults are ours. Records
    ``lambda``, ``r`` (this step's violation rate), ``r_smooth``, ``tau``, ``kappa``, ``lipschitz``. What it lowers is how far
    apart and how spread out the tasks' scores are; on adult, inconsistency falls by 1 % and flips by 4 %.
    """

    settings_class = ReLiFSettings
    source = "arXiv:2606.10632"
    cost = (
        "near pairs 1.4 to 1.7 plain steps at 300 columns, flip a second forward pass more; random ones 1.9 to 2.1 with 2 to 40 "
        "tasks (docs/RESULTS.md)"
    )
    settings: ReLiFSettings
    _told: bool = False
    _warm: bool = False

    def configure(self, settings: Settings) -> None:
        """Make the controllers and, for random pairs, the term with its running scales."""
        super().configure(settings)
        if self.settings.form != "near":
            self.controller = self.settings.controller()
            self.term = LipschitzScales(self.settings)
        self.share = self.settings.share_controller()
        self.needs_reference = self.settings.form != "random"
        self.needs_twins = self.settings.flip > 0
        if self.needs_twins and self.rep_grad:
            raise HostError(
                "ReLiF: flip takes gradients through a second forward pass, past the heads: use rep_grad=False"
            )
        self.needs_representation = self.settings.form != "near"
        self.to(self.device)

    def penalty(self, batch: FairBatch) -> Written | None:
        """Return the gradient of lambda times the term (0 where nothing can be compared) after moving the controllers."""
        if self.settings.form == "random":
            return self._random(batch)
        if batch.reference is not None:
            return self._near(batch)
        if self.settings.form == "near":
            raise HostError(f"ReLiF with near pairs needs reference features, by which people are alike: {REFERENCE}")
        if not self._told:
            self._told = True
            _LOG.info(  # no warning: LibMTL users' loaders have none, and this is what ReLiF has been for them
                "ReLiF: the loader gives no reference features, so that near people cannot be told and pairs='random', the published "
                "form's variant, is used. For near pairs %s; or say pairs='random'",
                REFERENCE,
            )
        return self._random(batch)

    def _near(self, batch: FairBatch) -> Written:
        """Return the gradient of lambda times the sum over tasks of near people's gaps."""
        flip = self.settings.flip
        if flip and batch.twins is None:
            raise HostError(f"ReLiF with flip={flip:g} needs flip twins, and {NO_TWINS}")
        odd = [name for name in batch.main if flip and batch.task(name).summed]
        if odd:
            raise HostError(
                f"ReLiF: flip compares people with their twins, and task {odd[0]!r} has no one value a person; use flip=0"
            )
        term, self.__dict__["trace"] = near_term(batch, self.settings.lam, partial(self._strength, batch), flip, ENOUGH)
        return term

    def _strength(self, batch: FairBatch, inconsistency: Tensor, valid: Tensor) -> Tensor:
        """Return lambda, or the price where none is given, after moving its controller.

        Unasked, a controller acts only where the length of the run is known.
        """
        epochs = int(getattr(self, "epochs", 0) or 0)
        pace = self.settings.pace(batch.step, epochs * (batch.epoch_steps or 0))
        if self.share is None or (pace is None and self.settings.share is None):
            lam = PRICE if self.settings.lam is None else self.settings.lam
            return torch.as_tensor(lam, dtype=inconsistency.dtype, device=inconsistency.device)
        self._warm = batch.step < self.settings.warmup if pace is None else pace.warm
        return self.share.update(inconsistency, valid, pace).to(inconsistency.dtype)

    def admits(self, predictions: Callable[[], Predictions]) -> bool:
        """Whether the model of now may be chosen for its utility: not while a controller's warm-up trains it plainly."""
        return self.share is None or not self._warm

    def _random(self, batch: FairBatch) -> Written | None:
        scores, embedding = batch.score_matrix, batch.embedding
        found = self.term(scores.detach(), embedding.detach(), move=embedding.requires_grad)
        term = found.term
        strength = self.controller.update(term.rate, term.some)
        self.__dict__["trace"] = {
            "lambda": strength,
            "r": term.rate if term.some is None else torch.where(term.some, term.rate, torch.nan),
            "r_smooth": self.controller.smoothed.clone(),
            "tau": found.tau,
            "kappa": found.kappa,
            "lipschitz": term.value if term.some is None else torch.where(term.some, term.value, torch.nan),
        }
        if not self.settings.lipschitz:
            return None
        strength = strength.to(scores.dtype)
        pairs = [(scores, term.to_scores.mul_(strength))]
        if term.to_embeddings is not None:
            pairs.append((embedding, term.to_embeddings.mul_(strength)))
        return Written(pairs)
