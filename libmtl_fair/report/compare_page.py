"""A comparison shown: one table for the console, one HTML page, one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from libmtl_fair.files import write_json, write_text
from libmtl_fair.report.compare import Comparison
from libmtl_fair.report.frames import rows
from libmtl_fair.report.html import plotly_library, script_json
from libmtl_fair.report.interactive import interactive_plots
from libmtl_fair.report.published import publication
from libmtl_fair.report.sections import Cell, Sheet, audit_sheet, gain_sheet, sheet, task_sheet
from libmtl_fair.report.tables import show


def comparison_table(found: Comparison) -> Table:
    """Return the console's table: a row per measure and method, with the difference to the reference and its interval."""
    run = found.run
    seeds = f"{len(run.seeds)} seeds" if len(run.seeds) > 1 else "1 seed"
    table = Table(title=f"{run.name}: {run.split}, mean ± sd over {seeds}", title_justify="left")
    for i, head in enumerate(("measure, method", "mean", f"difference to {run.reference}")):
        table.add_column(Text(head), justify="right" if i else "left", no_wrap=i == 1)
    cells = found.cells
    for column in dict.fromkeys(cells["column"]):
        table.add_section()
        table.add_row(Text(str(column), style="bold"))
        for row in rows(cells[cells["column"] == column]):
            mean = Text(show(row.mean, row.sd) + ("*" if row.best else ""), style="bold" if row.best else "")
            table.add_row(Text(f"  {row.method}"), mean, Text(difference(row)))
    table.caption = Text("* best mean; [95 % bootstrap interval over seeds]", style="dim")
    return table


def difference(row: Any) -> str:
    """Write a paired difference with its interval; nothing for the reference."""
    if row.difference != row.difference:
        return ""
    return f"{row.difference:+.4f}" + (f" [{row.low:+.4f}, {row.high:+.4f}]" if row.low == row.low else "")


def write_comparison(found: Comparison, folder: str | Path) -> tuple[Path, Path]:
    """Write ``comparison.html`` and ``comparison.json`` and return their paths.

    Raises
    ------
    CheckpointError : the folder cannot be written.
    """
    folder = Path(folder)
    data = write_json(folder / "comparison.json", found.to_dict())
    return write_text(folder / "comparison.html", render(found)), data


def render(found: Comparison) -> str:
    """Return the page: self-contained, light and dark. Every name from the runs is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("libmtl_fair.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {name: items for name, items in interactive_plots(found.run).items() if name == "audit" and items}
    return environment.get_template("comparison.html.j2").render(
        run=found.run,
        figures=figures,
        figures_json=Markup(script_json(figures)),
        plotly=Markup(plotly_library()) if figures else "",
        plots={},
        facts=_facts(found),
        utility=[measure_sheet(found, "Utility", ("macro ",)), task_sheet(found.run)],
        fairness=[
            measure_sheet(found, "Group fairness", ("EO diff", "DP diff", "KS")),
            measure_sheet(found, "Further differences between groups", ("EOP diff", "AUC diff", "MAE diff")),
        ],
        audit=[measure_sheet(found, "Bias and violation rate", ("Bias@", "VR@")), audit_sheet(found.run)],
        standing=[
            standing_sheet(found),
            published_sheet(found),
            drift_sheet(found),
            gain_sheet(found.run, found.gains),
        ],
        notes=found.notes,
    )


def _facts(found: Comparison) -> list[tuple[str, str]]:
    run = found.run
    return [
        ("Methods", f"{', '.join(run.methods)}"),
        ("Reference", run.reference),
        ("Seeds", ", ".join(map(str, run.seeds))),
        ("Split", run.split),
    ]


def measure_sheet(found: Comparison, title: str, prefixes: tuple[str, ...]) -> Sheet | None:
    """Return measures that start with one of ``prefixes``: a row a method, the difference and interval below the mean."""
    cells = found.cells
    columns = [c for c in dict.fromkeys(cells["column"]) if str(c).startswith(prefixes)]
    at = {(r.method, r.column): Cell(show(r.mean, r.sd), difference(r), bool(r.best)) for r in rows(cells)}
    body = [[m, *(at.get((m, column), Cell("–")) for column in columns)] for m in found.run.methods]
    return sheet(title, ["method", *map(str, columns)], body) if columns else None


def standing_sheet(found: Comparison) -> Sheet:
    """Return mean rank and Delta_m of every method, by utility alone and with the differences between groups."""
    body = [
        [r.method, f"{r.mean_rank:.2f}", f"{r.delta_m:+.2f} %", f"{r.fair_rank:.2f}", f"{r.fair_delta_m:+.2f} %"]
        for r in rows(found.overview)
    ]
    heads = ["method", "mean rank ↓", "Δm ↓", "mean rank, fairness too ↓", "Δm, fairness too ↓"]
    note = (
        "By each task's main metric (AUC, else accuracy, else R²); with fairness, the differences between groups in equalised "
        "odds, equal opportunity and AUC (regression: MAE) of each attribute count as one metric each. "
        "Δm: mean relative loss to the reference; below 0 is better."
    )
    return sheet("Ranks and Δm", heads, body, note)


def published_sheet(found: Comparison) -> Sheet | None:
    """Return a source's numbers beside ours; None where the recipe holds none."""
    if found.published.empty:
        return None
    body = [
        [r.method, r.measure, show(r.published, digits=4), show(r.ours, digits=4), f"{r.ours - r.published:+.4f}"]
        for r in rows(found.published)
    ]
    heads = ["method", "measure", "published", "ours", "ours − published"]
    return sheet("Beside published numbers", heads, body, " ".join(publication(found.run)))


def drift_sheet(found: Comparison) -> Sheet | None:
    """Return ranks under raw and fixed thresholds, drift budgets and robustness."""
    if found.drift.empty:
        return None
    body = [
        [
            r.delta_name,
            r.method,
            show(r.raw_bias, digits=4),
            r.rank_raw,
            show(r.fixed_bias, digits=4),
            r.rank_fixed,
            show(r.mean_threshold, digits=4),
            show(r.budget, digits=4),
            "yes" if r.robust else "no",
        ]
        for r in rows(found.drift)
    ]
    heads = ["tolerance", "method", "raw Bias", "rank", "fixed Bias", "rank", "own threshold", "drift budget", "robust"]
    note = "Robust: the fixed order against every other method outlasts both drift budgets."
    return sheet("Threshold drift", heads, body, note)
