"""What a method is made of: settings declared once, a whole step (FairWeighting), or a term that is added (Penalty)."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor

from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import HostError, RecipeError, unknown
from libmtl_fair.files import Json
from libmtl_fair.libmtl.gradients import (
    added,
    carry_representation_gradients,
    shared_parameters,
)
from libmtl_fair.libmtl.loading import AbsWeighting
from libmtl_fair.tasks import Task

Names = Annotated[
    tuple[str, ...], Strict(False), BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
"""A list of names, or one name."""


def setting(
    default: Any,
    help: str,
    *,
    ours: bool = False,
    expected: str | None = None,
    choices: Sequence[str] | None = None,
    search: Sequence[object] | None = None,
    **bounds: Any,
) -> Any:
    """Declare one hyperparameter: everything that checks, tables, studies and docs say of it.

    Parameters
    ----------
    default : object
        Its value where nothing is given; for a mapping ``{}``.
    help : str
        One line.
    ours : bool, default False
        Whether the default (or the setting itself) is ours and not the source's.
    expected : str, optional
        How an error names what is allowed; None says it from the bounds.
    choices : sequence of str, optional
        The texts that it takes.
    search : sequence of object, optional
        What a study searches unless told: ``(low, high)``, ``(low, high, "log")``, or a list of choices.
    bounds : object
        ``gt``, ``ge``, ``lt``, ``le`` of a number, ``min_length`` of a list, and what else pydantic's ``Field`` takes.
    """
    extra = {"ours": ours, "expected": expected, "choices": choices, "search": search}
    made: Any = Field
    return made(default, description=help, json_schema_extra=extra, **bounds)


class Declared(BaseModel):
    """Hyperparameters, each declared by :func:`setting`; checked when made, then fixed.

    A subclass may have :meth:`check` for what concerns several settings, ``aliases`` (another name -> setting) and
    ``presets`` (name -> values that stand under those given).

    Raises
    ------
    RecipeError
        An unknown setting, or a value of the wrong type or out of range. Its ``where`` names the setting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)
    aliases: ClassVar[Mapping[str, str]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, *values: Any, **named: Any) -> None:
        try:
            super().__init__(**dict(zip(type(self).model_fields, values)), **named)
        except ValidationError as error:
            raise self._refusal(error) from None
        for name in type(self).model_fields:
            choices, value = self._declared(name)["choices"], getattr(self, name)
            if choices and value is not None and value not in choices:
                raise self.refused(name, unknown(name, value, choices))
        self.check()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        """Document every setting from its declaration."""
        rows = cls.described()
        lines = [f"{r['name']} : {r['type']}, default {r['default']}\n    {r['help']}." for r in rows]
        cls.__doc__ = "\n".join(
            [inspect.cleandoc(vars(cls).get("__doc__") or ""), "", "Parameters", "----------", *lines]
        )

    def check(self) -> None:
        """Raise a RecipeError where settings do not go together."""

    @classmethod
    def from_args(cls, method: str, args: Mapping[str, object]) -> Self:
        """Build settings from LibMTL's ``weight_args`` or ``arch_args`` of a method.

        Raises
        ------
        RecipeError
            An unknown name or preset, a setting given under two names, or a value out of range.
        """
        given: dict[str, object] = {}
        for name, value in args.items():
            known = cls.aliases.get(name, name)
            if known in given:
                alias = next(a for a, s in cls.aliases.items() if s == known)
                raise RecipeError(f"{method}: {alias!r} and {known!r} are the same setting; give one")
            if known not in cls.model_fields:
                raise RecipeError(f"{method}: {unknown('setting', name, cls.model_fields)}")
            given[known] = value
        preset = given.get("preset")
        if preset is not None and preset not in cls.presets:
            raise RecipeError(f"{method}: {unknown('preset', preset, cls.presets)}")
        try:
            return cls(**{**cls.presets.get(str(preset), {}), **given})
        except RecipeError as error:  # at the name that was written
            error.where = cls.written(error.where, args)
            raise

    @classmethod
    def written(cls, where: tuple[str, ...], args: Mapping[str, object]) -> tuple[str, ...]:
        """Return the place of an error with the name that a setting was given under."""
        return (*(next((a for a in args if cls.aliases.get(a, a) == name), name) for name in where[:1]), *where[1:])

    def check_names(self, tasks: Sequence[Task], attributes: Collection[str]) -> None:
        """Raise a RecipeError where a task or attribute that a setting names is none of the data's."""
        for name, message in unknown_names(self, tasks, attributes):
            raise self.refused(name, message)

    @classmethod
    def search_space(cls, given: Mapping[str, object] | None = None) -> dict[str, Json]:
        """Return setting -> what a study searches unless told, beside what is ``given``: ``low, high, log`` or ``choices``."""
        found: dict[str, Json] = {}
        for name in cls.model_fields:
            search = cls._declared(name)["search"]
            if isinstance(search, list):
                found[name] = {"choices": search}
            elif search:
                found[name] = {"low": search[0], "high": search[1]} | ({"log": True} if search[2:] else {})
        return found

    @classmethod
    def described(cls) -> list[dict[str, str]]:
        """Return a row a setting: ``name, type, range, default, search, source, help``."""
        rows = []
        for name, field in cls.model_fields.items():
            extra, space = cls._declared(name), cls.search_space().get(name, {})
            choices = " | ".join(str(c) for c in extra["choices"] or ())
            search = (
                f"{space['low']:g} to {space['high']:g}"
                if "low" in space
                else ", ".join(map(str, space.get("choices", ())))
            )
            kind = getattr(field.annotation, "__name__", str(field.annotation)).replace("typing.", "")
            rows.append(
                {
                    "name": name,
                    "type": str(field.annotation) if "|" in str(field.annotation) else kind,
                    "range": choices or _range(field),
                    "default": "{}" if field.default == {} else str(field.default),
                    "search": search + (" (log)" if space.get("log") else ""),
                    "source": "ours" if extra["ours"] else "source",
                    "help": field.description or "",
                }
            )
        return rows

    @classmethod
    def _declared(cls, name: str) -> Json:
        extra = cls.model_fields[name].json_schema_extra
        return {"ours": False, "expected": None, "choices": None, "search": None} | (
            dict(extra) if isinstance(extra, dict) else {}
        )

    @classmethod
    def refused(cls, name: str, message: str, *within: str) -> RecipeError:
        """Return the error that a setting is refused with; ``within`` it, an entry."""
        error = RecipeError(f"{cls.__name__.removesuffix('Settings')}: {message}")
        error.where = (name, *within)
        return error

    @classmethod
    def _refusal(cls, error: ValidationError) -> RecipeError:
        first = error.errors(include_url=False)[0]
        name, found, kind = str(first["loc"][0]), first["input"], first["type"]
        if kind == "extra_forbidden":
            return cls.refused(name, unknown("setting", name, cls.model_fields))
        field, extra = cls.model_fields[name], cls._declared(name)
        if extra["choices"]:
            return cls.refused(name, unknown(name, found, extra["choices"]))
        wrong_type = not kind.startswith(("greater", "less", "too_", "finite"))
        finite = (
            "a finite number" if kind == "finite_number" or (wrong_type and "float" in str(field.annotation)) else None
        )
        expected = extra["expected"] or finite or _range(field)
        return cls.refused(
            name, f"{name} must be {expected}, found {found!r}" + (" (wrong type)" if wrong_type else "")
        )


def unknown_names(given: BaseModel, tasks: Sequence[Task], attributes: Collection[str]) -> Iterator[tuple[str, str]]:
    """Give the field and what is wrong with it, of each task and attribute named in ``given`` that the data do not have."""
    attribute = ("sensitive attribute", attributes)
    every = {"tasks": ("task", [task.name for task in tasks]), "sensitive": attribute, "attributes": attribute}
    for field, (what, known) in (every | {"attribute": attribute}).items():
        yield from ((field, unknown(what, n, known)) for n in getattr(given, field, None) or () if n not in known)


def _range(field: FieldInfo) -> str:
    """Say what a field takes, from its type and bounds."""
    bounds = {key: getattr(m, key) for m in field.metadata for key in ("gt", "ge", "lt", "le") if hasattr(m, key)}
    kind, low, high = str(field.annotation), bounds.get("gt", bounds.get("ge")), bounds.get("lt", bounds.get("le"))
    null = ", or null" if "None" in kind else ""
    if low is not None and high is not None:
        return f"in {'(' if 'gt' in bounds else '['}{low:g}, {high:g}{')' if 'lt' in bounds else ']'}{null}"
    if "int" in kind:
        return f"a whole number{'' if low is None else f' of at least {low:g}'}{null}"
    if "float" in kind:
        return ("finite" if low is None else f"finite and {'>' if 'gt' in bounds else '>='} {low:g}") + null
    names = {"Mapping": "a mapping", "tuple": "a list of names", "Sequence": "a list of names", "bool": "true or false"}
    return next((text for key, text in names.items() if key in kind), "a text") + null


class Settings(Declared):
    """Hyperparameters of a weighting."""

    base: str = setting(
        "EW", "LibMTL weighting that balances the tasks' losses; the method's term is added to its gradient"
    )
    base_args: Mapping[str, Any] = setting(
        {}, "hyperparameters of ``base``; what is not given takes LibMTL's default", ours=True
    )


class FairWeighting(AbsWeighting):  # type: ignore[misc]
    """A weighting that uses a :class:`FairBatch`. Subclasses define ``settings_class``, :meth:`configure`, :meth:`step`.

    :class:`FairTrainer` sets ``fair_batch`` before each ``backward`` and composes the model as architecture, this
    weighting, base weighting, so that :meth:`base_backward` reaches the base. A method that never asks for the representation says
    ``needs_representation = False``, one that derives the losses by the outputs ``losses_from_outputs = True``, and one that
    reads decisions or labels, which tasks of a user's own kind lack, ``needs_known_kinds = True``.
    """

    settings_class: ClassVar[type[Settings]] = Settings
    needs_groups: ClassVar[bool] = False
    needs_reference: bool = False
    needs_twins: bool = False
    needs_representation: bool = True
    losses_from_outputs: bool = False
    needs_known_kinds: bool = False
    source: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    fair_batch: FairBatch | None = None
    settings: Settings | None = None
    trace: Mapping[str, Tensor | float]

    def init_param(self) -> None:
        """Let the base weighting make its parameters."""
        super().init_param()
        self.trace = {}

    def configure(self, settings: Settings) -> None:
        """Take the settings and make controllers and buffers; called once, before the optimiser is made."""
        self.settings = settings

    def step(self, batch: FairBatch, losses: Tensor) -> Tensor | None:
        """Leave the gradient of this step in ``.grad``; return the tasks' weights [T] or None."""
        raise NotImplementedError

    def backward(self, losses: Tensor, **kwargs: Any) -> Tensor | None:
        """LibMTL's entry point: take the batch that FairTrainer left here and run :meth:`step`.

        Under ``rep_grad=True`` a step that leaves gradients at the detached representations only has them carried on.
        """
        batch, self.__dict__["fair_batch"] = self.fair_batch, None
        if batch is None:
            name = type(self).fair_name()
            raise HostError(
                f"{name} needs labels, groups and the representation of the step, which LibMTL.Trainer does not hand "
                "over: use libmtl_fair.FairTrainer, which takes the same arguments, or in a loop of your own libmtl_fair.FairStep"
            )
        if self.settings is None:
            self.configure(self.settings_class.from_args(type(self).fair_name(), kwargs))
        # a base of git main, such as GradVac, counts its steps under this name
        weights = self.step(batch, losses) if callable(self.step) else type(self).step(self, batch, losses)
        if self.rep_grad and all(p.grad is None for p in shared_parameters(self)):
            carry_representation_gradients(self)
        return weights

    def base_backward(self, losses: Tensor) -> Tensor | None:
        """Let the base weighting leave its gradient; frees the graph."""
        assert self.settings is not None
        weights: Tensor | None = super().backward(losses, **self.settings.base_args)
        return weights

    @classmethod
    def fair_name(cls) -> str:
        """Return the name under which LibMTL knows this weighting."""
        for c in cls.__mro__:
            if issubclass(c, FairWeighting) and c not in (FairWeighting, Penalty) and "settings_class" in vars(c):
                return c.__name__
        return cls.__name__


@dataclass(frozen=True)
class Written:
    """A term whose derivatives are written out: (tensor of the step's graph, derivative to it) of each that it moves."""

    pairs: Sequence[tuple[Tensor, Tensor]]


class Penalty(FairWeighting):
    """A method that adds a term to the tasks' losses: it writes :meth:`penalty` and nothing else.

    Base weighting, ``rep_grad`` and the order of the backward passes are dealt with here. The objective is
    ``loss_share * (what the base makes of the losses) + penalty``.
    """

    loss_share: float = 1.0

    def penalty(self, batch: FairBatch) -> Tensor | Written | None:
        """Return the term: a scalar attached to the graph, or its derivatives; None for none.

        Called once a step, so it may move controllers and set :attr:`trace`.
        """
        raise NotImplementedError

    def step(self, batch: FairBatch, losses: Tensor) -> Tensor | None:
        """Leave the gradient of the term beside what the base leaves of the losses; return the base's weights."""
        assert self.settings is not None
        term, share = self.penalty(batch), self.loss_share
        if term is None and share == 1:
            return self.base_backward(losses)
        pairs = [] if term is None else term.pairs if isinstance(term, Written) else [(term, torch.ones_like(term))]
        pairs = [(tensor, grad) for tensor, grad in pairs if tensor.requires_grad]
        if self.settings.base == "EW" and not self.rep_grad:
            root, whole = batch.loss_gradient(losses, share)
            for tensor, grad in pairs:
                if tensor is root:
                    whole.add_(grad)
            pairs = [(root, whole), *(pair for pair in pairs if pair[0] is not root)]
            torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
            return None
        with added(self, [tensor for tensor, _ in pairs], [grad for _, grad in pairs], share):
            weights = self.base_backward(losses)
        return None if weights is None else torch.as_tensor(weights)
