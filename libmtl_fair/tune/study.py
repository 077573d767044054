"""tune(): a study over a recipe, by one process or many, up to a total of trials."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import optuna
import torch
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from libmtl_fair.data.loader import resolve_device
from libmtl_fair.errors import CheckpointError, FairMTLError, RecipeError, unknown
from libmtl_fair.locks import GRACE
from libmtl_fair.processes import alone
from libmtl_fair.recipe.schema import Recipe, load_recipe
from libmtl_fair.recipe.sections import Tune
from libmtl_fair.recipe.yaml_source import Source
from libmtl_fair.tune.artifacts import Keeper, describe
from libmtl_fair.tune.budget import fill, finished
from libmtl_fair.tune.plan import FINGERPRINT, Plan, fingerprint, stamp
from libmtl_fair.tune.samplers import PRUNERS, SAMPLERS, make_sampler
from libmtl_fair.tune.stacking import Places, aloud
from libmtl_fair.tune.storage import need_sealed, open_storage, storage_errors
from libmtl_fair.tune.worker import Worker, protocol_of

Note = Callable[[str], None]
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
    grace: float = GRACE,
    note: Note | None = None,
) -> optuna.Study:
    """Search a method's settings for the best utility at the least disparity, on validation data.

    The unregularised reference, the recipe's own setting and the published defaults are always among the trials.

    Parameters
    ----------
    recipe : Recipe or str or Path
        A recipe or its file; its ``tune`` section says what the other arguments leave open.
    n_trials : int, optional
        Trials of the study in all: calling again goes on to this number.
    objectives : sequence of str, optional
        Names such as ``macro_auc`` (up) or ``eo_difference`` (down); see :mod:`libmtl_fair.tune.objectives`.
    storage : str or Path or BaseStorage, optional
        A journal file, a database URL, ``grpc://host:port``, an Optuna storage, or None: memory of this process.
    workers : int, default 1
        Processes that work on it; more than one need a storage that they can share.
    stacked : int, default 0
        Trials trained at once as one batched model; 1 trains one at a time; 0 is 16 on a GPU and 1 elsewhere.
    resume : bool, default True
        False refuses to go on with a study that has trials.
    study_name : str, optional
        Default is the recipe's name.
    timeout : float, optional
        Seconds after which no trial is begun.
    new_study : bool, default False
        Where the study of this name is about something else, begin another (``<name>-2``, ...).
    grace : float
        Seconds without a sign of life after which a worker on another machine counts as dead.

    Raises
    ------
    RecipeError
        Something that does not make sense, or a study about something else: says what differs.
    CheckpointError
        The storage cannot be used; nothing finished is lost.
    FairMTLError
        All trials fail.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    settings = recipe.tune or Tune()
    total = _whole("the number of trials", n_trials if n_trials is not None else settings.trials or 60, 1)
    if _whole("workers", workers, 1) > 1 and not isinstance(storage, str | Path):
        raise RecipeError(
            f"{workers} workers are processes that share a storage: give one as text, such as storage='study.journal'"
        )
    stacked = _whole("--stacked", stacked or settings.stacked, 0)
    limit = settings.timeout if timeout is None else timeout
    where = str(storage) if isinstance(storage, Path) else storage
    job = Job(objectives, where, study_name or recipe.name, total, limit, device, grace, stacked)
    return _work(recipe, job, note or (lambda text: None), workers, resume, new_study)


def _whole(what: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(f"{what} must be a whole number of at least {least}, found {value!r}")
    return value


def at_once(asked: int, device: str) -> int:
    """Return how many trials are trained at once: those asked for, or what suits the device."""
    return asked or (ON_GPU if resolve_device(device).type == "cuda" else 1)


@dataclass(frozen=True)
class Job:
    """What a worker is to do; a process is told it as JSON on its standard input."""

    objectives: Sequence[str] | None
    storage: str | BaseStorage | None
    study: str
    total: int
    timeout: float | None
    device: str
    grace: float
    stacked: int
    worker: int = 0


@alone()  # a worker that SLURM or torchrun started trains trials of its own
def _work(
    recipe: Recipe, job: Job, note: Note, workers: int = 1, resume: bool = True, new: bool = False
) -> optuna.Study:
    """Open the study and work, here and in processes of one's own, until every slot is finished or the time is over."""
    plan, device = Plan.make(recipe, job.objectives), job.device.split(",")[0]
    stacked = at_once(job.stacked, device)
    with storage_errors(job.storage), quiet():
        study = open_study(plan, open_storage(job.storage), job.study, resume=resume, new=new)
        protocol = protocol_of(study, plan, device)
        fill(study, plan, job.total)
        deadline = float("inf") if job.timeout is None else time.monotonic() + job.timeout
        if workers > 1:
            _run_workers(recipe, replace(job, study=study.study_name, stacked=stacked), workers, study, note)
        if not job.worker:
            describe(study)
        keeper = Keeper.beside(job.storage)
        worker = Worker(plan, protocol, job.total, device, deadline, job.grace, keeper, note)
        run = Places(worker, study, stacked) if stacked > 1 else partial(worker, study)
        while not worker.late:
            run()
            if finished(study, job.total) >= job.total:
                break
            time.sleep(min(0.5, job.grace / 5))
    return study


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's own log lines and its notes about experimental arguments to itself."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
            yield
    finally:
        optuna.logging.set_verbosity(level)


def open_study(plan: Plan, storage: BaseStorage, name: str, *, resume: bool = True, new: bool = False) -> optuna.Study:
    """Open or make the study of a plan; a study of that name about something else is refused, or left alone with ``new``."""
    names, first, number = set(optuna.get_all_study_names(storage)), name, 1
    load, own = partial(optuna.load_study, storage=storage), fingerprint(plan.described())
    while new and name in names and load(study_name=name).user_attrs.get(FINGERPRINT) != own:
        number += 1
        name = f"{first}-{number}"
    if name in names:
        study = load(study_name=name)
    else:
        directions = [StudyDirection[m.direction.upper()] for m in plan.objectives]
        study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    stamp(study, plan)
    need_sealed(study)
    done = len(study.get_trials(deepcopy=False))
    if name in names and done and not resume:
        raise CheckpointError(f"study {name!r} has trials already; call with resume=True to go on with it")
    if not study.metric_names:
        study.set_metric_names([m.name for m in plan.objectives])
    study.sampler = make_sampler(plan, plan.recipe.seeds[0])
    if "sampler" not in study.user_attrs:
        study.set_user_attr("sampler", {"name": plan.sampler, **SAMPLERS[plan.sampler], "optuna": optuna.__version__})
    if plan.tune.pruner not in PRUNERS:
        raise RecipeError(f"tune.pruner: {unknown('pruner', plan.tune.pruner, filter(None, PRUNERS))}")
    study.pruner = PRUNERS[plan.tune.pruner]()
    return study


_START = "import sys; from libmtl_fair.tune.study import main; sys.exit(main())"


def _run_workers(recipe: Recipe, job: Job, workers: int, study: optuna.Study, note: Note) -> None:
    """Run worker processes until they end; what a dead one leaves is for the caller to finish."""
    devices = job.device.split(",")
    if job.device == "auto" and torch.cuda.device_count() > 1:
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    processes = []
    try:
        for number in range(workers):
            own = replace(job, worker=number + 1, device=devices[number % len(devices)])
            process = subprocess.Popen([sys.executable, "-c", _START], stdin=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdin is not None
            with process.stdin as told:
                json.dump({"recipe": recipe.to_dict(), "file": recipe._source.file, "job": asdict(own)}, told)
        shown = finished(study, job.total)
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            now = finished(study, job.total)
            for number in range(shown + 1, now + 1):
                note(f"{number} of {job.total} trials")
            shown = max(shown, now)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    if all(process.returncode in (1, 2) for process in processes):
        raise FairMTLError(f"all {workers} workers stopped with an error; what they said is above")


def main() -> int:
    """Run as a worker process; return its exit code."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def complain(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    signal.signal(signal.SIGTERM, stop)
    torch.set_num_threads(1)
    try:
        told = json.load(sys.stdin)
        recipe = Recipe.from_dict(told["recipe"], Source(file=told["file"], data=told["recipe"]))
        _work(recipe, Job(**told["job"]), aloud(complain, lambda text: None))
    except FairMTLError as error:
        complain(f"worker: {error}")
        return 1
    except KeyboardInterrupt:
        return 75
    return 0
