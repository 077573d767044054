"""Checkpoints that resume exactly: model, optimiser, scheduler, controllers, random state, loaders and history.

A checkpoint is data: it is read with ``weights_only=True``, and written whole or not at all. Its seal is checked before it is read.
"""

from __future__ import annotations

import json
import os
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from libmtl_fair.errors import CheckpointError, DamagedFileError
from libmtl_fair.files import DAMAGE, is_sealed, remove_leftovers, say_once, sealed_path, writes
from libmtl_fair.libmtl.batches import per_task
from libmtl_fair.libmtl.history import History
from libmtl_fair.libmtl.state import Loader, Loaders, Plain, TrainingState

FORMAT = 2
"""2 has a seal, and its history in a file of its own; 1 had neither and is still read."""
LAST, PREVIOUS, BEST, HISTORY = "last.pt", "previous.pt", "best.pt", "history.csv"
CHECKPOINT = "checkpoint.pt"
"""What a finished run calls its last one, which holds the chosen epoch too."""
_FIELDS = {
    "fingerprint", "structure", "method", "tasks", "settings", "epoch", "step", "model", "attributes", "optimizer",
    "scheduler", "random", "loaders", "history", "best", "first",
}  # fmt: skip
_NOT_STATE = {
    *("training", "task_num", "task_name", "rep_grad", "multi_input", "keeps_weights_on_device", "fair_watchers"),
    *("grad_dim", "grad_index"),  # counted anew
}
_LATER = ("accumulate", "clip_norm", "amp")
"""Settings that checkpoints name only where they are not the defaults."""


# -- random generators, and what a model keeps outside its state_dict ---------------------------------------------


def random_state() -> dict[str, Plain]:
    """Return the state of Python's, numpy's and torch's global generators."""
    version, keys, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Plain] = {
        "python": [version, torch.tensor(keys), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(words).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Plain]) -> None:
    """Put back what :func:`random_state` gave."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global generators as they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators, as LibMTL's ``set_random_seed`` does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def attributes(model: nn.Module) -> dict[str, Plain]:
    """Return what a LibMTL weighting keeps outside its state_dict: tensors, arrays, numbers, optimisers of its own."""
    state: dict[str, Plain] = {}
    for name, value in vars(model).items():
        if name.startswith("_") or name in _NOT_STATE:
            continue
        if isinstance(value, torch.optim.Optimizer):
            state[name] = {"optimizer": value.state_dict()}
        elif hasattr(value, "held_state"):
            state[name] = {"held": value.held_state()}
        elif isinstance(value, np.ndarray):
            state[name] = {"array": torch.from_numpy(value.copy())}
        elif isinstance(value, np.generic):
            state[name] = value.item()
        elif isinstance(value, Tensor):
            if value.is_leaf:
                state[name] = value.detach().clone()
        elif all(isinstance(v, (bool, int, float, str)) for v in (value if isinstance(value, list) else [value])):
            state[name] = value
    return state


def set_attributes(model: nn.Module, state: Mapping[str, Plain]) -> None:
    """Put back what :func:`attributes` gave, into tensors and optimisers that exist where they do."""
    make_problem: Callable[[], None] | None = getattr(model, "_init_optim_problem", None)
    if state.get("step") and make_problem is not None:
        make_problem()  # git main's Nash_MTL makes its problem in its first step only
    for name, value in state.items():
        held = getattr(model, name, None)
        if isinstance(value, dict) and "held" in value:
            assert held is not None
            held.take_state(value["held"])
        elif isinstance(value, dict) and "optimizer" in value:
            assert held is not None
            held.load_state_dict(value["optimizer"])
        elif isinstance(value, dict):
            setattr(model, name, value["array"].numpy().copy())
        elif isinstance(value, Tensor) and isinstance(held, Tensor):
            held.data = value.to(held.device, held.dtype)
        else:
            setattr(model, name, value.to(vars(model)["device"]) if isinstance(value, Tensor) else value)


def loader_states(loaders: Mapping[str, Loader]) -> dict[str, Plain]:
    """Return what the order of the coming epochs depends on, for loaders that say: ours, and those with a generator."""
    states: dict[str, Plain] = {}
    for task, loader in loaders.items():
        generator, dataset = getattr(loader, "generator", None), getattr(loader, "dataset", None)
        if hasattr(loader, "state_dict"):
            states[task] = loader.state_dict()
        elif dataset is not None and hasattr(dataset, "state_dict"):
            states[task] = {"dataset": dataset.state_dict()}
        elif isinstance(generator, torch.Generator):
            states[task] = {"generator": generator.get_state()}
    return states


def set_loader_states(loaders: Mapping[str, Any], states: Mapping[str, Plain]) -> None:
    """Put back what :func:`loader_states` gave."""
    for task, state in states.items():
        if hasattr(loaders[task], "load_state_dict"):
            loaders[task].load_state_dict(state)
        elif "dataset" in state:
            loaders[task].dataset.load_state_dict(state["dataset"])
        else:
            loaders[task].generator.set_state(state["generator"].cpu())


# -- files --------------------------------------------------------------------------------------------------------


def save(path: Path, content: Mapping[str, Plain], keep: Path | None = None) -> None:
    """Write a checkpoint whole or not at all, with a seal; the one that it replaces is kept as ``keep``."""
    with sealed_path(path, keep) as temporary:
        try:
            torch.save({"format": FORMAT, **content}, temporary)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            cut = "its end was not taken: a full disk, or a limit on the size of files"
            raise OSError(cut if "unexpected pos" in said else said) from error


def load(path: Path, device: torch.device, *, state_dict_too: bool = False) -> dict[str, Plain]:
    """Read a checkpoint: tensors and plain values only, never code.

    ``state_dict_too`` also takes a plain state_dict, as LibMTL's git main saves it; it comes back under ``"model"``.

    Raises
    ------
    DamagedFileError
        Its bytes are not those that were written, or it is no checkpoint at all.
    CheckpointError
        It is missing, or of another format.
    """
    try:
        sealed = is_sealed(path)
        if not sealed and zipfile.is_zipfile(path):
            _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol of files that are not ours
            content = torch.load(path, map_location=device, weights_only=True)
        known = content if isinstance(content, dict) else {}
        if known.get("format") == FORMAT and not sealed:
            raise EOFError("its seal is missing")
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    except DAMAGE as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(
            f"checkpoint {path} is damaged or not ours ({first}); delete it to start afresh"
        ) from error
    if state_dict_too and known and all(isinstance(value, Tensor) for value in known.values()):
        return {"model": known}
    if known.get("format") not in (1, FORMAT):
        raise CheckpointError(f"checkpoint {path} is not of format 1 or {FORMAT}; delete it to start afresh")
    if not sealed:
        say_once(f"checkpoint {path} is of an earlier version, without a seal: some damage of it would not be seen")
    return known


def _check_sums(path: Path) -> None:
    """Check the CRC of every record of a zip archive, which torch does not."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def fingerprint(state: Mapping[str, Plain]) -> dict[str, list[int]]:
    """Return name -> shape of everything in a state_dict: what must agree for a checkpoint to fit."""
    return {name: list(value.shape) for name, value in state.items() if hasattr(value, "shape")}


def check_fits(path: Path, model: nn.Module, saved: Mapping[str, list[int]]) -> None:
    """Raise a CheckpointError that names the first tensor that differs."""
    here = fingerprint(model.state_dict())
    for name in sorted(here.keys() | saved.keys()):
        if here.get(name) != (list(saved[name]) if name in saved else None):
            raise CheckpointError(
                f"checkpoint {path} is of another model: {name} is {saved.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here; use the settings it was made with, or another run_dir"
            )


# -- a whole training ---------------------------------------------------------------------------------------------


def settings(trainer: TrainingState) -> dict[str, str]:
    """Return what must agree for a checkpoint to be continued, as text."""
    names = ("optim_param", "scheduler_param", "seed", "rep_grad", "multi_input", "select")
    values = {**trainer.kwargs, **{name: getattr(trainer, name) for name in names}}
    update = trainer.update
    amp = None if update.precision is None else update.precision.kind
    values |= {n: v for n, v in zip(_LATER, (update.accumulate, update.clip_norm, amp)) if v not in (1, None)}
    return {k: json.dumps(v, sort_keys=True, default=lambda other: type(other).__name__) for k, v in values.items()}


def trained(trainer: TrainingState) -> dict[str, Plain]:
    """Return everything that a training step changes: the live objects, not copies."""
    return {
        "model": trainer.model.state_dict(),
        "attributes": attributes(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict() if trainer.scheduler else None,
        "structure": trainer.model.structure(),
    }


def set_trained(trainer: TrainingState, content: Mapping[str, Plain]) -> None:
    """Put back what :func:`trained` gave."""
    reshape(trainer, content["structure"])
    trainer.model.load_state_dict(content["model"])
    set_attributes(trainer.model, content["attributes"])
    trainer.optimizer.load_state_dict(content["optimizer"])
    if trainer.scheduler is not None:
        trainer.scheduler.load_state_dict(content["scheduler"])


def save_training(trainer: TrainingState, loaders: Loaders) -> None:
    """Write ``history.csv``, then ``last.pt``, which says how far it goes; the checkpoint before is kept as ``previous.pt``."""
    assert trainer.run_dir is not None
    if not writes():
        return
    state = trained(trainer)
    trainer.steps.write(trainer.run_dir / HISTORY)
    content = {
        **state,
        "fingerprint": fingerprint(state["model"]),
        "method": trainer.weighting,
        "tasks": trainer.task_name,
        "settings": settings(trainer),
        "epoch": trainer.epoch,
        "step": trainer.global_step,
        "random": random_state(),
        "loaders": loader_states(per_task(trainer, loaders)),
        "history": trainer.steps.state_dict(),
        "best": trainer.best,
        "first": trainer.first_results,
        "precision": None if trainer.update.precision is None else trainer.update.precision.state_dict(),
    }
    save(trainer.run_dir / LAST, content, keep=trainer.run_dir / PREVIOUS)


def close_training(folder: Path) -> None:
    """Keep one checkpoint of a finished training."""
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / CHECKPOINT)
    for name in (BEST, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def reopen_training(folder: Path) -> None:
    """Undo :func:`close_training`, so that a training that was not measured is gone on with."""
    if (folder / CHECKPOINT).exists() and not (folder / LAST).exists():
        os.replace(folder / CHECKPOINT, folder / LAST)


def resume(trainer: TrainingState, loaders: Loaders) -> None:
    """Continue from ``last.pt``, or the checkpoint before where it is damaged or a kill left none; write ``history.csv`` as it was then."""
    assert trainer.run_dir is not None
    if writes():
        remove_leftovers(trainer.run_dir)
    if any((trainer.run_dir / name).exists() for name in (LAST, PREVIOUS)):
        restore(trainer, loaders)
        trainer.steps.write(trainer.run_dir / HISTORY)


def restore(trainer: TrainingState, loaders: Loaders | None) -> Path:
    """Put everything back that :func:`save_training` wrote; ``loaders`` None leaves them alone. Return the file."""
    assert trainer.run_dir is not None
    last, previous = trainer.run_dir / LAST, trainer.run_dir / PREVIOUS
    if last.exists() or not previous.exists():
        try:
            _restore(trainer, loaders, last)
            return last
        except DamagedFileError as error:
            if not previous.exists():
                raise
            damage = error
        try:
            _restore(trainer, loaders, previous)
        except DamagedFileError:
            raise damage from None
        say_once(f"{damage}. Here the checkpoint before it is taken: training goes on after epoch {trainer.epoch}")
    else:
        _restore(trainer, loaders, previous)
    os.replace(previous, last)
    return last


def _restore(trainer: TrainingState, loaders: Loaders | None, path: Path) -> None:
    """Nothing is changed where the checkpoint, or the history beside it, is damaged."""
    content = load(path, trainer.device)
    _check(trainer, content, path)
    try:
        steps = History.read(path.with_name(HISTORY), content["history"])
        reshape(trainer, content["structure"])
        check_fits(path, trainer.model, content["fingerprint"])
        set_trained(trainer, content)
        trainer.steps = steps
        trainer.best, trainer.first_results = content["best"], content["first"]
        trainer.epoch, trainer.global_step = content["epoch"], content["step"]
        if trainer.update.precision is not None:
            trainer.update.precision.load_state_dict(content["precision"])
        if loaders is not None:
            for loader in loaders.values() if trainer.multi_input and isinstance(loaders, Mapping) else [loaders]:
                if getattr(loader, "persistent_workers", False) and not isinstance(loader.dataset, IterableDataset):  # type: ignore[union-attr]
                    iter(
                        loader
                    )  # starts the workers, once, which draws a number that later epochs of the run did not draw
            set_loader_states(per_task(trainer, loaders), content["loaders"])
        set_random_state(content["random"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit this run ({error}); use another run_dir, or delete it to start afresh"
        ) from error


def _check(trainer: TrainingState, content: Mapping[str, Plain], path: Path) -> None:
    lacking = sorted(_FIELDS - content.keys())
    if lacking:
        raise CheckpointError(
            f"checkpoint {path} lacks {lacking[0]!r}: it is none of a whole run; delete it to start afresh"
        )
    if content["tasks"] != trainer.task_name or content["method"] != trainer.weighting:
        raise CheckpointError(
            f"checkpoint {path} was made with {content['method']} on tasks {content['tasks']}, this run is "
            f"{trainer.weighting} on {trainer.task_name}; use another run_dir"
        )
    own = settings(trainer)
    for name in (*own, *(later for later in _LATER if later in content["settings"] and later not in own)):
        here, there = own.get(name, "absent"), content["settings"].get(name, "absent")
        if there != here:
            raise CheckpointError(
                f"checkpoint {path} was made with {name} = {there}, this run has {here}; use the settings it was made "
                "with, or another run_dir"
            )


def reshape(trainer: TrainingState, structure: Plain) -> None:
    """Give a branching model the structure of a state; its optimiser and scheduler are made anew if that differs."""
    if structure is not None and structure != trainer.model.structure():
        trainer.model.restore_structure(structure)
        trainer.prepare_optimizer()


def chosen_weights(path: Path, select: str) -> dict[str, Plain]:
    """Return the state_dict (``model``) and branches (``structure``) that a finished training kept: the best epoch's or the last's.

    CheckpointError where the file is missing, damaged, or none of a training.
    """
    content = load(path, torch.device("cpu"))
    best = content.get("best") if select == "best" else None
    held = best if isinstance(best, dict) and best.get("state") is not None else content
    model, structure = held.get("state", content.get("model")), held.get("structure")
    if not isinstance(model, dict):
        raise CheckpointError(f"checkpoint {path} holds no model; run again to make it anew")
    return {"model": model, "structure": structure}


def load_weights(trainer: TrainingState, path: Path) -> None:
    """Load a model's weights: ours, or a plain state_dict such as LibMTL's git main saves. A folder means its ``best.pt``."""
    path = path / BEST if path.is_dir() else path
    content = load(path, trainer.device, state_dict_too=True)
    reshape(trainer, content.get("structure"))
    check_fits(path, trainer.model, fingerprint(content["model"]))
    trainer.model.load_state_dict(content["model"])
