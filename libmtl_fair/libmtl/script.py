"""Run a user's LibMTL script as it is: plugins registered, LibMTL healed."""

from __future__ import annotations

import importlib.util
import inspect
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from libmtl_fair.errors import RecipeError
from libmtl_fair.libmtl import loading
from libmtl_fair.libmtl.compat import heal
from libmtl_fair.libmtl.history import Floats
from libmtl_fair.libmtl.loading import config_module, libmtl, trainer_module
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


_OWN: type[Any] = loading.Trainer


class _Deciding(type):
    """Lets a script ask the class of its trainer for LibMTL's own attributes."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(_OWN, name)


class Trainer(metaclass=_Deciding):
    """``LibMTL.Trainer`` as a script sees it: becomes what the arguments ask for when it is made.

    With a method of ours, or fairness heads, it is a :class:`ScriptTrainer`, since LibMTL's own cannot show a weighting its
    batch; else it is LibMTL's own. A subclass of the script's stays in front of either.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(_OWN.__init__).bind_partial(self, *args, **kwargs).arguments
        tasks = given.get("task_dict") or {}
        heads = any(getattr(entry.get("task"), "auxiliary", False) for entry in tasks.values())
        ours = heads or any(map(_is_ours, (given.get("weighting"), given.get("architecture"))))
        own = type(self)
        bases = (own, ScriptTrainer if ours else _OWN)
        self.__class__ = type(own.__name__, bases, {"__module__": own.__module__, "__qualname__": own.__qualname__})
        shown = vars(trainer_module)["Trainer"]
        vars(trainer_module)["Trainer"] = _OWN  # by which its own constructor finds its base class
        try:
            super().__init__(*args, **kwargs)
        finally:
            vars(trainer_module)["Trainer"] = shown


def _is_ours(wanted: object) -> bool:
    """Whether a weighting or architecture needs a trainer that knows fairness methods: its name, module:Class or class."""
    if isinstance(wanted, str):
        return ":" in wanted or hasattr({**OUR_WEIGHTINGS, **OUR_ARCHITECTURES}.get(wanted), "settings_class")
    return hasattr(wanted, "settings_class")


def run_script(path: str | Path, args: Sequence[str] = (), *, module: bool = False) -> dict[str, object]:
    """Run a script as ``python path args`` would, with our methods known to LibMTL and LibMTL healed.

    A trainer that the script makes with one of our methods is a :class:`ScriptTrainer`; any other is LibMTL's own, healed.
    Without CUDA, ``.cuda()`` of tensors and modules leaves them where they are.

    Parameters
    ----------
    path : str or Path
        The script, or a folder with a ``__main__.py``.
    args : sequence of str
        What it finds in ``sys.argv``.
    module : bool, default False
        Whether ``path`` is the name of a module, as in ``python -m package.train``.

    Returns
    -------
    dict
        The script's global names.

    Raises
    ------
    RecipeError
        There is no such script. The script's own exceptions, ``SystemExit`` included, go through unchanged.
    """
    script, name = Path(path), str(path)
    if not module and not (script.is_file() or (script / "__main__.py").is_file()):
        raise RecipeError(
            f"no script at {path}; expected a Python file, as in: libmtl-fair exec train.py -- --weighting ReLiF, or a module: "
            "libmtl-fair exec -m package.train -- --weighting ReLiF"
        )
    heal()
    with _running(name, Path.cwd() if module else script if script.is_dir() else script.resolve().parent, args):
        if not module:
            return runpy.run_path(name, run_name="__main__")
        try:
            there = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # a package around it imports what is not installed
            there = False
        if not there:
            raise RecipeError(f"no module {name!r} in {Path.cwd()} or where Python looks for modules (PYTHONPATH)")
        return runpy.run_module(name, run_name="__main__", alter_sys=True)


@contextmanager
def _running(script: str, place: Path, args: Sequence[str]) -> Iterator[None]:
    """Let the script find its arguments, its folder, our trainer and, without CUDA, a ``.cuda()`` that does nothing."""
    argv, folder = sys.argv, str(place)
    places: list[tuple[Any, str, Any]] = [(module, "Trainer", Trainer) for module in (libmtl, trainer_module)]
    places += [(config_module.LibMTL_args, "prog", Path(script).name)]
    if not torch.cuda.is_available():
        places += [(cls, "cuda", lambda self, *_, **__: self) for cls in (torch.Tensor, torch.nn.Module)]
    held = [getattr(owner, name) for owner, name, _ in places]
    sys.argv = [script, *args]
    sys.path.insert(0, folder)
    for owner, name, instead in places:
        setattr(owner, name, instead)
    try:
        yield
    finally:
        sys.argv = argv
        for (owner, name, _), own in zip(places, held):
            setattr(owner, name, own)
        if folder in sys.path:
            sys.path.remove(folder)
