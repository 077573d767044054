"""tune(): a study over a recipe, by one process or many, up to a total of trials."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage

from libmtl_fair.data.loader import resolve_device
from libmtl_fair.errors import CheckpointError, FairMTLError, RecipeError
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.recipe.schema import Recipe, load_recipe
from libmtl_fair.tune import heartbeat as stale
from libmtl_fair.tune.artifacts import describe, keeper_of
from libmtl_fair.tune.fingerprint import PROTOCOL, fingerprint, stamp, study_protocol
from libmtl_fair.tune.objective import Plan, choose_protocol
from libmtl_fair.tune.queue import fill, finished
from libmtl_fair.tune.samplers import SAMPLERS, make_pruner, make_sampler
from libmtl_fair.tune.stacking import aloud
from libmtl_fair.tune.storage import open_storage, storage_errors
from libmtl_fair.tune.worker import Worker

Note = Callable[[str], None]
SAMPLER = "sampler"
ON_GPU = 16
"""Trials trained at once on a GPU, which one small model leaves idle."""


def tune(
    recipe: Recipe | str | Path,
    n_trials: int | None = None,
    objectives: Sequence[str] | None = None,
    storage: str | Path | BaseStorage | None = None,
    workers: int = 1,
    stacked: int = 0,
    resume: bool = True,
    *,
    study_name: str | None = None,
    timeout: float | None = None,
    device: str = "auto",
    new_study: bool = False,
    grace: float = stale.GRACE,
    note: Note | None = None,
) -> optuna.Study:
    """Search a method's settings for the best utility at the least disparity, on validation data.

    The unregularised reference, the recipe's own setting and the published defaults are always among the trials.

    Parameters
    ----------
    recipe : a recipe or its file; its ``tune`` section says what the other arguments leave open.
    n_trials : trials of the study in all: calling again goes on to this number.
    objectives : names such as ``macro_auc`` (up) or ``eo_difference`` (down); see :mod:`libmtl_fair.tune.objectives`.
    storage : a journal file, a database URL, ``grpc://host:port``, an Optuna storage, or None: memory of this process.
    workers : processes that work on it; more than one need a storage that they can share.
    stacked : trials trained at once as one batched model; 1 trains one at a time; 0 is 16 on a GPU and 1 elsewhere.
    resume : False refuses to go on with a study that has trials.
    study_name : default is the recipe's name.
    timeout : seconds after which no trial is begun.
    new_study : where the study of this name is about something else, begin another (``<name>-2``, ...).
    grace : seconds without a sign of life after which a worker on another machine counts as dead.

    Raises
    ------
    RecipeError : something that does not make sense, or a study about something else: says what differs.
    CheckpointError : the storage cannot be used; nothing finished is lost.
    FairMTLError : all trials fail.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    total = _total(recipe, n_trials)
    timeout = timeout if timeout is not None else (recipe.tune.timeout if recipe.tune else None)
    _check_workers(workers, storage)
    plan = Plan.make(recipe, objectives)
    stacked = _stacked(plan, stacked, _own_device(device))
    with storage_errors(storage if isinstance(storage, (str, Path)) else None), quiet():
        opened = open_storage(storage)
        study = open_study(plan, opened, study_name or recipe.name, resume=resume, new=new_study)
        protocol = _protocol(plan, study, device)
        fill(study, plan, total)
        deadline = None if timeout is None else time.monotonic() + timeout
        if workers > 1:
            job = replace(_Job.of(plan, study, storage, total, timeout, device, grace), stacked=stacked)
            _run_workers(job, workers, study, total, note)
        describe(study)
        own, keeper = _own_device(device), keeper_of(storage)
        Worker(plan, protocol, total, own, deadline, grace, keeper, stacked, note or _silent)(study)
    return study


def _silent(text: str) -> None:
    pass


def _total(recipe: Recipe, asked: int | None) -> int:
    total = asked if asked is not None else (recipe.tune.trials if recipe.tune else None) or 60
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise RecipeError(f"the number of trials must be a whole number of at least 1, found {total!r}")
    return total


def _check_workers(workers: int, storage: Any) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise RecipeError(f"workers must be a whole number of at least 1, found {workers!r}")
    if workers > 1 and not isinstance(storage, (str, Path)):
        raise RecipeError(
            f"{workers} workers are processes that share a storage: give one as text, such as storage='study.journal'"
        )


def _stacked(plan: Plan, asked: int, device: str) -> int:
    """Return how many trials are trained at once.

    Raises
    ------
    RecipeError : not a whole number.
    """
    found = asked or (plan.recipe.tune.stacked if plan.recipe.tune else 0)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise RecipeError(f"--stacked must be a whole number of at least 0, found {found!r}")
    return found or (ON_GPU if resolve_device(device).type == "cuda" else 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's own log lines and its notes about experimental arguments to itself."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def open_study(
    plan: Plan, storage: BaseStorage, name: str, *, resume: bool = True, new: bool = False, worker: int = 0
) -> optuna.Study:
    """Open or make the study of a plan; a study of that name about something else is refused, or left alone with ``new``.

    Raises
    ------
    RecipeError : it is about something else: says what differs.
    CheckpointError : it has trials, and ``resume`` is False.
    """
    described = plan.described()
    if new:
        name = _free_name(storage, name, fingerprint(described))
    existing = name in optuna.get_all_study_names(storage)
    if existing:
        study = optuna.load_study(study_name=name, storage=storage)
    else:
        directions = [optuna.study.StudyDirection[m.direction.upper()] for m in plan.objectives]
        study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    stamp(study, described, plan.recipe)
    done = len(study.get_trials(deepcopy=False))
    if existing and done and not resume:
        raise CheckpointError(f"study {name!r} has trials already; call with resume=True to go on with it")
    if not study.metric_names:
        study.set_metric_names([m.name for m in plan.objectives])
    study.sampler = make_sampler(plan.sampler, plan.space, plan.recipe.seeds[0] + 7919 * worker + done)
    if SAMPLER not in study.user_attrs:
        pinned = {"name": plan.sampler, **SAMPLERS[plan.sampler], "optuna": optuna.__version__}
        study.set_user_attr(SAMPLER, pinned)
    study.pruner = make_pruner(plan.pruner)
    return study


def _free_name(storage: BaseStorage, name: str, wanted: str) -> str:
    """Return the first of name, name-2, ... that is free or about the same."""
    names, number, candidate = set(optuna.get_all_study_names(storage)), 1, name
    while candidate in names:
        held = optuna.load_study(study_name=candidate, storage=storage).user_attrs
        if held.get("fingerprint") == wanted:
            break
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _protocol(plan: Plan, study: optuna.Study, device: str) -> Protocol:
    held = study_protocol(study)
    if held is not None:
        return held
    made = choose_protocol(plan, _own_device(device))
    study.set_user_attr(PROTOCOL, made.to_dict())
    return made


def _own_device(device: str) -> str:
    return device.split(",")[0]


# -- worker processes -------------------------------------------------------------------------------------------------

_START = "import sys; from libmtl_fair.tune.study import _main; sys.exit(_main())"


@dataclass(frozen=True)
class _Job:
    """What a worker process is told, as JSON on its standard input."""

    recipe: dict[str, Any]
    file: str
    objectives: list[str]
    storage: str
    study: str
    total: int
    timeout: float | None
    device: str
    grace: float
    worker: int = 0
    stacked: int = 0

    @classmethod
    def of(
        cls, plan: Plan, study: optuna.Study, storage: Any, total: int, timeout: float | None, device: str, grace: float
    ) -> _Job:
        names = [m.name for m in plan.objectives]
        source = plan.recipe._source.file
        return cls(plan.recipe.to_dict(), source, names, str(storage), study.study_name, total, timeout, device, grace)


def _run_workers(job: _Job, workers: int, study: optuna.Study, total: int, note: Note | None) -> None:
    """Run worker processes until they end; what a dead one leaves is for the caller to finish."""
    devices = _devices(job.device)
    processes = []
    try:
        for number in range(workers):
            told = {**asdict(job), "worker": number + 1, "device": devices[number % len(devices)]}
            process = subprocess.Popen([sys.executable, "-c", _START], stdin=subprocess.PIPE)
            processes.append(process)
            assert process.stdin is not None
            process.stdin.write(json.dumps(told).encode())
            process.stdin.close()
        _wait(processes, study, total, note)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()


def _wait(processes: list[subprocess.Popen[bytes]], study: optuna.Study, total: int, note: Note | None) -> None:
    shown = finished(study, total)
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)
        now = finished(study, total)
        for number in range(shown + 1, now + 1):
            (note or _silent)(f"{number} of {total} trials")
        shown = max(shown, now)
    codes = [process.returncode for process in processes]
    if all(code in (1, 2) for code in codes):
        raise FairMTLError(f"all {len(codes)} workers stopped with an error; what they said is above")


def _devices(device: str) -> list[str]:
    """Return the devices that workers take in turn: those listed, or all CUDA devices for ``auto``."""
    if device == "auto" and torch.cuda.device_count() > 1:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return device.split(",")


def _work(told: dict[str, Any]) -> None:
    """Do what a parent told: open the study and work."""
    from libmtl_fair.recipe.yaml_source import Source

    recipe = Recipe.from_dict(told["recipe"], Source(file=told["file"], data=told["recipe"]))
    with storage_errors(told["storage"]), quiet():
        plan = Plan.make(recipe, told["objectives"])
        study = open_study(plan, open_storage(told["storage"]), told["study"], worker=told["worker"])
        protocol = study_protocol(study)
        assert protocol is not None
        deadline = None if told["timeout"] is None else time.monotonic() + told["timeout"]
        keeper = keeper_of(told["storage"])
        stacked = told["stacked"]
        note = aloud(_complain, _silent)
        Worker(plan, protocol, told["total"], told["device"], deadline, told["grace"], keeper, stacked, note)(study)


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _main() -> int:
    """Run as a worker process."""
    import signal

    import libmtl_fair.libmtl  # noqa: F401 - loads LibMTL before anything else does

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    torch.set_num_threads(1)
    try:
        _work(json.load(sys.stdin))
    except FairMTLError as error:
        sys.stderr.write(f"worker: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 75
    return 0
