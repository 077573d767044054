"""What is wrong in LibMTL on today's stack, and what takes its place.

:func:`healed` returns a subclass of one LibMTL class with its faults mended; LibMTL itself stays as it is. That is what
:class:`~libmtl_fair.FairTrainer` uses. :func:`heal` changes LibMTL's own classes in place, for users of its own Trainer.
A method that a user's subclass overrides is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair.errors import DataError
from libmtl_fair.libmtl.batches import to_device
from libmtl_fair.libmtl.compat_weightings import UNCARRIED, gradvac_backward
from libmtl_fair.libmtl.gradients import PATCHES, Method, carry_representation_gradients, mends
from libmtl_fair.libmtl.hooks import next_batch, prepare_dataloaders
from libmtl_fair.libmtl.loading import LINEAGE, Trainer, architecture_namespace, trainer_module, weighting_namespace
from libmtl_fair.libmtl.precision import encode
from libmtl_fair.libmtl.state import Model, TrainingState


@mends("AbsArchitecture.forward", "took one representation for several, and the other way round")
def forward(self: Model, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
    """Run the encoder and the heads; one shared representation is kept once, several are kept per task."""
    out = {}
    s_rep = encode(self, self.encoder, inputs)
    several = isinstance(s_rep, (list, tuple))
    for t, task in enumerate(self.task_name):
        if task_name is None or task == task_name:
            rep = self._prepare_rep(s_rep[t] if several else s_rep, task, not several and not self.multi_input)
            out[task] = self.decoders[task](rep)
    return out


@mends("MTAN.zero_grad_share_params", "erased the attention modules' gradients too")
@mends("AbsArchitecture.zero_grad_share_params", "parameters without a gradient")
def zero_grad_share_params(self: Model) -> None:
    """Forget the gradients of the shared parameters."""
    for parameter in self.get_share_params():
        parameter.grad = None


if LINEAGE == "package":
    mends("GradVac.backward", "one device transfer a pair, and parameters without a gradient failed")(gradvac_backward)


def _carrying(original: Method) -> Method:
    @wraps(original)
    def backward(self: Model, losses: Tensor, **kwargs: object) -> object:
        weights = original(self, losses, **kwargs)
        carry_representation_gradients(self)
        return weights

    backward.__dict__["heals"] = original
    return backward


def _patches() -> Iterator[tuple[type[nn.Module], str, Method, str]]:
    """Yield (class, method name, replacement, why) for what the installed LibMTL has."""
    for name, method, replacement, why in PATCHES:
        owner = getattr(weighting_namespace, name, getattr(architecture_namespace, name, None))
        if owner is not None and method in vars(owner):
            yield owner, method, replacement, why
    for name in ("RLW", "FAMO", "STCH"):
        own = vars(getattr(weighting_namespace, name, object)).get("backward")
        if own is not None and not hasattr(own, "heals"):
            yield getattr(weighting_namespace, name), "backward", _carrying(own), UNCARRIED


def healed(cls: type[nn.Module]) -> type[nn.Module]:
    """Return ``cls``, or a subclass of the same name in which LibMTL's faults are mended."""
    overrides: dict[str, Method] = {
        method: replacement
        for owner, method, replacement, _ in _patches()
        if next((c for c in cls.__mro__ if method in vars(c)), None) is owner
    }
    if not overrides:
        return cls
    return type(cls.__name__, (cls,), {**overrides, "__module__": cls.__module__, "__doc__": cls.__doc__, "heals": cls})


class _TorchForTrainer(ModuleType):
    """``torch`` as LibMTL's trainer module sees it after :func:`heal`: a missing GPU becomes the CPU."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def device(*args: Any, **kwargs: Any) -> torch.device:
        """Return the device asked for, or the CPU where there is no CUDA."""
        wanted = torch.device(*args, **kwargs)
        return torch.device("cpu") if wanted.type == "cuda" and not torch.cuda.is_available() else wanted

    @staticmethod
    def load(*args: Any, **kwargs: Any) -> object:
        """Load tensors only, onto a device that exists."""
        place = {} if torch.cuda.is_available() else {"map_location": "cpu"}
        return torch.load(*args, **{"weights_only": True, **place, **kwargs})


def _process_data(self: TrainingState, loader: list[Any]) -> tuple[object, Tensor | dict[str, Tensor]]:
    """Take the next batch; a loader that has run out starts again, and its own errors are seen."""
    data, label = next_batch(loader)[:2]
    if self.multi_input:
        label = label[next(iter(label))] if isinstance(label, Mapping) else label
        return to_device(data, self.device), to_device(label, self.device)
    return to_device(data, self.device), {task: to_device(label[task], self.device) for task in self.task_name}


def _prepare_dataloaders(self: TrainingState, dataloaders: object) -> tuple[object, object]:
    """Return what ``_process_data`` takes, and numbers of batches, which LibMTL's own loops go by."""
    loaders, counts = prepare_dataloaders(self, dataloaders)
    if counts is None or (isinstance(counts, list) and None in counts):
        raise DataError(
            "LibMTL's Trainer goes by the number of a loader's batches, and one has no length (__len__): use libmtl_fair.FairTrainer"
        )
    return loaders, counts


def _returning_weights(original: Method) -> Method:
    @wraps(original)
    def train(
        self: TrainingState,
        train_dataloaders: object,
        test_dataloaders: object,
        epochs: int,
        *args: object,
        **kwargs: object,
    ) -> object:
        wanted = kwargs.get("return_weight", args[1] if len(args) > 1 else False)
        result = original(self, train_dataloaders, test_dataloaders, epochs, *args, **kwargs)
        return self.batch_weight if wanted and result is None and hasattr(self, "batch_weight") else result

    train.__dict__["heals"] = original
    return train


def heal() -> list[str]:
    """Make ``LibMTL.Trainer`` itself work on this stack, in place.

    Returns
    -------
    list of str
        What was changed and why, one line each; empty if it had been done before.
    """
    changed = []
    for owner, method, replacement, why in list(_patches()):
        if vars(owner)[method] is not replacement:
            setattr(owner, method, replacement)
            changed.append(f"{owner.__name__}.{method}: {why}")
    if not isinstance(trainer_module.torch, _TorchForTrainer):
        trainer_module.torch = _TorchForTrainer("torch")  # type: ignore[attr-defined]
        changed.append("Trainer device: 'cuda:0' was the only one; the CPU where there is no CUDA")
    if Trainer._process_data is not _process_data:
        Trainer._process_data = _process_data
        changed.append("Trainer._process_data: iterators have no .next(), and a bare except hid why")
    if getattr(Trainer, "_prepare_dataloaders", _prepare_dataloaders) is not _prepare_dataloaders:
        Trainer._prepare_dataloaders = _prepare_dataloaders
        changed.append(
            "Trainer._prepare_dataloaders: a _process_data of one's own may call .next(), which iterators lack"
        )
    if not hasattr(Trainer.train, "heals"):
        Trainer.train = _returning_weights(Trainer.train)
        changed.append("Trainer.train: return_weight=True could return None")
    return changed
