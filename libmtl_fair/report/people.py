"""The audit of people of finished runs, from saved predictions and the near pairs that were kept with the run: no retraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.table import Table
from rich.text import Text

from libmtl_fair.arrays import records
from libmtl_fair.errors import CheckpointError, FairMTLError
from libmtl_fair.files import Json
from libmtl_fair.metrics.consistency import ConsistencyAudit, audit_people
from libmtl_fair.report.reaudit import load_predictions, run_names
from libmtl_fair.report.run_folder import RunFolder, read_run, rows
from libmtl_fair.report.summary import PEOPLE, with_sd
from libmtl_fair.report.tables import in_order, people_sentence, show


@dataclass(frozen=True)
class PeopleAgain:
    """What auditing people of finished runs found.

    ``frame``: run, method, seed, task ("macro": mean over tasks), metric, value, low, high; ``said``: of each run by what people
    are alike, or why there is no audit.
    """

    frame: pd.DataFrame
    said: dict[str, str]
    split: str

    def to_dict(self) -> Json:
        """Return plain values for JSON."""
        return {"split": self.split, "reference": self.said, "rows": records(self.frame)}


def people_again(run_dirs: Sequence[str | Path], split: str | None = None) -> PeopleAgain:
    """Audit people of finished runs.

    Near pairs are those that were kept with the run, or found anew from the recipe's data where it is an older one. Gaps between
    flip twins need the model: they are those that the run measured.

    Parameters
    ----------
    split : str, optional
        ``"test"`` or ``"val"``; None takes what the first run reports.

    Raises
    ------
    CheckpointError
        A folder is incomplete or damaged.
    """
    runs = [read_run(path) for path in run_dirs]
    split = split or (runs[0].split if runs else "test")
    found: list[Json] = []
    said: dict[str, str] = {}
    for run, name in zip(runs, run_names(runs)):
        try:
            said[name], measured = _of_run(run, split)
            found += [{"run": name, **row} for row in measured]
        except FairMTLError as error:
            said[name] = f"There is no audit of people: {error}"
    columns = ["run", "method", "seed", "task", "metric", "value", "low", "high"]
    return PeopleAgain(pd.DataFrame(found, columns=columns), said, split)


def _of_run(run: RunFolder, split: str) -> tuple[str, list[Json]]:
    from libmtl_fair.recipe.build import make_dataset
    from libmtl_fair.recipe.people import kept_audit, people_of
    from libmtl_fair.recipe.schema import load_recipe

    found: list[Json] = []
    recipe, said = load_recipe(run.path / "recipe.yaml"), people_sentence(run)
    made: dict[int, ConsistencyAudit] = {}
    for item in run.runs:
        held, base = load_predictions(item, split), load_predictions(item, "val")
        key = item.seed if recipe.data.resplit else 0
        if key not in made and (audit := kept_audit(recipe, run.path, split, item.seed, held)) is not None:
            made[key] = audit
        elif key not in made:
            people = people_of(recipe, make_dataset(recipe, item.seed), parts=(split,))
            if split not in people.audits:
                return people.sentence, []
            if len(people.rows[split]) != len(held):
                raise CheckpointError(
                    f"the recipe's data have {len(people.rows[split])} people in the {split} split, the saved predictions of "
                    f"{item.folder} {len(held)}: the data have changed since"
                )
            said, made[key] = people.sentence, people.audits[split]
        report = audit_people(made[key], held, base, threshold=recipe.metrics.threshold)
        measured = [row for row in report.rows() if not row["metric"].startswith(("flip", "changed"))]
        kept = [
            row for row in item.entries("consistency", split) if str(row.get("metric")).startswith(("flip", "changed"))
        ]
        found += [{"method": item.method, "seed": item.seed, **row} for row in (*measured, *kept)]
    return said, found


def people_table(found: PeopleAgain) -> Table:
    """Return the table for the console: mean ± sd over seeds of the columns of the summary, and the split by sensitive value."""
    frame = found.frame[found.frame["task"] == "macro"]
    pairs = frame["metric"][frame["metric"].str.startswith("inconsistency[")]
    names = {metric: name for name, metric in PEOPLE.items()} | {m: m[len("inconsistency[") : -1] for m in pairs}
    means = with_sd(frame[frame["metric"].isin(list(names))], ["metric", "run", "method"], ["value", "low", "high"])
    table = Table(title=f"Are like people treated alike? {found.split}, mean ± sd over seeds", title_justify="left")
    for i, head in enumerate(("measure, method", "value ↓", "95 % interval over people")):
        table.add_column(head, justify="right" if i else "left", no_wrap=i == 1)
    several = len(found.said) > 1
    for metric in names:
        lines = in_order(means[means["metric"] == metric], "run", "method")
        if len(lines):
            table.add_section()
            table.add_row(Text(names[metric], style="bold"))
        for row in rows(lines):
            shown = f"[{row.low:.3f}, {row.high:.3f}]" if row.low == row.low else ""
            name = f"{row.run}/{row.method}" if several else row.method
            table.add_row(Text(f"  {name}"), show(row.value, row.value_sd), Text(shown))
    return table
