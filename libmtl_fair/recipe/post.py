"""Methods that are made of others after training: thresholds, offsets, blends, and fairlearn's reductions on the same splits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from libmtl_fair.arrays import Array, Bools, as_floats
from libmtl_fair.data import Dataset, Split
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.files import Json
from libmtl_fair.methods.base import Declared, Names, setting
from libmtl_fair.methods.targets import Target
from libmtl_fair.metrics import post_models
from libmtl_fair.metrics.fairlearn_bridge import group_labels
from libmtl_fair.metrics.post_models import LIFTED, PostModel, binary_tasks, worst_gap
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.people import PARTS
from libmtl_fair.recipe.reduction import decided_by, reduction, voters_of
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.sections import POST
from libmtl_fair.tasks import Task, with_nan

Parts = Mapping[str, Predictions]
_GAP = (
    "disparity on validation: that of equalized_odds, equal_opportunity or demographic_parity, the worst binary task's"
)
_PARITIES = (
    "true_positive_rate_parity",
    "false_positive_rate_parity",
    "true_negative_rate_parity",
    "false_negative_rate_parity",
)
_MEASURED = {"selection_rate_parity": "demographic_parity", "true_positive_rate_parity": "equal_opportunity"}


class PostSettings(Declared):
    """Settings of every post-processing."""

    aliases: ClassVar[Mapping[str, str]] = {"attributes": "attribute"}
    n_of: ClassVar[int] = 1
    source: ClassVar[str] = "ours"
    cost: ClassVar[str] = "no training"

    attribute: Names | None = setting(None, "sensitive attribute; several are crossed; null is all, crossed")
    constraint: str = setting("equalized_odds", _GAP, choices=tuple(LIFTED))


class PathSettings(PostSettings):
    """Settings of those that have a strength."""

    strength: float | None = setting(
        None,
        "how much of it; null chooses on validation: the least that has the lowest disparity, or at most target",
        gt=0,
        le=1,
    )
    target: float | None = setting(
        None, "disparity on validation that the least sufficient strength is taken for", ge=0, le=1
    )

    to_constraint: bool = setting(
        False,
        "the least strength that keeps on validation what the method it is made of was asked (FairMT's constraint), within one standard "
        "error: what training left over",
    )

    def check(self) -> None:
        """Refuse two ways to choose the strength."""
        if self.strength is not None and self.target is not None:
            raise self.refused("target", "strength and target exclude each other; target chooses the strength")
        if self.to_constraint and (self.strength is not None or self.target is not None):
            why = "to_constraint chooses the strength, by the constraint of the method: leave strength and target out"
            raise self.refused("to_constraint", why)

    def fit(self, val: Predictions, threshold: float | str, seed: int) -> PostModel:
        """Return the model whose strength is chosen."""
        return post_models.Blend()


class OffsetsSettings(PathSettings):
    """Logits of groups lifted to the best group's rate, along a strength (metrics.fit_offsets)."""

    def fit(self, val: Predictions, threshold: float | str, seed: int) -> PostModel:
        """Return the fitted offsets."""
        return post_models.fit_offsets(val, self.attribute, self.constraint, threshold=threshold)


class ThresholdsSettings(PathSettings):
    """Thresholds per group by fairlearn's ThresholdOptimizer (metrics.fit_thresholds)."""

    source: ClassVar[str] = "Hardt et al., NeurIPS 2016; fairlearn"
    constraint: str = setting(
        "equalized_odds",
        "fairlearn's constraint",
        choices=("equalized_odds", "demographic_parity", "selection_rate_parity", *_PARITIES),
    )
    objective: str = setting("accuracy_score", "what fairlearn maximises: accuracy_score or balanced_accuracy_score")
    strength: float | None = setting(
        None, "share of people who are so decided; null is 1, or chosen for target", gt=0, le=1
    )

    def fit(self, val: Predictions, threshold: float | str, seed: int) -> PostModel:
        """Return the fitted thresholds."""
        how: Json = {"objective": self.objective, "threshold": threshold, "seed": seed}
        return post_models.fit_thresholds(val, self.attribute, self.constraint, **how)


class BlendSettings(PathSettings):
    """Outputs of two methods mixed: 1 - strength of the first, strength of the second."""

    n_of: ClassVar[int] = 2


class ExponentiatedGradientSettings(PostSettings):
    """fairlearn's ExponentiatedGradient for every binary task, on the encoded inputs; other tasks are those of `of`."""

    source: ClassVar[str] = "Agarwal et al., ICML 2018; fairlearn"
    cost: ClassVar[str] = "up to max_iter fits of the estimator a task"
    constraint: str = setting(
        "equalized_odds",
        "what is bounded",
        choices=("equalized_odds", "demographic_parity", *_PARITIES[:2], "error_rate_parity"),
    )
    eps: float = setting(0.01, "the constraint's bound, and the tolerance of the search", gt=0, lt=1)
    estimator: str = setting("logistic", "the classifier that is trained on weights", choices=("logistic", "boosting"))
    max_iter: int = setting(50, "steps of the search", ge=1)


POST_SETTINGS: Mapping[str, type[PostSettings]] = {
    f"{POST}thresholds": ThresholdsSettings,
    f"{POST}offsets": OffsetsSettings,
    f"{POST}blend": BlendSettings,
    f"{POST}exponentiated_gradient": ExponentiatedGradientSettings,
}


def made_of(recipe: Recipe, method: str) -> tuple[str, ...]:
    """Return the methods that a post-processing is made of."""
    return recipe.methods[method].of or (recipe.reference,)


def check_post(recipe: Recipe) -> None:
    """Check what post-processings are made of; RecipeError with file and line."""
    for name, method in recipe.methods.items():
        if method.post is None:
            continue
        if name == recipe.reference:
            raise recipe.error(("methods", name, "post"), "the first method is the reference; it must be a trained one")
        if not recipe.output.predictions:
            why = f"method {name!r} is made of saved predictions: expected true, or no post-processing"
            raise recipe.error(("output", "predictions"), why)
        sources, wanted = made_of(recipe, name), POST_SETTINGS[method.weighting].n_of
        where = ("methods", name, "of" if method.of else "post")
        if len(sources) != wanted:
            raise recipe.error(
                where, f"post: {method.post} is made of {wanted} method{'s' * (wanted > 1)}, found {list(sources)}"
            )
        for source in sources:
            if source not in recipe.methods or recipe.methods[source].post:
                trained = [m for m, each in recipe.methods.items() if not each.post]
                raise recipe.error(where, unknown("trained method", source, trained))


def make_post(
    recipe: Recipe, method: str, seed: int, data: Dataset, sources: Mapping[str, Parts], asked: Sequence[Json] = ()
) -> tuple[Json, Json]:
    """Return the predictions of a post-processing by part, and how it was made.

    ``sources``: those it is made of, by part; ``asked``: what came of the first one's constraints, ``constraint`` of its metrics.
    """
    spec = recipe.methods[method]
    settings = POST_SETTINGS[spec.weighting].from_args(spec.weighting, spec.args)
    held = {part: [parts[part] for parts in sources.values()] for part in PARTS}
    try:
        if isinstance(settings, ExponentiatedGradientSettings):
            return _reduced(settings, seed, data, {part: each[0] for part, each in held.items()})
        assert isinstance(settings, PathSettings)
        return _on_path(recipe, settings, seed, held, asked)
    except DataError as error:
        raise recipe.error(("methods", method), str(error)) from error


def fitted(recipe: Recipe, method: str, seed: int, val: Predictions) -> PostModel:
    """Return what a post-processing along a strength is made of, fitted on validation predictions of its first model."""
    spec = recipe.methods[method]
    settings = POST_SETTINGS[spec.weighting].from_args(spec.weighting, spec.args)
    assert isinstance(settings, PathSettings)
    return settings.fit(val, recipe.metrics.threshold, seed)


def _on_path(
    recipe: Recipe, settings: PathSettings, seed: int, held: Mapping[str, list[Predictions]], asked: Sequence[Json]
) -> tuple[Json, Json]:
    threshold = recipe.metrics.threshold
    about: Json = {}
    model = settings.fit(held["val"][0], threshold, seed)
    metric = _MEASURED.get(settings.constraint, settings.constraint)
    strength, chosen = settings.strength, "set in the recipe"
    full = settings.target is None and not settings.to_constraint
    if strength is None and isinstance(settings, ThresholdsSettings) and full:
        strength, chosen = 1.0, "full strength"
    if strength is None:
        rule: Json = {"metric": metric, "min_group_size": recipe.metrics.min_group_size}

        def disparity(made: Predictions) -> float:
            return worst_gap(made, settings.attribute, thresholds=threshold, **rule)

        target = settings.target
        if settings.to_constraint:
            kept = _constraints(asked, held["val"][0], "base_rate" if threshold == "base_rate" else "half")
            target = 1.0

            def disparity(made: Predictions) -> float:
                least: Json = {"thresholds": threshold, "min_group_size": recipe.metrics.min_group_size}
                gaps = [worst_gap(replace(made, tasks=(task,)), *of, **least) / most for task, of, most in kept]
                return max((gap for gap in gaps if gap == gap), default=float("nan"))

        points = post_models.path(model.along(*held["val"]), disparity)
        strength = post_models.pick(points, target).strength
        wanted = "lowest" if target is None else f"first of at most {target:g}"
        chosen = f"least strength with the {wanted} {metric} difference on validation"
        if settings.to_constraint:
            chosen = "least strength that keeps the method's own constraints on validation, if one does"
        about["path"] = [point._asdict() for point in points]
    if isinstance(model, post_models.Offsets):
        about["offsets"] = {task: dict(by_group) for task, by_group in model.offsets.items()}
    made = {part: model.apply(*each, strength=strength) for part, each in held.items()}
    return made, {"strength": strength, "chosen_by": f"strength {strength:g}: {chosen}", **about}


def _constraints(
    asked: Sequence[Json], val: Predictions, threshold: str
) -> list[tuple[Task, tuple[list[str], str], float]]:
    """Return (task, (attributes, metric), difference that is allowed) of each constraint on decisions at a threshold.

    Allowed is one standard error above the tolerance. A run of before has rows without a threshold: those at 0.5.
    """
    names = {"eo": "equalized_odds", "eop": "equal_opportunity", "dp": "demographic_parity"}
    found = []
    for row in asked:
        if row.get("threshold", "half") == threshold and row["task"] in binary_tasks(val):
            of = str(row["attribute"]).split("*"), names[Target.read(row["target"]).metric]
            found.append((val.task(row["task"]), of, float(row["tolerance"]) + float(row.get("val_error") or 0.0)))
    if not found:
        raise DataError(
            "to_constraint: the method that it is made of was asked nothing of these decisions; expected `of` to name a method with "
            "a constraint on binary tasks, such as FairMT"
        )
    return found


def _reduced(settings: ExponentiatedGradientSettings, seed: int, data: Dataset, held: Parts) -> tuple[Json, Json]:
    """Train a randomised classifier for each binary task; its score is the expected decision."""
    about: Json = {"predictors": {}, "voters": {}}
    for task in binary_tasks(held["val"]):
        model = reduction(settings.constraint, settings.estimator, seed, eps=settings.eps, max_iter=settings.max_iter)
        rows, y, groups = _rows(data.train, held["val"], task, settings.attribute)
        x = data.train.x.numpy()[rows].astype(np.float64)
        with warnings.catch_warnings(action="ignore"):  # fairlearn's own, of what pandas will change
            model.fit(x, y, sensitive_features=groups)
        voters = about["voters"][task] = voters_of(model)
        about["predictors"][task] = len(voters)
    made = {part: decided_by(about["voters"], p, getattr(data, part).x) for part, p in held.items()}
    return made, {"chosen_by": "fairlearn's ExponentiatedGradient on training data", **about}


def _rows(train: Split, like: Predictions, task: str, attribute: Names | None) -> tuple[Array, Array, Array]:
    """Return the training rows with a label and known groups: their places, labels 0/1, and groups' names."""
    names = tuple(attribute or train.groups)
    labels = as_floats(with_nan(like.task(task).flat(train.labels[task])))
    known: Bools = np.logical_and.reduce([train.groups[name].numpy() >= 0 for name in names])
    rows = np.flatnonzero(known & np.isfinite(labels))
    ids = Predictions((), {}, {}, {}, {n: train.groups[n] for n in names}, train.group_names)
    return rows, labels[rows].astype(int), group_labels(ids, names)[rows]
