"""Checkpoints that resume exactly: model, optimiser, scheduler, controllers, random state, loaders and history.

A checkpoint is data: it is read with ``weights_only=True``, and written whole or not at all.
"""

from __future__ import annotations

import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from libmtl_fair.errors import CheckpointError
from libmtl_fair.files import atomic_path

FORMAT = 1
_NOT_STATE = {
    "training",
    "task_num",
    "task_name",
    "rep_grad",
    "multi_input",
    "keeps_weights_on_device",
    "fair_watchers",
}
_NOT_STATE |= {"grad_dim", "grad_index"}  # counted anew
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, OSError, ValueError),
    *(LookupError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError),
)
"""What reading a file of any bytes was seen to raise."""
_Plain = (bool, int, float, str, np.ndarray, np.generic, torch.Tensor)


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's global generators."""
    version, keys, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": [version, torch.tensor(keys), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(words).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` gave."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators, as LibMTL's ``set_random_seed`` does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def attributes(model: Any) -> dict[str, Any]:
    """Return what a LibMTL weighting keeps outside its state_dict: tensors, arrays, numbers, optimisers of its own."""
    state: dict[str, Any] = {}
    for name, value in vars(model).items():
        if name.startswith("_") or name in _NOT_STATE or not _is_state(value):
            continue
        if isinstance(value, torch.optim.Optimizer):
            state[name] = {"optimizer": value.state_dict()}
        elif isinstance(value, np.ndarray):
            state[name] = {"array": torch.from_numpy(value.copy())}
        elif isinstance(value, np.generic):
            state[name] = value.item()
        elif isinstance(value, torch.Tensor):
            state[name] = value.detach().clone() if value.is_leaf else None
        else:
            state[name] = value
    return {name: value for name, value in state.items() if value is not None}


def _is_state(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(v, (bool, int, float, str)) for v in value)
    return isinstance(value, (*_Plain, torch.optim.Optimizer))


def set_attributes(model: Any, state: dict[str, Any]) -> None:
    """Put back what :func:`attributes` gave, into tensors and optimisers that exist where they do."""
    if state.get("step") and hasattr(model, "_init_optim_problem"):
        model._init_optim_problem()  # git main's Nash_MTL makes its problem in its first step only
    for name, value in state.items():
        held = getattr(model, name, None)
        if isinstance(value, dict) and "optimizer" in value:
            held.load_state_dict(value["optimizer"])  # type: ignore[union-attr]
        elif isinstance(value, dict):
            setattr(model, name, value["array"].numpy().copy())
        elif isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor):
            held.data = value.to(held.device, held.dtype)
        else:
            setattr(model, name, value.to(model.device) if isinstance(value, torch.Tensor) else value)


def loader_states(loaders: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the order of the coming epochs depends on, for loaders that say: ours, and those with a generator."""
    states: dict[str, Any] = {}
    for task, loader in loaders.items():
        generator = getattr(loader, "generator", None)
        if hasattr(loader, "state_dict"):
            states[task] = loader.state_dict()
        elif isinstance(generator, torch.Generator):
            states[task] = {"generator": generator.get_state()}
    return states


def set_loader_states(loaders: Mapping[str, Any], states: dict[str, Any]) -> None:
    """Put back what :func:`loader_states` gave."""
    for task, state in states.items():
        if hasattr(loaders[task], "load_state_dict"):
            loaders[task].load_state_dict(state)
        else:
            loaders[task].generator.set_state(state["generator"].cpu())


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all.

    Raises
    ------
    CheckpointError : the folder cannot be written, or the disk is full.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save({"format": FORMAT, **content}, temporary)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def load(path: Path, device: torch.device, *, state_dict_too: bool = False) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, never code.

    ``state_dict_too`` also takes a plain state_dict, as LibMTL's git main saves it; it comes back under ``"model"``.

    Raises
    ------
    CheckpointError : missing, damaged, of another format, or holding anything but data.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol of files that are not ours
            content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    except _DAMAGE as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} is damaged or not ours ({first}); delete it to start afresh"
        ) from error
    if state_dict_too and isinstance(content, dict) and content and _all_tensors(content):
        return {"model": content}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} is not of format {FORMAT}; delete it to start afresh")
    return content


def _all_tensors(content: dict[str, Any]) -> bool:
    return all(isinstance(value, torch.Tensor) for value in content.values())


def fingerprint(model: Any) -> dict[str, list[int]]:
    """Return name -> shape of everything in the state_dict: what must agree for a checkpoint to fit."""
    return {name: list(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}


def check_fits(path: Path, model: Any, saved: dict[str, list[int]]) -> None:
    """Raise a CheckpointError that names the first tensor that differs."""
    here = fingerprint(model)
    for name in sorted(here.keys() | saved.keys()):
        if list(here.get(name, ())) != list(saved.get(name, ())) or (name in here) != (name in saved):
            raise CheckpointError(
                f"checkpoint {path} is of another model: {name} is {saved.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here; use the settings it was made with, or another run_dir"
            )
