"""Running a recipe: every method and seed trained, audited, measured and written, so that a kill loses at most an epoch."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from libmtl_fair.data import Dataset
from libmtl_fair.data.loader import resolve_device
from libmtl_fair.errors import CheckpointError
from libmtl_fair.files import atomic_path, read_json, write_json, write_text
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.libmtl.loading import LINEAGE
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.build import check, loaders, make_dataset, make_trainer, only
from libmtl_fair.recipe.measure import Protocol, measure, pool_embeddings
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tasks import Task

Note = Callable[[str], None]
_PACKAGES = ("torch", "LibMTL", "numpy", "scikit-learn", "fairlearn", "optuna", "pandas")


class Run:
    """One run of a recipe in one folder.

    Parameters
    ----------
    recipe : what to run.
    out : folder; None takes the recipe's ``output.dir``, else ``runs/<name>`` (a new number if that is taken).
    device : ``"auto"``, ``"cpu"``, ``"cuda:0"``, ...
    resume : go on in a folder that holds the same recipe; what is finished there is not trained again.
    note : called with one line before each training.

    Raises
    ------
    RecipeError, DataError : the recipe does not make sense, or does not fit its data.
    CheckpointError : the folder cannot be written, or holds another run.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path | None = None,
        *,
        device: str = "auto",
        resume: bool = False,
        note: Note | None = None,
    ) -> None:
        check(recipe)
        self.recipe, self.device, self.note = recipe, resolve_device(device), note or (lambda text: None)
        self.out = _claim(recipe, Path(out) if out else None, resume)
        self._data: dict[int, Dataset] = {}
        self._tasks: tuple[Task, ...] | None = None

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """Every (method, seed), the reference's first seed first."""
        return [(method, seed) for method in self.recipe.methods for seed in self.recipe.seeds]

    def __call__(self) -> Path:
        """Run everything; return the folder."""
        self._start()
        protocol = self._protocol()
        for method, seed in self.jobs:
            if not (self.folder(method, seed) / "metrics.json").exists():
                protocol = self._one(method, seed, protocol)
        self._finish()
        return self.out

    def folder(self, method: str, seed: int) -> Path:
        """Return the folder of one method and seed."""
        return self.out / method / f"seed{seed}"

    def data(self, seed: int) -> Dataset:
        """Return the data for a seed; one split serves all seeds unless the recipe says ``resplit``."""
        key = seed if self.recipe.data.resplit else 0
        if key not in self._data:
            self._data = {key: make_dataset(self.recipe, seed)}
        return self._data[key]

    def tasks(self, seed: int, protocol: Protocol | None) -> tuple[Task, ...]:
        """Return the tasks, with the score ranges that the reference model froze."""
        found = self.data(seed).tasks
        return found if protocol is None else protocol.freeze(found)

    def _start(self) -> None:
        data = self.data(self.recipe.seeds[0])
        write_text(self.out / "recipe.yaml", self.recipe.to_yaml())
        write_json(self.out / "environment.json", environment(self.device))
        write_json(self.out / "data_card.json", data.card)

    def _protocol(self) -> Protocol | None:
        path = self.out / "audit_protocol.json"
        return Protocol.from_dict(read_json(path)) if path.exists() else None

    def _one(self, method: str, seed: int, protocol: Protocol | None) -> Protocol:
        self.note(f"{method}, seed {seed}")
        data, folder = self.data(seed), self.folder(method, seed)
        tasks = self.tasks(seed, protocol)
        started = time.perf_counter()
        trained = self._train(method, seed, data, tasks, folder)
        spent = time.perf_counter() - started
        predictions = {part: self._predict(trained, data, part) for part in ("val", "test")}
        if protocol is None:
            protocol = Protocol.choose(self.recipe, method, seed, predictions["val"])
            write_json(self.out / "audit_protocol.json", protocol.to_dict())
            frozen = protocol.freeze(tasks)
            predictions = {part: rescore(p, frozen) for part, p in predictions.items()}
        if self.recipe.output.predictions:
            for part, p in predictions.items():
                dataclasses.replace(p, embeddings=None).save(folder / f"predictions_{part}.parquet")
        if self.recipe.output.embeddings:
            with atomic_path(folder / "embeddings.npz") as temporary, open(temporary, "wb") as stream:
                np.savez_compressed(stream, **pool_embeddings(self.recipe, predictions))
        content = measure(self.recipe, method, seed, predictions, protocol)
        first = next(iter(trained.values()))
        content["checkpoint"] = self._chosen(first, method)
        content["timing"] = {"train_s": spent, "epochs": first.epoch}
        _write_structure(first, folder)
        write_json(folder / "metrics.json", content)
        for trainer in trained.values():
            _tidy(trainer.run_dir)
        return protocol

    def _train(
        self, method: str, seed: int, data: Dataset, tasks: tuple[Task, ...], folder: Path
    ) -> dict[tuple[str, ...], FairTrainer]:
        """Return the trained model, or one for each task where the method is single-task."""
        parts: list[tuple[tuple[Task, ...], Path]] = [(tasks, folder)]
        if self.recipe.methods[method].single_task:
            parts = [((task,), folder / "single" / str(i)) for i, task in enumerate(tasks)]
        trained: dict[tuple[str, ...], FairTrainer] = {}
        for chosen, run_dir in parts:
            names = tuple(task.name for task in chosen)
            trainer = make_trainer(
                self.recipe, method, data, chosen, seed, device=self.device, run_dir=run_dir, resume=True
            )
            settings = self.recipe.train_for(method)
            sources = loaders(_narrowed(data, names), settings.batch_size, seed, self.device)
            trainer.train(sources["train"], None, settings.epochs, sources["val"])
            trained[names] = trainer
        return trained

    def _predict(self, trained: dict[tuple[str, ...], FairTrainer], data: Dataset, part: str) -> Predictions:
        found = []
        for names, trainer in trained.items():
            loader = only(getattr(data, part), names).loader(8192, device=self.device)
            found.append(trainer.predict(loader, embeddings=True))
        return found[0] if len(found) == 1 else merge(found)

    def _chosen(self, trainer: FairTrainer, method: str) -> dict[str, Any]:
        train = self.recipe.train_for(method)
        if train.select == "last":
            return {"epoch": trainer.epoch - 1, "chosen_by": "the last epoch (number of epochs set in the recipe)"}
        by = (
            "mean of AUC, accuracy or R2 over tasks"
            if train.select_by == "utility"
            else "LibMTL's mean relative improvement"
        )
        return {"epoch": trainer.best["epoch"], "chosen_by": f"{by}, on validation"}

    def _finish(self) -> None:
        from libmtl_fair.report import write_report, write_summary

        write_summary(self.out)
        if self.recipe.output.report:
            write_report(self.out)


def _narrowed(data: Dataset, names: tuple[str, ...]) -> Dataset:
    if names == data.task_names:
        return data
    return dataclasses.replace(
        data, train=only(data.train, names), val=only(data.val, names), test=only(data.test, names)
    )


def _write_structure(trainer: FairTrainer, folder: Path) -> None:
    """Write the branches of a branching model, last and chosen, and the recorded conflicts, where there are any."""
    chosen = trainer.model.structure() if hasattr(trainer.model, "structure") else None
    if chosen is not None:
        write_json(folder / "structure.json", {"last": trainer.last_structure or chosen, "chosen": chosen})
    if getattr(trainer.model, "conflict_cosines", None) is not None:
        write_text(folder / "conflicts.csv", trainer.model.conflicts.frame().to_csv(index=False))


def _tidy(run_dir: Path | None) -> None:
    """Keep one checkpoint of a finished training: the last also holds the chosen epoch."""
    assert run_dir is not None
    if (run_dir / "last.pt").exists():
        os.replace(run_dir / "last.pt", run_dir / "checkpoint.pt")
    (run_dir / "best.pt").unlink(missing_ok=True)


def rescore(predictions: Predictions, tasks: tuple[Task, ...]) -> Predictions:
    """Return the predictions with audit scores under frozen score ranges."""
    scores = {t.name: t.score(predictions.outputs[t.name]) for t in tasks}
    return dataclasses.replace(predictions, tasks=tasks, scores=scores)


def merge(parts: list[Predictions]) -> Predictions:
    """Return the predictions of single-task models of the same rows as one."""

    def joined(name: str) -> dict[str, Any]:
        return {task: value for part in parts for task, value in getattr(part, name).items()}

    h = {part.tasks[0].name: part.embeddings for part in parts}
    return dataclasses.replace(
        parts[0],
        tasks=tuple(part.tasks[0] for part in parts),
        scores=joined("scores"),
        outputs=joined("outputs"),
        labels=joined("labels"),
        embeddings=h,  # type: ignore[arg-type]
    )


def _claim(recipe: Recipe, out: Path | None, resume: bool) -> Path:
    """Return the run's folder, made, with this recipe's fingerprint in it.

    Raises
    ------
    CheckpointError : the folder holds another run, or a run without ``resume``.
    """
    chosen = out or (Path(recipe.output.dir) if recipe.output.dir else None)
    if chosen is None:
        chosen = next((p for p in _candidates(recipe.name) if _fits(p, recipe, resume)), Path("runs") / recipe.name)
    elif not _fits(chosen, recipe, resume):
        held = chosen / "run.json"
        if resume and held.exists():
            raise CheckpointError(
                f"{chosen} was made with another recipe; give another --out, or the recipe it was made with"
            )
        if held.exists():
            raise CheckpointError(f"{chosen} holds a run already; add --resume to go on with it, or give another --out")
        raise CheckpointError(f"{chosen} is not empty and holds no run; give an empty folder with --out")
    write_json(chosen / "run.json", {"fingerprint": recipe.fingerprint(), "name": recipe.name})
    return chosen


def _candidates(name: str) -> Iterator[Path]:
    yield Path("runs") / name
    number = 2
    while True:
        yield Path("runs") / f"{name}-{number}"
        number += 1


def _fits(folder: Path, recipe: Recipe, resume: bool) -> bool:
    """Whether the folder is free, or holds this recipe's run and may be continued."""
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return True
        held = folder / "run.json"
        return resume and held.exists() and read_json(held).get("fingerprint") == recipe.fingerprint()
    except OSError as error:
        raise CheckpointError(
            f"cannot use {folder}: {error.strerror or error}; give another folder with --out"
        ) from error


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions and machine facts that a reader needs to repeat a run."""
    found = {}
    for package in (*_PACKAGES, "libmtl_fair"):
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
