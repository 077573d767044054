"""Which epoch is kept, and what happens when a loss is not finite."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from libmtl_fair.errors import FairMTLError
from libmtl_fair.libmtl import checkpoint, saving
from libmtl_fair.libmtl import evaluate as evaluation


class DivergenceError(FairMTLError):
    """A loss was not finite; the model holds the last good state."""


def snapshot(trainer: Any) -> dict[str, Any]:
    """Return copies of everything that a training step changes, on the device."""
    return {
        "model": saving.model_state(trainer.model),
        "attributes": checkpoint.attributes(trainer.model),
        "optimizer": copy.deepcopy(trainer.optimizer.state_dict()),
        "scheduler": copy.deepcopy(trainer.scheduler.state_dict()) if trainer.scheduler else None,
        "structure": saving.structure(trainer.model),
    }


def put_back(trainer: Any, state: dict[str, Any]) -> None:
    """Undo what was trained since :func:`snapshot`."""
    _reshape(trainer, state["structure"])
    trainer.model.load_state_dict(state["model"])
    checkpoint.set_attributes(trainer.model, state["attributes"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.scheduler is not None:
        trainer.scheduler.load_state_dict(state["scheduler"])


def _reshape(trainer: Any, structure: Any) -> None:
    """Give a branching model the structure of a state; its optimiser and scheduler are made anew if that differs."""
    if structure is not None and structure != saving.structure(trainer.model):
        trainer.model.restore_structure(structure)
        trainer._prepare_optimizer(trainer.optim_param, trainer.scheduler_param)


def check_finite(trainer: Any, epoch: int, steps: pd.DataFrame, before: dict[str, Any] | None) -> None:
    """Stop with the last good state if a loss of the epoch, or a parameter after it, is not finite.

    Raises
    ------
    DivergenceError : says epoch, step and task, and where the last good state is.
    """
    losses = steps[[f"loss/{task}" for task in trainer.task_name]].to_numpy()
    good = np.isfinite(losses)
    if good.all() and _finite_parameters(trainer.model):
        return
    kept = _go_back(trainer, before)
    advice = "Lower the learning rate, or look for values that are not finite in the inputs"
    if good.all():
        raise DivergenceError(f"epoch {epoch}: a parameter is not finite after the last step; {kept}. {advice}")
    step = int((~good).any(axis=1).argmax())
    column = int((~good[step]).argmax())
    raise DivergenceError(
        f"the loss of task {trainer.task_name[column]!r} is {losses[step, column]} in epoch {epoch}, step {step} of the "
        f"epoch; {kept}. {advice}"
    )


def _finite_parameters(model: torch.nn.Module) -> bool:
    parameters = list(model.parameters())
    return not parameters or bool(torch.stack([p.detach().isfinite().all() for p in parameters]).all())


def _go_back(trainer: Any, before: dict[str, Any] | None) -> str:
    if before is not None:
        put_back(trainer, before)
        return "the model is as it was before this epoch"
    path = Path(trainer.run_dir) / saving.LAST
    saving.restore(trainer, checkpoint.load(path, trainer.device), None, path)
    return f"the last good checkpoint is {path}, and the model is as it says"


def judge(trainer: Any, epoch: int, results: evaluation.Results) -> float:
    """Return the epoch's score on validation data, and keep its weights if it is the best so far."""
    if trainer._first is None:
        trainer._first = results
    if trainer.select_by is not None:
        score = float(trainer.select_by(results))
    else:
        weights = {task: entry["weight"] for task, entry in trainer.task_dict.items()}
        score = evaluation.improvement(results, trainer._first, weights)
    if score > trainer.best["score"] or trainer.best["epoch"] is None:
        trainer.best = {
            "epoch": epoch,
            "score": score,
            "results": results,
            "state": saving.model_state(trainer.model),
            "structure": saving.structure(trainer.model),
        }
        saving.save_best(trainer)
    return score


def hold_best(trainer: Any) -> None:
    """Give the model the weights of its best epoch; what its branches were before is kept as ``last_structure``."""
    trainer.last_structure = saving.structure(trainer.model)
    _reshape(trainer, trainer.best["structure"])
    trainer.model.load_state_dict(trainer.best["state"])
