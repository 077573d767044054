"""``report.html``: one self-contained page about a run, light and dark, readable on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from libmtl_fair.files import write_text
from libmtl_fair.report.branches import event_sheet, tree_texts
from libmtl_fair.report.facts import card_facts, method_facts, run_facts
from libmtl_fair.report.gallery import Plot, plots_of, write_plots
from libmtl_fair.report.interactive import interactive_plots
from libmtl_fair.report.notes import notes
from libmtl_fair.report.protocol import checklist, words
from libmtl_fair.report.run_folder import RunFolder, read_run
from libmtl_fair.report.sections import (
    audit_sheet,
    data_sheets,
    disparity_sheet,
    gain_sheet,
    group_sheet,
    pair_sheet,
    summary_sheet,
    task_sheet,
)
from libmtl_fair.report.tables import MEANINGS

_FAIRNESS_NOTE = f"EO: {MEANINGS['EO diff']}. DP: {MEANINGS['DP diff']}. Lower is better."


def write_report(run_dir: str | Path, *, interactive: bool = True) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into a run folder.

    Parameters
    ----------
    run_dir
        Folder of a finished run.
    interactive
        Draw utility, bias and group plots with plotly, whose library is inlined once (about 5 MB); without it every
        plot is a static picture and the page has some 100 kB.

    Raises
    ------
    CheckpointError
        The folder is incomplete or damaged (it says which file), or the report cannot be written.
    """
    run = read_run(run_dir)
    plots = list(plots_of(run))
    write_plots(run, plots)
    return write_text(run.path / "report.html", render(run, interactive=interactive, plots=plots))


def render(run: RunFolder, *, interactive: bool = True, plots: Iterable[Plot] | None = None) -> str:
    """Return the page. Every name from the run is escaped: it is data."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("libmtl_fair.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**_context(run, interactive, plots or plots_of(run)))


def _context(run: RunFolder, interactive: bool, plots: Iterable[Plot]) -> dict[str, Any]:
    figures = {section: items for section, items in interactive_plots(run).items() if items} if interactive else {}
    static: dict[str, list[dict[str, Any]]] = {}
    for plot in plots:
        if plot.section not in figures and (svg := plot.svg()):
            # The picture comes from matplotlib, which escapes text; nothing else is marked as safe.
            static.setdefault(plot.section, []).append({"caption": plot.caption, "svg": Markup(svg)})
    return {
        "run": run,
        "figures": figures,
        "figures_json": Markup(script_json(figures)),
        "plotly": Markup(plotly_library()) if figures else "",
        "plots": static,
        "facts": run_facts(run),
        "methods": method_facts(run),
        "recipe": (run.path / "recipe.yaml").read_text(encoding="utf-8"),
        "card": card_facts(run.data_card),
        "data_sheets": data_sheets(run),
        "utility": [summary_sheet(run, "Mean over tasks", ("macro ",)), task_sheet(run), gain_sheet(run)],
        "fairness": [
            summary_sheet(run, "Mean over tasks", ("EO diff", "DP diff", "KS"), _FAIRNESS_NOTE),
            disparity_sheet(run),
        ],
        "audit": [audit_sheet(run), pair_sheet(run)],
        "checklist": checklist(run),
        "groups": group_sheet(run),
        "trees": tree_texts(run),
        "events": event_sheet(run),
        "notes": notes(run),
        "environment": [(str(key), words(value)) for key, value in run.environment.items()],
    }


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: no way to close it, no line ends that JavaScript dislikes."""
    text = json.dumps(value, allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def plotly_library() -> str:
    """Return plotly's JavaScript, safe inside a script element."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")
