"""The trainer of most tests: quiet, seeded, on the CPU, linear heads on one encoder, the last epoch kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import libmtl_fair as lf
from libmtl_fair.models import linear_heads


def settings(width: int, tasks: Sequence[lf.Task], lr: float = 1e-2, optim: str = "adam") -> dict[str, Any]:
    """Return what most trainers of tests share, for heads on a representation so wide."""
    return {
        "architecture": "HPS",
        "decoders": linear_heads(tasks, width),
        "rep_grad": False,
        "multi_input": False,
        "optim_param": {"optim": optim, "lr": lr},
        "scheduler_param": None,
        "device": "cpu",
        "seed": 0,
        "progress": False,
        "select": "last",
    }


def quiet(
    encoder: Callable[[], nn.Module], width: int, tasks: Sequence[lf.Task], weighting: str = "EW", **changes: Any
) -> Any:
    """Return a FairTrainer; ``changes`` are its arguments, ``lr`` and ``optim`` the optimiser's."""
    how = {name: changes.pop(name) for name in ("lr", "optim") if name in changes}
    given = {"encoder_class": encoder, **settings(width, tasks, **how), **changes}
    return lf.FairTrainer(lf.task_dict(tasks), weighting, **given)
