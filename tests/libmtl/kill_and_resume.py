"""Kill a training run again and again, resume it each time, and compare with a run that was left in peace.

Used by ``test_resume.py`` with a few kills; by hand with many: ``python tests/libmtl/kill_and_resume.py --kills 200``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.models import MLP

WEIGHTINGS = ("EW", "ReLiF", "FairMT", "GradNorm", "DWA", "GradVac")
SETTINGS = {"ReLiF": {"warmup": 5, "pairs": "random"}, "FairMT": {"min_count": 2, "target": "eo <= 0.01"}}
TASKS = (lf.Binary("a"), lf.Binary("b"), lf.Regression("c"))


def loaders() -> tuple[Any, Any]:
    """Return a training and a validation loader."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(160, 6, generator=g)
    labels = {"a": (x[:, 0] > 0).float(), "b": (x[:, 0] + x[:, 1] > 0).float(), "c": x[:, 2] - x[:, 0]}
    groups = {"sex": (x[:, 3] > 0).long()}
    options = {"batch_size": 32, "seed": 1, "device": "cpu"}
    val = lf.ResidentLoader(
        x[:64], {t: v[:64] for t, v in labels.items()}, {"sex": groups["sex"][:64]}, shuffle=False, **options
    )
    return lf.ResidentLoader(x, labels, groups, shuffle=True, **options), val


def train(weighting: str, run_dir: Path | None, epochs: int) -> tuple[Any, Any]:
    """Train, continuing what is in ``run_dir``; dropout, a scheduler and a weighting's own state included."""
    torch.manual_seed(9)
    heads = {t.name: torch.nn.Linear(8, 1) for t in TASKS}
    trainer = lf.FairTrainer(
        lf.task_dict(TASKS), weighting, "HPS", lambda: MLP(6, (16, 8), dropout=0.2, norm="batch"), heads, False, False,
        {"optim": "adam", "lr": 1e-2}, {"scheduler": "cos", "T_max": epochs}, device="cpu", run_dir=run_dir,
        resume=run_dir is not None, seed=4, progress=False,
        weight_args=SETTINGS.get(weighting, {}),
    )  # fmt: skip
    train_loader, val_loader = loaders()
    trainer.train(train_loader, val_loader, epochs, val_loader)
    return trainer, val_loader


def picture(trainer: Any) -> dict[str, Any]:
    """Return everything that must be the same to the last bit."""
    state: dict[str, Tensor] = trainer.model.state_dict()
    moments = trainer.optimizer.state_dict()["state"]
    return {
        "weights": {k: v.double().flatten().tolist() for k, v in state.items()},
        "optimiser": {
            str(i): {k: torch.as_tensor(v).double().flatten().tolist() for k, v in s.items()}
            for i, s in moments.items()
        },
        "history": json.loads(trainer.history.drop(columns="train_s").to_json(double_precision=15)),
        "digits": trainer.history.drop(columns="train_s").to_csv(),
        "results": trainer.test_results,
        "best": [trainer.best["epoch"], trainer.best["score"]],
        "buffer": trainer.model.train_loss_buffer.tolist(),
    }


def torture(weighting: str, folder: Path, kills: int, epochs: int, seed: int = 0) -> dict[str, Any]:
    """Return how many kills hit a living run, at how many different epochs, and what differs in the end."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FairMT.* was not met")  # in so short a training
    draw = random.Random(seed)
    expected = picture(train(weighting, None, epochs)[0])
    started = time.perf_counter()
    train(weighting, folder / "timed", epochs)
    epoch_s = (time.perf_counter() - started) / epochs
    hits, reached, turn = 0, set(), 0
    while hits < kills:
        run = folder / f"run{turn}"
        while hits < kills:
            child = os.fork()
            if child == 0:
                train(weighting, run, epochs)
                os._exit(0)
            time.sleep(draw.uniform(0.1, 4.0) * epoch_s)
            done, _ = os.waitpid(child, os.WNOHANG)
            if done:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hits += 1
            reached.add((turn, (run / "history.csv").read_text().count("\n") if (run / "history.csv").exists() else 0))
        trainer, _ = train(weighting, run, epochs)
        found = picture(trainer)
        wrong = [name for name in expected if found[name] != expected[name]]
        left = [p.name for p in run.iterdir() if p.name.endswith(".tmp")]
        if wrong or left:
            return {"hits": hits, "moments": len(reached), "wrong": wrong, "left": left}
        turn += 1
    return {"hits": hits, "moments": len(reached), "wrong": [], "left": [], "runs": turn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="in all, shared among the weightings")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    total, failures = 0, 0
    for weighting in WEIGHTINGS:
        with tempfile.TemporaryDirectory() as folder:
            found = torture(weighting, Path(folder), options.kills // len(WEIGHTINGS), options.epochs)
        total, failures = total + found["hits"], failures + bool(found["wrong"])
        print(weighting, found, flush=True)
    print(f"{total} kills, {failures} weightings with a number changed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
