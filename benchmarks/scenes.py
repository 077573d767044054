"""What dense ReLiF does, on rooms made from a seed (recipes/sources/scenes.yaml): its aligned Bias beside what shrinking brings.

Segmentation, depth and surface normals of scenes, three seeds: the published form's Bias and violation rate at tolerances that are
fixed from the plain model (its table 1's measure), beside the least Bias that shrinking the plain model's scores reaches at no more
error of the scores, the native metrics, the audit of people (are rooms that look alike scored alike?) and the gap to the same room
under the other light.

    python benchmarks/scenes.py --out runs/scenes      # goes on where it was interrupted
    python benchmarks/scenes.py --smoke                # few scenes, one epoch: its numbers mean nothing
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy are imported

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from libmtl_fair.files import write_text
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import shrinkage_verdict
from libmtl_fair.report.run_folder import RunFolder, read_run

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


def shown(found: pd.DataFrame, key: tuple[str, ...], digits: int = 3) -> str:
    """Return "mean ± sd" of one entry."""
    if key not in found.index:
        return "–"
    mean, sd = found.loc[key, ["mean", "std"]]
    return f"{mean:.{digits}f}" + ("" if sd != sd else f" ± {sd:.{digits}f}")


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
        lines.append([*cells, *(shown(alike, (method, metric)) for metric in ("inconsistency", "flip_gap"))])
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
