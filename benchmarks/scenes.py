"""What dense ReLiF does, on rooms made from a seed (recipes/sources/scenes.yaml): its aligned Bias beside what shrinking brings.

Segmentation, depth and surface normals of scenes, three seeds: the published form's Bias and violation rate at tolerances that are
fixed from the plain model (its table 1's measure), beside the least Bias that shrinking the plain model's scores reaches at no more
error of the scores, and what the plain model reaches with the same predictions at every pixel: the score of depth and normals is the
norm of the head's feature map, and a map times s before a last layer divided by s predicts the same. Beside them the native metrics, the
audit of people (are rooms that look alike scored alike?) and the gap to the same room under the other light.

    python benchmarks/scenes.py --out runs/scenes      # goes on where it was interrupted
    python benchmarks/scenes.py --smoke                # few scenes, one epoch: its numbers mean nothing
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy are imported

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from libmtl_fair.files import write_text
from libmtl_fair.metrics import FixedDeltaAudit
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import shrinkage_verdict
from libmtl_fair.report.run_folder import RunFolder, read_run
from libmtl_fair.tasks import Ranged

RECIPE = Path(__file__).parents[1] / "recipes" / "sources" / "scenes.yaml"
SMOKE = [
    "train.epochs=1",
    "seeds=[0]",
    "data.args={n: 40, size: [24, 32]}",
    "output.report=false",
    "metrics.n_bootstrap=0",
]
NATIVE = {"segmentation": ("mIoU", 3), "depth": ("RMSE", 3), "normal": ("mean", 1)}


def means(frame: pd.DataFrame, keys: list[str], value: str = "value") -> pd.DataFrame:
    """Return mean and spread over seeds of a run's numbers, by method and ``keys``."""
    return frame.groupby(["method", *keys], sort=False)[value].agg(["mean", "std"])


def shown(found: pd.DataFrame, key: tuple[str, ...] | str, digits: int = 3) -> str:
    """Return "mean ± sd" of one entry."""
    if key not in found.index:
        return "–"
    mean, sd = found.loc[key, ["mean", "std"]]
    return f"{mean:.{digits}f}" + ("" if sd != sd else f" ± {sd:.{digits}f}")


def rescaled(held: Predictions, delta: float) -> float:
    """Return the least Bias of a model whose feature maps are scaled, and its last layers so that every output stays as it is."""
    ranged = [task for task in held.tasks if isinstance(task, Ranged) and task.name in held.raw]
    audit, found = FixedDeltaAudit(delta, exact=True), []
    for factors in itertools.product(np.geomspace(0.5, 4, 16), repeat=len(ranged)):
        moved = {task.name: task.squash(held.raw[task.name] * factor) for task, factor in zip(ranged, factors)}
        found.append(audit.run({**held.scores, **moved}).bias)
    return min(found)


def of_plain(run: RunFolder) -> pd.DataFrame:
    """Return what :func:`rescaled` gives of the reference, mean and spread over seeds, by tolerance."""
    audit, found = run.frame("audit"), []
    for item in (each for each in run.runs if each.method == run.reference):
        held = Predictions.load(item.folder / "predictions_test.parquet")
        own = audit[(audit["method"] == run.reference) & (audit["seed"] == item.seed)]
        found += [(name, rescaled(held, delta)) for name, delta in zip(own["delta_name"], own["delta"])]
    return pd.DataFrame(found, columns=["delta_name", "bias"]).groupby("delta_name")["bias"].agg(["mean", "std"])


def table(run: RunFolder) -> str:
    """Return the table as Markdown: one line a method."""
    audit, people = run.frame("audit"), run.frame("consistency")
    deltas = list(dict.fromkeys(audit["delta_name"]))
    utility, bias = means(run.frame("utility"), ["task", "metric"]), means(audit, ["delta_name"], "bias")
    rates, alike = means(audit, ["delta_name"], "violation_rate"), means(people[people["task"] == "macro"], ["metric"])
    verdict = shrinkage_verdict(run).set_index(["method", "delta_name"])
    head = ["method", *(f"{metric} of {task}" for task, (metric, _) in NATIVE.items())]
    for delta in deltas:
        head += [f"Bias@{delta}", f"VR@{delta}", f"plain shrunk, Bias@{delta}"]
    lines = [[*head, "inconsistency", "gap to the other light"]]
    for method in run.methods:
        cells = [method, *(shown(utility, (method, task, metric), n) for task, (metric, n) in NATIVE.items())]
        for delta in deltas:
            key = (method, delta)
            shrunk = f"{verdict.loc[key, 'curve_bias']:.3f}" if key in verdict.index else "–"
            below = " (below)" if key in verdict.index and verdict.loc[key, "below"] else ""
            cells += [shown(bias, key), shown(rates, key), shrunk + below]
        lines.append([*cells, *(shown(alike, (method, metric)) for metric in ("inconsistency", "flip"))])
    same, blank = of_plain(run), ["as plain"] * len(NATIVE)
    scaled = [
        "plain, feature maps rescaled",
        *blank,
        *(c for d in deltas for c in (shown(same, d), "–", "–")),
        "as plain",
        "as plain",
    ]
    lines.append(scaled)
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]]) + "\n"


def main() -> None:
    """Train, audit, print the table and write it beside the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scenes" if options.smoke else options.out
        run_recipe(load_recipe(RECIPE, SMOKE if options.smoke else []), out, resume=True, note=print)
        text = table(read_run(out))
        write_text(out / "table.md", text)
        print(text)


if __name__ == "__main__":
    main()
