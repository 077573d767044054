"""Composing LibMTL's model: one object that is architecture and weighting at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from libmtl_fair.batch import Columns, beside
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.compat import forward, healed
from libmtl_fair.libmtl.joint_heads import JointHeads, is_plain_linear
from libmtl_fair.libmtl.loading import AbsArchitecture, architecture_namespace
from libmtl_fair.libmtl.precision import encode
from libmtl_fair.libmtl.registry import resolve_architecture, resolve_weighting, weight_args
from libmtl_fair.libmtl.state import Keeper, Model, TrainingState
from libmtl_fair.methods.base import FairWeighting, Settings
from libmtl_fair.models import Heads, any_names
from libmtl_fair.tasks import AUXILIARY_PREFIX


class FusedHeads(Model):
    """Run linear heads on one shared representation as one matrix product.

    Comes first in the model's bases when the architecture shares one representation; the heads stay the modules that
    LibMTL knows. A head that is hooked, or no plain ``nn.Linear``, is called by itself; auxiliary heads in training only.
    """

    takes_precision = True
    fair_h: Tensor | None = None
    fair_joint: JointHeads | None = None

    def forward(self, inputs: Tensor, task_name: str | None = None) -> Mapping[str, Tensor]:
        """Return task -> output; in training the fused ones stay columns of one matrix."""
        h = encode(self, self.encoder, inputs)
        if not isinstance(h, Tensor):
            raise HostError(f"hard sharing (HPS) needs an encoder that returns one tensor, found {type(h).__name__}")
        if self.fair_watchers:
            vars(self)["fair_h"] = h  # as everywhere in a step: nn.Module's own way takes as long as a tensor operation
        joint = self.fair_joint if task_name is None and self.training else None
        names = self.task_name if joint else [t for t in self.task_name if task_name in (None, t) and self._wanted(t)]
        heads = () if joint else self.plain_heads(names)
        out: Columns | None = None
        if joint is not None:
            heads, weight, bias, sizes = joint.tasks, joint.weight.data, joint.bias.data, joint.sizes
            out = joint.run(h)
        elif len(heads) > 1:
            found: list[Any] = [self.decoders[task] for task in heads]
            weight, bias = (torch.cat([getattr(head, part) for head in found]) for part in ("weight", "bias"))
            sizes = [head.out_features for head in found]
            out = Columns(heads, nn.functional.linear(h, weight, bias), sizes)
        known = frozenset(heads if out is not None else ())
        others: dict[str, Any] = {task: self.decoders[task] for task in names if task not in known}
        made: Mapping[str, Tensor] = {}
        if others:
            repeat = {task: head.follows for task, head in others.items() if _repeats(head, known)}
            if repeat:  # what main heads say, with their parameters held fixed
                fixed = Columns(heads, nn.functional.linear(h, weight.detach(), bias.detach()), sizes)
            made = {t: _joined(fixed, repeat[t]) if t in repeat else head(h) for t, head in others.items()}
        outputs = made if out is None else beside(out, made) if made else out
        return outputs if self.training else {task: outputs[task] for task in names}

    def plain_heads(self, names: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the tasks whose heads one product may run."""
        return tuple(t for t in (self.task_name if names is None else names) if is_plain_linear(self.decoders[t]))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield what is trained: while heads are joined, their joint weight and bias in place of their own."""
        joint = self.fair_joint
        if joint is None:
            yield from super().parameters(recurse)
            return
        yield from (p for p in super().parameters(recurse) if id(p) not in joint.replaced)
        yield from (joint.weight, joint.bias)

    def take_representation(self) -> Tensor | None:
        """Return what the heads received in the last forward pass, [B, d]; forget it."""
        h, vars(self)["fair_h"] = self.fair_h, None
        return h

    def _wanted(self, task: str) -> bool:
        return self.training or not task.startswith(AUXILIARY_PREFIX)


def _repeats(head: nn.Module, known: frozenset[str]) -> bool:
    """Whether an auxiliary head says what the heads of ``known`` tasks do, and nobody listens to it."""
    follows = getattr(head, "follows", ())
    return bool(follows) and known.issuperset(follows) and not (head._forward_hooks or head._forward_pre_hooks)


def _joined(outputs: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return outputs[names[0]] if len(names) == 1 else torch.cat([outputs[name] for name in names], -1)


class Composed(Model):
    """The last base of a trainer's model, which can be pickled and copied whole: its class is made anew from its parts.

    What a step left behind stays behind; so does ``encoder_class``, which may be a local function and has been called.
    """

    made_of: ClassVar[tuple[type[nn.Module], ...]]

    def __reduce__(self) -> tuple[Callable[..., Model], tuple[tuple[type[nn.Module], ...], str], dict[str, Any]]:
        """Name the classes that make the model, and its state."""
        left = {
            "fair_batch": None,
            "fair_h": None,
            "fair_joint": None,
            "encoder_class": None,
            "_optimizer": None,
            "precision": None,
            "fair_processes": None,
        }
        emptied = {
            "rep": {},
            "rep_tasks": {},
            "_seen_by_heads": {},
            "fair_watchers": 0,
            "_roots": ((), ()),
            "_found": {},
        }
        held = vars(self)
        return (
            _blank,
            (self.made_of, type(self).__name__),
            {**held, **{k: v for k, v in {**left, **emptied}.items() if k in held}},
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state; nobody watches the heads any more."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for module in (m for head in self.decoders.values() for m in head.modules()):
            watching = [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Keeper)]
            for key in watching:
                del module._forward_pre_hooks[key]


def model_class(parts: Sequence[type[nn.Module]], name: str = "MTLmodel") -> type[Model]:
    """Return the class made of these, LibMTL's faults mended."""
    named = tuple(vars(part).get("heals", part) for part in parts)
    return type(name, (*map(healed, named), Composed), {"made_of": named})


def _blank(parts: Sequence[type[nn.Module]], name: str = "MTLmodel") -> Model:
    cls = model_class(parts, name)
    return cls.__new__(cls)


def compose(
    trainer: TrainingState,
    weighting: str | type[nn.Module],
    architecture: str | type[nn.Module],
    encoder_class: Callable[[], nn.Module],
    decoders: Mapping[str, nn.Module],
) -> Model:
    """Return the model of a trainer, whose ``weighting`` and ``weight_args`` are set."""
    wanted, shared = resolve_weighting(weighting), resolve_architecture(architecture)
    trainer.weighting = wanted.__name__
    missing = [name for name in trainer.task_name if name not in decoders]
    if missing:
        raise HostError(f"no decoder (head) for task {missing[0]!r}; decoders has: {', '.join(decoders) or 'none'}")
    bases, trainer.weight_args, settings = weighting_bases(wanted, trainer.kwargs["weight_args"])
    heads = decoders if isinstance(decoders, nn.ModuleDict) else Heads(dict(decoders))
    arch = healed(shared)
    hard_sharing = issubclass(arch, architecture_namespace.HPS) and arch.forward in (forward, AbsArchitecture.forward)
    plain = not trainer.rep_grad and not trainer.multi_input and trainer.own_forward
    fused = [FusedHeads] if hard_sharing and plain else []
    cls = model_class((*fused, shared, *bases))
    options = (trainer.rep_grad, trainer.multi_input, trainer.device)
    try:
        with any_names(trainer.task_name):
            model = cls(trainer.task_name, encoder_class, heads, *options, **trainer.kwargs["arch_args"])
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        if not shared.__module__.startswith("LibMTL.") or _raised_by_user(error):
            raise
        raise HostError(f"architecture {shared.__name__} cannot be built: {_hint(error)}") from error
    _need_sizes(model)
    if not fused:
        for head in heads.values():
            follow = getattr(head, "follow", None)
            if follow is not None:
                follow()  # tasks may have representations of their own: take the main task's
    vars(model)["keeps_weights_on_device"] = True
    known = {id(p) for p in model.parameters()}
    model.init_param()
    vars(model)["auxiliary_tasks"] = tuple(trainer.auxiliary.values())
    if settings is not None:
        model.configure(settings)
    vars(model)["fair_own"] = tuple(p for p in model.parameters() if id(p) not in known)
    made: Model = model.to(trainer.device)
    return made


def _need_sizes(model: nn.Module) -> None:
    """Raise where layers of torch wait for a first batch to tell their size: optimisers and checkpoints need it before."""
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise HostError(
            f"parameter {lazy!r} is of a lazy layer, whose size nobody knows yet: give the layer its size, or let encoder_class() run "
            "one batch through the encoder (and its output through the heads) before it is handed over"
        )


def _hint(error: Exception) -> str:
    hints = {
        KeyError: f"it needs arch_args[{error}]",
        AttributeError: f"it needs a ResNet-like encoder ({error})",
        IndexError: "num_experts needs one number for the shared experts and one for each task",
    }
    return hints.get(type(error), str(error))


def _raised_by_user(error: BaseException) -> bool:
    """Whether the error came out of the user's own code, such as an encoder's constructor, and is not about LibMTL."""
    trace, names = error.__traceback__, []
    while trace is not None:
        names.append(str(trace.tb_frame.f_globals.get("__name__")))
        trace = trace.tb_next
    return any(not name.startswith(("LibMTL", "torch", "libmtl_fair", "numpy")) for name in names[1:])


def weighting_bases(
    weighting: type[nn.Module], given: Mapping[str, object]
) -> tuple[list[type[nn.Module]], dict[str, object], Settings | None]:
    """Return the mended classes that a weighting is made of, what its ``backward`` is called with, and a method's settings."""
    if not issubclass(weighting, FairWeighting):
        return [healed(weighting)], weight_args(weighting, given), None
    settings = weighting.settings_class.from_args(weighting.__name__, given)
    base = resolve_weighting(settings.base)
    if issubclass(base, FairWeighting):
        raise HostError(
            f"{weighting.__name__}: base must be a LibMTL weighting such as 'EW' or 'GradNorm', found {settings.base!r}"
        )
    settings = settings.model_copy(update={"base_args": weight_args(base, settings.base_args)})
    return [weighting, healed(base)], {}, settings
