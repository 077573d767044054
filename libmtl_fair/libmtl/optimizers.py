"""Optimisers and schedulers from LibMTL's parameter dicts, fused where the device can."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from libmtl_fair.errors import RecipeError, unknown

Made = TypeVar("Made")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
SCHEDULERS: dict[str, Callable[..., torch.optim.lr_scheduler.LRScheduler]] = {
    "exp": torch.optim.lr_scheduler.ExponentialLR,
    "step": torch.optim.lr_scheduler.StepLR,
    "cos": torch.optim.lr_scheduler.CosineAnnealingLR,
    "reduce": torch.optim.lr_scheduler.ReduceLROnPlateau,
}


def make_optimizer(model: torch.nn.Module, param: Mapping[str, object]) -> torch.optim.Optimizer:
    """Return the optimiser for LibMTL's ``optim_param``: ``{"optim": "adam", "lr": 1e-3, ...}``."""
    cls, args = _chosen("optimizer", param, "optim", OPTIMIZERS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    takes_fused = "fused" in inspect.signature(cls).parameters and "fused" not in args and "foreach" not in args
    if takes_fused and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters):
        args["fused"] = True
    return _made(f"optimizer {param['optim']}", cls, parameters, args)


def make_scheduler(
    optimizer: torch.optim.Optimizer, param: Mapping[str, object] | None
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return the scheduler for LibMTL's ``scheduler_param``, or None."""
    if param is None:
        return None
    cls, args = _chosen("scheduler", param, "scheduler", SCHEDULERS)
    return _made(f"scheduler {param['scheduler']}", cls, optimizer, args)


def prepare_forgotten(params: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Return the parameter dicts of what LibMTL's ``prepare_args`` accepts but never prepares, by option name.

    Its options name adagrad, rmsprop, cos and exp, for which it then ends in an UnboundLocalError. ``cos`` falls over the
    script's ``--T_max`` or ``--epochs``, which LibMTL leaves to the script.
    """
    found: dict[str, dict[str, object]] = {}
    optim, scheduler = getattr(params, "optim", None), getattr(params, "scheduler", None)  # a lineage may name neither
    if optim in ("adagrad", "rmsprop"):
        found["optim"] = {"optim": optim, "lr": params.lr, "weight_decay": params.weight_decay}
    if scheduler == "exp":
        found["scheduler"] = {"scheduler": "exp", "gamma": params.gamma}
    elif scheduler == "cos":
        over = getattr(params, "T_max", None) or getattr(params, "epochs", None)
        if not over:
            raise RecipeError(
                "--scheduler cos: over how many epochs? Add an option --T_max or --epochs to the script's parser, or pass "
                "scheduler_param={'scheduler': 'cos', 'T_max': ...} to the trainer"
            )
        found["scheduler"] = {"scheduler": "cos", "T_max": int(over)}
    return found


def _chosen(
    what: str, param: Mapping[str, object], key: str, options: Mapping[str, Callable[..., Made]]
) -> tuple[Callable[..., Made], dict[str, object]]:
    """Return the class that ``param`` names under ``key``, and its arguments, whose names are known to be its own."""
    if key not in param:
        raise RecipeError(
            f"{what}: say which one, for example {{{key!r}: {next(iter(options))!r}, ...}}; found {dict(param)}"
        )
    chosen = str(param[key])
    if chosen not in options:
        raise RecipeError(unknown(what, chosen, options))
    cls = options[chosen]
    known = [n for n in inspect.signature(cls).parameters if n not in ("params", "optimizer")]
    args = {name: value for name, value in param.items() if name != key}
    for name in args:
        if name not in known:
            raise RecipeError(f"{what} {param[key]}: {unknown('setting', name, known)}")
    return cls, args


def _made(what: str, cls: Callable[..., Made], first: object, args: Mapping[str, object]) -> Made:
    try:
        return cls(first, **args)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{what}: {error}") from error
