"""Composing LibMTL's model: one object that is architecture and weighting at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.compat import forward, healed
from libmtl_fair.libmtl.joint_heads import JointHeads, is_plain_linear
from libmtl_fair.libmtl.loading import AbsArchitecture, architecture_namespace
from libmtl_fair.libmtl.registry import resolve_weighting, weight_args
from libmtl_fair.methods.base import FairWeighting, Settings
from libmtl_fair.tasks import AUXILIARY_PREFIX


class _FusedHeads:
    """Run linear heads on one shared representation as one matrix product.

    Comes first in the model's bases when the architecture shares one representation; the heads stay the modules that
    LibMTL knows. A head that is hooked, or no plain ``nn.Linear``, is called by itself; auxiliary heads in training only.
    """

    fair_h: Tensor | None = None
    fair_watchers: int = 0
    fair_joint: JointHeads | None = None

    def forward(self: Any, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        h = self.encoder(inputs)
        if not isinstance(h, Tensor):
            raise HostError(f"hard sharing (HPS) needs an encoder that returns one tensor, found {type(h).__name__}")
        if self.fair_watchers:
            vars(self)["fair_h"] = h  # as everywhere in a step: nn.Module's own way takes as long as a tensor operation
        joint = self.fair_joint
        if joint is not None and task_name is None and self.training:
            return _FusedHeads._with_others(self, h, self.task_name, joint.run(h))
        names = [task for task in self.task_name if task_name in (None, task) and self._wanted(task)]
        heads = self.plain_heads(names)
        out: dict[str, Tensor] = {}
        if len(heads) > 1:
            weights, biases = zip(*[(x.weight, x.bias) for x in heads.values()])
            z = torch.nn.functional.linear(h, torch.cat(weights), torch.cat(biases))
            out = dict(zip(heads, torch.split(z, [x.out_features for x in heads.values()], dim=-1)))
        return _FusedHeads._with_others(self, h, names, out)

    def plain_heads(self: Any, names: Sequence[str] | None = None) -> dict[str, nn.Linear]:
        """Return task -> head of those that one product may run."""
        heads = {task: self.decoders[task] for task in (self.task_name if names is None else names)}
        return {task: head for task, head in heads.items() if is_plain_linear(head)}

    def parameters(self: Any, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield what is trained: while heads are joined, their joint weight and bias in place of their own."""
        joint = self.fair_joint
        if joint is None:
            yield from super().parameters(recurse)  # type: ignore[misc]
            return
        yield from (p for p in super().parameters(recurse) if id(p) not in joint.replaced)  # type: ignore[misc]
        yield from (joint.weight, joint.bias)

    def _with_others(self: Any, h: Tensor, names: Sequence[str], out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of the named tasks, in order: those that are there, and of others by their heads."""
        if len(out) == len(names):
            return out
        return {task: out[task] if task in out else self.decoders[task](h) for task in names}

    def _wanted(self: Any, task: str) -> bool:
        return self.training or not task.startswith(AUXILIARY_PREFIX)


def compose(
    weighting: type[Any],
    architecture: type[Any],
    encoder_class: Any,
    decoders: Mapping[str, nn.Module],
    task_names: list[str],
    *,
    rep_grad: bool,
    multi_input: bool,
    device: torch.device,
    weight_settings: Mapping[str, Any],
    arch_args: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Return (model, hyperparameters of ``model.backward``).

    Raises
    ------
    HostError : heads missing, or an architecture that does not fit its encoder.
    RecipeError : a hyperparameter that the weighting does not take.
    """
    missing = [name for name in task_names if name not in decoders]
    if missing:
        raise HostError(f"no decoder (head) for task {missing[0]!r}; decoders has: {', '.join(decoders) or 'none'}")
    bases, args, settings = _weighting_bases(weighting, weight_settings)
    heads = decoders if isinstance(decoders, nn.ModuleDict) else nn.ModuleDict(dict(decoders))
    arch = healed(architecture)
    bases = [_FusedHeads, arch, *bases] if _can_fuse(arch, rep_grad, multi_input) else [arch, *bases]
    cls = type("MTLmodel", tuple(bases), {})
    model = _construct(cls, architecture, task_names, encoder_class, heads, rep_grad, multi_input, device, arch_args)
    if not isinstance(model, _FusedHeads):
        for head in heads.values():
            follow: Any = getattr(head, "follow", None)
            if follow is not None:
                follow()  # tasks may have representations of their own: take the main task's
    model.keeps_weights_on_device = True
    model.init_param()
    if settings is not None:
        model.configure(settings)
    return model.to(device), args


def _construct(
    cls: type[Any],
    architecture: type[Any],
    task_names: list[str],
    encoder_class: Any,
    heads: nn.ModuleDict,
    rep_grad: bool,
    multi_input: bool,
    device: torch.device,
    arch_args: Mapping[str, Any],
) -> Any:
    try:
        return cls(task_names, encoder_class, heads, rep_grad, multi_input, device, **arch_args)
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        if not architecture.__module__.startswith("LibMTL.") or _raised_by_user(error):
            raise
        hint = {
            KeyError: f"it needs arch_args[{error}]",
            AttributeError: f"it needs a ResNet-like encoder ({error})",
            IndexError: "num_experts needs one number for the shared experts and one for each task",
        }.get(type(error), str(error))
        raise HostError(f"architecture {architecture.__name__} cannot be built: {hint}") from error


def _raised_by_user(error: BaseException) -> bool:
    """Whether the error came out of the user's own code, such as an encoder's constructor, and is not about LibMTL."""
    trace, names = error.__traceback__, []
    while trace is not None:
        names.append(str(trace.tb_frame.f_globals.get("__name__")))
        trace = trace.tb_next
    return any(not name.startswith(("LibMTL", "torch", "libmtl_fair", "numpy")) for name in names[1:])


def _weighting_bases(
    weighting: type[Any], given: Mapping[str, Any]
) -> tuple[list[type[Any]], dict[str, Any], Settings | None]:
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


def _can_fuse(arch: type[Any], rep_grad: bool, multi_input: bool) -> bool:
    """Whether the architecture is plain hard sharing, whose forward we know."""
    hard_sharing = issubclass(arch, architecture_namespace.HPS)
    return hard_sharing and arch.forward in (forward, AbsArchitecture.forward) and not rep_grad and not multi_input


def _keeps_own(model: Any) -> bool:
    """Whether the architecture itself keeps what its heads received, while somebody watches (FairBranch)."""
    return hasattr(model, "take_representation")


class RepresentationHook:
    """Keeps what each head received in the last forward pass."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        if isinstance(model, _FusedHeads) or _keeps_own(model):
            model.fair_watchers += 1
        else:
            for task in model.task_name:
                hook = model.decoders[task].register_forward_pre_hook(self._keeper(task))
                self._handles.append(hook)

    def _keeper(self, task: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._seen[task] = inputs[0]

        return keep

    def take(self) -> Tensor | dict[str, Tensor]:
        """Return the representation [B, d] where the heads shared one, else one per task; forget it."""
        if isinstance(self._model, _FusedHeads) and self._model.fair_h is not None:
            h, vars(self._model)["fair_h"] = self._model.fair_h, None
            return h
        if _keeps_own(self._model):
            return self._model.take_representation()  # type: ignore[no-any-return]
        if self._model.rep_grad:
            rep = self._model.rep
            return dict(rep) if isinstance(rep, dict) else rep
        seen, self._seen = self._seen, {}
        if not seen:
            raise HostError("no head was called in the forward pass, so there is no representation to look at")
        first = next(iter(seen.values()))
        return first if all(h is first for h in seen.values()) and len(seen) > 1 else seen

    def remove(self) -> None:
        """Take the hooks off the heads."""
        if isinstance(self._model, _FusedHeads):
            self._model.fair_watchers, self._model.fair_h = self._model.fair_watchers - 1, None
        elif _keeps_own(self._model):
            self._model.fair_watchers -= 1
        for handle in self._handles:
            handle.remove()
