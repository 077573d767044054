"""How benchmarks time: one thread, variants in turn, ratios as medians of each round's own; and the binary tasks that steps are timed on.

Import it before torch: that is when the threads are counted.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads

FEATURES, BATCH = 100, 256
Run = Callable[[], object]

torch.set_num_threads(1)


def measure(
    variants: Mapping[str, Run],
    rounds: int,
    calls: Mapping[str, int] | int = 1,
    warm: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Return seconds of each variant, a number a round, in turn; the first ``warm`` rounds do not count.

    ``calls``: what a variant's seconds are divided by, the steps that it takes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + warm):
        for name, run in variants.items():
            started = clock()
            run()
            if turn >= warm:
                seconds[name].append((clock() - started) / (calls if isinstance(calls, int) else calls[name]))
    return seconds


def ratio(top: Sequence[float], bottom: Sequence[float]) -> float:
    """Return the median over rounds of one variant's time as a share of another's."""
    return statistics.median(a / b for a, b in zip(top, bottom))


def binary_data(rows: int, n_tasks: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return inputs and the labels of binary tasks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, FEATURES, generator=generator)
    logits = x @ torch.randn(FEATURES, n_tasks, generator=generator) / FEATURES**0.5
    return x, {f"t{i}": (logits[:, i] > 0).float() for i in range(n_tasks)}


def resident(x: Tensor, labels: dict[str, Tensor], shuffle: bool = True) -> lf.ResidentLoader:
    """Return a loader of these, with a sensitive attribute of two groups."""
    groups = {"sex": (x[:, 0] > 0).long()}
    return lf.ResidentLoader(x, labels, groups, batch_size=BATCH, shuffle=shuffle, seed=0, device="cpu")


def settings(n_tasks: int, hidden: Sequence[int] = (128, 64)) -> dict[str, Any]:
    """Return what trainers of these tasks share, LibMTL's and ours."""
    tasks = [lf.Binary(f"t{i}") for i in range(n_tasks)]
    torch.manual_seed(0)
    return {
        "task_dict": lf.task_dict(tasks),
        "encoder_class": lambda: MLP(FEATURES, hidden),
        "decoders": linear_heads(tasks, hidden[-1]),
        "rep_grad": False,
        "multi_input": False,
        "optim_param": {"optim": "adam", "lr": 1e-3},
        "scheduler_param": None,
    }


def libmtl_epoch(train: object, test: object, weighting: type[Any], made: dict[str, Any], **args: object) -> Run:
    """Return one epoch of LibMTL's own Trainer; what it tests on is best one batch, so that training is what is measured."""
    from LibMTL import Trainer
    from LibMTL.architecture import HPS

    given = {"architecture": HPS, "weight_args": {}, "arch_args": {}, **made, **args}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(weighting=weighting, **given)

    def epoch() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(train, test, 1)

    return epoch


def fair_trainer(weighting: str, made: dict[str, Any], **args: object) -> lf.FairTrainer:
    """Return a FairTrainer that shows and keeps nothing."""
    given = {"architecture": "HPS", "device": "cpu", "progress": False, "select": "last", **made, **args}
    return lf.FairTrainer(weighting=weighting, **given)


def fair_epoch(trainer: lf.FairTrainer, loader: object) -> Run:
    """Return one epoch more of a FairTrainer."""
    return lambda: trainer.train(loader, epochs=trainer.epoch + 1)
