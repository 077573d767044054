"""What a training step of a weighting on gradients costs: LibMTL's own code, mended, in FairTrainer, and TorchJD's.

Work: MLP 100-128-64, T binary heads, batch 256, Adam, on the CPU. "LibMTL" is its own Trainer with the weighting's own code
(only what keeps it from running mended); "mended" the same Trainer after ``lf.heal()``; "TorchJD" a hand-written loop with
``mtl_backward`` and the aggregator of that name, "autogram" one with its ``Engine``. CAGrad has no own column: LibMTL wrote it
for three tasks. GroupRegulariser stands beside a hand-written loop with fairret's ``NormLoss`` of positive rates for each
task. One thread, process CPU time, variants interleaved; printed are medians. Peers that are not installed are left out.

    pip install torchjd fairret
    python benchmarks/gradient_weightings.py            # some minutes
    python benchmarks/gradient_weightings.py --smoke    # seconds, on few steps: checks that it runs, its numbers mean nothing
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy are imported

import argparse
import contextlib
import importlib.util
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads

import LibMTL.weighting  # isort: skip

FEATURES, HIDDEN, BATCH = 100, (128, 64), 256
NAMES = ("MGDA", "PCGrad", "GradVac", "CAGrad")
ARGS: dict[str, dict[str, Any]] = {
    "MGDA": {"mgda_gn": "none"},
    "GradVac": {"beta": 0.5},
    "CAGrad": {"calpha": 0.5, "rescale": 1},
}
Step = Callable[[], None]


def as_shipped(name: str) -> type[Any]:
    """Return LibMTL's class with its own methods, whatever is mended later; gradients are zeroed, not dropped, as it needs."""
    own: dict[str, Any] = {}
    for cls in (LibMTL.weighting.AbsWeighting, getattr(LibMTL.weighting, name)):
        own |= {key: value for key, value in vars(cls).items() if callable(value) and not key.startswith("__")}
    del own["init_param"]

    def zero_grad_share_params(self: Any) -> None:
        self.encoder.zero_grad(set_to_none=False)

    return type(name, (getattr(LibMTL.weighting, name),), own | {"zero_grad_share_params": zero_grad_share_params})


SHIPPED = {name: as_shipped(name) for name in NAMES if name != "CAGrad"}
lf.heal()
from LibMTL import Trainer
from LibMTL.architecture import HPS


class OwnHPS(HPS):  # type: ignore[misc]
    """Hard sharing that zeroes gradients as LibMTL's own weightings need."""

    def zero_grad_share_params(self) -> None:
        self.encoder.zero_grad(set_to_none=False)


def data(steps: int, n: int) -> lf.ResidentLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps * BATCH, FEATURES, generator=generator)
    logits = x @ torch.randn(FEATURES, n, generator=generator) / FEATURES**0.5
    labels = {f"t{i}": (logits[:, i] > 0).float() for i in range(n)}
    sex = {"sex": (x[:, 0] > 0).long()}
    return lf.ResidentLoader(x, labels, sex, batch_size=BATCH, shuffle=False, seed=0, device="cpu")


def settings(n: int) -> dict[str, Any]:
    tasks = [lf.Binary(f"t{i}") for i in range(n)]
    torch.manual_seed(0)
    return {
        "task_dict": lf.task_dict(tasks),
        "encoder_class": lambda: MLP(FEATURES, HIDDEN),
        "decoders": linear_heads(tasks, HIDDEN[-1]),
        "rep_grad": False,
        "multi_input": False,
        "optim_param": {"optim": "adam", "lr": 1e-3},
        "scheduler_param": None,
    }


def libmtl(
    loader: lf.ResidentLoader, test: lf.ResidentLoader, n: int, weighting: Any, architecture: Any, args: Any
) -> Step:
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(weighting=weighting, architecture=architecture, weight_args=args, arch_args={}, **settings(n))

    def epoch() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(loader, test, 1)

    return epoch


def fair(loader: lf.ResidentLoader, n: int, weighting: str, args: Any) -> Step:
    trainer = lf.FairTrainer(
        weighting=weighting,
        architecture="HPS",
        weight_args=args,
        device="cpu",
        progress=False,
        select="last",
        **settings(n),
    )
    return lambda: trainer.train(loader, epochs=trainer.epoch + 1) and None


def by_hand(loader: lf.ResidentLoader, n: int, backward: Callable[[Any, Tensor, list[Tensor], Any], None]) -> Step:
    """Return an epoch of a loop as the peers' documentation has it; ``backward(encoder, h, logits, labels)``."""
    made = settings(n)
    encoder, heads = made["encoder_class"](), made["decoders"]
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=1e-3, fused=True)

    def epoch() -> None:
        for x, labels in loader:
            h = encoder(x)
            logits = [head(h).squeeze(1) for head in heads.values()]
            optimizer.zero_grad()
            backward(encoder, h, logits, labels)
            optimizer.step()

    return epoch


def losses_of(logits: list[Tensor], labels: Any) -> list[Tensor]:
    return [nnf.binary_cross_entropy_with_logits(z, labels[f"t{i}"]) for i, z in enumerate(logits)]


def torchjd(loader: lf.ResidentLoader, n: int, name: str) -> dict[str, Step]:
    """Return TorchJD's two ways to the aggregator of that name; none where it, or what it needs, is not installed."""
    try:
        from torchjd import aggregation
        from torchjd.autogram import Engine
        from torchjd.autojac import jac_to_grad, mtl_backward

        needs = {"CAGrad": {"c": 0.5}}.get(name, {})
        aggregator, weighting = getattr(aggregation, name)(**needs), getattr(aggregation, f"{name}Weighting")(**needs)
    except ImportError as error:
        print(f"TorchJD {name} left out: {error}")
        return {}
    engines: dict[int, Any] = {}

    def jacobian(encoder: Any, h: Tensor, logits: list[Tensor], labels: Any) -> None:
        mtl_backward(losses_of(logits, labels), h)
        jac_to_grad(list(encoder.parameters()), aggregator)

    def gramian(encoder: Any, h: Tensor, logits: list[Tensor], labels: Any) -> None:
        losses = torch.stack(losses_of(logits, labels))
        engine = engines.get(id(encoder))
        if engine is None:  # its hooks see the next forward
            engines[id(encoder)] = Engine(encoder, batch_dim=None)
            return
        losses.backward(weighting(engine.compute_gramian(losses)))

    return {"TorchJD": by_hand(loader, n, jacobian), "autogram": by_hand(loader, n, gramian)}


def regularisers(loader: lf.ResidentLoader, n: int) -> dict[str, Step]:
    found = {"FairTrainer": fair(loader, n, "GroupRegulariser", {})}
    if importlib.util.find_spec("fairret") is None:
        print("fairret left out: it is not installed")
        return found
    from fairret.loss import NormLoss
    from fairret.statistic import PositiveRate

    penalty = NormLoss(PositiveRate())

    def backward(encoder: Any, h: Tensor, logits: list[Tensor], labels: Any) -> None:
        groups = nnf.one_hot(labels["sensitive"]["sex"], 2).float()
        total = torch.stack(losses_of(logits, labels)).sum() + sum(penalty(z.unsqueeze(1), groups) for z in logits)
        total.backward()

    return {**found, "fairret": by_hand(loader, n, backward)}


def measure(variants: dict[str, Step], rounds: int, steps: int) -> dict[str, float]:
    """Return milliseconds of CPU a step: the median over rounds, variants interleaved; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            started = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - started)
    return {name: 1e3 * statistics.median(taken) / steps for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to check that it runs")
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 40])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, rounds = (2, 1) if args.smoke else (8, args.rounds)
    columns = ("LibMTL", "mended", "FairTrainer", "TorchJD", "autogram", "fairret")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for n in [2] if args.smoke else args.tasks:
        loader, test = data(steps, n), data(1, n)
        rows = {name: torchjd(loader, n, name) for name in NAMES}
        for name, variants in rows.items():
            more = ARGS.get(name, {})
            if name in SHIPPED:
                variants["LibMTL"] = libmtl(loader, test, n, SHIPPED[name], OwnHPS, more)
            variants["mended"] = libmtl(loader, test, n, getattr(LibMTL.weighting, name), HPS, more)
            variants["FairTrainer"] = fair(loader, n, name, more)
        rows["GroupRegulariser"] = regularisers(loader, n)
        print(f"\nT = {n}: milliseconds of CPU a step")
        print(f"{'':18}" + "".join(f"{column:>13}" for column in columns))
        results[str(n)] = {name: measure(variants, rounds, steps) for name, variants in rows.items()}
        for name, found in results[str(n)].items():
            cells = (f"{found[column]:13.2f}" if column in found else f"{'-':>13}" for column in columns)
            print(f"{name:18}" + "".join(cells))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
