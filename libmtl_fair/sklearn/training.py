"""Training behind the estimators: a FairTrainer, and what is left of it for prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from libmtl_fair.data import ResidentLoader
from libmtl_fair.data.loader import representative
from libmtl_fair.errors import RecipeError
from libmtl_fair.libmtl import FairTrainer, checkpoint
from libmtl_fair.models import MLP, linear_heads
from libmtl_fair.sklearn.groups import Groups
from libmtl_fair.sklearn.methods import Method
from libmtl_fair.tasks import Task, task_dict

_ROWS = 8192


@dataclass(frozen=True)
class Settings:
    """The estimator's parameters, checked."""

    epochs: int
    batch_size: int
    hidden: tuple[int, ...]
    dropout: float
    lr: float
    weight_decay: float
    validation_fraction: float
    device: str

    @classmethod
    def of(cls, estimator: Any) -> Settings:
        """Read and check an estimator's parameters.

        Raises
        ------
        RecipeError : a value out of range.
        """
        for name in ("epochs", "batch_size"):
            value = getattr(estimator, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise RecipeError(f"{name} must be a whole number of at least 1, found {value!r}")
        if not 0 <= estimator.validation_fraction < 1:
            raise RecipeError(f"validation_fraction must be in [0, 1), found {estimator.validation_fraction!r}")
        if isinstance(estimator.hidden, str) or not isinstance(estimator.hidden, Sequence):
            raise RecipeError(f"hidden must be a tuple of widths, such as (64, 32), found {estimator.hidden!r}")
        values = {name: getattr(estimator, name) for name in cls.__dataclass_fields__}
        return cls(**{**values, "hidden": tuple(int(width) for width in estimator.hidden)})


@dataclass(frozen=True)
class Trained:
    """Weights of the main tasks (CPU), the branches of a branching model, and the history of training."""

    weights: dict[str, Tensor]
    structure: Any
    history: pd.DataFrame


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global generators as they were: an estimator's seed is its own."""
    state = checkpoint.random_state()
    try:
        yield
    finally:
        checkpoint.set_random_state(state)


def train(
    settings: Settings,
    method: Method,
    method_args: Mapping[str, Any],
    x: Tensor,
    tasks: Sequence[Task],
    labels: Mapping[str, Tensor],
    groups: Groups,
    seed: int,
    weights: Tensor | None = None,
) -> Trained:
    """Train a model on rows [N, F], with weights [N] or without, and return what prediction needs."""
    with random_state_kept():
        trainer = _trainer(settings, method, method_args, x.shape[1], tasks, groups, seed)
        parts = _parts(len(x), settings.validation_fraction, seed)
        if weights is not None and len(parts) > 1:
            parts[1] = parts[1][representative(weights[parts[1]])]
        loaders = [_loader(settings, x, labels, groups, parts[0], seed, weights)]
        loaders += [_loader(settings, x, labels, groups, rows, None, None) for rows in parts[1:]]
        trainer.train(loaders[0], None, int(settings.epochs), loaders[1] if len(loaders) > 1 else None)
        structure = trainer.model.structure() if hasattr(trainer.model, "structure") else None
        model = predictor(settings, method, method_args, x.shape[1], tasks, structure)
    held = trainer.model.state_dict()
    learnt = {name: held[name].detach().cpu().clone() for name in model.state_dict()}
    return Trained(learnt, structure, trainer.history)


def _trainer(
    settings: Settings,
    method: Method,
    method_args: Mapping[str, Any],
    n_features: int,
    tasks: Sequence[Task],
    groups: Groups,
    seed: int,
) -> FairTrainer:
    weight_args, arch_args, head_args = method.arguments(method_args)
    checkpoint.seed_everything(seed)
    described: Any = task_dict(tasks)
    heads: Any = linear_heads(tasks, settings.hidden[-1])
    if method.heads is not None:
        from libmtl_fair.methods.heads.add_heads import add_fairness_heads

        counts = {name: len(names) for name, names in groups.names.items()}
        head_args = {"sensitive": tuple(counts), **head_args}
        described, heads = add_fairness_heads(described, heads, method.heads, n_groups=counts, **head_args)
    return FairTrainer(
        described,
        method.weighting,
        method.architecture,
        lambda: MLP(n_features, settings.hidden, settings.dropout),
        heads,
        False,
        False,
        {"optim": "adam", "lr": float(settings.lr), "weight_decay": float(settings.weight_decay)},
        None,
        device=settings.device,
        seed=seed,
        progress=False,
        select="best" if settings.validation_fraction > 0 else "last",
        weight_args=weight_args,
        arch_args=arch_args,
    )


def _parts(n_rows: int, fraction: float, seed: int) -> list[Tensor]:
    held_out = int(n_rows * fraction)
    if not held_out:
        return [torch.arange(n_rows)]
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    return [order[held_out:], order[:held_out]]


def _loader(
    settings: Settings,
    x: Tensor,
    labels: Mapping[str, Tensor],
    groups: Groups,
    rows: Tensor,
    seed: int | None,
    weights: Tensor | None,
) -> ResidentLoader:
    """Return a loader of some rows: shuffled by a seed, or, without one, in their order."""
    taken, shuffle = groups.take(rows), seed is not None
    return ResidentLoader(
        x[rows],
        {name: values[rows] for name, values in labels.items()},
        taken.ids,
        batch_size=int(settings.batch_size) if shuffle else _ROWS,
        shuffle=shuffle,
        seed=seed,
        device=settings.device,
        group_names=taken.names,
        weights=None if weights is None else weights[rows],
    )


def predictor(
    settings: Settings,
    method: Method,
    method_args: Mapping[str, Any],
    n_features: int,
    tasks: Sequence[Task],
    structure: Any,
    weights: Mapping[str, Tensor] | None = None,
) -> Any:
    """Return the model of the main tasks in float64 on the CPU, so that a row's prediction does not depend on its batch."""
    with random_state_kept():
        trainer = FairTrainer(
            task_dict(tasks),
            "EW",
            method.architecture,
            lambda: MLP(n_features, settings.hidden, settings.dropout),
            dict(linear_heads(tasks, settings.hidden[-1]).items()),
            False,
            False,
            {"optim": "sgd", "lr": 0.1},
            None,
            device="cpu",
            progress=False,
            arch_args=method.arguments(method_args)[1],
        )
    model = trainer.model
    if structure is not None:
        model.restore_structure(structure)
    if weights is not None:
        model.load_state_dict(dict(weights))
    return model.double().eval()


@torch.no_grad()
def outputs(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Return task -> raw outputs of all rows."""
    parts = [model(rows.double()) for rows in torch.split(x, _ROWS)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
