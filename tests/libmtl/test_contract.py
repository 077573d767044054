"""One contract for every weighting and architecture of the installed LibMTL, and ours, over all combinations that fit.

Each combination trains through FairTrainer: the loss falls, every trainable parameter gets a finite gradient that is
somewhere not zero (which a frozen encoder fails), a fixed seed repeats bitwise, and prediction and audit work.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.libmtl import architecture_names, weighting_names
from libmtl_fair.libmtl.loading import LINEAGE
from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, OUR_WEIGHTINGS
from libmtl_fair.libmtl.torchjd_bridge import torchjd_names
from libmtl_fair.models import MLP

REPRESENTATION_ONLY = {"GradDrop"}
PARAMETERS_ONLY = {
    *("PCGrad", "GradVac", "CAGrad"),
    *("Nash_MTL", "MoCo", "DB_MTL", "FairGrad", "MoDo", "SDMGrad", "UPGrad"),  # git main
    *("torchjd:GradDrop", "torchjd:TrimmedMean"),
}
NEEDS = {"Nash_MTL": "cvxpy", "UPGrad": "qpsolvers", "torchjd:CAGrad": "cvxpy", "torchjd:NashMTL": "cvxpy"}
TORCHJD = [f"torchjd:{name}" for name in torchjd_names()] if importlib.util.find_spec("torchjd") else []
"""TorchJD's aggregators, each with hard sharing."""
EQUAL_BATCHES = {"FairMT"}  # with inputs of their own, the tasks' batches must be of one size: see its own suite
RESNET = {"Cross_stitch", "MTAN", "PLE", "LTB"}
SINGLE_INPUT = {"Cross_stitch", "LTB"} | ({"PLE"} if LINEAGE == "git main" else set())
ELSEWHERE = {"FairBranch", "Recon"}
"""Our architectures need more than a combination can give them here: they have suites of their own."""
OURS_ELSEWHERE = {
    "FBGrad": "groups must be of FairBranch's tree",
    "LambdaMix": "mixes auxiliary heads, which a plain task_dict lacks",
    "TAG": "runs with hard sharing only",
    "torchjd:Krum": "takes three tasks or more",
}
OUR_ARGS: dict[str, dict[str, Any]] = {
    "FairMT": {"min_count": 1},
    "torchjd:CAGrad": {"c": 0.4},
    "torchjd:Constant": {"weights": [1.0, 0.5]},
    "torchjd:FairGrad": {"alpha": 1.0},
    "torchjd:TrimmedMean": {"trim_number": 0},
}
SMALL = (4, 4, 8, 8)
MTAN_CHANNELS = (64, 128, 256, 512)
"""Fixed in MTAN's code; all but one of its combinations run with a sixteenth of them, for time."""
IMAGE = (3, 4, 4)
ARCH_ARGS: dict[str, dict[str, Any]] = {
    "MMoE": {"img_size": (6,), "num_experts": [2]},
    "CGC": {"img_size": (6,), "num_experts": [1, 1, 1]},
    "DSelect_k": {"img_size": (6,), "num_experts": [2], "num_nonzeros": 2, "kgamma": 1.0},
    "PLE": {"img_size": IMAGE, "num_experts": [1, 1, 1]},
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]


@pytest.fixture(autouse=True, scope="module")
def _forgotten() -> Any:
    """Leave the names of TorchJD's weightings, once asked for, to this module's tests."""
    yield
    for name in [name for name in OUR_WEIGHTINGS if name.startswith("torchjd:")]:
        del OUR_WEIGHTINGS[name]


class TinyResNet(nn.Module):
    """The parts that LibMTL's ResNet-only architectures take: conv1, bn1, relu, maxpool, layer1 to layer4 of two each."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.feature_dim = channels[-1]
        self.conv1 = nn.Conv2d(3, channels[0], 1)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        for i, (width_in, width) in enumerate(zip((channels[0], *channels), channels)):
            first = nn.Conv2d(width_in, width, 1, stride=2 if i == 1 else 1)
            setattr(
                self, f"layer{i + 1}", nn.Sequential(first, nn.Sequential(nn.LeakyReLU(), nn.Conv2d(width, width, 1)))
            )

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[no-any-return]


def combinations() -> list[Any]:
    found = []
    for weighting, arch, rep_grad, multi in itertools.product(
        [*weighting_names(), *TORCHJD], architecture_names(), (False, True), (False, True)
    ):
        if weighting in TORCHJD and arch != "HPS":
            continue
        if (rep_grad and weighting in PARAMETERS_ONLY) or (not rep_grad and weighting in REPRESENTATION_ONLY):
            continue
        if (multi and arch in SINGLE_INPUT) or arch in ELSEWHERE or weighting in OURS_ELSEWHERE:
            continue
        if weighting in EQUAL_BATCHES and multi:
            continue
        lacking = NEEDS.get(weighting)
        marks = (
            [pytest.mark.skip(reason=f"needs {lacking}")] if lacking and not importlib.util.find_spec(lacking) else []
        )
        name = f"{weighting}-{arch}-{'rep' if rep_grad else 'par'}-{'multi' if multi else 'single'}"
        found.append(pytest.param(weighting, arch, rep_grad, multi, id=name, marks=marks))
    return found


def problem(arch: str, multi: bool, device: str) -> tuple[Any, tuple[lf.Task, ...]]:
    """Return a loader, or one a task with different lengths and batch sizes, and its two tasks."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(32, *(IMAGE if arch in RESNET else (6,)), generator=g)
    signal = x.flatten(1)[:, 0] + 0.3 * x.flatten(1)[:, 1]
    labels = {"a": (signal > 0).float(), "b": (signal + x.flatten(1)[:, 2]).clone()}
    groups = {"sex": torch.arange(32) % 2}
    tasks = (lf.Binary("a"), lf.Regression("b"))
    options: dict[str, Any] = {"shuffle": True, "seed": 2, "device": device}
    if not multi:
        return lf.ResidentLoader(x, labels, groups, batch_size=16, **options), tasks
    sizes = {"a": (32, 16), "b": (24, 8)}
    loaders = {
        t: lf.ResidentLoader(x[:n], {t: labels[t][:n]}, {"sex": groups["sex"][:n]}, batch_size=b, **options)
        for t, (n, b) in sizes.items()
    }
    return loaders, tasks


def narrow_mtan(factor: int) -> Any:
    """Let MTAN's module count with a part of its channels while a model is built."""
    if "MTAN" not in architecture_names() or factor == 1:
        return contextlib.nullcontext()
    module = importlib.import_module("LibMTL.architecture.MTAN")
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "np", SimpleNamespace(array=lambda channels: np.array(channels) // factor))
    return contextlib.closing(SimpleNamespace(close=patch.undo))


def train(
    weighting: str, arch: str, rep_grad: bool, multi: bool, device: str, epochs: int, narrower: int = 16
) -> tuple[Any, dict[str, float]]:
    """Return the trained trainer and, for each parameter, the largest gradient seen (inf where one was not finite)."""
    loader, tasks = problem(arch, multi, device)
    channels = tuple(c // narrower for c in MTAN_CHANNELS) if arch == "MTAN" else SMALL
    width = channels[-1] if arch in RESNET else 8
    torch.manual_seed(1)
    heads = {
        t.name: nn.Sequential(nn.Flatten(), nn.Linear(width, 1)) if arch in RESNET else nn.Linear(width, 1)
        for t in tasks
    }
    with narrow_mtan(narrower):
        trainer = lf.FairTrainer(
            lf.task_dict(tasks),
            weighting,
            arch,
            (lambda: TinyResNet(channels)) if arch in RESNET else (lambda: MLP(6, (12, 8))),
            heads,
            rep_grad,
            multi,
            {"optim": "adam", "lr": 1e-2 if arch in RESNET else 2e-2},
            None,
            device=device,
            seed=0,
            progress=False,
            select="last",
            weight_args=OUR_ARGS.get(weighting, {}),
            arch_args=ARCH_ARGS.get(arch, {}),
        )
    largest = {name: torch.zeros((), device=trainer.device) for name, _ in trainer.model.named_parameters()}

    def look(*_: Any) -> None:
        for name, p in trainer.model.named_parameters():
            if p.grad is not None:
                bad = ~p.grad.isfinite().all()
                largest[name] = torch.maximum(largest[name], p.grad.abs().max()).masked_fill(bad, torch.inf)

    trainer.optimizer.register_step_pre_hook(look)
    trainer.train(loader, epochs=epochs)
    return trainer, {name: value.item() for name, value in largest.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("weighting", "arch", "rep_grad", "multi"), combinations())
def test_contract(weighting: str, arch: str, rep_grad: bool, multi: bool, device: str) -> None:
    trainer, largest = train(weighting, arch, rep_grad, multi, device, epochs=4)

    losses = trainer.epochs[["loss/a", "loss/b"]].sum(axis=1)
    reached = losses.iloc[1:].min() if arch == "MTAN" else losses.iloc[-1]  # its batch norms over 8 rows make noise
    assert reached < losses.iloc[0], f"the loss did not fall: {losses.tolist()}"
    assert {n: v for n, v in largest.items() if not 0 < v < float("inf")} == {}, (
        "no gradient, or one that is not finite"
    )

    # FairMT's pace is in units of the run
    again, _ = train(weighting, arch, rep_grad, multi, device, 4 if weighting == "FairMT" else 1)
    first = trainer.history.drop(columns="train_s").iloc[: len(again.history)]
    assert first.equals(again.history.drop(columns="train_s")), "a fixed seed did not repeat"

    loader, _ = problem(arch, multi, device)
    found = trainer.predict(loader)
    assert {name: bool(s.isfinite().all()) for name, s in found.scores.items()} == {"a": True, "b": True}
    report = trainer.audit(loader, 0.2)
    assert 0 <= report.bias <= report.violation_rate <= 1


def test_mtan_at_its_own_width() -> None:
    trainer, largest = train("EW", "MTAN", False, False, "cpu", epochs=1, narrower=1)
    assert trainer.model.decoders["a"][1].in_features == 512
    assert all(0 < v < float("inf") for v in largest.values())


def test_contract_covers_all_that_is_installed() -> None:
    weightings = {p.values[0] for p in combinations()}
    architectures = {p.values[1] for p in combinations()}
    assert weightings == {*weighting_names(), *TORCHJD} - set(OURS_ELSEWHERE)
    assert architectures == set(architecture_names()) - ELSEWHERE
    libmtls = {"EW", "UW", "DWA", "RLW", "GLS", "GradNorm", "GradDrop", "MGDA", "PCGrad", "GradVac", "IMTL", "CAGrad"}
    assert libmtls <= weightings
    assert {"HPS", "Cross_stitch", "MMoE", "MTAN", "CGC", "PLE", "DSelect_k"} <= architectures
    assert set(OURS_ELSEWHERE) | ELSEWHERE <= set(OUR_WEIGHTINGS) | set(OUR_ARCHITECTURES) | {
        "FBGrad",
        "LambdaMix",
        "TAG",
        "FairBranch",
        "Recon",
        *TORCHJD,
    }


@pytest.mark.parametrize("weighting", sorted(REPRESENTATION_ONLY & set(weighting_names())))
def test_weightings_of_the_representation_say_so(weighting: str) -> None:
    with pytest.raises(lf.errors.HostError, match=f"{weighting}.*rep_grad=True"):
        train(weighting, "HPS", False, False, "cpu", 1)


@pytest.mark.parametrize("weighting", sorted({"PCGrad", "GradVac", "CAGrad"} & set(weighting_names())))
def test_weightings_of_parameters_say_so(weighting: str) -> None:
    with pytest.raises(lf.errors.HostError, match=f"{weighting}.*rep_grad=False"):
        train(weighting, "HPS", True, False, "cpu", 1)
