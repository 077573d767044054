"""Which trainings can be stacked, and which of them with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS, resolve_weighting
from libmtl_fair.methods.base import Penalty
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tasks import Task

WEIGHTINGS = ("EW", "ReLiF", "FairMT", "LambdaMix", "GroupRegulariser")
SUPPORTED = f"an MLP without norm, hard sharing, binary tasks, Adam, {', '.join(WEIGHTINGS)} and any Penalty, linear fairness heads"


def obstacle(recipe: Recipe, method: str, tasks: Sequence[Task]) -> str | None:
    """Return why a method cannot be stacked, or None."""
    spec, model, train = recipe.methods[method], recipe.model_for(method), recipe.train_for(method)
    heads = spec.heads
    checks = (
        (_at_logits(spec.weighting), f"weighting {spec.weighting}"),
        (spec.args.get("base", "EW") == "EW", f"base {spec.args.get('base')}"),
        (_needs_logits_only(recipe, method), f"proxy {spec.args.get('proxy')}"),
        (model.encoder == "mlp" and model.norm is None, f"encoder {model.encoder} with norm {model.norm}"),
        (model.architecture == "HPS", f"architecture {model.architecture}"),
        (heads is None or heads.loss not in ("adversarial", "group_specific"), f"heads {heads and heads.loss}"),
        (heads is None or heads.target in (None, "main") or heads.heads == "per_task", "shared heads of their own"),
        (train.optimizer.optim == "adam", f"optimiser {train.optimizer.optim}"),
        (not train.rep_grad, "rep_grad"),
        (not recipe.data.resplit, "resplit, another split of the data for each seed"),
        (all(task.kind == "binary" for task in tasks), "tasks that are not binary"),
    )
    return next((f"{why} (stacked: {SUPPORTED})" for fits, why in checks if not fits), None)


def _at_logits(weighting: str) -> bool:
    """Whether a method's gradient starts at logits and representations: a term's does, whoever wrote it."""
    return weighting in WEIGHTINGS or issubclass(resolve_weighting(weighting), Penalty)


def _needs_logits_only(recipe: Recipe, method: str) -> bool:
    """Whether FairMT takes its task weights from the logits, as it does by default."""
    spec = recipe.methods[method]
    if spec.weighting != "FairMT":
        return True
    settings: Any = OUR_WEIGHTINGS["FairMT"].settings_class.from_args("FairMT", spec.args)
    return bool(settings.proxy == "head" or settings.weighing == "uniform")


def shape(recipe: Recipe, method: str) -> tuple[object, ...]:
    """Return what members of one stack have in common."""
    spec, model, train = recipe.methods[method], recipe.model_for(method), recipe.train_for(method)
    heads, optimizer = spec.heads, train.optimizer
    own = (
        None
        if heads is None or heads.target in (None, "main")
        else (heads.sensitive, heads.tasks, heads.intersectional)
    )
    return (model.hidden, train.batch_size, optimizer.betas, optimizer.eps, own)
