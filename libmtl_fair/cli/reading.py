"""Commands that read what was trained: ``report``, ``audit``, ``compare``, ``power``, ``dashboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from libmtl_fair.cli.common import Several, command, findings, out, say, table
from libmtl_fair.errors import RecipeError

RunDirs = Annotated[list[Path], Argument(metavar="RUN_DIR...", help="folders of finished runs")]
_TOLERANCE = "tolerance; may be repeated; default: the first run's"
Deltas = Annotated[Several, Option("--delta", metavar="0.275|p75|conformal:0.1", help=_TOLERANCE)]


@command()
def report(
    folder: Annotated[Path, Argument(metavar="RUN_DIR")],
    card: Annotated[bool, Option("--card", help="write the fairness card (Markdown and JSON) too")] = False,
) -> None:
    """Write the HTML report of a run anew, and its fairness card."""
    from libmtl_fair.report import write_card, write_report

    say(f"report: {write_report(folder)}")
    for path in write_card(folder) if card else ():
        say(f"card: {path}")


@command()
def audit(
    folders: RunDirs,
    delta: Deltas = None,
    split: Annotated[str | None, Option(help="test or val")] = None,
    target: Annotated[Path | None, Option("--out", help="JSON file; default: reaudit.json in the first run")] = None,
) -> None:
    """Audit finished runs again from their saved predictions: tolerances of the first run's reference model; like people."""
    from libmtl_fair.files import write_json
    from libmtl_fair.report.people import people_again, people_table
    from libmtl_fair.report.reaudit import reaudit, reaudit_table
    from libmtl_fair.report.run_folder import read_run

    several = delta or read_run(folders[0]).protocol.get("deltas") != {}
    found = reaudit(folders, delta or (), split=split) if several else None
    people = people_again(folders, split)
    if found is not None:
        out.print(reaudit_table(found))
        for item in found.tolerances:
            say(f"{item.name} = {item.value:.6g}: {escape(item.source)}")
    for name, sentence in people.said.items():
        say(escape(f"{name}: {sentence}" if len(people.said) > 1 else sentence))
    if len(people.frame):
        out.print(people_table(people))
    written = {**(found.to_dict() if found is not None else {}), "people": people.to_dict()}
    say(f"audit: {write_json(target or folders[0] / 'reaudit.json', written)}")


@command()
def compare(
    folders: RunDirs,
    delta: Deltas = None,
    folder: Path | None = Option(
        None, "--out", help="folder of the page; default: the run, or ./comparison for several"
    ),
    choose: Several = Option(
        None,
        metavar="MEASURE",
        help="take in each seed the method with the lowest of this (such as 'EO diff sex'; mean of several) on "
        "validation data, and show it as one method more",
    ),
    within: float = Option(0.5, metavar="POINTS", help="what that choice may lose in each task on validation data"),
    allow: Several = Option(None, metavar="WHAT", help="take these too: degenerate, levelling-down; may be repeated"),
    among: Several = Option(None, metavar="PATTERN", help="methods to choose from, such as 'main_*'"),
    pooled: bool = Option(False, "--pooled", help="one choice for all seeds, by means over their validation data"),
) -> None:
    """Compare methods, runs and seeds: one table and one HTML page."""
    from libmtl_fair.report.choice import Rule
    from libmtl_fair.report.compare import compare as compare_runs
    from libmtl_fair.report.page import comparison_table, write_comparison

    if (among or pooled or allow) and not choose:
        raise RecipeError("--among, --pooled and --allow say how --choose chooses; give --choose too")
    rule = Rule(choose, within, among or ("*",), pooled, allow or ()) if choose else None
    found = compare_runs(folders, delta or (), rule)
    out.print(comparison_table(found))
    findings(found.run)
    if choose:
        out.print(escape(found.notes[0]))
    page, _ = write_comparison(found, folder or (folders[0] if len(folders) == 1 else Path("comparison")))
    say(f"comparison: {page}")


@command()
def power(
    folder: Annotated[Path | None, Argument(metavar="[RUN_DIR]", help="what gap the run's test set can see")] = None,
    gap: Annotated[float | None, Option(help="gap between two groups' rates: how many people does it take?")] = None,
    people: Annotated[list[int] | None, Option(help="people of a group; give it twice: what gap do they show?")] = None,
    rate: Annotated[float, Option(help="about what the rates are, without a run")] = 0.5,
    base_rate: Annotated[float | None, Option(help="share of positives: people are then rows of a table")] = None,
    groups: Annotated[int, Option(help="groups that are compared, without a run")] = 2,
    wanted: Annotated[float, Option("--power", help="probability of seeing the gap")] = 0.8,
    confidence: Annotated[float, Option(help="level of the test")] = 0.95,
) -> None:
    """Show how many people of each group it takes to see a gap in TPR, FPR or selection, or what gap a test set can see."""
    from libmtl_fair.report.power import power_of_numbers, power_of_run
    from libmtl_fair.report.run_folder import read_run

    level = {"wanted": wanted, "confidence": confidence}
    if people and len(people) != 2:
        raise RecipeError(f"--people is given twice, once for each group; found {people}")
    if folder is not None:
        found, title = power_of_run(read_run(folder), gap, **level), f"gaps seen with probability {wanted:g}"
    else:
        two = (people[0], people[1]) if people else None
        found = power_of_numbers(gap, two, rate, base_rate, groups=groups, **level)
        title = f"rates about {rate:g}, seen with probability {wanted:g}"
    heads = {
        "people": "people behind the rate",
        "level": "level",
        "gap": "smallest gap seen",
        "needed": f"people for {gap}",
    }
    shown = [[_cell(value) for value in row] for row in found.itertuples(index=False)]
    table(f"{title} at {confidence:g} confidence", [heads.get(c, c) for c in found.columns], shown)
    say(
        "People behind the rate: positives for TPR, negatives for FPR. Two groups' rates, normal approximation; see METHODS.md, 5."
    )


def _cell(value: object) -> str:
    """A number with three digits, a count without any, – for what is missing."""
    if not isinstance(value, float):
        return str(value)
    return "–" if value != value else f"{value:.0f}" if value > 1 else f"{value:.3f}"


@command()
def dashboard(
    study: Annotated[str, Argument(metavar="STUDY", help="journal file, folder of tune, or storage URL")],
    host: Annotated[str, Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, Option(help="port to listen on; 0 takes a free one")] = 8080,
) -> None:
    """Show a study in optuna-dashboard, in the browser, until Ctrl-C."""
    from libmtl_fair.tune.artifacts import serve

    serve(study, host, port, lambda url: say(f"dashboard: {url} (Ctrl-C ends it)"))
