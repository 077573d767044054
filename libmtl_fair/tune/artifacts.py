"""optuna-dashboard on a study of ours: notes, each trial's files as artifacts, and the server."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
import torch
from matplotlib.figure import Figure
from optuna.artifacts import FileSystemArtifactStore

from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.files import write_text
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.report.theme import themed
from libmtl_fair.shown import csv_text
from libmtl_fair.tune.plan import DESCRIBED, ROLE, Outcome
from libmtl_fair.tune.storage import open_storage, storage_errors

ARTIFACTS = "artifacts"


class Keeper:
    """Keeps a trial's checkpoint, history and plot of each seed, its metrics and its recipe, as Optuna artifacts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._store = FileSystemArtifactStore(str(folder))

    @classmethod
    def beside(cls, storage: object) -> Keeper | None:
        """Return a keeper beside a journal file; other storages may be far away and have none."""
        if not isinstance(storage, str | Path) or "://" in str(storage):
            return None
        return cls(Path(storage).parent / ARTIFACTS)

    def trained(self, trial: optuna.Trial, seed: int, trainer: FairTrainer) -> None:
        """Keep what a seed's training has left."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            torch.save(trainer.model.state_dict(), folder / f"checkpoint_seed{seed}.pt")
            if len(trainer.history):  # a stacked training keeps none
                write_text(folder / f"history_seed{seed}.csv", csv_text(trainer.epochs))
                _plot(trainer, folder / f"history_seed{seed}.png")
            self._upload(folder, trial)

    def measured(self, trial: optuna.Trial, outcome: Outcome, recipe: Recipe) -> None:
        """Keep the metrics and the recipe of a trial, and say in its note what it is."""
        with tempfile.TemporaryDirectory() as name:
            content = json.dumps({"validation": outcome.found, **asdict(outcome)}, indent=1)
            for file, text in (("metrics.json", content), ("recipe.yaml", recipe.to_yaml())):
                write_text(Path(name) / file, text)
            self._upload(Path(name), trial)
        if (role := trial.user_attrs.get(ROLE)) is not None:
            _note(trial, f"**{role}**: one of the known settings that every study tries.")

    def _upload(self, folder: Path, trial: optuna.Trial) -> None:
        for path in sorted(folder.iterdir()):
            optuna.artifacts.upload_artifact(artifact_store=self._store, file_path=str(path), study_or_trial=trial)


def _plot(trainer: FairTrainer, path: Path) -> None:
    losses = trainer.epochs.set_index("epoch").filter(regex="^loss/").rename(columns=lambda c: c.removeprefix("loss/"))
    with themed():
        figure = Figure(figsize=(5, 3), layout="constrained")
        losses.plot(ax=figure.subplots(), marker=".", xlabel="epoch", ylabel="training loss")
        figure.savefig(path, format="png")


def describe(study: optuna.Study) -> None:
    """Write a note on the study that says what it asks; without optuna-dashboard there is no reader, and no note."""
    about = study.user_attrs[DESCRIBED]
    goals = ", ".join(f"{name} ({direction})" for name, direction in about["objectives"].items())
    rules, space = "; ".join(about["constraints"]) or "none", ", ".join(about["space"])
    text = f"Objectives on validation data: {goals}\n\nConstraints: {rules}\n\nParameters: {space}\n\nSampler: {about['sampler']}"
    _note(study, text)


def _note(where: optuna.Study | optuna.Trial, text: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        try:
            from optuna_dashboard import get_note, save_note
        except ImportError:
            return
        if get_note(where) != text:
            save_note(where, text)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing about requests."""


def make_server_for(study: str, host: str, port: int) -> WSGIServer:
    """Return a server, listening already, of the dashboard of a study: a journal, a folder of ``tune``, or a URL."""
    path = Path(study) / "study.journal" if Path(study).is_dir() else Path(study)
    if "://" not in study and not path.is_file():
        raise RecipeError(f"there is no study at {study}: expected a journal file, or the folder that tune wrote")
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise RecipeError("the dashboard needs optuna-dashboard; install libmtl_fair[dashboard]") from error
    where, artifacts = study if "://" in study else str(path), path.parent / ARTIFACTS
    store = FileSystemArtifactStore(str(artifacts)) if artifacts.is_dir() and path.is_file() else None
    with storage_errors(where), warnings.catch_warnings(action="ignore"):
        app = wsgi(open_storage(where), artifact_store=store)
    try:
        return make_server(host, port, app, handler_class=_Quiet)
    except OSError as error:
        raise CheckpointError(
            f"cannot listen on {host}:{port}: {error.strerror}; give another --port (0: a free one)"
        ) from error


def serve(study: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until interrupted; ``say`` is given the address once the server listens."""
    with make_server_for(study, host, port) as server, warnings.catch_warnings(action="ignore"):
        say(f"http://{host}:{server.server_port}")
        server.serve_forever()
