"""Every method at its defaults on every shipped data set, and on tables with known unfairness: one table.

``recipes/untouched.yaml`` is run on each data set, five splits, nothing tuned; test data are looked at once. The tables of our own
making are like a census extract (:func:`census`): 20,000 people whose sex moves the first label by a known amount. In ``census_fair``
it is 0: people of the same merits have the same odds, and the gap that there is comes from hours and occupations alone. In
``census_direct`` women of the same merits have lower odds; in ``census_proxy`` too, and sex is no input, but occupation and hours
tell much of it.

    python benchmarks/untouched.py --out runs/untouched      # under an hour on one core; goes on where it was interrupted
    python benchmarks/untouched.py --methods fairmt relif    # plain and these alone, in a folder of their own
    python benchmarks/untouched.py --smoke                   # a minute, on few rows and one epoch: its numbers mean nothing
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy are imported

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from libmtl_fair.files import write_text
from libmtl_fair.metrics.verdicts import chance_gaps
from libmtl_fair.recipe import Recipe, load_recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import judged
from libmtl_fair.report.run_folder import RunFolder, read_run
from libmtl_fair.report.summary import summary

RECIPE = Path(__file__).parents[1] / "recipes" / "untouched.yaml"


def _rates(*tasks: str) -> str:
    return f"methods.fairret.tasks=[{','.join(tasks)}]"


SHIPPED = {
    "adult": ["data.tasks=[income,never_married,long_hours]", "data.sensitive=[sex]"],
    "compas": ["data.tasks=[two_year_recid,is_violent_recid]", "data.sensitive=[race]", "data.keep_groups={race: 2}"],
    "german": [
        "train.batch_size=64",
        "data.tasks=[bad_credit,owns_home,log_amount]",
        "data.sensitive=[age]",
        _rates("bad_credit", "owns_home"),
    ],
    "support2": [
        "data.tasks=[hospdead,death180,log_charges]",
        "data.sensitive=[sex]",
        _rates("hospdead", "death180"),
    ],
}
"""Data set -> changes of the recipe; the penalty of rates is for binary tasks."""
CENSUS = {"census_fair": (0.0, True), "census_direct": (-1.0, True), "census_proxy": (-1.0, False)}
"""Table -> (what being a woman adds to the log-odds of a high income, whether sex is an input)."""


def census(n: int, effect: float, seed: int = 0) -> pd.DataFrame:
    """Return ``n`` people: inputs, sex, and three labels, of which ``high_income`` depends on sex by ``effect`` in log-odds.

    Labels: high_income (about 30 %), insured (about 90 %; sex plays no part), commute (minutes; no part).
    """
    rng = np.random.default_rng(seed)
    woman = rng.random(n) < 0.48
    age, school = rng.integers(18, 70, n), np.clip(rng.normal(12, 3, n), 1, 20).round()
    hours = np.clip(rng.normal(41 - 5 * woman, 9, n), 5, 90).round()
    chances = np.where(woman[:, None], [0.10, 0.30, 0.25, 0.20, 0.15], [0.25, 0.10, 0.25, 0.15, 0.25])
    occupation = (rng.random((n, 1)) > chances.cumsum(1)).sum(1).clip(0, 4)
    region = rng.integers(0, 6, n)
    merit = 0.28 * (school - 12) + 0.05 * (hours - 40) + 0.03 * (age - 40) - 0.0012 * (age - 45) ** 2
    merit += np.array([0.3, -0.3, 0.4, -0.4, 0.0])[occupation]
    high = rng.random(n) < 1 / (1 + np.exp(-(merit - 0.6 + effect * (woman - 0.48))))
    insured = rng.random(n) < 1 / (1 + np.exp(-(2.2 + 0.12 * (school - 12) + 0.02 * (age - 40) + 0.8 * high)))
    commute = np.clip(28 + 4 * (region - 2.5) + 0.2 * (hours - 40) + rng.gamma(2, 6, n) - 12, 1, None)
    return pd.DataFrame(
        {
            "age": age,
            "school": school,
            "hours": hours,
            "occupation": np.array(["trade", "care", "office", "service", "technical"])[occupation],
            "region": np.array(list("ABCDEF"))[region],
            "sex": np.where(woman, "woman", "man"),
            "high_income": high.astype(int),
            "insured": insured.astype(int),
            "commute": commute.round(1),
        }
    )


def recipes(out: Path, smoke: bool) -> dict[str, Recipe]:
    """Return data set -> its recipe; tables are written under ``out``."""
    small = ["train.epochs=1", "seeds=[0]", "metrics.n_bootstrap=50"] if smoke else []
    found = {}
    for name, changes in SHIPPED.items():
        if name != "adult":
            changes = [*changes, f"data.name={name}"]
        found[name] = load_recipe(RECIPE, [*changes, *small, *(["data.subset=1000"] if smoke else [])])
    plain = load_recipe(RECIPE, [*small, _rates("high_income", "insured")]).to_dict()
    for name, (effect, is_input) in CENSUS.items():
        path = out / "tables" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        census(1000 if smoke else 20_000, effect).to_csv(path, index=False)
        tasks = {"high_income": {"kind": "binary"}, "insured": {"kind": "binary"}, "commute": {"kind": "regression"}}
        data = {"table": str(path.resolve()), "tasks": tasks, "sensitive": {"sex": {"column": "sex"}}, "resplit": True}
        found[name] = Recipe.from_dict({**plain, "name": name, "data": {**data, "sensitive_inputs": is_input}})
    return found


NOTE = (
    "Means over splits, test data; utilities: plain's value, and the methods' differences in points. EO diff: the worst binary "
    "task's equalised-odds difference at 0.5 and at validation's base-rate threshold; ⚠: a decision is (nearly) the same for "
    "all, so the number says nothing; ▽: levels down, nobody gains. time: training, in units of plain's."
)


def table(run: RunFolder) -> pd.DataFrame:
    """Return a row a method: what it costs and brings against plain, means over splits, with marks as the reports have them."""
    cells, found = summary(run), pd.DataFrame(index=run.methods)
    for column, each in cells.groupby("column", sort=False):
        of = each.set_index("method").reindex(run.methods)
        if str(column).startswith("macro ") and column != "macro Brier":
            found[f"{column} (points)"] = [
                f"{100 * v:.1f}" if m == run.reference else (f"{100 * d:+.1f}" if d == d else "–")
                for m, v, d in zip(run.methods, of["mean"], of["difference"])
            ]
        elif str(column).startswith("EO diff") or column in ("inconsistency", "flip gap"):
            marks = [
                ("⚠" if why else "") + ("▽" if isinstance(down, str) and down else "")
                for why, down in zip(of["why"], of["down"])
            ]
            found[str(column)] = [f"{v:.3f}{mark}" if v == v else "–" for v, mark in zip(of["mean"], marks)]
    seconds = {
        m: np.mean([(r.metrics.get("timing") or {}).get("train_s", np.nan) for r in run.of(m)]) for m in run.methods
    }
    found["time"] = [f"{seconds[m] / seconds[run.reference]:.1f}" for m in run.methods]
    return found.rename_axis("method").reset_index()


CHANCE = (
    "What chance makes. EO diff as above; *by chance*: what it is where groups are permuted among people of one label, in the worst "
    "task, root mean square; p: how often that is as large, its median over splits; *left*: of plain's; *left beyond chance*: the same of "
    "sqrt(EO diff² - by chance²), squares averaged over splits. 0: no more than chance makes; – where plain has no gap beyond it."
)


def beyond_chance(run: RunFolder) -> pd.DataFrame:
    """Return a row a method: the worst binary task's EO diff, what chance makes of it, and what of plain's is left beyond that."""
    parts = [pd.DataFrame(index=run.methods)]
    for end in judged.thresholds(run):
        counts: dict[tuple[str, int, str], list[tuple[pd.DataFrame, float]]] = {}
        for d in judged.decisions(run, end):
            for seed, each in d.by_seed.items() if not d.label else ():
                counts.setdefault((d.method, seed, d.attribute), []).append((each, d.gap("equalized_odds", seed).value))
        rows = []
        for (method, _, attribute), tasks in counts.items():
            gap, draws = np.nanmax([gap for _, gap in tasks]), chance_gaps([each for each, _ in tasks])
            rows.append((method, attribute, gap, (draws**2).mean(), (1 + (draws >= gap).sum()) / (1 + len(draws))))
        found = pd.DataFrame(rows, columns=["method", "attribute", "EO", "square", "p"])
        for attribute, own in found.groupby("attribute", sort=False):
            own["beyond"] = own["EO"] ** 2 - own["square"]
            mean, p = own.groupby("method")[["EO", "square", "beyond"]].mean(), own.groupby("method")["p"].median()
            beyond, plain = mean["beyond"].clip(lower=0) ** 0.5, mean.loc[run.reference]
            left = beyond / beyond[run.reference] if beyond[run.reference] > 0 else beyond * np.nan
            shown = {
                "by chance": mean["square"] ** 0.5,
                "p": p,
                "left": mean["EO"] / plain["EO"],
                "left beyond chance": left,
            }
            name = f"EO diff {attribute}{end}"
            columns = {name: mean["EO"].map("{:.3f}".format)}
            columns |= {
                f"{key}{end}": values.map("{:.3f}".format if key in ("by chance", "p") else "{:.2f}".format)
                for key, values in shown.items()
            }
            parts.append(pd.DataFrame(columns).reindex(run.methods).replace(["nan", "inf"], "–"))
    return pd.concat(parts, axis=1).rename_axis("method").reset_index()


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame of texts as a Markdown table."""
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Run what is not finished; write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", help="data sets; default: all (--smoke: a shipped one and a table)")
    parser.add_argument("--methods", nargs="*", help="plain and these alone; default: all")
    parser.add_argument("--smoke", action="store_true")
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.only = chosen.only or ["german", "census_proxy"]
        chosen.out = chosen.out or Path(tempfile.mkdtemp())
    chosen.out = chosen.out or Path("runs/untouched")
    parts = [NOTE]
    for name, recipe in recipes(chosen.out, chosen.smoke).items():
        if not chosen.only or name in chosen.only:
            if chosen.methods:
                told = recipe.to_dict()
                kept = {m: told["methods"][m] for m in ("plain", *chosen.methods)}
                recipe = Recipe.from_dict({**told, "methods": kept})
            folder = run_recipe(recipe, chosen.out / name, resume=True, note=partial(_say, name))
            run = read_run(folder)
            parts += [f"### {name}", markdown(table(run)), CHANCE, markdown(beyond_chance(run))]
    print("\n\n".join(parts))
    write_text(chosen.out / "untouched.md", "\n\n".join(parts) + "\n")


def _say(name: str, text: str) -> None:
    print(f"{name}: {text}", flush=True)


if __name__ == "__main__":
    main()
