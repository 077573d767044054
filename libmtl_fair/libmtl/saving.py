"""Saving a FairTrainer after every epoch, and continuing it to the numbers of an uninterrupted run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from libmtl_fair.errors import CheckpointError
from libmtl_fair.files import remove_leftovers, write_text
from libmtl_fair.libmtl import checkpoint
from libmtl_fair.libmtl.history import History

LAST, BEST, HISTORY = "last.pt", "best.pt", "history.csv"
_FIELDS = {
    "fingerprint", "structure", "method", "tasks", "settings", "epoch", "step", "model", "attributes", "optimizer",
    "scheduler", "random", "loaders", "history", "best", "first",
}  # fmt: skip


def model_state(model: Any) -> dict[str, Any]:
    """Return a copy of the model's state_dict, on the device."""
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in model.state_dict().items()}


def structure(model: Any) -> Any:
    """Return what a branching model needs to be rebuilt before its weights are loaded; None for any other."""
    return model.structure() if hasattr(model, "structure") else None


def settings(trainer: Any) -> dict[str, str]:
    """Return what must agree for a checkpoint to be continued, as text."""
    values = {
        **trainer.kwargs,
        "optim_param": trainer.optim_param,
        "scheduler_param": trainer.scheduler_param,
        "seed": trainer.seed,
        "rep_grad": trainer.rep_grad,
        "multi_input": trainer.multi_input,
        "select": trainer.select,
    }
    return {k: json.dumps(v, sort_keys=True, default=lambda other: type(other).__name__) for k, v in values.items()}


def save(trainer: Any, loaders: Any) -> None:
    """Write ``last.pt`` and ``history.csv``, each whole or not at all."""
    content = {
        "fingerprint": checkpoint.fingerprint(trainer.model),
        "structure": structure(trainer.model),
        "method": trainer.weighting,
        "tasks": trainer.task_name,
        "settings": settings(trainer),
        "epoch": trainer.epoch,
        "step": trainer.global_step,
        "model": trainer.model.state_dict(),
        "attributes": checkpoint.attributes(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict() if trainer.scheduler else None,
        "random": checkpoint.random_state(),
        "loaders": checkpoint.loader_states(_named(trainer, loaders)),
        "history": trainer._history.state_dict(),
        "best": trainer.best,
        "first": trainer._first,
    }
    checkpoint.save(trainer.run_dir / LAST, content)
    write_text(trainer.run_dir / HISTORY, trainer._history.to_csv())


def save_best(trainer: Any) -> None:
    """Write ``best.pt`` where there is a run folder."""
    if trainer.run_dir is not None:
        best = trainer.best
        content = {"model": best["state"], "structure": best["structure"], "epoch": best["epoch"]}
        checkpoint.save(trainer.run_dir / BEST, content)


def _named(trainer: Any, loaders: Any) -> Mapping[str, Any]:
    return loaders if trainer.multi_input else {"": loaders}


def resume(trainer: Any, loaders: Any) -> None:
    """Continue from ``last.pt`` if there is one.

    Raises
    ------
    CheckpointError : damaged, no checkpoint of ours, or made with other tasks, settings or model.
    """
    path = trainer.run_dir / LAST
    remove_leftovers(trainer.run_dir)
    if path.exists():
        restore(trainer, checkpoint.load(path, trainer.device), loaders, path)


def restore(trainer: Any, content: dict[str, Any], loaders: Any, path: Path) -> None:
    """Put everything back that :func:`save` wrote; ``loaders`` None leaves them alone."""
    _check(trainer, content, path)
    if content["structure"] is not None:
        trainer.model.restore_structure(content["structure"])
        trainer._prepare_optimizer(trainer.optim_param, trainer.scheduler_param)
    checkpoint.check_fits(path, trainer.model, content["fingerprint"])
    try:
        trainer.model.load_state_dict(content["model"])
        checkpoint.set_attributes(trainer.model, content["attributes"])
        trainer.optimizer.load_state_dict(content["optimizer"])
        if trainer.scheduler is not None:
            trainer.scheduler.load_state_dict(content["scheduler"])
        trainer._history = History.from_state(content["history"])
        trainer.best, trainer._first = content["best"], content["first"]
        trainer.epoch, trainer.global_step = content["epoch"], content["step"]
        if loaders is not None:
            checkpoint.set_loader_states(_named(trainer, loaders), content["loaders"])
        checkpoint.set_random_state(content["random"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit this run ({error}); use another run_dir, or delete it to start afresh"
        ) from error


def _check(trainer: Any, content: dict[str, Any], path: Path) -> None:
    lacking = sorted(_FIELDS - content.keys())
    if lacking:
        raise CheckpointError(
            f"checkpoint {path} lacks {lacking[0]!r}: it is none of a whole run; delete it to start afresh"
        )
    if content["tasks"] != trainer.task_name or content["method"] != trainer.weighting:
        raise CheckpointError(
            f"checkpoint {path} was made with {content['method']} on tasks {content['tasks']}, this run is "
            f"{trainer.weighting} on {trainer.task_name}; use another run_dir"
        )
    for name, here in settings(trainer).items():
        there = content["settings"].get(name, "absent")
        if there != here:
            raise CheckpointError(
                f"checkpoint {path} was made with {name} = {there}, this run has {here}; use the settings it was made "
                "with, or another run_dir"
            )


def load_weights(trainer: Any, path: Path) -> None:
    """Load a model's weights: ours, or a plain state_dict such as LibMTL's git main saves. A folder means its ``best.pt``.

    Raises
    ------
    CheckpointError : missing, damaged, or of another model.
    """
    path = path / BEST if path.is_dir() else path
    content = checkpoint.load(path, trainer.device, state_dict_too=True)
    if content.get("structure") is not None:
        trainer.model.restore_structure(content["structure"])
        trainer._prepare_optimizer(trainer.optim_param, trainer.scheduler_param)
    weights = content["model"]
    checkpoint.check_fits(path, trainer.model, {k: list(v.shape) for k, v in weights.items()})
    trainer.model.load_state_dict(weights)
