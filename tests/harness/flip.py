"""One flipped bit, or one truncation, of a file: refused with an error of ours, healed, or without effect; never another number.

python -m tests.harness.flip --n 2000
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from libmtl_fair.libmtl import checkpoint
from libmtl_fair.predictions import Predictions
from libmtl_fair.report import read_run
from libmtl_fair.report.notes import notes
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.sklearn import FairMTLEstimator
from libmtl_fair.tune.storage import JournalFile
from tests.harness.common import Trials, WrongNumberError, main
from tests.harness.kill import child, do_run, do_study, room, state_of_run


@cache
def finished() -> Path:
    """A run that is finished."""
    do_run(room() / "finished")
    return room() / "finished"


@cache
def interrupted() -> Path:
    """A run that ended without a word when its second method had trained two epochs."""

    def half(folder: Path) -> None:
        real, seen = os.replace, []

        def replace(source: Any, target: Any) -> None:
            real(source, target)
            seen.append(str(target).endswith("relif/seed0/last.pt"))
            if sum(seen) == 2:
                os._exit(0)

        os.replace = replace  # type: ignore[assignment]
        do_run(folder)

    os.waitpid(child(half, room() / "interrupted"), 0)
    return room() / "interrupted"


@cache
def estimator() -> tuple[Path, pd.DataFrame]:
    """A saved estimator, and rows."""
    rng = np.random.default_rng(0)
    x = pd.DataFrame({"a": rng.normal(size=60), "b": rng.normal(size=60)})
    y = pd.DataFrame({"t": (x["a"] > 0).astype(int), "u": x["b"]})
    made = FairMTLEstimator(hidden=(4,), epochs=1, random_state=0).fit(x, y, sensitive_features=x["a"] > 0.5)
    return made.save(room() / "estimator.pt"), x


@cache
def journal() -> Path:
    """The journal of a study."""
    do_study(room() / "study")
    return room() / "study" / "study.journal"


def plain(value: Any) -> Any:
    """Return what can be compared: lists for tensors and tables."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.reshape(-1).numpy().tobytes()]
    return value.to_csv() if isinstance(value, pd.DataFrame) else value


def damaged(path: Path, draw: random.Random, spare: int = 0) -> Path:
    """Write a copy with one bit flipped (nine of ten) or its end cut off; ``spare`` bytes of its end are left alone."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.9:
        bit = draw.randrange(8 * (len(content) - spare))
        content[bit // 8] ^= 1 << bit % 8
    else:
        del content[draw.randrange(len(content)) :]
    copy = room() / f"damaged{path.suffix}"
    copy.write_bytes(content)
    return copy


def reading(path: Callable[[], Path], read: Callable[[Path], Any], spare: int = 0) -> Callable[[random.Random], str]:
    """Return a trial that reads a damaged copy of a file."""
    expected = cache(lambda: plain(read(path())))

    def trial(draw: random.Random) -> str:
        expected()
        if plain(read(damaged(path(), draw, spare))) != expected():
            raise WrongNumberError(f"{path().name} was read with other content")
        return "read as it was"

    return trial


def entries(path: Path) -> Any:
    """Return a journal's lines; one that was cut off is shorter, and that is no other content."""
    found = list(JournalFile(str(path)).read_logs(0))
    whole = list(JournalFile(str(journal())).read_logs(0))
    return whole if found == whole[: len(found)] and path.stat().st_size < journal().stat().st_size else found


def resumed(base: Callable[[], Path]) -> Callable[[random.Random], str]:
    """Return a trial that resumes a run, one of whose files is damaged."""

    def trial(draw: random.Random) -> str:
        folder = room() / "resumed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base(), folder)
        path = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))
        shutil.copy(damaged(path, draw), path)
        do_run(folder)
        if state_of_run(folder)[2] != state_of_run(finished())[2]:  # type: ignore[index]
            raise WrongNumberError(f"{path.relative_to(folder)} was damaged, and the resumed run has other numbers")
        return "resumed to the same numbers"

    return trial


def reported(draw: random.Random) -> str:
    """Read a run, one of whose files is damaged, and all that a report takes from it."""
    folder = room() / "reported"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished(), folder)
    path = draw.choice(sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".parquet", ".csv", ".yaml")))
    shutil.copy(damaged(path, draw), path)
    run = read_run(folder)
    taken = everything(run)
    if any("as the run wrote" in note for note in notes(run)):
        return "read, and said to be edited or damaged"
    if taken != everything(read_run(finished())):
        raise WrongNumberError(f"{path.relative_to(folder)} was damaged, and nothing is said")
    return "read as it was"


def everything(run: RunFolder) -> Any:
    """Return what a run folder holds for a report."""
    each = [[item.metrics, item.history(), item.structure(), item.conflicts()] for item in run.runs]
    return plain([run.recipe, run.data_card, run.protocol, run.environment, each])


def load(path: Path) -> Any:
    return checkpoint.load(path, torch.device("cpu"))


def table(path: Path) -> Any:
    held = Predictions.load(path)
    return [held.frame(), held.outputs]


TRIALS: Trials = {
    "checkpoints": (9, reading(lambda: finished() / "relif" / "seed0" / "checkpoint.pt", load)),
    "estimators": (
        4,
        reading(lambda: estimator()[0], lambda path: FairMTLEstimator.load(path).predict(estimator()[1])),
    ),
    "predictions": (6, reading(lambda: finished() / "plain" / "seed0" / "predictions_test.parquet", table)),
    "journals": (4, reading(journal, entries, spare=1)),
    "reports": (3, reported),
    "interrupted runs": (1, resumed(interrupted)),
    "finished runs": (1, resumed(finished)),
}

if __name__ == "__main__":
    main(__doc__ or "", TRIALS, 2000)
