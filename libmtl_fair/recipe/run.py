"""Running a recipe: every method and seed trained, audited, measured and written, so that a kill loses at most an epoch."""

from __future__ import annotations

import dataclasses
import itertools
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from libmtl_fair.data import Dataset
from libmtl_fair.data.loader import resolve_device
from libmtl_fair.errors import CheckpointError, DamagedFileError
from libmtl_fair.files import (
    Json,
    edited_files,
    is_leftover,
    is_sealed,
    read_json,
    remove_leftovers,
    seal_beside,
    sealed_path,
    write_json,
    write_text,
    writes,
)
from libmtl_fair.libmtl.checkpoint import HISTORY, close_training, reopen_training
from libmtl_fair.libmtl.loading import LINEAGE
from libmtl_fair.libmtl.trainer import FairTrainer
from libmtl_fair.locks import alone_in
from libmtl_fair.methods.tag import need_few
from libmtl_fair.predictions import Predictions, side_by_side
from libmtl_fair.processes import alone, join
from libmtl_fair.recipe.build import EVAL_BATCH, check, data_for, loaders, make_dataset, make_trainer, only
from libmtl_fair.recipe.checked import check_data
from libmtl_fair.recipe.measure import Protocol, digests, measure, pool_embeddings
from libmtl_fair.recipe.networks import (
    Part,
    by_groups,
    find_groups,
    joint_folder,
    parts_of,
    run_dirs,
    task_groups,
    weighting_of,
    write_groups,
)
from libmtl_fair.recipe.people import PARTS, People, people_of
from libmtl_fair.recipe.post import made_of, make_post
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.shown import csv_text
from libmtl_fair.tasks import MapTask, Task

METRICS, PROTOCOL = "metrics.json", "audit_protocol.json"
_PACKAGES = ("torch", "LibMTL", "numpy", "scikit-learn", "fairlearn", "optuna", "pandas", "libmtl_fair")
_CHOSEN_BY = {
    "utility": "mean of AUC, accuracy or R2 over tasks, on validation",
    "improvement": "LibMTL's mean relative improvement, on validation",
    "maps": "mean of mIoU, 1 / (1 + RMSE), 1 - angle / 180 (and AUC, accuracy or R2 of tasks without maps) over tasks, on validation",
}
T = TypeVar("T")
_Trained = dict[Part, FairTrainer]
MODEL = "model.json"
"""What a method's folder holds for models in use, besides weights."""


class Run:
    """One run of a recipe in one folder.

    Parameters
    ----------
    out : str or Path, optional
        Folder; None takes the recipe's ``output.dir``, else ``runs/<name>`` (a new number if that is taken).
    resume : bool, default False
        Go on in a folder that holds the same recipe; what is finished there is not trained again.
    note : callable (str) -> None, optional
        Called with one line before each training.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path | None = None,
        *,
        device: str = "auto",
        resume: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> None:
        check(recipe)
        self.recipe, self.device, self.note = recipe, resolve_device(device), note or (lambda text: None)
        self._together = join(self.device)
        self.out = self._first(lambda: _claim(recipe, Path(out) if out else None, resume))
        self._data: dict[int, Dataset] = {}
        self._people: dict[int, People] = {}

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """Every (method, seed), the reference's first seed first, and what is made of others after them."""
        methods = sorted(self.recipe.methods, key=lambda name: self.recipe.methods[name].post is not None)
        return [(method, seed) for method in methods for seed in self.recipe.seeds]

    def __call__(self) -> Path:
        """Run everything; return the folder.

        The files of a method and seed are written in one order, its checkpoint last but one and ``metrics.json`` last: a run that is
        resumed completes whatever was not, from the last checkpoint.

        Raises
        ------
        CheckpointError
            Another process works in the folder, or it cannot be written or gone on with.
        """
        if not writes():
            return self._all()
        with alone_in(self.out):
            remove_leftovers(self.out, deep=True)
            return self._all()

    def _first(self, make: Callable[[], T]) -> T:
        """Return what the first process of a training makes."""
        return make() if self._together is None else self._together.from_first(make)

    def _shared(self, own: T) -> T:
        return self._first(lambda: own)

    def _all(self) -> Path:
        from libmtl_fair.report import write_report, write_summary

        if self._together is not None:  # the first process may have to put data into a cache
            self._first(lambda: len(self.data(self.recipe.seeds[0]).tasks))
        write_text(self.out / "recipe.yaml", self.recipe.to_yaml(), sealed=True)
        write_json(self.out / "environment.json", environment(self.device), sealed="beside")
        write_json(self.out / "data_card.json", self.data(self.recipe.seeds[0]).card, sealed="beside")
        check_data(self.recipe, self.data(self.recipe.seeds[0]))
        protocol = self._first(self._protocol)
        for method, seed in self.jobs:
            folder = self.out / method / f"seed{seed}"
            if self._first(partial(self._lacks, method, seed, folder, protocol)):
                protocol = self._shared(self._one(method, seed, folder, protocol))
        if not writes():
            return self.out
        write_summary(self.out)
        if self.recipe.output.report:
            write_report(self.out)
        return self.out

    def data(self, seed: int) -> Dataset:
        """Return the data for a seed; one split serves all seeds unless the recipe says ``resplit``."""
        key = seed if self.recipe.data.resplit else 0
        if key not in self._data:
            self._data = {key: make_dataset(self.recipe, seed)}
        return self._data[key]

    def people(self, seed: int) -> People:
        """Return the audits of people for a seed's data; their near pairs are found once and kept in the folder."""
        key = seed if self.recipe.data.resplit else 0
        if key not in self._people:
            name = f"_seed{seed}" if self.recipe.data.resplit else ""
            self._people = {key: people_of(self.recipe, self.data(seed), self.out, name)}
        return self._people[key]

    def _protocol(self) -> Protocol | None:
        """Return the protocol that the folder holds; None where there is none, or where it is damaged: it is chosen again, the same."""
        held = self.out / PROTOCOL
        try:
            return Protocol.read(held) if held.exists() else None
        except DamagedFileError as error:
            self.note(f"{error}; it is chosen again")
            return None

    def _lacks(self, method: str, seed: int, folder: Path, protocol: Protocol | None) -> bool:
        return protocol is None or protocol.lacks(method, seed) or not self._done(folder)

    def _done(self, folder: Path) -> bool:
        """Whether a method and seed is measured, and its numbers and predictions are as they were written; what is not is made again."""
        if not (folder / METRICS).exists():
            return False
        try:
            read_json(folder / METRICS, sealed=True)
            for path in (*folder.glob("predictions_*.parquet"), *folder.glob("*.npz"), *folder.glob(MODEL)):
                is_sealed(path)
            if changed := [name for name in edited_files(folder) if Path(name).name != HISTORY]:
                raise DamagedFileError(f"{folder / changed[0]} is damaged or was changed")
        except DamagedFileError as error:
            self.note(f"{error}; it is made again from the checkpoint")
            return False
        for run_dir in run_dirs(folder):
            close_training(run_dir)  # runs of earlier versions did so last
        return True

    def _one(self, method: str, seed: int, folder: Path, protocol: Protocol | None) -> Protocol | None:
        """Train, which all processes do, and measure, which the first one does; return the protocol."""
        self.note(f"{method}, seed {seed}")
        recipe = self.recipe
        data = data_for(recipe, method, self.data(seed))
        chooses = protocol is None or protocol.lacks(method, seed)  # its score ranges are those of its own outputs
        tasks = data.tasks if protocol is None or chooses else protocol.freeze(data.tasks, seed)
        trained: _Trained = {}
        if recipe.methods[method].post is None:
            trained = self._train(method, seed, data, tasks, folder)
        if not writes():
            return protocol
        for trainer in trained.values():
            trainer.processes = None
        with alone():
            return self._measure(method, seed, folder, data, tasks, trained, protocol)

    def _measure(
        self,
        method: str,
        seed: int,
        folder: Path,
        data: Dataset,
        tasks: tuple[Task, ...],
        trained: _Trained,
        protocol: Protocol | None,
    ) -> Protocol:
        """Make what is made of others, measure and write; return the protocol, with what is chosen here."""
        recipe, started, made = self.recipe, time.perf_counter(), Json()
        chooses = protocol is None or protocol.lacks(method, seed)
        if trained:
            predictions = {part: self._predict(trained, data, part) for part in PARTS}
        else:
            names = made_of(recipe, method)
            sources = {name: self._saved(name, seed) for name in names}
            asked = read_json(self.out / names[0] / f"seed{seed}" / METRICS).get("constraint") or []
            predictions, made = make_post(recipe, method, seed, data, sources, asked)
        spent = time.perf_counter() - started
        if protocol is None or chooses:
            val = predictions["val"]
            protocol = Protocol.choose(recipe, method, seed, val) if protocol is None else protocol.with_seed(seed, val)
            write_json(self.out / PROTOCOL, protocol.to_dict(), sealed="beside")
            frozen = protocol.freeze(tasks, seed)
            predictions = {part: p.rescored(frozen) for part, p in predictions.items()}
        if recipe.output.predictions:
            for part, p in predictions.items():
                dataclasses.replace(p, embeddings=None).save(folder / f"predictions_{part}.parquet")
        if recipe.output.embeddings and trained:
            with sealed_path(folder / "embeddings.npz") as temporary, open(temporary, "wb") as stream:
                np.savez_compressed(stream, **pool_embeddings(recipe, predictions))
        content = measure(recipe, method, seed, predictions, protocol)
        content["consistency"] = self._consistency(method, seed, predictions, trained)
        if trained:
            spent = sum(map(_seconds, trained.values()))
            spent += task_groups(folder)["train_s"] if by_groups(recipe.methods[method]) else 0.0
        content["timing"] = {"train_s": spent, "epochs": 0}
        if recipe.output.predictions:
            content["digest"] = digests(folder, predictions)
        voters = made.pop("voters", None)
        if made:
            content |= {"post": made, "checkpoint": {"chosen_by": made["chosen_by"]}}
        for first in list(trained.values())[:1]:
            train = recipe.train_for(method)
            best, last = train.select == "best", "the last epoch (number of epochs set in the recipe)"
            by = (
                "maps"
                if train.select_by == "utility" and any(isinstance(t, MapTask) for t in tasks)
                else train.select_by
            )
            content["checkpoint"] = {
                "epoch": first.best["epoch"] if best else first.epoch - 1,
                "chosen_by": _CHOSEN_BY[by] if best else last,
            }
            content["timing"]["epochs"] = first.epoch
            _write_structure(first, folder)
        constraints = self._constraints(trained, data, predictions["val"])
        content |= {"constraint": constraints} if constraints else {}
        self._write_model(folder, method, seed, predictions["val"].tasks, content, voters)
        for run_dir in run_dirs(folder):
            close_training(run_dir)
            if (run_dir / HISTORY).exists():
                seal_beside(run_dir / HISTORY)
        write_json(folder / METRICS, content, sealed="beside")
        return protocol

    def _write_model(
        self,
        folder: Path,
        method: str,
        seed: int,
        tasks: tuple[Task, ...],
        content: Json,
        voters: object,
    ) -> None:
        """Write what a model in use needs besides its weights: how rows are read, thresholds, and what it was made of."""
        rows = dataclasses.replace(data_for(self.recipe, method, self.data(seed)).new_rows, tasks=tasks)
        about = {"method": method, "seed": seed, "thresholds": content["thresholds"]["in_use"], "rows": rows.to_dict()}
        post = {"strength": content["post"].get("strength"), "voters": voters} if "post" in content else {}
        write_json(folder / MODEL, {**about, "post": post}, sealed=True)

    def _constraints(self, trained: _Trained, data: Dataset, val: Predictions) -> list[Json]:
        """Return what came of each constraint that a method set: of the kept model, on training and validation decisions."""
        found = []
        for part, trainer in trained.items():
            if trainer.model.constraint_rows(val=val):
                train = self._predict({part: trainer}, data, "train")
                found += trainer.model.constraint_rows(train=train, val=val)
        return found

    def _train(self, method: str, seed: int, data: Dataset, tasks: tuple[Task, ...], folder: Path) -> _Trained:
        """Return the trained networks: one, or one for each task or group of tasks."""
        named = {task.name: task for task in tasks}
        if by_groups(self.recipe.methods[method]):
            self._find_groups(method, seed, data, tasks, folder)
        trained = _Trained()
        for part in parts_of(self.recipe, method, tuple(named), folder):
            chosen = tuple(named[name] for name in part.tasks)
            trained[part] = self._network(method, seed, data, chosen, part.folder, **weighting_of(self.recipe, method))
        return trained

    def _network(
        self, method: str, seed: int, data: Dataset, tasks: tuple[Task, ...], run_dir: Path, **options: Any
    ) -> FairTrainer:
        """Return one trained network, gone on with where it was begun."""
        if writes():
            reopen_training(run_dir)
        where = {"device": self.device, "run_dir": run_dir, "resume": True}
        trainer = make_trainer(self.recipe, method, data, tasks, seed, **where, **options)
        settings = self.recipe.train_for(method)
        chosen = only(data, tuple(task.name for task in tasks))
        sources = loaders(chosen, settings.batch_size, seed, self.device, self.recipe.model_for(method))
        trainer.train(sources["train"], None, settings.epochs, sources["val"])
        return trainer

    def _find_groups(self, method: str, seed: int, data: Dataset, tasks: tuple[Task, ...], folder: Path) -> None:
        """Train all tasks together, and write the groups that follow, where the folder does not hold them."""

        def lacking() -> bool:
            try:
                return bool([task.name for task in tasks] != task_groups(folder)["tasks"])
            except CheckpointError:
                return True

        if self._first(lacking):
            need_few(len(tasks))
            trainer = self._network(method, seed, data, tasks, joint_folder(folder))
            settings = trainer.model.settings
            names = [task.name for task in tasks]
            write_groups(folder, self._first(lambda: find_groups(trainer, names, settings, _seconds(trainer))))
        self._first(lambda: task_groups(folder)["tasks"])  # the others wait for the file

    def _consistency(self, method: str, seed: int, predictions: dict[str, Predictions], trained: _Trained) -> Json:
        """Return the audit of people; flip twins are those of all inputs, of which a method sees what it saw in training."""
        people, data = self.people(seed), self.data(seed)

        def predict(changed: Dataset, part: str) -> Predictions:
            return self._predict(trained, data_for(self.recipe, method, changed), part)

        twins = {part: people.twins(data, part, predict) for part in predictions if trained}
        return people.measured(self.recipe, predictions, twins)

    def _saved(self, method: str, seed: int) -> dict[str, Predictions]:
        folder = self.out / method / f"seed{seed}"
        return {part: Predictions.load(folder / f"predictions_{part}.parquet") for part in PARTS}

    def _predict(self, trained: _Trained, data: Dataset, part: str) -> Predictions:
        found = []
        for network, trainer in trained.items():
            rows = getattr(only(data, network.tasks), part)
            held = trainer.predict(rows.loader(EVAL_BATCH, device=self.device), embeddings=True, maps=False)
            found.append(held.only(network.serves))
        served = {name for network in trained for name in network.serves}
        return side_by_side(found).only([task.name for task in data.tasks if task.name in served])


def _seconds(trainer: FairTrainer) -> float:
    """Return the seconds of all steps, those before a kill included."""
    return float(trainer.history["train_s"].sum()) if trainer.epoch else 0.0


def _write_structure(trainer: FairTrainer, folder: Path) -> None:
    """Write the branches of a branching model, last and chosen, and the recorded conflicts, where there are any."""
    chosen = trainer.model.structure() if hasattr(trainer.model, "structure") else None
    if chosen is not None:
        write_json(
            folder / "structure.json", {"last": trainer.last_structure or chosen, "chosen": chosen}, sealed="beside"
        )
    if getattr(trainer.model, "conflict_cosines", None) is not None:
        write_text(folder / "conflicts.csv", csv_text(trainer.model.conflicts.frame()), sealed=True)


def _claim(recipe: Recipe, out: Path | None, resume: bool) -> Path:
    """Return the run's folder, made, with this recipe's fingerprint in it; one that holds another run is refused."""
    chosen = out or (Path(recipe.output.dir) if recipe.output.dir else None)
    if chosen is None:
        names = itertools.chain([recipe.name], (f"{recipe.name}-{number}" for number in itertools.count(2)))
        chosen = next(folder for name in names if _fits(folder := Path("runs") / name, recipe, resume))
    elif not _fits(chosen, recipe, resume):
        if not (chosen / "run.json").exists():
            raise CheckpointError(f"{chosen} is not empty and holds no run; give an empty folder with --out")
        if resume:
            raise CheckpointError(
                f"{chosen} was made with another recipe; give another --out, or the recipe it was made with"
            )
        raise CheckpointError(f"{chosen} holds a run already; add --resume to go on with it, or give another --out")
    write_json(chosen / "run.json", {"fingerprint": recipe.fingerprint(), "name": recipe.name}, sealed="beside")
    return chosen


def _fits(folder: Path, recipe: Recipe, resume: bool) -> bool:
    """Whether the folder is free, or holds this recipe's run and may be continued."""
    try:
        # What a kill left of the very first write, run.json's, is nobody's run.
        if not folder.exists() or all(is_leftover(each, "run.json") for each in folder.iterdir()):
            return True
        held = folder / "run.json"
        if not resume or not held.exists():
            return False
        found = read_json(held, sealed=True)
        if not isinstance(found, dict) or not isinstance(found.get("fingerprint"), str):
            raise DamagedFileError(f"{held} is damaged: expected a mapping with a fingerprint, found {str(found)[:60]}")
        return bool(found["fingerprint"] == recipe.fingerprint())
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{error}. It says of which recipe the run is: put it back, or give another --out; nothing was changed"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot use {folder}: {error.strerror or error}; give another folder with --out"
        ) from error


def environment(device: torch.device) -> dict[str, object]:
    """Return versions and machine facts that a reader needs to repeat a run."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "packages": found,
        "LibMTL lineage": LINEAGE,
        "device": f"{device} ({name})",
        "system": platform.system(),
        "threads": torch.get_num_threads(),
    }


def run_recipe(recipe: Recipe, out: str | Path | None = None, **options: Any) -> Path:
    """Run a recipe and return its folder; see :class:`Run`."""
    return Run(recipe, out, **options)()
