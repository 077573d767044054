"""A comparison on the console; pages about runs, self-contained, light and dark; plotly draws what one may point at."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.table import Table
from rich.text import Text

from libmtl_fair.files import Json, write_json, write_text
from libmtl_fair.report import notes, protocol, tables
from libmtl_fair.report.branches import event_sheet, grouping_sheet, tree_texts
from libmtl_fair.report.competitors import competitor_sheet
from libmtl_fair.report.findings import findings, headline
from libmtl_fair.report.plots import bars, first_plots, plots_of, scatters, write_plots
from libmtl_fair.report.run_folder import RunFolder, damage_named, read_run, rows
from libmtl_fair.report.summary import PEOPLE
from libmtl_fair.report.theme import REFERENCE, Plot, colours, label
from libmtl_fair.shown import printable

if TYPE_CHECKING:
    from libmtl_fair.report.compare import Comparison

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "hexagon")
_PATTERNS = ("", "/", ".", "x", "\\", "+", "-", "|")


def write_report(run_dir: str | Path, *, interactive: bool = True) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into a run folder.

    Parameters
    ----------
    run_dir : str or Path
        Folder of a finished run.
    interactive : bool, default True
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


@damage_named
def render(run: RunFolder, *, interactive: bool = True, plots: Iterable[Plot] | None = None) -> str:
    """Return the page of a run. Every name from the run is escaped: it is data."""
    return _page(
        "report.html.j2",
        run,
        {"audit": list(_scatter_figures(run)), "groups": list(_bar_figures(run))} if interactive else {},
        plots or plots_of(run),
        facts=protocol.run_facts(run),
        methods=protocol.method_facts(run),
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
        card=protocol.card_facts(run.data_card),
        data_sheets=list(tables.data_sheets(run)),
        utility=[
            tables.summary_sheet(run, "Mean over tasks", ("macro ",)),
            tables.task_sheet(run),
            tables.gain_sheet(run),
            tables.published_sheet(run),
        ],
        fairness=[
            tables.summary_sheet(run, "Largest gap of the worst task", tables.GAPS, tables.MARKS),
            *tables.pays_sheets(run),
            competitor_sheet(run),
            tables.group_sheet(run, between=True),
        ],
        audit=[tables.audit_sheet(run), tables.pair_sheet(run)],
        people_sentence=tables.people_sentence(run),
        people=[tables.consistency_sheet(run), tables.consistency_sheet(run, tasks=True), tables.worst_sheet(run)],
        checklist=protocol.checklist(run),
        groups=tables.group_sheet(run),
        trees=tree_texts(run),
        events=[event_sheet(run), grouping_sheet(run)],
        notes=notes.notes(run),
        environment=[(key, protocol.words(value)) for key, value in run.environment.items()],
    )


def comparison_table(found: Comparison) -> Table:
    """Return the console's table: a row per measure and method, with the difference to the reference and its interval."""
    run = found.run
    table = tables.titled(f"{run.name}: {run.split}", run)
    for i, head in enumerate(("measure, method", "mean", f"difference to {run.reference}")):
        table.add_column(Text(head), justify="right" if i else "left", no_wrap=i == 1)
    for column, lines in found.cells.groupby("column", sort=False):
        table.add_section()
        table.add_row(Text(str(column), style="bold"))
        for row in rows(lines):
            table.add_row(Text(f"  {row.method}"), tables.starred(row), Text(tables.show_difference(row)))
    table.caption = Text(f"* best mean; [95 % bootstrap interval over seeds]; {tables.MARKS}", style="dim")
    return table


def write_comparison(found: Comparison, folder: str | Path) -> tuple[Path, Path]:
    """Write ``comparison.html`` and ``comparison.json`` and return their paths; CheckpointError where that cannot be."""
    data = write_json(Path(folder) / "comparison.json", found.to_dict())
    return write_text(Path(folder) / "comparison.html", render_comparison(found)), data


@damage_named
def render_comparison(found: Comparison) -> str:
    """Return the page of a comparison. Every name from the runs is escaped."""
    run = found.run

    def measures(title: str, prefixes: tuple[str, ...]) -> tables.Sheet | None:
        return tables.summary_sheet(run, title, prefixes, cells=found.cells)

    return _page(
        "comparison.html.j2",
        run,
        {"audit": list(_scatter_figures(run))},
        first_plots(run),
        facts=protocol.comparison_facts(run),
        utility=[measures("Utility", ("macro ",)), tables.task_sheet(run)],
        fairness=[
            measures("Largest gap of the worst task", tables.GAPS),
            measures("Means over tasks of the gaps between groups", ("mean EO", "mean EOP", "mean AUC", "mean MAE")),
            *tables.pays_sheets(run),
            competitor_sheet(run),
        ],
        audit=[measures("Bias and violation rate", ("Bias@", "VR@")), tables.audit_sheet(run)],
        people_sentence=tables.people_sentence(run),
        people=[measures("Are like people treated alike?", tuple(PEOPLE)), tables.consistency_sheet(run)],
        standing=[
            tables.standing_sheet(found.overview),
            tables.published_sheet(run, found.published),
            tables.drift_sheet(found.drift),
            tables.gain_sheet(run, found.gains),
        ],
        notes=found.notes,
    )


def _page(
    template: str, run: RunFolder, figures: dict[str, list[Json]], plots: Iterable[Plot], **context: object
) -> str:
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    shown = {section: items for section, items in figures.items() if items}
    pictures: dict[str, list[Json]] = {}
    for plot in plots:
        if plot.section not in shown and (svg := plot.svg()):
            # The picture comes from matplotlib, which escapes text; nothing else is marked as safe.
            pictures.setdefault(plot.section, []).append({"caption": plot.caption, "svg": Markup(svg)})
    text = json.dumps(shown, allow_nan=False)
    for char in "<>&\u2028\u2029":  # no way to close the script element, no line ends that JavaScript dislikes
        text = text.replace(char, f"\\u{ord(char):04x}")
    library = get_plotlyjs().replace("</script", "<\\/script") if shown else ""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("libmtl_fair.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    glance = tables.glance_sheet(run)
    names = [
        text
        for each in context.values()
        if isinstance(each, list)
        for item in each
        for text in getattr(item, "heads", ())
    ]
    seen = glance.heads if glance else ()
    legends = {
        "legend": notes.legend([*seen, "±"]),
        "more_names": notes.legend(name for name in names if name not in seen),
    }
    first = {"headline": headline(run), "findings": findings(run), "glance": glance, **legends, "marks": tables.MARKS}
    drawn = {"figures": shown, "figures_json": Markup(text), "plotly": Markup(library), "plots": pictures}
    return printable(environment.get_template(template).render(run=run, **drawn, **first, **context))


def _safe(text: object) -> str:
    return html.escape(label(text), quote=False)


def _figure(title: str, x: str, y: str, data: list[Json], **layout: str) -> Json:
    """Return a plotly specification; names are escaped for plotly's labels."""
    axes = [{"title": {"text": _safe(name)}, "zeroline": False, "automargin": True} for name in (x, y)]
    return {"title": title, "data": data, "layout": {**layout, "xaxis": axes[0], "yaxis": axes[1]}}


def _scatter_figures(run: RunFolder) -> Iterator[Json]:
    colour = colours(run.methods)
    for found in scatters(run):
        data: list[Json] = []
        if not found.curve.empty:
            line = {"type": "scatter", "mode": "lines+markers", "line": {"color": REFERENCE}, "marker": {"size": 4}}
            values = {"x": _plain(found.curve["brier"]), "y": _plain(found.curve["bias"])}
            hover = {"text": [f"{a:g}" for a in found.curve["a"]], "hovertemplate": "a = %{text}<br>%{x:.4f}, %{y:.4f}"}
            data.append({"name": _safe(f"{run.reference}, shrunk"), **line, **values, **hover})
        for row in rows(found.points):
            spread = {"error_x": row.x_sd, "error_y": row.y_sd}
            error = {axis: {"type": "data", "array": [sd], "thickness": 1.2} for axis, sd in spread.items() if sd > 0}
            symbol = _SYMBOLS[run.methods.index(row.method) % len(_SYMBOLS)]
            marker = {"color": colour[row.method], "size": 12, "symbol": symbol}
            trace = {"type": "scatter", "mode": "markers", "name": _safe(row.method), "x": [row.x], "y": [row.y]}
            data.append({**trace, "marker": marker, "hovertemplate": "%{x:.4f}, %{y:.4f}", **error})
        against = found.x.removeprefix("macro ")
        yield _figure(f"{found.y} against {against}", found.x, found.y, data)


def _bar_figures(run: RunFolder) -> Iterator[Json]:
    for (task, attribute), frames in bars(run).items():
        for metric, frame in frames.items():
            data = [_bar(run.methods, i, frame[frame["method"] == method]) for i, method in enumerate(run.methods)]
            name = metric.replace("_", " ")
            yield _figure(f"{task} by {attribute}: {name}", attribute, name, data, barmode="group")


def _bar(methods: list[str], i: int, frame: pd.DataFrame) -> Json:
    pattern = {"shape": _PATTERNS[i % len(_PATTERNS)], "fillmode": "overlay", "fgcolor": "white", "solidity": 0.15}
    spread = {"array": frame["high"] - frame["value"], "arrayminus": frame["value"] - frame["low"]}
    error = {side: length.clip(lower=0).fillna(0).tolist() for side, length in spread.items()}
    return {
        "type": "bar",
        "name": _safe(methods[i]),
        "x": [_safe(name) for name in frame["group"]],
        "y": _plain(frame["value"]),
        "text": [f"n = {n:.0f}" if n == n else "" for n in frame["n"]],
        "textposition": "none",
        "hovertemplate": "%{x}: %{y:.3f} (%{text})",
        "marker": {"color": colours(methods)[methods[i]], "pattern": {**pattern, "size": 10}},
        "error_y": {"type": "data", "symmetric": False, **error, "thickness": 1.2, "width": 3},
    }


def _plain(values: pd.Series[float]) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]
