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

import _timing  # noqa: F401, isort: skip  # before torch: one thread

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from _timing import BATCH, Run, binary_data, fair_epoch, fair_trainer, libmtl_epoch, measure, resident, settings
from torch import Tensor

import libmtl_fair as lf

import LibMTL.weighting  # isort: skip

NAMES = ("MGDA", "PCGrad", "GradVac", "CAGrad")
ARGS: dict[str, dict[str, Any]] = {
    "MGDA": {"mgda_gn": "none"},
    "GradVac": {"beta": 0.5},
    "CAGrad": {"calpha": 0.5, "rescale": 1},
}


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
from LibMTL.architecture import HPS


class OwnHPS(HPS):  # type: ignore[misc]
    """Hard sharing that zeroes gradients as LibMTL's own weightings need."""

    def zero_grad_share_params(self) -> None:
        self.encoder.zero_grad(set_to_none=False)


def by_hand(loader: lf.ResidentLoader, n: int, backward: Callable[[Any, Tensor, list[Tensor], Any], None]) -> Run:
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


def torchjd(loader: lf.ResidentLoader, n: int, name: str) -> dict[str, Run]:
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


def regularisers(loader: lf.ResidentLoader, n: int) -> dict[str, Run]:
    found = {"FairTrainer": fair_epoch(fair_trainer("GroupRegulariser", settings(n)), loader)}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to check that it runs")
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 40])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    steps, rounds = (2, 1) if args.smoke else (8, args.rounds)
    columns = ("LibMTL", "mended", "FairTrainer", "TorchJD", "autogram", "fairret")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for n in [2] if args.smoke else args.tasks:
        loader, test = (resident(*binary_data(many * BATCH, n), shuffle=False) for many in (steps, 1))
        rows = {name: torchjd(loader, n, name) for name in NAMES}
        for name, variants in rows.items():
            more = ARGS.get(name, {})
            if name in SHIPPED:
                variants["LibMTL"] = libmtl_epoch(
                    loader, test, SHIPPED[name], settings(n), architecture=OwnHPS, weight_args=more
                )
            mended = getattr(LibMTL.weighting, name)
            variants["mended"] = libmtl_epoch(loader, test, mended, settings(n), weight_args=more)
            variants["FairTrainer"] = fair_epoch(fair_trainer(name, settings(n), weight_args=more), loader)
        rows["GroupRegulariser"] = regularisers(loader, n)
        print(f"\nT = {n}: milliseconds of CPU a step")
        print(f"{'':18}" + "".join(f"{column:>13}" for column in columns))
        results[str(n)] = {
            name: {each: 1e3 * statistics.median(taken) for each, taken in measure(variants, rounds, steps).items()}
            for name, variants in rows.items()
        }
        for name, found in results[str(n)].items():
            cells = (f"{found[column]:13.2f}" if column in found else f"{'-':>13}" for column in columns)
            print(f"{name:18}" + "".join(cells))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
