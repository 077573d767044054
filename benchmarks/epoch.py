"""What one training epoch costs: LibMTL's own Trainer against FairTrainer, plain and with ReLiF; and a loop by hand.

Work: MLP 100-128-64, T binary heads, batch 256, 50,000 rows, Adam, on the CPU. "LibMTL" is its own Trainer (healed, or it
does not run) with a ``DataLoader``. One thread, process CPU time, variants interleaved; printed are medians of per-round
ratios, since absolute times on a shared machine say little.

The second table is against a loop written by hand with one fused head: a plain step's share of its step, and what an epoch
costs beside its steps (from epochs of 2 and of 60 steps).

    python benchmarks/epoch.py            # the tables of docs/RESULTS.md, some minutes
    python benchmarks/epoch.py --smoke    # seconds, on small data: checks that it runs, its numbers mean nothing
"""

from __future__ import annotations

import _timing  # noqa: F401, isort: skip  # before torch: one thread

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import BATCH, FEATURES, binary_data, fair_epoch, fair_trainer, libmtl_epoch, measure, ratio, settings
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import libmtl_fair as lf
from libmtl_fair.models import MLP

lf.heal()
from LibMTL.weighting import EW

GOALS = {2: (0.28, 0.40), 5: (0.18, 0.28), 40: (0.03, 0.06)}
"""Tasks -> goals for (plain, ReLiF) as shares of LibMTL's epoch."""
LOOP_GOALS = {2: (1.2, 1), 5: (1.2, 1), 40: (1.3, 3)}
"""Tasks -> goals for a step as a share of one by hand, and for the milliseconds of an epoch beside its steps."""


class Rows(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """What a LibMTL user writes: one row at a time, a dict of labels."""

    def __init__(self, x: Tensor, labels: dict[str, Tensor]) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[row], {task: column[row] for task, column in self.labels.items()}


def plain_epoch(
    x: Tensor, labels: dict[str, Tensor], weighting: str = "EW", **weight_args: object
) -> Callable[[], object]:
    """Return one epoch of FairTrainer on a resident loader."""
    loader = lf.ResidentLoader(x, labels, batch_size=BATCH, shuffle=True, seed=0, device="cpu")
    return fair_epoch(fair_trainer(weighting, settings(len(labels)), weight_args=weight_args), loader)


def hand_epoch(x: Tensor, labels: dict[str, Tensor]) -> Callable[[], None]:
    """Return one epoch of a loop by hand: one head for all tasks, fused Adam, losses logged without reading them."""
    encoder, head, y = MLP(FEATURES, (128, 64)), torch.nn.Linear(64, len(labels)), torch.stack(list(labels.values()), 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3, fused=True)
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits

    def epoch() -> None:
        log = []
        for rows in torch.randperm(len(x)).split(BATCH):
            z = head(encoder(x.index_select(0, rows)))
            losses = loss_of(z, y.index_select(0, rows), reduction="none").mean(0)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            log.append(losses.detach())
        torch.stack(log)

    return epoch


def beside_a_loop(n_tasks: int, rounds: int, steps: tuple[int, int] = (2, 60)) -> dict[str, float]:
    """Return a plain step's share of a step by hand, and the milliseconds of an epoch beside its steps."""
    few, many = steps
    x, labels = binary_data(BATCH * many, n_tasks)
    short = x[: BATCH * few], {t: y[: BATCH * few] for t, y in labels.items()}
    seconds = measure(
        {
            "hand": hand_epoch(x, labels),
            "hand short": hand_epoch(*short),
            "plain": plain_epoch(x, labels),
            "plain short": plain_epoch(*short),
        },
        rounds,
    )
    step = {
        name: [(a - b) / (many - few) for a, b in zip(seconds[name], seconds[f"{name} short"])]
        for name in ("hand", "plain")
    }
    beside = statistics.median(seconds["plain short"]) - few * statistics.median(step["plain"])
    return {"tasks": n_tasks, "step_over_hand": ratio(step["plain"], step["hand"]), "beside_ms": beside * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 5, 40])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds on small data")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.rounds, options.tasks = 1024, 1, [2, 5]
    warnings.simplefilter("error")
    results = []
    print(f"{'T':>3} {'LibMTL':>10} {'plain':>8} {'goal':>6} {'ReLiF':>8} {'goal':>6} {'ReLiF/plain':>12}")
    for n_tasks in options.tasks:
        x, labels = binary_data(options.rows, n_tasks)
        one = Rows(x[:BATCH], {t: y[:BATCH] for t, y in labels.items()})
        loaders = DataLoader(Rows(x, labels), batch_size=BATCH, shuffle=True), DataLoader(one, batch_size=BATCH)
        variants = {
            "LibMTL": libmtl_epoch(*loaders, EW, settings(n_tasks)),
            "plain": plain_epoch(x, labels),
            "ReLiF": plain_epoch(x, labels, "ReLiF", pairs="random"),
        }
        seconds = measure(variants, options.rounds)
        row = {
            "tasks": n_tasks,
            "libmtl_s": statistics.median(seconds["LibMTL"]),
            "plain": ratio(seconds["plain"], seconds["LibMTL"]),
            "relif": ratio(seconds["ReLiF"], seconds["LibMTL"]),
            "relif_over_plain": ratio(seconds["ReLiF"], seconds["plain"]),
        }
        results.append(row)
        goal = [f"{g:.2f}" for g in GOALS.get(n_tasks, ())] or ["-", "-"]
        print(
            f"{n_tasks:>3} {row['libmtl_s']:>8.2f} s {row['plain']:>8.3f} {goal[0]:>6} {row['relif']:>8.3f} {goal[1]:>6} "
            f"{row['relif_over_plain']:>12.2f}"
        )
    print(f"\n{'T':>3} {'step/hand':>10} {'goal':>6} {'beside ms':>10} {'goal':>6}")
    for n_tasks in options.tasks:
        row = beside_a_loop(n_tasks, options.rounds * 3)
        results.append(row)
        goal = [f"{g:g}" for g in LOOP_GOALS.get(n_tasks, ())] or ["-", "-"]
        print(f"{n_tasks:>3} {row['step_over_hand']:>10.2f} {goal[0]:>6} {row['beside_ms']:>10.2f} {goal[1]:>6}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
