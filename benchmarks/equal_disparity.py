"""AUC at equal equalised odds: FairMT beside the strength of fairret's penalty and of lift-only offsets that reaches the same.

Data, network and training are those of ``recipes/untouched.yaml`` (adult and compas, and ``census_direct`` of :mod:`untouched`), five
splits, test data; the last epoch is kept. FairMT is trained for 20 %, 30 % (its default) and 50 % of plain's difference, at both thresholds
(its default) and, as offsets are fitted for one, at one alone; the last rows are its models after offsets that take the difference on
validation data to 30 % of plain's (``then offsets``). Fairret's penalty (the ``GroupRegulariser`` of the loss norm) is trained at
:data:`SHARES`; offsets, fitted on validation decisions, go along their strength. EO is the worst binary task's difference, at 0.5 and
at validation's base-rate threshold.

A competitor's strength is the least at which its mean EO over the splits, linear between neighbours, is FairMT's; its AUC there is
interpolated alike in each split. Printed is FairMT's AUC less that, in points, with two standard errors over the splits (of AUC
alone: that FairMT's EO is itself uncertain is not in them). Where no strength reaches FairMT's EO, the least it has is said.

    python benchmarks/equal_disparity.py              # about 30 minutes on a shared core
    python benchmarks/equal_disparity.py --smoke      # seconds: few rows, one epoch and one split; its numbers mean nothing
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy are imported

import argparse
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch
from untouched import markdown, recipes

from libmtl_fair import metrics
from libmtl_fair.metrics.post_models import STRENGTHS, Offsets, fit_offsets, path, pick, worst_gap
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.build import loaders, make_dataset, make_trainer

DATA = ("adult", "compas", "census_direct")
TARGETS = (20, 30, 50)
"""Of plain training's difference, in per cent."""
SHARES = (0.98, 0.93, 0.8, 0.5)
"""The tasks' share lambda of the loss beside fairret's penalty; 1 is plain training."""
ENDS = {"at 0.5": 0.5, "at the base rate": "base_rate"}
ALONE = {"at 0.5": "half", "at the base rate": "base_rate"}
"""FairMT's setting for each."""
LEFT = 0.3
"""Share of plain's difference on validation data up to which offsets take what FairMT's training left over."""


def with_methods(recipe: Recipe, smoke: bool) -> Recipe:
    """Return the recipe with plain training, FairMT for each target, and fairret's penalty at each share; one of each to try it."""
    targets, shares = (TARGETS[:1], SHARES[-1:]) if smoke else (TARGETS, SHARES)
    told = recipe.to_dict()
    norm = told["methods"]["fairret"]
    methods = {"plain": {"weighting": "EW"}}
    for target in targets:
        fairmt = {"weighting": "FairMT", "target": f"eo <= {target}%"}
        methods |= {f"fairmt {target} {how}": {**fairmt, "threshold": how} for how in ("both", *ALONE.values())}
    methods |= {f"fairret {lam}": {**norm, "lam": lam} for lam in shares}
    return Recipe.from_dict({**told, "methods": methods})


def points(recipe: Recipe, seed: int) -> Iterator[tuple[str, str, float, float, float]]:
    """Return (end, what, strength, EO, AUC) of every model of a split, AUC in points."""
    data = make_dataset(recipe, seed)
    wanted: dict[str, float] = {}
    for method in recipe.methods:
        trainer = make_trainer(recipe, method, data, tuple(data.tasks), seed, device="cpu")
        parts = loaders(data, recipe.train.batch_size, seed, torch.device("cpu"))
        trainer.train(parts["train"], None, recipe.train.epochs)
        val, test = (trainer.predict(parts[part]) for part in ("val", "test"))
        what, _, how = method.partition(" ")
        for end, threshold in ENDS.items():
            if what == "fairmt" and how.split()[1] not in ("both", ALONE[end]):
                continue
            gap = partial(worst_gap, metric="equalized_odds", thresholds=threshold)
            offsets = fit_offsets(val, threshold=threshold)
            if what == "fairmt":
                yield end, method, 0.0, *_measured(val, test, threshold)
                left = pick(path(offsets.along(val), gap), wanted[end])
                yield end, f"{method}, then offsets", 0.0, *_lifted(offsets, left.strength, val, test, threshold)
                continue
            yield end, "fairret", 1 - float(how or 1), *_measured(val, test, threshold)
            if what == "plain":
                wanted[end] = LEFT * gap(val)
                yield from ((end, "offsets", s, *_lifted(offsets, s, val, test, threshold)) for s in STRENGTHS)


def _lifted(
    offsets: Offsets, strength: float, val: Predictions, test: Predictions, threshold: float | str
) -> tuple[float, float]:
    return _measured(offsets.along(val)(strength), offsets.along(test)(strength), threshold)


def _measured(val: Predictions, test: Predictions, threshold: float | str) -> tuple[float, float]:
    bars = metrics.base_rate_thresholds(val) if threshold == "base_rate" else 0.5
    return worst_gap(test, None, "equalized_odds", bars), 100 * metrics.utility(test)["macro"]["auc"]


def compared(found: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Return a row a target and threshold: FairMT's EO and AUC, and its AUC less each competitor's at that EO."""
    for (end, method), own in found[found["what"].str.startswith("fairmt")].groupby(["end", "what"], sort=False):
        auc = own.set_index("seed")["AUC"]
        target, how = method.removeprefix("fairmt ").split(" ", 1)
        row = {
            "decisions": end,
            "FairMT for": f"{target} % {how}".replace("both", "at both")
            .replace("half", "there alone")
            .replace("base_rate", "there alone"),
            "EO": f"{own['EO'].mean():.3f}",
            "AUC": f"{auc.mean():.2f}",
        }
        for what in ("fairret", "offsets"):
            its = found[(found["end"] == end) & (found["what"] == what)]
            row[f"AUC less that of {what}"] = _difference(auc, its, own["EO"].mean())
        yield row


def _difference(auc: pd.Series, its: pd.DataFrame, wanted: float) -> str:
    mean = its.groupby("strength")["EO"].mean()
    aucs = its.pivot(index="seed", columns="strength", values="AUC").loc[auc.index]
    for (a, high), (b, low) in pairwise(mean.items()):
        if low <= wanted:
            share = 0.0 if high <= wanted else (high - wanted) / (high - low)
            less = auc - (1 - share) * aucs[a] - share * aucs[b]
            error = 2 * less.std(ddof=1) / len(less) ** 0.5
            clear = "**" if abs(less.mean()) > error else ""
            return f"{clear}{less.mean():+.2f} ± {error:.2f}{clear}"
    return f"not reached (least EO {mean.min():.3f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=DATA, default=DATA)
    parser.add_argument("--smoke", action="store_true")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = ["compas"] if chosen.smoke else chosen.only
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: with_methods(recipe, chosen.smoke)
            for name, recipe in recipes(Path(folder), chosen.smoke).items()
            if name in names
        }
        for name, recipe in made.items():
            columns = ["end", "what", "strength", "EO", "AUC", "seed"]
            rows = [(*point, seed) for seed in recipe.seeds for point in points(recipe, seed)]
            print(
                f"#### {name}\n\n{markdown(pd.DataFrame(compared(pd.DataFrame(rows, columns=columns))))}\n", flush=True
            )


if __name__ == "__main__":
    main()
