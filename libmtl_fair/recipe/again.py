"""Numbers measured again from saved predictions that no longer are those that a run measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from libmtl_fair.errors import CheckpointError, FairMTLError, RecipeError
from libmtl_fair.files import Json, plain
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.measure import Protocol, measure, scores_digest
from libmtl_fair.recipe.people import measured_from_kept
from libmtl_fair.recipe.schema import Recipe

_OF_TRAINING = ("settings", "weighting", "checkpoint", "timing", "post", "digest")
"""What does not follow from predictions; all other old numbers are dropped."""


def measured_again(
    recipe: Mapping[str, object], protocol: Json, folder: Path, metrics: Json, changed: Sequence[str]
) -> Json:
    """Return the content of ``metrics.json`` for the predictions that are in ``folder`` now; ``changed`` splits are not as recorded.

    Where outputs changed and the scores beside them did not, the scores follow the outputs. What needs the model is left out: its own
    thresholds, flip twins.

    Raises
    ------
    CheckpointError
        A file of predictions or the protocol cannot be read.
    RecipeError
        The recipe cannot, or the predictions are of other tasks.
    """
    held: dict[str, Predictions] = {}
    try:
        for part, recorded in metrics["digest"].items():
            found = Predictions.load(folder / f"predictions_{part}.parquet")
            stale = part in changed and recorded.get("scores") == scores_digest(found)
            held[part] = found.rescored(found.tasks) if stale else found
            here, there = [t.name for t in found.tasks], [t for t in metrics["utility"][part] if t != "macro"]
            if here != there:
                raise RecipeError(
                    f"they have the tasks {here}, the run {there}; keep the same tasks, in the same order"
                )
        read, seed = Recipe.from_dict(recipe), metrics["seed"]
        content = measure(read, metrics["method"], seed, held, Protocol.from_dict(protocol))
        if old := metrics.get("consistency"):
            content["consistency"] = measured_from_kept(read, folder.parent.parent, old, seed, held)
    except (FairMTLError, KeyError, TypeError) as error:
        kind = RecipeError if isinstance(error, RecipeError) else CheckpointError
        raise kind(
            f"{folder}: the saved predictions ({', '.join(changed)}) are not those that metrics.json was measured on, and they "
            f"cannot be measured: {error}"
        ) from error
    again: Json = plain(content | {name: metrics[name] for name in _OF_TRAINING if name in metrics})
    return again
