"""From a recipe to its data and trainers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from libmtl_fair.data import Dataset, ResidentLoader, dataset_names, load_dataset, load_table
from libmtl_fair.data.streamed import FileLoader
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.files import Json
from libmtl_fair.libmtl.checkpoint import random_state_kept, seed_everything
from libmtl_fair.libmtl.losses import task_dict
from libmtl_fair.libmtl.registry import (
    OUR_WEIGHTINGS,
    architecture_names,
    resolve_weighting,
    weight_args,
    weighting_names,
)
from libmtl_fair.libmtl.state import Results
from libmtl_fair.libmtl.trainer import FairTrainer
from libmtl_fair.memory import need_memory
from libmtl_fair.methods.base import Declared
from libmtl_fair.methods.heads.auxiliary import add_fairness_heads
from libmtl_fair.methods.tag import TAG
from libmtl_fair.models import encoder_for, linear_heads, load_weights, map_heads, sequence_heads
from libmtl_fair.recipe.post import POST_SETTINGS, check_post
from libmtl_fair.recipe.schema import Recipe, check_names
from libmtl_fair.recipe.sections import Encoder, Model, Train
from libmtl_fair.tasks import Task

EVAL_BATCH = 8192


def check(recipe: Recipe) -> None:
    """Check every name and hyperparameter of a recipe before anything is loaded or trained."""
    trained = {name: method for name, method in recipe.methods.items() if method.post is None}
    imported = {name: method.weighting for name, method in trained.items() if ":" in method.weighting}
    for name, weighting in imported.items():
        try:
            resolve_weighting(weighting)
        except HostError as error:
            raise recipe.error(("methods", name, "weighting"), str(error)) from error
    ours: dict[str, type[Declared]] = {name: cls.settings_class for name, cls in OUR_WEIGHTINGS.items()} | {
        **POST_SETTINGS
    }
    settings = {name: {*cls.model_fields, *cls.aliases} for name, cls in ours.items()}
    known = {*weighting_names(), *imported.values(), *POST_SETTINGS}
    check_names(recipe, known, architecture_names(), dataset_names(), settings)
    check_post(recipe)
    _check_encoders(recipe)
    for name in (name for name, method in recipe.methods.items() if method.weighting == TAG.__name__):
        found = "single_task: true" if recipe.methods[name].single_task else recipe.model_for(name).architecture
        if found != "HPS":
            text = (
                f"TAG trains all tasks with hard sharing (architecture HPS), and then a network a group; found {found}"
            )
            raise recipe.error(("methods", name, "weighting"), text)
    for name, method in recipe.methods.items():
        base = ""
        try:
            if method.weighting in ours:
                ours[method.weighting].from_args(method.weighting, method.args)
            base = str(method.args.get("base", ""))
            if ":" in base:
                weight_args(resolve_weighting(base), method.args.get("base_args") or {})
        except RecipeError as error:
            place = ("base_args", *error.where) if ":" in base and error.where else error.where
            raise recipe.error(("methods", name, *place), str(error)) from error
        except HostError as error:
            raise recipe.error(("methods", name, "base"), str(error)) from error


def _check_encoders(recipe: Recipe) -> None:
    """Check that encoders are known, and their arguments."""
    for name in recipe.methods:
        model, own = recipe.model_for(name), recipe.methods[name].model

        def where(field: str, own: Encoder | None = own, name: str = name) -> tuple[str, ...]:
            return ("methods", name, "model", field) if own and field in own.model_fields_set else ("model", field)

        try:
            kind = encoder_for(model.encoder)
        except RecipeError as error:
            raise recipe.error(where("encoder"), str(error)) from error
        if kind.name == "mlp" and model.encoder_args:
            text = "encoder 'mlp' takes its settings from hidden, dropout and norm beside it, found encoder_args"
            raise recipe.error(where("encoder_args"), text)
        if kind.name == "mlp" and model.weights:
            raise recipe.error(where("weights"), "encoder 'mlp' is trained from the start; leave weights out")
        if model.weights and not recipe.beside(model.weights).is_file():
            raise recipe.error(
                where("weights"), f"no file {recipe.beside(model.weights)}; weights are of a state dict in a file"
            )
        try:
            with torch.device("meta"):
                kind((3,) * kind.dims, model.encoder_args)
        except (RecipeError, HostError) as error:
            raise recipe.error(
                where("encoder_args" if isinstance(error, RecipeError) else "encoder"), str(error)
            ) from error


def make_dataset(recipe: Recipe, seed: int) -> Dataset:
    """Return the recipe's data; ``seed`` decides the split where the recipe says ``resplit``. Errors of a column name its line."""
    try:
        return _make_dataset(recipe, seed)
    except DataError as error:
        if not error.where:
            raise
        listed = not isinstance(getattr(recipe.data, error.where[0]), dict)
        raise DataError(str(recipe.error(("data", *error.where[: 1 if listed else None]), str(error)))) from error


def _make_dataset(recipe: Recipe, seed: int) -> Dataset:
    data = recipe.data
    names = ("split", "missing", "subset", "min_frequency", "max_categories", "sensitive_inputs")
    options: Json = {name: getattr(data, name) for name in names}
    options |= {"seed": seed if data.resplit else data.split_seed, "keep_groups": dict(data.keep_groups) or None}
    options["test_seed"] = data.test_seed if data.resplit else None
    if data.name is not None:
        tasks, sensitive = (None if chosen is None else tuple(chosen) for chosen in (data.tasks, data.sensitive))
        options |= {"root": None if data.root is None else recipe.beside(data.root), "args": data.args}
        made = load_dataset(data.name, tasks, sensitive, workers=data.workers, **options)
        if made.train.reader is not None:
            _need_no_columns(recipe)
    else:
        assert isinstance(data.tasks, dict)
        features: tuple[str, ...] | dict[str, str] | None = data.features
        if data.categorical:
            features = dict.fromkeys(features or (), "auto") | dict.fromkeys(data.categorical, "categorical")
        made = load_table(
            recipe.table_path(),
            tasks=data.tasks,
            sensitive=data.sensitive or (),
            features=features,
            drop=data.drop,
            where=data.where,
            missing_values=data.missing_values,
            name=recipe.name,
            out_of_core=data.out_of_core,
            cache=None if data.cache is None else recipe.beside(data.cache),
            **options,
        )
    return keep_labels(made, data.label_fraction, options["seed"]) if data.label_fraction < 1 else made


def _need_no_columns(recipe: Recipe) -> None:
    """Refuse what needs inputs that are columns."""
    for name, method in recipe.methods.items():
        key = "unaware" if method.unaware else "post" if method.post == "exponentiated_gradient" else None
        if key is not None:
            raise recipe.error(("methods", name, key), "needs inputs that are columns, and these are read from files")


def data_for(recipe: Recipe, method: str, data: Dataset) -> Dataset:
    """Return the data as a method sees them: without the inputs that show a sensitive attribute where it is ``unaware``."""
    return data.unaware() if recipe.methods[method].unaware else data


def need_model(model: Model, input_shape: Sequence[int]) -> None:
    """Refuse a model whose weights, gradients and optimiser take more memory than there is.

    Raises
    ------
    DataError
        More than what is free.
    """
    with torch.device("meta"):
        made = encoder_for(model.encoder)(input_shape, _own_args(model, True))
    weights = sum(each.numel() for each in made.parameters())
    what, hint = f"encoder {model.encoder!r} with {model.encoder_args}", "give smaller encoder_args, or another encoder"
    if model.encoder == "mlp":
        what, hint = (
            f"a model of widths {[*input_shape, *model.hidden]}",
            "give a smaller model.hidden, or fewer inputs",
        )
    need_memory(16.0 * weights, what, hint)


def keep_labels(data: Dataset, fraction: float, seed: int) -> Dataset:
    """Return the data with a random share of each task's training labels, the rest missing."""
    if data.train.filed:
        raise DataError(f"label_fraction: labels of {', '.join(data.train.filed)} are in files and cannot be left out")
    generator = torch.Generator().manual_seed(seed)
    labels = {}
    for name, values in data.train.labels.items():
        hide = torch.rand(len(values), generator=generator) >= fraction
        labels[name] = values.clone()
        labels[name][hide] = float("nan") if values.is_floating_point() else -100
    return dataclasses.replace(data, train=dataclasses.replace(data.train, labels=labels))


def loaders(
    data: Dataset, batch_size: int, seed: int, device: torch.device, model: Model | None = None
) -> dict[str, ResidentLoader | FileLoader]:
    """Return loaders of the three parts; only the training part is shuffled, and leaves out a last batch of one with batch norm."""
    norm = len(data.input_shape) == 3 or (model is not None and model.norm == "batch")
    lone = norm and len(data.train) % batch_size == 1 < len(data.train)
    return {
        "train": data.train.loader(batch_size, shuffle=True, seed=seed, device=device, drop_last=lone),
        "val": data.val.loader(EVAL_BATCH, device=device),
        "test": data.test.loader(EVAL_BATCH, device=device),
    }


def only(data: Dataset, tasks: tuple[str, ...]) -> Dataset:
    """Return the data with the labels of some tasks only."""
    parts: Json = {name: split.only(tasks) for name, split in data.splits().items()}
    return dataclasses.replace(data, **parts)


def utility_of(tasks: Mapping[str, Task | None]) -> Callable[[Results], float]:
    """Return the function that judges an epoch: the mean of AUC, accuracy, R2 (and what maps have) over tasks, NaN left out."""

    def judge(results: Results) -> float:
        found = [task.utility(results[name]) for name, task in tasks.items() if task and name in results]
        known = [value for value in found if value == value]
        return sum(known) / len(known) if known else float("-inf")

    return judge


class Shape(Protocol):
    """What a model's shape needs of data: the shape of an input and the names of the groups."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one input: [features], [steps, features] or [channels, height, width]."""

    @property
    def groups(self) -> dict[str, list[str]]:
        """Return attribute -> names of its groups."""


def make_trainer(
    recipe: Recipe,
    method: str,
    data: Shape,
    tasks: tuple[Task, ...],
    seed: int,
    **options: Any,
) -> FairTrainer:
    """Return the trainer of one method and seed of a recipe; ``options`` go to :class:`FairTrainer`, above the recipe's own.

    ``pretrained=False`` leaves the file of pretrained weights alone, as others come.
    """
    spec, train, model = recipe.methods[method], recipe.train_for(method), recipe.model_for(method)
    if model.weights:
        model = model.model_copy(
            update={"weights": str(recipe.beside(model.weights)) if options.get("pretrained", True) else None}
        )
    heads = None if spec.heads is None else spec.heads.model_dump(exclude_none=True)
    judge = utility_of({t.name: t for t in tasks}) if train.select_by == "utility" else None
    settled = {"progress": False, "select_by": judge, "loggers": recipe.output.loggers, "weight_args": dict(spec.args)}
    made = {name: value for name, value in (settled | options).items() if name != "pretrained"}
    weighting = str(made.pop("weighting", spec.weighting))
    return build_trainer(weighting, model, train, tasks, data.input_shape, data.groups, seed, heads=heads, **made)


def build_trainer(
    weighting: str,
    model: Model,
    train: Train,
    tasks: Sequence[Task],
    input_shape: int | Sequence[int],
    groups: Mapping[str, Sequence[str]],
    seed: int | None,
    *,
    heads: Mapping[str, Any] | None = None,
    encoder: Callable[[int], nn.Module] | None = None,
    **options: Any,
) -> FairTrainer:
    """Return a trainer with the model's encoder, heads and the fairness heads asked for, initialised from the seed.

    ``input_shape`` is that of one example; of a table its number of columns. ``encoder`` stands in the place of the model's own: a
    function of the number of columns. ``heads`` are arguments of :func:`add_fairness_heads`, ``options`` what else goes to
    :class:`FairTrainer`.
    """
    input_shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
    if encoder is None:
        need_model(model, input_shape)
    if seed is not None:
        seed_everything(seed)
    pool = not any(task.summed for task in tasks)
    made_by = partial(_encoder, model, input_shape, pool) if encoder is None else partial(encoder, input_shape[0])
    width = _out_features(made_by) if encoder is None else _width(encoder, input_shape[0])
    own: Mapping[int, Callable[..., nn.ModuleDict]] = {2: sequence_heads}
    if len(input_shape) == 3 and not _own_args(model, pool).get("pool", False):
        own = {3: partial(map_heads, head=model.head)}
    described = task_dict(tasks)
    decoders = dict(own.get(len(input_shape), linear_heads)(tasks, width).items())
    if heads is not None:
        counts = {name: len(names) for name, names in groups.items()}
        described, made = add_fairness_heads(
            described, decoders, n_groups=counts, **{"sensitive": tuple(groups), **heads}
        )
        decoders = dict(made.items())
    arch_args = dict(model.arch_args)
    if model.architecture in ("MMoE", "CGC", "DSelect_k"):
        arch_args.setdefault("img_size", list(input_shape))
    return FairTrainer(
        described,
        weighting,
        model.architecture,
        made_by,
        decoders,
        train.rep_grad,
        False,
        train.optimizer.params(),
        train.scheduler.params() if train.scheduler else None,
        seed=seed,
        select=train.select,
        arch_args=arch_args,
        **{
            "accumulate": train.accumulate,
            "clip_norm": train.clip_norm,
            "amp": train.amp,
            "patience": train.early_stopping,
            **options,
        },
    )


def _encoder(model: Model, input_shape: Sequence[int], pool: bool) -> nn.Module:
    """Return the model's encoder for inputs of this shape, with its pretrained weights."""
    made = encoder_for(model.encoder)(input_shape, _own_args(model, pool))
    if model.weights and not any(p.is_meta for p in made.parameters()):
        load_weights(made, model.weights)
    return made


def _own_args(model: Model, pool: bool) -> Mapping[str, Any]:
    """Return the encoder's arguments; maps are pooled, unless something is said of it, where no task has labels at every place."""
    kind = encoder_for(model.encoder)
    if kind.name == "mlp":
        return {"hidden": model.hidden, "dropout": model.dropout, "norm": model.norm}
    return ({"pool": pool} if "pool" in kind.arguments else {}) | model.encoder_args


def _out_features(made_by: Callable[[], nn.Module]) -> int:
    """Return the width of the representation, without making the weights."""
    with torch.device("meta"):
        width: Any = made_by().out_features
    return int(width)


@torch.no_grad()
def _width(encoder: Callable[[int], nn.Module], n_features: int) -> int:
    """Return the width of an encoder's representation, HostError where it gives none of rows [N, n_features]."""
    with random_state_kept():
        try:
            found = encoder(n_features).eval()(torch.zeros(2, n_features))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise HostError(
                f"encoder: expected a class or function that takes the number of columns ({n_features}) and returns a module for "
                f"rows [N, {n_features}]: {error}"
            ) from error
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != 2:
        what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise HostError(f"encoder: expected a representation [N, width], found {what} for N = 2")
    return found.shape[1]
