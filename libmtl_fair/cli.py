"""The command line: ``libmtl-fair run | tune | audit | compare | report | exec | methods | datasets | dashboard``.

Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and resumable.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from libmtl_fair.errors import CheckpointError, DataError, FairMTLError, HostError, RecipeError
from libmtl_fair.tune.cli import StudyName, agreement_table, dashboard, recipe_from_study, tune

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
out = Console()
err = Console(stderr=True)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML recipe")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="change one entry; may be repeated")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")]
Folder = Annotated[Path | None, typer.Option("--out", help="folder of the run")]
RunDirs = Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="folders of finished runs")]
Deltas = Annotated[
    list[str] | None,
    typer.Option(
        "--delta", metavar="0.275|p75|conformal:0.1", help="tolerance; may be repeated; default: the first run's"
    ),
]


class _Stopped(KeyboardInterrupt):
    """SIGTERM came in."""


@contextmanager
def _clean_exit(resume_hint: str = "") -> Iterator[None]:
    """Turn errors of ours into one message and an exit code, and an interruption into a way to go on."""

    def stop(*_: Any) -> None:
        raise _Stopped

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (RecipeError, DataError, HostError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(BAD_INPUT) from error
    except CheckpointError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(FAILED if str(error).startswith("cannot write") else BAD_INPUT) from error
    except FairMTLError as error:
        err.print(f"[bold red]failed:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        err.print(f"interrupted; nothing finished is lost.{resume_hint}", soft_wrap=True, highlight=False)
        raise typer.Exit(INTERRUPTED) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def _one_thread() -> None:
    """Small models on a CPU are fastest with one thread, and do not fight other processes for cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="a YAML recipe")] = None,
    overrides: Overrides = None,
    device: Device = "auto",
    folder: Folder = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the folder")] = False,
    from_study: Annotated[
        str | None, typer.Option("--from-study", metavar="FILE|URL", help="run a trial of a study instead of a recipe")
    ] = None,
    study: StudyName = None,
    trial: Annotated[int | None, typer.Option(metavar="N", help="which trial of the study")] = None,
) -> None:
    """Train, audit, measure and report every method and seed of a recipe."""
    with _clean_exit(" Go on with the same command and --resume."):
        from libmtl_fair.progress import bar
        from libmtl_fair.recipe import load_recipe
        from libmtl_fair.recipe.run import Run
        from libmtl_fair.report import summary_table
        from libmtl_fair.report.run_folder import read_run

        _one_thread()
        if (recipe is None) == (from_study is None) or (from_study is None) != (trial is None):
            raise RecipeError("run expects either a RECIPE, or --from-study STORAGE --trial N")
        if from_study is not None and trial is not None:
            loaded = recipe_from_study(from_study, study, trial, overrides or [])
        else:
            assert recipe is not None
            loaded = load_recipe(recipe, overrides or [])
        planned = Run(loaded, folder, device=device, resume=resume)
        with bar(loaded.name, len(planned.jobs) + 1) as advance:
            planned.note = advance
            made = planned()
        out.print(summary_table(read_run(made), width=out.width))
        if from_study is not None:
            out.print(agreement_table(made))
        out.print(f"report: {made / 'report.html'}", soft_wrap=True, highlight=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    card: Annotated[bool, typer.Option("--card", help="write the fairness card (Markdown and JSON) too")] = False,
) -> None:
    """Write the HTML report of a run anew, and its fairness card."""
    with _clean_exit():
        from libmtl_fair.report import write_card, write_report

        out.print(f"report: {write_report(folder)}", soft_wrap=True, highlight=False)
        if card:
            for path in write_card(folder):
                out.print(f"card: {path}", soft_wrap=True, highlight=False)


@app.command()
def audit(
    folders: RunDirs,
    delta: Deltas = None,
    split: Annotated[str | None, typer.Option(help="test or val")] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="JSON file; default: reaudit.json in the first run")
    ] = None,
) -> None:
    """Audit finished runs again from their saved predictions, under tolerances of the first run's reference model."""
    with _clean_exit():
        from libmtl_fair.report.reaudit import reaudit, reaudit_table, write_reaudit

        found = reaudit(folders, delta or (), split=split)
        out.print(reaudit_table(found))
        for item in found.tolerances:
            out.print(f"{item.name} = {item.value:.6g}: {escape(item.source)}", soft_wrap=True, highlight=False)
        path = write_reaudit(found, target or folders[0] / "reaudit.json")
        out.print(f"audit: {path}", soft_wrap=True, highlight=False)


@app.command()
def compare(
    folders: RunDirs,
    delta: Deltas = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="folder of the page; default: the run, or ./comparison for several")
    ] = None,
    choose: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MEASURE",
            help="take in each seed the method with the lowest of this (such as 'EO diff sex'; mean of several) on "
            "validation data, and show it as one method more",
        ),
    ] = None,
    within: Annotated[
        float, typer.Option(metavar="POINTS", help="what that choice may lose in utility on validation data")
    ] = 0.5,
    among: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="methods to choose from, such as 'main_*'")
    ] = None,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="one choice for all seeds, by means over their validation data")
    ] = False,
) -> None:
    """Compare methods, runs and seeds: one table and one HTML page."""
    with _clean_exit():
        from libmtl_fair.report.choice import Rule
        from libmtl_fair.report.compare import compare as compare_runs
        from libmtl_fair.report.compare_page import comparison_table, write_comparison

        if (among or pooled) and not choose:
            raise RecipeError("--among and --pooled say how --choose chooses; give --choose too")
        rule = Rule(choose, within, among or ("*",), pooled=pooled) if choose else None
        found = compare_runs(folders, delta or (), rule)
        out.print(comparison_table(found))
        if choose:
            out.print(escape(found.notes[0]))
        page, _ = write_comparison(found, folder or (folders[0] if len(folders) == 1 else Path("comparison")))
        out.print(f"comparison: {page}", soft_wrap=True, highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def exec(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(metavar="SCRIPT.py", help="a script that uses LibMTL")],
) -> None:
    """Run a LibMTL script with the plugins registered and LibMTL healed: exec SCRIPT.py -- ARGS."""
    with _clean_exit():
        from libmtl_fair.libmtl.script import run_script

        run_script(script, list(context.args))


@app.command()
def methods() -> None:
    """List the weightings and architectures that recipes and LibMTL can name."""
    with _clean_exit():
        from libmtl_fair.libmtl import architecture_names, weighting_names
        from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, OUR_WEIGHTINGS

        for title, names, ours in (
            ("weightings", weighting_names(), OUR_WEIGHTINGS),
            ("architectures", architecture_names(), OUR_ARCHITECTURES),
        ):
            table = Table("name", "from", "what it does", title=title, title_justify="left")
            for name in sorted(names, key=lambda n: (n not in ours, n)):
                cls = ours.get(name)
                what = (cls.__doc__ or "").strip().splitlines()[0] if cls else ""
                origin = getattr(cls, "source", "") or "libmtl_fair" if cls else "LibMTL"
                table.add_row(name, escape(origin), escape(what))
            out.print(table)


@app.command()
def datasets(name: Annotated[str | None, typer.Argument(help="show one data set in full")] = None) -> None:
    """List the data sets that recipes can name, or describe one."""
    with _clean_exit():
        from libmtl_fair.data import dataset_names, describe_dataset

        table = Table("name", "tasks", "sensitive", "licence", title="data sets", title_justify="left")
        for each in [name] if name else dataset_names():
            about = describe_dataset(each)
            cells = (each, _listed(about.get("tasks")), _listed(about.get("sensitive")), str(about.get("licence", "")))
            table.add_row(*(escape(cell) for cell in cells))
        out.print(table)
        if name:
            for note in describe_dataset(name).get("notes", []):
                out.print(f"- {escape(str(note))}", highlight=False)


def _listed(value: Any) -> str:
    return ", ".join(str(v) for v in (value or ()))


app.command()(tune)
app.command()(dashboard)


def main() -> None:
    """Run the command line; an interruption before a command has begun exits 75 too."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
