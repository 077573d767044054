"""Which epoch is kept, and what happens when a loss is not finite."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.errors import FairMTLError
from libmtl_fair.files import writes
from libmtl_fair.libmtl import checkpoint
from libmtl_fair.libmtl.evaluate import predict
from libmtl_fair.libmtl.history import Floats
from libmtl_fair.libmtl.state import Loaders, Plain, Results, TrainingState


class DivergenceError(FairMTLError):
    """A loss was not finite; the model holds the last good state."""


class Snapshot:
    """A copy of everything that a training step changes, on the device; taken anew into the memory of the last one."""

    def __init__(self) -> None:
        self._held: dict[str, Plain] = {}

    @torch.no_grad()
    def take(self, trainer: TrainingState) -> None:
        """Copy the trainer's state of now."""
        into: list[Tensor] = []
        values: list[Tensor] = []
        self._held = _copied(checkpoint.trained(trainer), self._held, into, values)
        if into:
            torch._foreach_copy_(into, values)

    def put_back(self, trainer: TrainingState) -> None:
        """Undo what was trained since :meth:`take`."""
        held, self._held = self._held, {}  # the optimiser goes on with these very tensors
        checkpoint.set_trained(trainer, held)


def _copied(value: Plain, before: Plain, into: list[Tensor], values: list[Tensor]) -> Plain:
    """Return a copy of nested dicts and lists of tensors and plain values; note which tensors go into which of ``before``."""
    if isinstance(value, dict):
        old = before if isinstance(before, dict) else {}
        return {key: _copied(item, old.get(key), into, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, None, into, values) for item in value]
    if not isinstance(value, Tensor):
        return value
    kinds = [(t.shape, t.dtype, t.device) for t in (before, value) if isinstance(t, Tensor)]
    if len(kinds) < 2 or kinds[0] != kinds[1]:
        return value.detach().clone()
    into.append(before)
    values.append(value)
    return before


def fault(trainer: TrainingState, epoch: int, losses: Floats) -> str | None:
    """Return what is not finite in an epoch's ``losses`` [steps, T], or in the model after it; None if all is."""
    good = np.isfinite(losses)
    if not good.all():
        step = int((~good).any(axis=1).argmax())
        column = int((~good[step]).argmax())
        where = f"epoch {epoch}, step {step} of the epoch"
        return f"the loss of task {trainer.task_name[column]!r} is {losses[step, column]} in {where}"
    largest = torch._foreach_norm([p.detach() for p in trainer.model.parameters() if p.numel()], math.inf)
    if not largest or bool(torch.stack(largest).isfinite().all()):
        return None
    return f"epoch {epoch}: a parameter is not finite after the last step"


def improvement(results: Results, first: Results, weights: dict[str, list[int]]) -> float:
    """Return LibMTL's selection score: the mean relative improvement of all metrics over the first epoch.

    Metrics that are not finite in either are left out; with none left it is minus infinity.
    """
    gains = []
    for task, scores in results.items():
        names = [n for n in scores if n != "loss"]
        for name, weight in zip(names, weights[task]):
            new, base = scores[name], first[task][name]
            gains.append((new - base) / max(abs(base), 1e-8) * (1 if weight else -1))
    known = [gain for gain in gains if np.isfinite(gain)]
    return sum(known) / len(known) if known else float("-inf")


def judge(trainer: TrainingState, epoch: int, results: Results, loaders: Loaders) -> float:
    """Return the epoch's score on validation data, and keep its weights if it is the best so far.

    One that breaks a constraint of its method is kept only until one does not; among such the last is.
    """
    if trainer.first_results is None:
        trainer.first_results = results
    if trainer.select_by is not None:
        score = float(trainer.select_by(results))
    else:
        weights = {task: entry["weight"] for task, entry in trainer.task_dict.items()}
        score = improvement(results, trainer.first_results, weights)
    admitted, before = trainer.model.admits(lambda: predict(trainer, loaders)), trainer.best.get("admitted", True)
    better = score > trainer.best["score"] or not admitted
    if (better if admitted == before else admitted) or trainer.best["epoch"] is None:
        state = _copied(trainer.model.state_dict(), None, [], [])
        structure = trainer.model.structure()
        trainer.best = {"epoch": epoch, "score": score, "results": results, "state": state, "structure": structure}
        trainer.best["admitted"] = admitted
        if trainer.run_dir is not None and writes():
            content = {"model": state, "structure": structure, "epoch": epoch}
            checkpoint.save(trainer.run_dir / checkpoint.BEST, content)
    return score


def hold_best(trainer: TrainingState) -> None:
    """Give the model the weights of its best epoch; what its branches were before is kept as ``last_structure``."""
    trainer.last_structure = trainer.model.structure()
    checkpoint.reshape(trainer, trainer.best["structure"])
    assert trainer.best["state"] is not None
    trainer.model.load_state_dict(trainer.best["state"])
