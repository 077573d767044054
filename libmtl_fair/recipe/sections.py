"""The sections of a recipe: data, model, train, methods, audit, metrics, tune, output, published; strict and frozen."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, TypeGuard

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from libmtl_fair.data.expressions import parse
from libmtl_fair.data.spec import MAX_CATEGORIES, SensitiveSpec, TaskSpec, words
from libmtl_fair.files import Json
from libmtl_fair.validation import STRICT, Keep, MissingRule, Names, OptionalNames, Text, distinct, form, listed

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(gt=0, le=1)]

_QUANTILE = re.compile(r"p(\d{1,2}(?:\.\d{1,4})?)")
_CONFORMAL = re.compile(r"conformal:(\d*\.?\d+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _+.@=-]*")


class Section(BaseModel):
    """A part of a recipe: unknown fields, wrong types and numbers that are not finite are refused."""

    model_config = STRICT

    def params(self) -> dict[str, object]:
        """Return the fields that are set, such as LibMTL's ``optim_param`` and ``scheduler_param``.

        >>> Optimizer(lr=0.01).params()
        {'optim': 'adam', 'lr': 0.01, 'weight_decay': 0.0}
        """
        return self.model_dump(exclude_none=True)


def _plain(value: object, depth: int = 0) -> object:
    """Accept JSON-like values only, finite, so that a setting can be written back and hashed."""
    if depth > 20:
        raise ValueError("expected a setting nested at most 20 levels deep")
    if isinstance(value, str):
        value.encode()
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"expected a number of at most 64 bits, found one of {value.bit_length()}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, found {value}")
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_plain(key): _plain(item, depth + 1) for key, item in value.items()}
    raise ValueError(f"expected plain data (text, number, true/false, list, mapping), found {type(value).__name__}")


def _settings(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping of settings, found {value!r}")
    return {str(_plain(key)): _plain(item) for key, item in value.items()}


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _delta(value: object) -> float | str:
    """A tolerance: a number in [0, 1], a quantile "p75", or "conformal:0.1"."""
    if _is_number(value) and 0 <= value <= 1:
        return float(value)
    if isinstance(value, str):
        quantile, conformal = _QUANTILE.fullmatch(value), _CONFORMAL.fullmatch(value)
        if (quantile and float(quantile[1]) > 0) or (conformal and 0 < float(conformal[1]) < 1):
            return value
    raise ValueError(
        "expected a number in [0, 1], a quantile of the reference model such as p75 (above p0, below p100), "
        f"or conformal:0.1, found {value!r}"
    )


def _threshold(value: object) -> float | str:
    if value == "base_rate" or (_is_number(value) and 0 < value < 1):
        return value if isinstance(value, str) else float(value)
    raise ValueError(f"expected a number between 0 and 1, or base_rate, found {value!r}")


def _folder_name(value: str) -> str:
    if len(value) > 80 or not _NAME.fullmatch(value) or value[-1] in " .":
        raise ValueError(
            "expected a name that can be a folder (letters, digits, space and _ + - . @ =, at most 80, starting with "
            f"a letter or digit), found {value[:100]!r}"
        )
    return value


def _split(value: object) -> tuple[float, ...] | str:
    """Shares of train, validation and test, or the name of a column that says which row is which."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
        raise ValueError(f"expected three shares such as [0.6, 0.2, 0.2], or the name of a column, found {value!r}")
    if min(value) <= 0 or abs(sum(value) - 1) > 1e-6:
        raise ValueError(f"expected three positive shares that sum to 1, found {value} (sum {sum(value):g})")
    return tuple(map(float, value))


def _subset(value: object) -> int | float:
    if _is_number(value) and (value >= 10 if isinstance(value, int) else 0 < value < 1):
        return value
    raise ValueError(f"expected at least 10 rows, or a share between 0 and 1, found {value!r}")


def _readable(expression: str) -> str:
    parse(expression)
    return expression


_AS_IS = PlainSerializer(lambda value: value)
OptionalText = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
Settings = Annotated[Json, PlainValidator(_settings)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
Delta = Annotated[float | str, PlainValidator(_delta)]
Threshold = Annotated[float | str, PlainValidator(_threshold)]
Split = Annotated[tuple[float, ...] | str, PlainValidator(_split), _AS_IS]
Subset = Annotated[int | float, PlainValidator(_subset), _AS_IS]
Widths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...],
    Field(strict=False, min_length=1, max_length=200),
    BeforeValidator(listed),
]
_SEVERAL = (Field(strict=False, min_length=1), AfterValidator(distinct), BeforeValidator(listed))
Seeds = Annotated[tuple[Seed, ...], *_SEVERAL]
Deltas = Annotated[tuple[Delta, ...], *_SEVERAL]
_NAMES = Annotated[Names, Tag("names")]
_DECLARED = (Field(min_length=1), Tag("declared"))
Tasks = Annotated[_NAMES | Annotated[dict[Text, TaskSpec], *_DECLARED], Discriminator(form)]
Sensitive = Annotated[_NAMES | Annotated[dict[Text, SensitiveSpec], *_DECLARED], Discriminator(form)]


_LATER = words("test_seed max_categories drop where missing_values root args workers out_of_core cache")


class Data(Section):
    """What to train on: a built-in data set by ``name``, or a ``table`` (CSV, parquet) with its columns declared.

    ``where`` keeps the rows that it says, ``drop`` names columns that are no inputs, ``missing_values`` words that are missing in text.
    ``resplit`` divides the rows anew for each seed; with ``test_seed`` the test rows are those of that seed for all of them.
    A data set whose files the user has needs their folder, ``root``, and takes its own settings in ``args`` or beside it;
    ``workers`` processes read ahead. ``out_of_core`` reads a table of parquet, one file or a folder, by row group, and keeps what
    was prepared in ``cache`` (None: beside it).
    """

    name: Text | None = None
    table: Text | None = None
    features: Names | None = None
    categorical: Names | None = None
    tasks: Tasks | None = None
    sensitive: Sensitive | None = None
    sensitive_inputs: bool = True
    split: Split = (0.6, 0.2, 0.2)
    split_seed: Seed = 0
    resplit: bool = False
    test_seed: Seed | None = None
    keep_groups: dict[Text, Keep] = Field(default_factory=dict)
    missing: MissingRule = "drop"
    label_fraction: Share = 1.0
    min_frequency: Annotated[int, Field(ge=1, le=10**9)] | None = None
    max_categories: Annotated[int, Field(ge=1, le=10**6)] = MAX_CATEGORIES
    drop: OptionalNames = ()
    where: Annotated[Text, AfterValidator(_readable)] | None = None
    missing_values: OptionalNames = ()
    subset: Subset | None = None
    root: Text | None = None
    args: Settings = Field(default_factory=dict)
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    out_of_core: bool = False
    cache: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _settings_of_its_own(cls, value: object) -> object:
        """Take what is a setting of the data set, and no field here, as one of ``args``."""
        from libmtl_fair.data.sources import source, source_names  # with torch, which other recipes do without here

        if (
            not isinstance(value, dict)
            or value.get("name") not in source_names()
            or not set(value) - set(cls.model_fields)
        ):
            return value
        own = set(source(value["name"]).settings.model_fields) - set(cls.model_fields)
        moved = {key: item for key, item in value.items() if key in own}
        given = value.get("args") or {}
        if not moved or not isinstance(given, dict):
            return value
        return {**{key: item for key, item in value.items() if key not in own}, "args": {**moved, **given}}

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.name is None) == (self.table is None):
            found = "both" if self.name is not None else "neither"
            raise ValueError(f"expected either 'name' (a built-in data set) or 'table' (a file), found {found}")
        declared = isinstance(self.tasks, dict) or isinstance(self.sensitive, dict)
        if self.name is not None and (declared or self.features is not None or self.categorical is not None):
            raise ValueError(
                "a built-in data set declares its own columns: expected 'tasks' and 'sensitive' as lists of names and no "
                "'features' or 'categorical' (they belong to 'table')"
            )
        if self.name is not None and (self.drop or self.where or self.missing_values):
            raise ValueError("'drop', 'where' and 'missing_values' belong to a 'table', found them beside 'name'")
        if self.table is not None and (self.root is not None or self.args or self.workers):
            raise ValueError("'root', 'args' and 'workers' belong to a data set by 'name', found them beside 'table'")
        if (self.table is None and self.out_of_core) or (self.cache is not None and not self.out_of_core):
            raise ValueError("'out_of_core' belongs to a 'table', and 'cache' to 'out_of_core: true'")
        if self.table is not None and not isinstance(self.tasks, dict):
            raise ValueError("a table needs 'tasks' as a mapping, such as tasks: {income: {kind: binary}}")
        if self.table is not None and self.sensitive is None:
            raise ValueError("a table needs 'sensitive': the columns that hold the groups")
        if self.test_seed is not None and not self.resplit:
            raise ValueError("test_seed keeps the test rows while resplit: true divides the others; expected both")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out what is not said, so that recipes from before this field keep their fingerprints."""
        later = {name: type(self).model_fields[name].default for name in _LATER}
        return {n: item for n, item in write(self).items() if n not in later or item not in (later[n], None, [], {})}


class Encoder(Section):
    """Encoder of the model: what a method may change of it.

    ``hidden``, ``dropout`` and ``norm`` are of ``mlp``; other encoders have ``encoder_args``, and may start from the ``weights``
    of a file. ``head`` is that of tasks whose labels are maps.
    """

    encoder: Text = "mlp"
    hidden: Widths = (128, 64)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm: Literal["batch", "layer"] | None = None
    encoder_args: Settings = Field(default_factory=dict)
    weights: Text | None = None
    head: Literal["conv", "aspp"] = "conv"

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out what is not said, so that recipes from before these fields keep their fingerprints."""
        later = {"encoder_args", "weights", "head"} - self.model_fields_set
        return {name: value for name, value in write(self).items() if name not in later}


class Model(Encoder):
    """Encoder and LibMTL architecture."""

    architecture: Text = "HPS"
    arch_args: Settings = Field(default_factory=dict)


_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Moment = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """Optimiser in LibMTL's terms (``optim_param``)."""

    optim: Literal["adam", "adamw", "sgd", "adagrad", "rmsprop"] = "adam"
    lr: _Positive = 1e-3
    weight_decay: _NotNegative = 0.0
    momentum: _Moment | None = None
    betas: Annotated[tuple[_Moment, _Moment], Field(strict=False)] | None = None
    eps: _Positive | None = None
    nesterov: bool | None = None


class Scheduler(Section):
    """Learning-rate scheduler in LibMTL's terms (``scheduler_param``), stepped once an epoch."""

    scheduler: Literal["step", "exp", "cos"]
    step_size: Count | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    T_max: Count | None = None
    eta_min: _NotNegative | None = None

    @model_validator(mode="after")
    def _fits(self) -> Scheduler:
        fields = {"step": ("step_size", "gamma"), "exp": ("gamma", ""), "cos": ("T_max", "eta_min")}
        needed, other = fields[self.scheduler]
        given = sorted(name for name, value in self if value is not None and name != "scheduler")
        if needed not in given or set(given) - {needed, other}:
            also = f" (and may have {other})" if other else ""
            found = ", ".join(given) or "nothing"
            raise ValueError(f"scheduler {self.scheduler} expects {needed}{also}, found {found}")
        return self


class Train(Section):
    """How to train and which epoch to keep (chosen on validation, never on test).

    ``accumulate`` batches make one update of the optimiser, its gradient at most ``clip_norm`` long; ``amp`` runs the encoder in
    half precision; ``early_stopping`` ends training after so many epochs without a better one.
    """

    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    batch_size: Annotated[int, Field(ge=2, le=10**9)] = 512
    optimizer: Optimizer = Field(default_factory=Optimizer)
    scheduler: Scheduler | None = None
    select: Literal["best", "last"] = "best"
    select_by: Literal["utility", "improvement"] = "utility"
    rep_grad: bool = False
    accumulate: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    clip_norm: _Positive | None = None
    amp: Literal["bf16", "fp16"] | None = None
    early_stopping: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out what is not said, so that recipes from before these fields keep their fingerprints."""
        later = {"accumulate", "clip_norm", "amp", "early_stopping"} - self.model_fields_set
        return {name: value for name, value in write(self).items() if name not in later}


class Heads(Section):
    """Auxiliary fairness heads (GLF, GLD, baselines); see ``add_fairness_heads``. Several losses are several heads."""

    loss: Text | Names = "glf"
    sensitive: Names | None = None
    target: Literal["label", "label+accuracy", "main", "group"] | None = None
    conditional: bool | None = None
    heads: Literal["per_task", "shared"] = "per_task"
    intersectional: bool = False
    tasks: Names | None = None
    bins: Count = 4
    sharpness: _Positive | None = None


POST = "post: "
"""What ``weighting`` begins with for a method that is made of others after training."""
_OF_TRAINING = ("architecture", "arch_args", "heads", "train", "model", "single_task")


class Method(Section):
    """One row of the comparison: a weighting, what it changes, and its own settings in ``args``.

    In YAML every key that is not a field here is a setting of the weighting: ``{weighting: ReLiF, target: 0.1}`` has
    ``args == {"target": 0.1}``. In place of a weighting ``post`` names what is made, after training, of the predictions of
    the methods ``of`` (None: the reference); see :mod:`libmtl_fair.recipe.post`. ``unaware`` leaves the inputs out that show a
    sensitive attribute.
    """

    weighting: Text
    post: Literal["thresholds", "offsets", "blend", "exponentiated_gradient"] | None = None
    of: Names | None = None
    unaware: bool = False
    architecture: Text | None = None
    arch_args: Settings | None = None
    heads: Heads | None = None
    train: Train | None = None
    model: Encoder | None = None
    single_task: bool = False
    args: Settings = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: object) -> object:
        if not isinstance(value, dict) or not isinstance(value.get("args", {}), dict):
            return value
        own = {key: item for key, item in value.items() if key in cls.model_fields}
        rest = {key: item for key, item in value.items() if key not in cls.model_fields}
        if own.get("post") is not None and "weighting" not in own:
            own["weighting"] = f"{POST}{own['post']}"
        return {**own, "args": {**own.get("args", {}), **rest}} if rest else own

    @model_validator(mode="after")
    def _no_reserved(self) -> Method:
        reserved = sorted(set(self.args) & set(type(self).model_fields))
        if reserved:
            raise ValueError(f"expected settings of the weighting in 'args', found the recipe's own {reserved}")
        return self

    @model_validator(mode="after")
    def _trained_or_made(self) -> Method:
        if self.post is None:
            if self.of is not None or self.weighting.startswith(POST):
                raise ValueError(
                    "'of' names what a method is made of after training; it needs 'post' in place of 'weighting'"
                )
            return self
        if self.weighting != f"{POST}{self.post}":
            raise ValueError(
                f"expected either 'weighting' or 'post', found both ({self.weighting!r} and {self.post!r})"
            )
        unfit = [name for name in _OF_TRAINING if name in self.model_fields_set]
        if self.unaware and self.post != "exponentiated_gradient":
            unfit.append("unaware")
        if unfit:
            raise ValueError(f"post: {self.post} trains no network, so it takes no {', '.join(map(repr, unfit))}")
        return self

    @model_serializer
    def _flat(self) -> dict[str, object]:
        hidden = {"args", "weighting"} if self.post else {"args"}
        kept = {name: value for name, value in self if name not in hidden and value is not None and value is not False}
        for name, value in kept.items():
            if isinstance(value, Section):  # what a method changes keeps only what was set; its heads are complete
                kept[name] = value.model_dump(exclude_unset=isinstance(value, Train | Encoder))
        return kept | self.args


class People(Section):
    """Audit of people (METHODS.md, 1.3): by what people are alike, and how many near others count.

    ``reference``: "inputs" without sensitive columns and what tells them, "inputs+sensitive", or "off". ``leave_out``: further
    columns that are no reference; ``keep``: columns that stay in it although they tell an attribute; ``weights`` by column.
    """

    reference: Literal["inputs", "inputs+sensitive", "off"] = "inputs"
    leave_out: OptionalNames = ()
    keep: OptionalNames = ()
    weights: dict[Text, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    k: Count = 10
    anchors: Count = 20000
    seed: Seed = 0


def _people(value: object) -> object:
    return {"reference": "off"} if value is False or value == "off" else value


class Audit(Section):
    """Audits: of people, and with a fixed delta: tolerances (numbers, quantiles or conformal levels of the reference model)."""

    delta: Deltas = (0.275, "p75")
    exact: bool = True
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    pool_size: Annotated[int, Field(ge=2, le=10**9)] = 256
    n_pairs: Count = 4096
    eval_seed: Seed = 0
    pair_seed: Seed = 42
    shrinkage: bool = True
    people: Annotated[People, BeforeValidator(_people)] = Field(default_factory=People)

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out what is not said, so that recipes from before this field keep their fingerprints."""
        return {name: value for name, value in write(self).items() if name != "people" or self.people != People()}

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """All tolerances asked for: ``delta``, and ``conformal:<alpha>`` where ``alpha`` is given."""
        extra = () if self.alpha is None else (f"conformal:{self.alpha:g}",)
        return (*self.delta, *(name for name in extra if name not in self.delta))

    @property
    def draws(self) -> dict[str, int]:
        """How pairs are drawn, as :class:`~libmtl_fair.metrics.FixedDeltaAudit` takes it."""
        return {name: getattr(self, name) for name in ("pool_size", "n_pairs", "eval_seed", "pair_seed")}


class Metrics(Section):
    """Group metrics: decisions, small groups, missing groups, intervals."""

    threshold: Threshold = 0.5
    min_group_size: Annotated[int, Field(ge=0, le=10**9)] = 30
    missing: MissingRule = "drop"
    empty: Literal["missing", "fairlearn"] = "missing"
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    n_bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 1000


class Tune(Section):
    """A study over this recipe; names of objectives and samplers are checked when the study is made.

    ``methods`` are the methods to tune; None takes the first that is not the reference. An empty ``space`` is the built-in
    one; otherwise it maps names to ``builtin``, a list of choices, or ``{low: 0.01, high: 1.0, log: true}``. ``enqueue`` holds
    what is tried first: names of methods, as they are written, and settings by name, within the space.
    """

    methods: Names | None = None
    objectives: Names | None = None
    constraints: Names | None = None
    space: Settings = Field(default_factory=dict)
    enqueue: Annotated[tuple[Text | Settings, ...], Field(strict=False)] = ()
    sampler: str | None = None
    pruner: str | None = None
    trials: Count | None = None
    timeout: _Positive | None = None
    seeds_per_trial: Annotated[int, Field(ge=1, le=10_000)] = 1
    select: str | None = None
    stacked: Annotated[int, Field(ge=0, le=100_000)] = 0


class Published(Section):
    """A source's own numbers, which ``compare`` shows beside the run's: method -> measure -> value.

    A measure is a column of the comparison, such as ``macro AUC`` or ``EO diff sex``, or ``delta_m``, ``mean_rank``, ``fair_rank``,
    ``worst``, ``macro``, ``knowledge_gain``, ``discrimination_gain_ep``, ``discrimination_gain_eo``, ``glf_delta_m`` (the scale of GLF's
    table, which is not that of our ``fair_delta_m``). ``source`` says where the numbers come from, ``note`` where the protocols differ.
    """

    source: Text
    note: OptionalText = ""
    values: dict[Text, dict[Text, float]]


class Output(Section):
    """What a run writes, and where (None: a folder named after the recipe); ``loggers`` besides its JSON lines."""

    dir: Text | None = None
    predictions: bool = True
    embeddings: bool = True
    report: bool = True
    loggers: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], Field(strict=False)] = ()
