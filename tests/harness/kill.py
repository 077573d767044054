"""Runs and studies killed at random moments, by SIGKILL, and resumed: to the numbers and files of those left in peace.

python -m tests.harness.kill --n 200
"""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from libmtl_fair import tune
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.tune.budget import slots
from tests.harness.common import Trials, WrongNumberError, main

CONTENT = {
    "name": "tiny",
    "data": {"name": "german", "tasks": ["bad_credit", "owns_home"], "sensitive": ["age"], "subset": 400},
    "model": {"hidden": [8]},
    "train": {"epochs": 3, "batch_size": 64},
    "methods": {"plain": {"weighting": "EW"}, "relif": {"weighting": "ReLiF", "pairs": "random"}},
    "metrics": {"n_bootstrap": 0},
    "audit": {"shrinkage": False},
    "output": {"report": False},
    "tune": {"space": {"target": "builtin", "lr": "builtin"}, "objectives": ["macro_auc"]},
}
RECIPE = Recipe.from_dict(CONTENT)
TRIALS_OF_A_STUDY = 7


@cache
def room() -> Path:
    """Return a folder that goes when this process ends."""
    torch.set_num_threads(1)
    folder, owner = Path(tempfile.mkdtemp(prefix="harness-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def do_run(folder: Path) -> None:
    run_recipe(RECIPE, folder, device="cpu", resume=True)


def state_of_run(folder: Path) -> object:
    """Return the files that there are, and every number but the seconds."""
    numbers = {}
    for path in sorted(folder.glob("*/seed*/metrics.json")):
        content = json.loads(path.read_text())
        numbers[str(path.relative_to(folder))] = {k: v for k, v in content.items() if k != "timing"}
    rows = {str(p.relative_to(folder)): len(p.read_bytes().splitlines()) for p in folder.rglob("history.csv")}
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()), rows, numbers


def do_study(folder: Path) -> None:
    tune.tune(RECIPE, TRIALS_OF_A_STUDY, storage=folder / "study.journal")


def state_of_study(folder: Path) -> object:
    study = tune.tune(RECIPE, TRIALS_OF_A_STUDY, storage=folder / "study.journal")
    return {slot: (t.state.name, t.params, t.values) for slot, t in sorted(slots(study).items())}


def child(work: Callable[[Path], None], folder: Path) -> int:
    """Begin the work in a process of its own; what it says is in ``<folder>.log``."""
    began = os.fork()
    if began == 0:
        warnings.simplefilter("ignore")
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 1
        try:
            work(folder)
            code = 0
        except BaseException:  # noqa: BLE001  it is in the log
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
    return began


def ended(process: int, folder: Path) -> None:
    """Raise where a process ended with an error: a result is lost then."""
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise WrongNumberError(f"results lost: {Path(f'{folder}.log').read_text().strip().splitlines()[-1]}")


class Killing:
    """Kills one piece of work after another; each kill is one trial."""

    def __init__(self, name: str, work: Callable[[Path], None], state: Callable[[Path], object]) -> None:
        self.name, self.work, self.state = name, work, state
        self.turn, self.expected, self.seconds = 0, None, 0.0

    def begin(self) -> None:
        """Do the work in peace, once; the second time is timed, as the first reads more."""
        if self.expected is None:
            for _ in range(2):
                whole = room() / f"{self.name}-whole"
                shutil.rmtree(whole, ignore_errors=True)
                began = time.monotonic()
                ended(child(self.work, whole), whole)
                self.seconds = time.monotonic() - began
            self.expected = self.state(whole)

    @property
    def folder(self) -> Path:
        return room() / f"{self.name}-{self.turn}"

    def __call__(self, draw: random.Random) -> str:
        """Kill the work once, at a random moment; in one of four cases let it end then, and compare."""
        self.begin()
        while True:
            process = child(self.work, self.folder)
            time.sleep(draw.uniform(0, self.seconds))
            done, status = os.waitpid(process, os.WNOHANG)
            if not done:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                break
            if os.waitstatus_to_exitcode(status):
                raise WrongNumberError(
                    f"results lost: {Path(f'{self.folder}.log').read_text().strip().splitlines()[-1]}"
                )
            self.compare()
        if draw.random() > 0.25:
            return "killed"
        ended(child(self.work, self.folder), self.folder)
        self.compare()
        return "killed, completed and compared"

    def compare(self) -> None:
        """Raise where a number or a file is another than that of the work that was left in peace."""
        found, folder = self.state(self.folder), self.folder
        self.turn += 1
        shutil.rmtree(folder, ignore_errors=True)
        if found != self.expected:
            raise WrongNumberError(f"{self.name}: {found} instead of {self.expected}"[:2000])


TRIALS: Trials = {
    "runs": (3, Killing("run", do_run, state_of_run)),
    "studies": (1, Killing("study", do_study, state_of_study)),
}

if __name__ == "__main__":
    main(__doc__ or "", TRIALS, 200)
