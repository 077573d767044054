"""From a recipe to its data and trainers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from libmtl_fair.data import Dataset, Split, dataset_names, load_dataset, load_table
from libmtl_fair.errors import RecipeError
from libmtl_fair.libmtl import FairTrainer, FairWeighting, architecture_names, weighting_names
from libmtl_fair.libmtl.evaluate import Results
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS, resolve_weighting
from libmtl_fair.models import MLP, linear_heads
from libmtl_fair.recipe.schema import Recipe, check_names
from libmtl_fair.tasks import Task, task_dict

_EVAL_BATCH = 8192
_UTILITY = {"binary": "AUC", "multiclass": "Acc", "multilabel": "AUC", "regression": "R2"}


def check(recipe: Recipe) -> None:
    """Check every name and hyperparameter of a recipe before anything is loaded or trained.

    Raises
    ------
    RecipeError : an unknown name or a value out of range, with file and line.
    """
    imported = {name: method.weighting for name, method in recipe.methods.items() if ":" in method.weighting}
    for name, weighting in imported.items():
        try:
            resolve_weighting(weighting)
        except FairMTLError as error:
            raise recipe.error(("methods", name, "weighting"), str(error)) from error
    settings = {name: set(cls.settings_class.model_fields) for name, cls in OUR_WEIGHTINGS.items()}
    check_names(
        recipe, {*weighting_names(), *imported.values()}, set(architecture_names()), set(dataset_names()), settings
    )
    for name, method in recipe.methods.items():
        cls = OUR_WEIGHTINGS.get(method.weighting)
        if cls is not None:
            assert issubclass(cls, FairWeighting)
            try:
                cls.settings_class.from_args(method.weighting, method.args)
            except RecipeError as error:
                raise recipe.error(("methods", name, *error.where), str(error)) from error


def make_dataset(recipe: Recipe, seed: int) -> Dataset:
    """Return the recipe's data; ``seed`` decides the split where the recipe says ``resplit``.

    Raises
    ------
    DataError : the table does not fit what the recipe declares.
    """
    data = recipe.data
    options: dict[str, Any] = {
        "seed": seed if data.resplit else data.split_seed,
        "split": data.split,
        "missing": data.missing,
        "keep_groups": dict(data.keep_groups) or None,
        "subset": data.subset,
        "min_frequency": data.min_frequency,
        "sensitive_inputs": data.sensitive_inputs,
    }
    if data.name is not None:
        made = load_dataset(data.name, data.task_names, data.sensitive_names, **options)
    else:
        path = recipe.table_path()
        assert path is not None
        assert isinstance(data.tasks, dict)
        features = _features(data.features, data.categorical)
        made = load_table(
            path,
            tasks=data.tasks,
            sensitive=data.sensitive or (),
            features=features,
            name=recipe.name,
            **options,
        )
    return keep_labels(made, data.label_fraction, options["seed"]) if data.label_fraction < 1 else made


def _features(names: Any, categorical: Any) -> Any:
    if not categorical:
        return list(names) if names else None
    chosen = list(names or ())
    return {name: "categorical" if name in categorical else "auto" for name in [*chosen, *categorical]}


def keep_labels(data: Dataset, fraction: float, seed: int) -> Dataset:
    """Return the data with a random share of each task's training labels, the rest missing."""
    generator = torch.Generator().manual_seed(seed)
    labels = {}
    for name, values in data.train.labels.items():
        hide = torch.rand(len(values), generator=generator) >= fraction
        gone = float("nan") if values.is_floating_point() else -100
        labels[name] = values.clone()
        labels[name][hide] = gone
    return dataclasses.replace(data, train=dataclasses.replace(data.train, labels=labels))


def loaders(data: Dataset, batch_size: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Return resident loaders of the three parts; only the training part is shuffled."""
    return {
        "train": data.train.loader(batch_size, shuffle=True, seed=seed, device=device),
        "val": data.val.loader(_EVAL_BATCH, device=device),
        "test": data.test.loader(_EVAL_BATCH, device=device),
    }


def only(split: Split, tasks: tuple[str, ...]) -> Split:
    """Return a part with the labels of some tasks only."""
    return dataclasses.replace(split, labels={name: split.labels[name] for name in tasks})


def utility_of(tasks: Mapping[str, Task | None]) -> Callable[[Results], float]:
    """Return the function that judges an epoch: the mean of AUC, accuracy or R2 over tasks, NaN left out."""

    def judge(results: Results) -> float:
        found = [
            results[name][_UTILITY[task.kind]] for name, task in tasks.items() if task is not None and name in results
        ]
        known = [value for value in found if value == value]
        return sum(known) / len(known) if known else float("-inf")

    return judge


def make_trainer(
    recipe: Recipe,
    method: str,
    data: Dataset,
    tasks: tuple[Task, ...],
    seed: int,
    *,
    device: torch.device,
    run_dir: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> FairTrainer:
    """Return the trainer of one method and seed, with encoder and heads initialised from the seed."""
    from libmtl_fair.libmtl.checkpoint import seed_everything

    spec, train, model = recipe.methods[method], recipe.train_for(method), recipe.model_for(method)
    if model.encoder != "mlp":
        raise recipe.error(
            ("model", "encoder"), f"encoder {model.encoder!r} is for Python use; recipes of tables take 'mlp'"
        )
    seed_everything(seed)
    heads: Any = linear_heads(tasks, model.hidden[-1])
    described = task_dict(tasks)
    if spec.heads is not None:
        described, heads = _with_fairness_heads(described, heads, data, spec.heads)
    arch_args = dict(model.arch_args)
    if model.architecture in ("MMoE", "CGC", "DSelect_k"):
        arch_args.setdefault("img_size", [data.n_features])
    judge = utility_of({t.name: t for t in tasks}) if train.select_by == "utility" else None
    return FairTrainer(
        described,
        spec.weighting,
        model.architecture,
        lambda: MLP(data.n_features, model.hidden, model.dropout, model.norm),
        heads,
        train.rep_grad,
        False,
        train.optimizer.params(),
        train.scheduler.params() if train.scheduler else None,
        device=device,
        run_dir=run_dir,
        resume=resume,
        seed=seed,
        progress=progress,
        select=train.select,
        select_by=judge,
        loggers=recipe.output.loggers,
        weight_args=dict(spec.args),
        arch_args=arch_args,
    )


def _with_fairness_heads(described: Any, heads: Any, data: Dataset, spec: Any) -> Any:
    try:
        from libmtl_fair.methods.heads.add_heads import add_fairness_heads
    except ImportError as error:
        raise RecipeError("this version has no auxiliary fairness heads") from error
    options = {k: v for k, v in spec.model_dump().items() if v is not None}
    options["sensitive"] = tuple(options.get("sensitive") or data.groups)
    return add_fairness_heads(described, heads, n_groups={a: len(n) for a, n in data.groups.items()}, **options)
