"""One of several processes, in an environment as torchrun makes it; ``test_processes.py`` compares with one process.

``python two.py all OUT`` trains every method, ``python two.py one FOLDER EPOCHS [STEP]`` goes on with one training, in which the second
process is killed at a step, ``python two.py blocks FOLDER EPOCH`` with several of rows that are read by blocks, up to an epoch.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loop_kit import EPOCHS, FEATURES, MIXED, TASKS, block_loader, losses_of, made, make_loader, trainer_of

import libmtl_fair as lf
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.models import MLP
from libmtl_fair.processes import current

TRAINED: list[tuple[str, dict[str, Any], Any, str]] = [
    *(
        (name, {}, MIXED, "HPS")
        for name in ("EW", "UW", "GradNorm", "PCGrad", "MGDA", "DWA", "GradVac", "CAGrad", "RLW")
    ),
    *((f"torchjd:{name}", {}, MIXED, "HPS") for name in ("UPGrad", "ConFIG", "GradVac")),
    ("FairMT", {"min_count": 1, "base": "torchjd:AlignedMTL"}, MIXED, "HPS"),
    ("torchjd:UPGrad", {}, MIXED, "rep_grad"),
    ("ReLiF", {}, MIXED, "HPS"),
    ("ReLiF", {"share": 0.5, "base": "UW"}, TASKS, "HPS"),
    ("ReLiF", {"pairs": "random", "k": 4}, MIXED, "HPS"),
    ("FairMT", {"min_count": 1}, TASKS, "HPS"),
    ("FairMT", {"min_count": 1, "base": "PCGrad", "threshold": "base_rate"}, MIXED, "HPS"),
    ("FairMT", {"form": "phi", "min_count": 1}, TASKS, "HPS"),
    ("FairMT", {"form": "phi", "min_count": 1, "proxy": "full"}, MIXED, "HPS"),
    ("FairMT", {"form": "phi", "min_count": 1, "proxy": "representation"}, MIXED, "HPS"),
    ("FairMT", {"form": "phi", "min_count": 1, "lipschitz": True, "lipschitz_args": {"k": 4}}, MIXED, "HPS"),
    ("FairMT", {"form": "phi", "alpha": "uniform", "min_count": 1}, TASKS, "FairBranch"),
    ("FBGrad", {"where": "everywhere"}, TASKS, "HPS"),
    ("FBGrad", {}, MIXED, "FairBranch"),
    ("FBGrad", {"where": "none", "base": "MGDA"}, MIXED, "HPS"),
    ("EW", {}, MIXED, "FairBranch"),
    ("GroupRegulariser", {"loss": "gap", "tasks": ("a", "b")}, MIXED, "HPS"),
    ("GroupRegulariser", {"loss": "glf", "tasks": ("a", "b"), "base": "GradNorm", "lam": 0.7}, TASKS, "HPS"),
    ("LambdaMix", {}, TASKS, "HPS"),
    ("LambdaMix", {"base": "UW"}, MIXED, "HPS"),
    ("TAG", {"affinity_every": 2}, MIXED, "HPS"),
    ("MGDA", {}, MIXED, "rep_grad"),
    ("ReLiF", {"pairs": "random", "k": 4}, MIXED, "rep_grad"),
    ("EW", {}, MIXED, "accumulate"),
    ("FairMT", {"min_count": 1}, TASKS, "accumulate"),
    ("MGDA", {}, MIXED, "accumulate"),
    ("EW", {}, MIXED, "amp"),
    ("FairMT", {"min_count": 1}, TASKS, "amp"),
    ("ReLiF", {"share": 0.5}, TASKS, "amp accumulate"),
    ("UW", {}, TASKS, "multi_input"),
    ("GroupRegulariser", {"loss": "gap"}, TASKS, "multi_input"),
]
"""Method, settings, tasks, and the architecture or the way of training."""


def trained(method: str, args: dict[str, Any], tasks: Any, how: str) -> dict[str, torch.Tensor]:
    """Train with FairTrainer; return weights, traces, validation and predictions."""
    entries, net = made(tasks, method == "LambdaMix")
    torch.manual_seed(4)
    encoder = MLP(FEATURES, (12, 8, 8)) if how == "FairBranch" else net.encoder
    several = how == "multi_input"
    options: dict[str, Any] = {"accumulate": 2, "clip_norm": 0.5} if "accumulate" in how else {}
    options |= {"amp": "bf16"} if "amp" in how else {}
    trainer = lf.FairTrainer(
        entries, method, how if how == "FairBranch" else "HPS", lambda: encoder, net.heads, how == "rep_grad", several,
        {"optim": "sgd", "lr": 0.1} if "amp" in how else {"optim": "adam", "lr": 1e-2}, None,
        device="cpu", progress=False, weight_args=args, seed=0, **options,
    )  # fmt: skip
    loaders = [make_loader(50, 15), make_loader(21, 15, shuffle=False)]
    if several:
        loaders = [{task.name: loader for task in tasks} for loader in loaders]
    trainer.train(loaders[0], None, EPOCHS, loaders[1])
    seen = trainer.predict(loaders[1])
    state = {name: value for name, value in trainer.model.state_dict().items() if isinstance(value, torch.Tensor)}
    found = {**state, **{f"score {name}": value for name, value in seen.scores.items()}}
    frame = trainer.history.drop(columns=["train_s"])
    return found | {f"trace {name}": torch.tensor(frame[name].to_numpy()) for name in frame}


STEPPED: list[tuple[str, dict[str, Any], Any, str]] = [
    ("EW", {}, MIXED, ""),
    ("UW", {}, MIXED, ""),
    ("MGDA", {}, MIXED, ""),
    ("PCGrad", {}, MIXED, ""),
    ("ReLiF", {"pairs": "random", "k": 4}, MIXED, ""),
    ("FairMT", {"min_count": 1}, TASKS, ""),
    ("FairMT", {"form": "phi", "min_count": 1}, MIXED, ""),
    ("FairMT", {"form": "phi", "min_count": 1, "proxy": "representation"}, MIXED, ""),
    ("FBGrad", {"where": "everywhere"}, TASKS, ""),
    ("GroupRegulariser", {"loss": "gap"}, TASKS, ""),
    ("LambdaMix", {}, TASKS, ""),
    ("FairMT", {"min_count": 1}, TASKS, "accumulate"),
    ("MGDA", {}, MIXED, "accumulate"),
    ("FairMT", {"min_count": 1}, TASKS, "amp"),
    ("UW", {}, MIXED, "amp accumulate"),
]


def stepped(method: str, args: dict[str, Any], tasks: Any, how: str) -> dict[str, torch.Tensor]:
    """Train in a loop of one's own with FairStep; return weights and the last trace."""
    entries, net = made(tasks, method == "LambdaMix")
    loader = make_loader(50, 15)
    fair = lf.FairStep(
        method, entries, net.heads, n_groups=loader.n_groups, epochs=EPOCHS, epoch_steps=len(loader), **args
    )
    parameters = [*net.parameters(), *fair.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1) if "amp" in how else torch.optim.Adam(parameters, lr=1e-2)
    torch.manual_seed(0)
    random.seed(0)
    batches = 2 if "accumulate" in how else 1
    for _ in range(EPOCHS):
        for number, (x, labels) in enumerate(loader, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled="amp" in how):
                h, outputs = net(x)
            losses = None if "amp" in how else losses_of(entries, outputs, labels)  # FairStep makes them in float32
            fair.backward(losses, representation=h, outputs=outputs, labels=labels)
            if number % batches == 0:
                optimizer.step()
                optimizer.zero_grad()
        fair.close_epoch()
    return {**net.state_dict(), **{f"trace {name}": torch.tensor(value) for name, value in fair.trace.items()}}


def everything(out: str) -> None:
    """Train everything; the first process saves it."""
    found = {}
    for train, name, cases in ((trained, "", TRAINED), (stepped, "step ", STEPPED)):
        for case in cases:
            torch.set_default_dtype(
                torch.float32 if "amp" in case[3] else torch.float64
            )  # autocast leaves float64 alone
            found[f"{name}{case[0]} {case[1]} {case[3]}".strip()] = train(*case)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, out)


def one(folder: str, epochs: str, kill: str = "0") -> None:
    """Go on with a training with run folder; the second process is killed at a step."""
    trainer = trainer_of("ReLiF", TASKS, {"share": 0.5}, run_dir=folder, resume=True, seed=0, select="best")
    original = stepping.step

    def step(state: Any, *args: Any) -> None:
        if int(kill) and dist.get_rank() == 1 and state.global_step + 1 == int(kill):
            os.kill(os.getpid(), signal.SIGKILL)
        original(state, *args)

    stepping.step = step
    trainer.train(make_loader(50, 15), None, int(epochs), make_loader(21, 15, shuffle=False))
    audit = trainer.audit(make_loader(21, 15, shuffle=False), 0.2)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({**trainer.model.state_dict(), "bias": torch.tensor(audit.bias)}, Path(folder) / "found.pt")


class Stopping:
    """Ends a training after some epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def epoch(self, trainer: Any, number: int, results: Any) -> None:
        """Stop, if it is time."""
        if number + 1 == self.epochs:
            trainer.stop()


def blocks(folder: str, stop: str) -> None:
    """Go on with trainings of rows in blocks, several windows an epoch; say which rows each process had in each batch."""
    found: dict[str, Any] = {}
    for method, args in (("EW", {}), ("ReLiF", {"share": 0.5}), ("FairMT", {"min_count": 1})):
        rows: list[list[int]] = []
        loader = block_loader(rows)
        first = os.environ.get("RANK", "0") == "0"  # it is enough that one process ends a training
        options = {
            "run_dir": Path(folder) / method,
            "resume": True,
            "callbacks": [Stopping(int(stop))] if first else [],
        }
        trainer = trainer_of(method, TASKS, args, seed=0, **options)
        trainer.train(loader, None, EPOCHS, block_loader([], shuffle=False))
        together = current()
        shares = [rows] if together is None else together.objects(rows)
        found[f"{method} rows"] = torch.tensor([row for batch in zip(*shares) for share in batch for row in share])
        found |= {f"{method} {name}": value for name, value in trainer.model.state_dict().items()}
        for name, scores in trainer.predict(block_loader([], shuffle=False)).scores.items():
            found[f"{method} score {name}"] = scores
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, Path(folder) / "found.pt")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    {"all": everything, "one": one, "blocks": blocks}[sys.argv[1]](*sys.argv[2:])
    if dist.is_initialized():
        dist.destroy_process_group()
