"""Run a user's LibMTL script as it is: plugins registered, LibMTL healed."""

from __future__ import annotations

import itertools
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from libmtl_fair.errors import RecipeError
from libmtl_fair.libmtl.compat import heal
from libmtl_fair.libmtl.history import Floats
from libmtl_fair.libmtl.loading import libmtl, trainer_module
from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, OUR_WEIGHTINGS
from libmtl_fair.libmtl.state import Loaders, Results
from libmtl_fair.libmtl.trainer import FairTrainer


class ScriptTrainer(FairTrainer):
    """FairTrainer in the place of ``LibMTL.Trainer``: results go to the console, as a LibMTL script expects."""

    def _one_epoch(self, epoch: int, train_dataloaders: Loaders, val_dataloaders: Loaders | None) -> None:
        super()._one_epoch(epoch, train_dataloaders, val_dataloaders)
        row = self.epochs.iloc[-1]
        train = " ".join(f"{task} {row[f'loss/{task}']:.4f}" for task in self.task_name)
        val = " ".join(f"{name.removeprefix('val/')} {row[name]:.4f}" for name in row.index if name.startswith("val/"))
        _say(f"Epoch: {epoch:04d} | TRAIN: {train}" + (f" | VAL: {val}" if val else ""))

    def train(self, *args: Any, **kwargs: Any) -> Floats | None:
        """Train, then show the results on the test loader."""
        weights = super().train(*args, **kwargs)
        if self.test_results is not None:
            _say_test(self.test_results)
        return weights

    def test(self, *args: Any, **kwargs: Any) -> Results:
        """Return the results over a loader, and show them."""
        results = super().test(*args, **kwargs)
        _say_test(results)
        return results


def _say_test(results: Results) -> None:
    parts = [f"{task}/{name} {value:.4f}" for task, found in results.items() for name, value in found.items()]
    _say(f"TEST: {' '.join(parts)}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_script(path: str | Path, args: Sequence[str] = ()) -> dict[str, object]:
    """Run a script as ``python path args`` would, with our methods known to LibMTL and LibMTL healed.

    Where ``args`` choose one of our methods (``--weighting ReLiF``), the ``LibMTL.Trainer`` that the script imports is a
    :class:`ScriptTrainer`, since LibMTL's own cannot show a weighting its batch; else it is LibMTL's own, healed.

    Returns
    -------
    dict of str to object
        The script's global names.

    Raises
    ------
    RecipeError
        There is no such script. The script's own exceptions, ``SystemExit`` included, go through unchanged.
    """
    script = Path(path)
    if not script.is_file():
        raise RecipeError(
            f"no script at {path}; expected a Python file, as in: libmtl-fair exec train.py -- --weighting ReLiF"
        )
    heal()
    with _running(script, args):
        return runpy.run_path(str(script), run_name="__main__")


@contextmanager
def _running(script: Path, args: Sequence[str]) -> Iterator[None]:
    """Let the script find its arguments, its folder and, where it asks for a method of ours, our trainer."""
    argv, folder, held = sys.argv, str(script.resolve().parent), (libmtl.Trainer, trainer_module.Trainer)
    words, ours = [word for arg in args for word in arg.split("=", 1)], {*OUR_WEIGHTINGS, *OUR_ARCHITECTURES}
    sys.argv = [str(script), *args]
    sys.path.insert(0, folder)
    if any(option in ("--weighting", "--arch") and name in ours for option, name in itertools.pairwise(words)):
        vars(libmtl)["Trainer"] = vars(trainer_module)["Trainer"] = ScriptTrainer
    try:
        yield
    finally:
        sys.argv = argv
        vars(libmtl)["Trainer"], vars(trainer_module)["Trainer"] = held
        if folder in sys.path:
            sys.path.remove(folder)
