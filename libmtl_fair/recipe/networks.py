"""The networks of a method: one for all tasks, one a task, or one a group of tasks that a first training found (TAG)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from libmtl_fair.errors import DamagedFileError
from libmtl_fair.files import Json, read_json, write_json
from libmtl_fair.methods.tag import TAGSettings, affinities, group_tasks
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.sections import Method

if TYPE_CHECKING:
    from libmtl_fair.libmtl.trainer import FairTrainer

GROUPS = "task_groups.json"
"""What the folder of a method by task groups holds: ``tasks``, ``affinity``, ``groups`` (``tasks``, ``serves``), ``train_s``."""
_TAG, _JOINT, _APART = "TAG", "joint", "single"


@dataclass(frozen=True)
class Part:
    """One network: its folder, the tasks that it is trained on, and those of them that it answers for."""

    folder: Path
    tasks: tuple[str, ...]
    serves: tuple[str, ...]


def by_groups(method: Method) -> bool:
    """Whether a method's networks are those of task groups."""
    return method.weighting == _TAG


def parts_of(recipe: Recipe, method: str, tasks: Sequence[str], folder: Path) -> list[Part]:
    """Return the networks of a method in its folder, trained or to be trained.

    Raises
    ------
    CheckpointError
        The file of a method by task groups is missing or damaged.
    """
    every = tuple(tasks)
    if by_groups(recipe.methods[method]):
        held = task_groups(folder)
        chosen = [(tuple(group["tasks"]), tuple(group["serves"])) for group in held["groups"]]
    elif recipe.methods[method].single_task:
        chosen = [((task,), (task,)) for task in every]
    else:
        return [Part(folder, every, every)]
    return [Part(folder / _APART / str(i), *each) for i, each in enumerate(chosen)]


def joint_folder(folder: Path) -> Path:
    """Return where the training is that looks for task groups."""
    return folder / _JOINT


def run_dirs(folder: Path) -> list[Path]:
    """Return where a method and seed was trained: its folder, or those of its networks."""
    return [folder, folder / _JOINT, *folder.glob(f"{_APART}/*")]


def task_groups(folder: Path) -> Json:
    """Return what :data:`GROUPS` holds.

    Raises
    ------
    CheckpointError
        A file that is missing, or damaged.
    """
    path = folder / GROUPS
    found = read_json(path, sealed=True)
    try:
        names, groups = list(found["tasks"]), found["groups"]
        served = [task for group in groups for task in group["serves"]]
        right = sorted(served) == sorted(names) and all(
            set(g["serves"]) <= set(g["tasks"]) <= set(names) for g in groups
        )
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}); run again with --resume to make it anew") from error
    if not right:
        raise DamagedFileError(
            f"{path} is damaged: not every task is served once; run again with --resume to make it anew"
        )
    return dict(found)


def find_groups(trainer: FairTrainer, tasks: Sequence[str], settings: TAGSettings, seconds: float) -> Json:
    """Return what :data:`GROUPS` is to hold, from the training that recorded affinities."""
    found = affinities(trainer.history, tasks)
    groups = [{"tasks": each.tasks, "serves": each.serves} for each in group_tasks(found, settings.networks)]
    return {"tasks": list(tasks), "affinity": found.to_numpy().tolist(), "groups": groups, "train_s": seconds}


def write_groups(folder: Path, content: Json) -> None:
    """Write :data:`GROUPS`."""
    write_json(folder / GROUPS, dict(content), sealed="beside")


def weighting_of(recipe: Recipe, method: str) -> Json:
    """Return what a network of a group is trained with in place of the method's weighting; nothing of other methods."""
    if not by_groups(recipe.methods[method]):
        return {}
    settings = TAGSettings.from_args(_TAG, recipe.methods[method].args)
    return {"weighting": settings.base, "weight_args": dict(settings.base_args)}
