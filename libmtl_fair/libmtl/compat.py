"""What is wrong in LibMTL on today's stack, and what takes its place.

:func:`healed` returns a subclass of one LibMTL class with its faults mended; LibMTL itself stays as it is. That is what
:class:`~libmtl_fair.FairTrainer` uses. :func:`heal` changes LibMTL's own classes in place, for users of its own Trainer.
A method that a user's subclass overrides is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.libmtl import compat_weightings as healed_weightings
from libmtl_fair.libmtl import gradients
from libmtl_fair.libmtl.loading import (
    LINEAGE,
    Trainer,
    architecture_namespace,
    trainer_module,
    weighting_namespace,
)

Method = Callable[..., Any]


@dataclass(frozen=True)
class Patch:
    """One mended method: which class, which method, what takes its place, and why."""

    owner: str
    method: str
    replacement: Method
    why: str


def _forward(self: Any, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
    """Run the encoder and the heads; one shared representation is kept once, several are kept per task."""
    out = {}
    s_rep = self.encoder(inputs)
    several = isinstance(s_rep, (list, tuple))
    for t, task in enumerate(self.task_name):
        if task_name is not None and task != task_name:
            continue
        rep = self._prepare_rep(s_rep[t] if several else s_rep, task, not several and not self.multi_input)
        out[task] = self.decoders[task](rep)
    return out


def _zero_grad_share_params(self: Any) -> None:
    for parameter in self.get_share_params():
        parameter.grad = None


_SUM = "rep_grad=True left the encoder without a gradient"
_SYNC = "one device transfer a pair, and parameters without a gradient failed"
_COMMON = [
    Patch(
        "AbsWeighting", "_compute_grad_dim", gradients.compute_grad_dim, "counted sizes once, or for frozen weights too"
    ),
    Patch(
        "AbsWeighting",
        "_compute_grad",
        gradients.compute_grad,
        "went through the CPU; erased gradients of other modules",
    ),
    Patch("AbsWeighting", "_grad2vec", gradients.grad2vec, "went through the CPU"),
    Patch("AbsWeighting", "_reset_grad", gradients.reset_grad, "zero_grad() leaves None since PyTorch 2.0"),
    Patch("AbsWeighting", "_get_grads", gradients.get_grads, "failed where tasks have batches of their own"),
    Patch(
        "AbsWeighting", "_backward_new_grads", gradients.backward_new_grads, "one encoder pass a task instead of one"
    ),
    Patch("AbsArchitecture", "forward", _forward, "took one representation for several, and the other way round"),
    Patch("AbsArchitecture", "zero_grad_share_params", _zero_grad_share_params, "parameters without a gradient"),
    Patch("MTAN", "zero_grad_share_params", _zero_grad_share_params, "erased the attention modules' gradients too"),
    Patch("EW", "backward", healed_weightings.ew_backward, _SUM),
    Patch("UW", "backward", healed_weightings.uw_backward, _SUM),
    Patch("GLS", "backward", healed_weightings.gls_backward, _SUM + "; the product of many losses underflowed"),
    Patch("DWA", "backward", healed_weightings.dwa_backward, _SUM),
    Patch(
        "GradNorm",
        "backward",
        healed_weightings.gradnorm_backward,
        "rep_grad=True froze the encoder in the first epoch",
    ),
    Patch(
        "MGDA",
        "_find_min_norm_element",
        healed_weightings.mgda_solution,
        "its loop never counted, and could run for ever",
    ),
    Patch("GradDrop", "backward", healed_weightings.graddrop_backward, "failed where tasks have batches of their own"),
    Patch("MGDA", "backward", healed_weightings.mgda_backward, "one device transfer a task"),
    Patch("PCGrad", "backward", healed_weightings.pcgrad_backward, _SYNC),
    Patch("CAGrad", "backward", healed_weightings.cagrad_backward, "was written for exactly three tasks"),
    Patch("IMTL", "backward", healed_weightings.imtl_backward, "linearly dependent gradients raised"),
    Patch("Aligned_MTL", "backward", healed_weightings.aligned_backward, "torch.symeig is gone"),
    Patch("SDMGrad", "euclidean_proj_simplex", healed_weightings.project_numpy, "numpy.alltrue is gone"),
]
_PACKAGE = [Patch("GradVac", "backward", healed_weightings.gradvac_backward, _SYNC)]
PATCHES: list[Patch] = _COMMON + (_PACKAGE if LINEAGE == "package" else [])


def _rlw_patch(original: Method) -> Method:
    @wraps(original)
    def backward(self: Any, losses: Tensor, **kwargs: Any) -> Any:
        weights = original(self, losses, **kwargs)
        gradients.carry_representation_gradients(self)
        return weights

    backward.__dict__["heals"] = original
    return backward


def _owner(name: str) -> type[Any] | None:
    found = getattr(weighting_namespace, name, None) or getattr(architecture_namespace, name, None)
    return found if isinstance(found, type) else None


def _patches() -> list[tuple[type[Any], str, Method, str]]:
    """Return (class, method name, replacement, why) for what the installed LibMTL has."""
    found = [(_owner(p.owner), p.method, p.replacement, p.why) for p in PATCHES]
    for name in ("RLW", "FAMO", "STCH"):
        owner = _owner(name)
        if owner is not None and "backward" in vars(owner) and not hasattr(owner.backward, "heals"):
            found.append((owner, "backward", _rlw_patch(vars(owner)["backward"]), _SUM))
    return [(o, m, r, w) for o, m, r, w in found if o is not None and m in vars(o)]


def healed(cls: type[Any]) -> type[Any]:
    """Return ``cls``, or a subclass of the same name in which LibMTL's faults are mended."""
    overrides: dict[str, Any] = {}
    for owner, method, replacement, _ in _patches():
        definer = next((c for c in cls.__mro__ if method in vars(c)), None)
        if definer is owner:
            overrides[method] = replacement
    if not overrides:
        return cls
    return type(cls.__name__, (cls,), {**overrides, "__module__": cls.__module__, "__doc__": cls.__doc__})


class _TorchForTrainer(ModuleType):
    """``torch`` as LibMTL's trainer module sees it after :func:`heal`: a missing GPU becomes the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(*args: Any, **kwargs: Any) -> torch.device:
        """Return the device asked for, or the CPU where there is no CUDA."""
        wanted = torch.device(*args, **kwargs)
        return torch.device("cpu") if wanted.type == "cuda" and not torch.cuda.is_available() else wanted

    @staticmethod
    def load(*args: Any, **kwargs: Any) -> Any:
        """Load tensors only, onto a device that exists."""
        kwargs.setdefault("weights_only", True)
        if not torch.cuda.is_available():
            kwargs.setdefault("map_location", "cpu")
        return torch.load(*args, **kwargs)


def _process_data(self: Any, loader: list[Any]) -> tuple[Tensor, Any]:
    """Take the next batch; a loader that has run out starts again, and its own errors are seen."""
    try:
        data, label = next(loader[1])
    except StopIteration:
        loader[1] = iter(loader[0])
        data, label = next(loader[1])
    data = data.to(self.device, non_blocking=True)
    if self.multi_input:
        return data, label.to(self.device, non_blocking=True)
    return data, {task: label[task].to(self.device, non_blocking=True) for task in self.task_name}


def _returning_weights(original: Method) -> Method:
    @wraps(original)
    def train(self: Any, train_dataloaders: Any, test_dataloaders: Any, epochs: int, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("return_weight", args[1] if len(args) > 1 else False)
        result = original(self, train_dataloaders, test_dataloaders, epochs, *args, **kwargs)
        return self.batch_weight if wanted and result is None and hasattr(self, "batch_weight") else result

    train.__dict__["heals"] = original
    return train


def heal() -> list[str]:
    """Make ``LibMTL.Trainer`` itself work on this stack, in place.

    Returns
    -------
    list of str : what was changed and why, one line each; empty if it had been done before.
    """
    changed = []
    for owner, method, replacement, why in _patches():
        if vars(owner)[method] is not replacement:
            setattr(owner, method, replacement)
            changed.append(f"{owner.__name__}.{method}: {why}")
    if not isinstance(trainer_module.torch, _TorchForTrainer):
        trainer_module.torch = _TorchForTrainer("torch")  # type: ignore[attr-defined]
        changed.append("Trainer device: 'cuda:0' was the only one; the CPU where there is no CUDA")
    if Trainer._process_data is not _process_data:
        Trainer._process_data = _process_data
        changed.append("Trainer._process_data: iterators have no .next(), and a bare except hid why")
    if not hasattr(Trainer.train, "heals"):
        Trainer.train = _returning_weights(Trainer.train)
        changed.append("Trainer.train: return_weight=True could return None")
    return changed
