"""Optimisers and schedulers from LibMTL's parameter dicts, fused where the device can."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from libmtl_fair.errors import RecipeError, unknown

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
SCHEDULERS: dict[str, Any] = {
    "exp": torch.optim.lr_scheduler.ExponentialLR,
    "step": torch.optim.lr_scheduler.StepLR,
    "cos": torch.optim.lr_scheduler.CosineAnnealingLR,
    "reduce": torch.optim.lr_scheduler.ReduceLROnPlateau,
}


def make_optimizer(model: torch.nn.Module, param: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return the optimiser for LibMTL's ``optim_param``: ``{"optim": "adam", "lr": 1e-3, ...}``.

    Raises
    ------
    RecipeError : unknown optimiser or setting.
    """
    cls = _pick("optimizer", param, "optim", OPTIMIZERS)
    args = {k: v for k, v in param.items() if k != "optim"}
    _check_args(f"optimizer {param['optim']}", cls, args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    takes_fused = "fused" in inspect.signature(cls).parameters and "fused" not in args and "foreach" not in args
    if takes_fused and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters):
        args["fused"] = True
    try:
        optimizer: torch.optim.Optimizer = cls(parameters, **args)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"optimizer {param['optim']}: {error}") from error
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, param: Mapping[str, Any] | None) -> Any:
    """Return the scheduler for LibMTL's ``scheduler_param``, or None.

    Raises
    ------
    RecipeError : unknown scheduler or setting.
    """
    if param is None:
        return None
    cls = _pick("scheduler", param, "scheduler", SCHEDULERS)
    args = {k: v for k, v in param.items() if k != "scheduler"}
    _check_args(f"scheduler {param['scheduler']}", cls, args)
    try:
        return cls(optimizer, **args)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"scheduler {param['scheduler']}: {error}") from error


def prepare_forgotten(params: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the parameter dicts of what LibMTL's ``prepare_args`` accepts but never prepares, by option name.

    Its options name adagrad, rmsprop, cos and exp, for which it then ends in an UnboundLocalError. ``cos`` falls over the
    script's ``--T_max`` or ``--epochs``, which LibMTL leaves to the script.

    Raises
    ------
    RecipeError : ``--scheduler cos`` and neither of the two is among the script's options.
    """
    found: dict[str, dict[str, Any]] = {}
    optim, scheduler = getattr(params, "optim", None), getattr(params, "scheduler", None)  # a lineage may name neither
    if optim in ("adagrad", "rmsprop"):
        found["optim"] = {"optim": optim, "lr": params.lr, "weight_decay": params.weight_decay}
    if scheduler == "exp":
        found["scheduler"] = {"scheduler": "exp", "gamma": params.gamma}
    if scheduler == "cos":
        over = getattr(params, "T_max", None) or getattr(params, "epochs", None)
        if not over:
            raise RecipeError(
                "--scheduler cos: over how many epochs? Add an option --T_max or --epochs to the script's parser, or pass "
                "scheduler_param={'scheduler': 'cos', 'T_max': ...} to the trainer"
            )
        found["scheduler"] = {"scheduler": "cos", "T_max": int(over)}
    return found


def _pick(what: str, param: Mapping[str, Any], key: str, options: Mapping[str, Any]) -> Any:
    if key not in param:
        raise RecipeError(
            f"{what}: say which one, for example {{{key!r}: {next(iter(options))!r}, ...}}; found {dict(param)}"
        )
    if param[key] not in options:
        raise RecipeError(unknown(what, param[key], options))
    return options[param[key]]


def _check_args(what: str, cls: Any, args: Mapping[str, Any]) -> None:
    known = [n for n in inspect.signature(cls).parameters if n not in ("params", "optimizer")]
    for name in args:
        if name not in known:
            raise RecipeError(f"{what}: {unknown('setting', name, known)}")
