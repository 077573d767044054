"""FairWeighting: the base of every weighting here, a LibMTL weighting that sees the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import HostError, RecipeError, unknown
from libmtl_fair.libmtl.loading import AbsWeighting


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a weighting, checked when made.

    Parameters
    ----------
    base : LibMTL weighting that balances the tasks' losses; the fairness term is added to the gradient it leaves.
    base_args : its hyperparameters; what is not given takes LibMTL's default.
    """

    base: str = "EW"
    base_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_args(cls, method: str, args: Mapping[str, Any]) -> Settings:
        """Build settings from a LibMTL ``weight_args`` dict.

        Raises
        ------
        RecipeError : an unknown name, or a value out of range.
        """
        names = {f.name for f in fields(cls)}
        for name in args:
            if name not in names:
                raise RecipeError(f"{method}: {unknown('setting', name, names)}")
        try:
            return cls(**args)
        except TypeError as error:
            raise RecipeError(f"{method}: a setting is of the wrong type ({error}); found {dict(args)}") from error

    def need(self, name: str, condition: bool, expected: str) -> None:
        """Raise a RecipeError unless the condition on the setting holds."""
        if not condition:
            raise RecipeError(f"{name} must be {expected}, found {getattr(self, name)!r}")


class FairWeighting(AbsWeighting):  # type: ignore[misc]
    """A weighting that uses a :class:`FairBatch`. Subclasses define ``Settings``, :meth:`configure`, :meth:`step`.

    :class:`FairTrainer` sets ``fair_batch`` before each ``backward`` and composes the model as architecture, this
    weighting, base weighting, so that :meth:`base_backward` reaches the base.
    """

    settings_class: ClassVar[type[Settings]] = Settings
    needs_groups: ClassVar[bool] = False
    source: ClassVar[str] = ""
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

    def step(self, batch: FairBatch, losses: Tensor) -> Any:
        """Leave the gradient of this step in ``.grad``; return the tasks' weights [T] or None."""
        raise NotImplementedError

    def backward(self, losses: Tensor, **kwargs: Any) -> Any:
        """LibMTL's entry point: take the batch that FairTrainer left here and run :meth:`step`."""
        batch, self.__dict__["fair_batch"] = self.fair_batch, None
        if batch is None:
            name = type(self).fair_name()
            raise HostError(
                f"{name} needs labels, groups and the representation of the step, which LibMTL.Trainer does not hand "
                "over: use libmtl_fair.FairTrainer, which takes the same arguments"
            )
        if self.settings is None:
            self.configure(self.settings_class.from_args(type(self).fair_name(), kwargs))
        step = self.step
        if not callable(step):  # a base of git main, such as GradVac, counts its steps under this name
            return type(self).step(self, batch, losses)
        return step(batch, losses)

    def base_backward(self, losses: Tensor) -> Any:
        """Let the base weighting leave its gradient; frees the graph."""
        assert self.settings is not None
        return super().backward(losses, **self.settings.base_args)

    @classmethod
    def fair_name(cls) -> str:
        """Return the name under which LibMTL knows this weighting."""
        for c in cls.__mro__:
            if issubclass(c, FairWeighting) and c is not FairWeighting and "settings_class" in vars(c):
                return c.__name__
        return cls.__name__
