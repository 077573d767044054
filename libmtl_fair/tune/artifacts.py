"""What optuna-dashboard shows beside the numbers: a note on the study, and each trial's files as artifacts."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import optuna
import torch

from libmtl_fair.files import write_text
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tune.fingerprint import DESCRIBED
from libmtl_fair.tune.plan import ROLE
from libmtl_fair.tune.trial import Outcome

ARTIFACTS = "artifacts"


class Keeper:
    """Keeps a trial's checkpoint, history and plot of each seed, its metrics and its recipe, as Optuna artifacts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._store = optuna.artifacts.FileSystemArtifactStore(str(folder))

    @classmethod
    def beside(cls, storage: object) -> Keeper | None:
        """Return a keeper beside a journal file; other storages may be far away and have none."""
        if not isinstance(storage, str | Path) or "://" in str(storage):
            return None
        return cls(Path(storage).parent / ARTIFACTS)

    def trained(self, trial: optuna.Trial) -> Callable[[int, FairTrainer], None]:
        """Return what to call with each seed's trained model."""

        def keep(seed: int, trainer: FairTrainer) -> None:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                torch.save(trainer.model.state_dict(), folder / f"checkpoint_seed{seed}.pt")
                if len(trainer.history):  # a stacked training keeps none
                    write_text(folder / f"history_seed{seed}.csv", trainer.epochs.to_csv(index=False))
                    _plot(trainer, folder / f"history_seed{seed}.png")
                self._upload(folder, trial)

        return keep

    def measured(self, trial: optuna.Trial, outcome: Outcome, recipe: Recipe) -> None:
        """Keep the metrics and the recipe of a trial, and say in its note what it is."""
        with tempfile.TemporaryDirectory() as name:
            text = json.dumps({"validation": outcome.found, **asdict(outcome)}, indent=1)
            write_text(Path(name) / "metrics.json", text)
            write_text(Path(name) / "recipe.yaml", recipe.to_yaml())
            self._upload(Path(name), trial)
        role = trial.user_attrs.get(ROLE)
        if role is not None:
            _note(trial, f"**{role}**: one of the known settings that every study tries.")

    def _upload(self, folder: Path, trial: optuna.Trial) -> None:
        for path in sorted(folder.iterdir()):
            optuna.artifacts.upload_artifact(artifact_store=self._store, file_path=str(path), study_or_trial=trial)


def _plot(trainer: FairTrainer, path: Path) -> None:
    from matplotlib.figure import Figure

    from libmtl_fair.report.theme import themed

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from optuna_dashboard import get_note, save_note
        except ImportError:
            return
        if get_note(where) != text:
            save_note(where, text)
