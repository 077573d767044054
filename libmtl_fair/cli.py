"""The command line: ``libmtl-fair run | tune | audit | compare | report | power | exec | methods | datasets | dashboard``.

Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and resumable.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Never

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

import libmtl_fair
from libmtl_fair.errors import CheckpointError, DataError, FairMTLError, HostError, RecipeError, unknown

if TYPE_CHECKING:
    from libmtl_fair.report import RunFolder

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
out = Console()
err = Console(stderr=True)

Several = list[str] | None
RecipePath = Argument(metavar="RECIPE", help="a YAML recipe")
Overrides = Annotated[Several, Option("--set", metavar="A.B=VALUE", help="change one entry; may be repeated")]
StudyName = Annotated[str | None, Option("--study", metavar="NAME", help="name of the study (default: the recipe's)")]
RunDirs = Annotated[list[Path], Argument(metavar="RUN_DIR...", help="folders of finished runs")]
_TOLERANCE = "tolerance; may be repeated; default: the first run's"
Deltas = Annotated[Several, Option("--delta", metavar="0.275|p75|conformal:0.1", help=_TOLERANCE)]


@contextmanager
def _clean_exit(resume_hint: str) -> Iterator[None]:
    """Turn errors of ours into one message and an exit code, and an interruption into a way to go on."""

    def stop(*_: object) -> Never:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except FairMTLError as error:
        bad = isinstance(error, RecipeError | DataError | HostError | CheckpointError)
        _say(f"[bold red]{'error' if bad else 'failed'}:[/] {escape(str(error))}", err)
        raise typer.Exit(BAD_INPUT if bad and not str(error).startswith("cannot write") else FAILED) from error
    except KeyboardInterrupt as error:
        _say(f"interrupted; nothing finished is lost.{resume_hint}", err)
        raise typer.Exit(INTERRUPTED) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def _command(resume_hint: str = "", **settings: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that ends cleanly; what needs torch is imported inside it, not for ``--help``.

    What trains uses one thread: fastest for small models on a CPU, and no fight with other processes for cores.
    """

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*args: object, **options: object) -> None:
            with _clean_exit(resume_hint):
                libmtl_fair.register_methods()
                if resume_hint and "OMP_NUM_THREADS" not in os.environ:
                    import torch

                    torch.set_num_threads(1)
                function(*args, **options)

        return app.command(context_settings=settings or None)(command)

    return wrap


def _say(text: str, to: Console = out) -> None:
    to.print(text, soft_wrap=True, highlight=False)


def _findings(run: RunFolder) -> None:
    """Say in plain sentences what a run, or a comparison, found."""
    from libmtl_fair.report.findings import findings

    for about, text in findings(run):
        out.print(f"[bold]{about}.[/] {escape(text)}", highlight=False)


def _version(asked: bool) -> None:
    if asked:
        _say(f"libmtl-fair {libmtl_fair.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="show the version")] = False,
) -> None:
    """Fair multi-task learning for LibMTL."""


@_command(" Go on with the same command and --resume.")
def run(
    recipe: Annotated[Path | None, RecipePath] = None,
    overrides: Overrides = None,
    device: Annotated[str, Option(help="auto, cpu, cuda:0, ...")] = "auto",
    folder: Annotated[Path | None, Option("--out", help="folder of the run")] = None,
    resume: Annotated[bool, Option("--resume", help="go on with the run in the folder")] = False,
    from_study: str | None = Option(None, metavar="FILE|URL", help="run a trial of a study instead of a recipe"),
    study: StudyName = None,
    trial: Annotated[int | None, Option(metavar="N", help="which trial of the study")] = None,
) -> None:
    """Train, audit, measure and report every method and seed of a recipe."""
    from libmtl_fair.progress import bar
    from libmtl_fair.recipe import load_recipe
    from libmtl_fair.recipe.run import Run
    from libmtl_fair.report import summary_table
    from libmtl_fair.report.run_folder import read_run
    from libmtl_fair.tune.results import agreement_table, best_recipe
    from libmtl_fair.tune.selection import trial_by_number
    from libmtl_fair.tune.storage import load_study
    from libmtl_fair.tune.study import quiet

    if recipe is not None and from_study is None and trial is None:
        loaded = load_recipe(recipe, overrides or [])
    elif recipe is None and from_study is not None and trial is not None:
        with quiet():
            opened = load_study(from_study, study)
            loaded = best_recipe(opened, trial_by_number(opened, trial)).changed(overrides or [])
    else:
        raise RecipeError("run expects either a RECIPE, or --from-study STORAGE --trial N")
    planned = Run(loaded, folder, device=device, resume=resume)
    with bar(loaded.name, len(planned.jobs) + 1) as advance:
        planned.note = advance
        made = planned()
    finished = read_run(made)
    out.print(summary_table(finished, width=out.width))
    _findings(finished)
    if from_study is not None:
        out.print(agreement_table(made))
    _say(f"report: {made / 'report.html'}")


@_command(" Go on with the same command.")
def tune(
    recipe: Annotated[Path, RecipePath],
    trials: Annotated[int | None, Option("--trials", metavar="TOTAL", help="trials of the study in all")] = None,
    timeout: Annotated[float | None, Option(metavar="S", help="seconds after which no trial is begun")] = None,
    storage: str | None = Option(None, metavar="FILE|URL", help="journal file, postgresql://..., grpc://host:port"),
    study: StudyName = None,
    workers: Annotated[int, Option(help="processes that share the storage")] = 1,
    stacked: int = Option(0, metavar="M", help="trials trained at once as one model (default: 16 on a GPU, else 1)"),
    overrides: Overrides = None,
    folder: Annotated[Path | None, Option("--out", help="folder of the results (default: runs/<name>-tune)")] = None,
    select: str | None = Option(None, metavar="HOW", help="max_disparity=0.05, knee, best, or the number of a trial"),
    confidence: float | None = Option(
        None, metavar="LEVEL", help="of the interval whose upper end max_disparity bounds (default: metrics.confidence)"
    ),
    within: float | None = Option(
        None, metavar="POINTS", help="what a task's AUC, accuracy or R2 may lose (default: what is within noise)"
    ),
    new_study: bool = Option(False, "--new-study", help="begin another study where this one is about something else"),
    device: Annotated[str, Option(help="auto, cpu, cuda:0, or a list that workers take in turn")] = "auto",
) -> None:
    """Search for the best utility at the least disparity; the same command again goes on to TOTAL."""
    from libmtl_fair.files import need_writable
    from libmtl_fair.progress import bar
    from libmtl_fair.recipe import load_recipe
    from libmtl_fair.tune.results import hand_back
    from libmtl_fair.tune.selection import Rules, chosen, selection
    from libmtl_fair.tune.stacking import aloud
    from libmtl_fair.tune.study import tune as run_study

    loaded = load_recipe(recipe, overrides or [])
    target = folder or Path("runs") / f"{loaded.name}-tune"
    how = select or (loaded.tune.select if loaded.tune else None) or "best"
    selection(how)  # refuses before a study is run for it
    rules = Rules(confidence, within)
    need_writable(target)
    with bar(loaded.name, trials or (loaded.tune.trials if loaded.tune else None) or 60) as advance:
        note = aloud(lambda text: _say(escape(text), err), advance)
        found = run_study(
            loaded, trials, None, storage or str(target / "study.journal"), workers, stacked, True,
            study_name=study, timeout=timeout, device=device, new_study=new_study, note=note,
        )  # fmt: skip
    try:
        trial = chosen(found, how, confidence=confidence, within=within)
    except RecipeError as error:
        raise RecipeError(f"--select {how}: {error}") from error
    for shown in hand_back(found, trial, loaded, target, device, how, rules):
        out.print(shown, soft_wrap=isinstance(shown, str), highlight=False)
    for each in found.get_trials(deepcopy=False):
        if each.user_attrs.get("error"):
            _say(escape(f"trial {each.number} failed: {each.user_attrs['error']}"), err)


@_command()
def report(
    folder: Annotated[Path, Argument(metavar="RUN_DIR")],
    card: Annotated[bool, Option("--card", help="write the fairness card (Markdown and JSON) too")] = False,
) -> None:
    """Write the HTML report of a run anew, and its fairness card."""
    from libmtl_fair.report import write_card, write_report

    _say(f"report: {write_report(folder)}")
    for path in write_card(folder) if card else ():
        _say(f"card: {path}")


@_command()
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
            _say(f"{item.name} = {item.value:.6g}: {escape(item.source)}")
    for name, sentence in people.said.items():
        _say(escape(f"{name}: {sentence}" if len(people.said) > 1 else sentence))
    if len(people.frame):
        out.print(people_table(people))
    written = {**(found.to_dict() if found is not None else {}), "people": people.to_dict()}
    _say(f"audit: {write_json(target or folders[0] / 'reaudit.json', written)}")


@_command()
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
    _findings(found.run)
    if choose:
        out.print(escape(found.notes[0]))
    page, _ = write_comparison(found, folder or (folders[0] if len(folders) == 1 else Path("comparison")))
    _say(f"comparison: {page}")


@_command(allow_extra_args=True, ignore_unknown_options=True)
def exec(
    context: typer.Context, script: Annotated[Path, Argument(metavar="SCRIPT.py", help="a script that uses LibMTL")]
) -> None:
    """Run a LibMTL script with the plugins registered and LibMTL healed: exec SCRIPT.py -- ARGS."""
    from libmtl_fair.libmtl.script import run_script

    run_script(script, list(context.args))


@_command()
def methods(name: Annotated[str | None, Argument(help="show one with its settings")] = None) -> None:
    """List the weightings and architectures that recipes and LibMTL can name, or describe one."""
    from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, OUR_WEIGHTINGS, architecture_names, weighting_names
    from libmtl_fair.methods.base import Declared
    from libmtl_fair.recipe.post import POST_SETTINGS
    from libmtl_fair.recipe.sections import POST

    posts = {each.removeprefix(POST): cls for each, cls in POST_SETTINGS.items()}
    ours: dict[str, type] = {**OUR_WEIGHTINGS, **OUR_ARCHITECTURES, **posts}
    known = {"weightings": weighting_names(), "architectures": architecture_names(), "post (after training)": [*posts]}
    every = [each for names in known.values() for each in names]
    if name is not None and name not in every:
        raise RecipeError(unknown("method", name, every))
    for title, names in known.items():
        rows = []
        for each in sorted(set(names) & {name or each for each in names}, key=lambda n: (n not in ours, n)):
            cls = ours.get(each)
            what = (cls.__doc__ or "").strip().splitlines()[0] if cls else ""
            rows.append((each, getattr(cls, "source", "") or "libmtl_fair" if cls else "LibMTL", what))
        if rows:
            _table(title, ("name", "from", "what it does"), rows)
    shown = ours.get(name or "")
    if shown is not None:
        paper = getattr(shown, "source", "") or "the source"
        settings: type[Declared] = getattr(shown, "settings_class", shown)
        for row in settings.described():
            search = f"; searched: {row['search']}" if row["search"] else ""
            facts = f"{row['type']}, {row['range']}; default: {row['default']}{search}"
            out.print(
                f"[bold]{row['name']}[/] ({escape(facts)}; {'ours' if row['source'] == 'ours' else escape(paper)})"
            )
            out.print(f"    {escape(row['help'].replace('``', ''))}", highlight=False)
        _say(f"cost: {escape(getattr(shown, 'cost', '') or 'not stated')}")


@_command()
def datasets(name: Annotated[str | None, Argument(help="show one data set in full")] = None) -> None:
    """List the data sets that recipes can name, or describe one."""
    from libmtl_fair.data import dataset_names, describe_dataset

    found = {each: describe_dataset(each) for each in ([name] if name else dataset_names())}
    rows = [(each, ", ".join(it["tasks"]), ", ".join(it["sensitive"]), it["licence"]) for each, it in found.items()]
    _table("data sets", ("name", "tasks", "sensitive", "licence"), rows)
    for note in found[name]["notes"] if name else ():
        out.print(f"- {escape(str(note))}", highlight=False)


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    out.print(table)


@_command()
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
    _table(f"{title} at {confidence:g} confidence", [heads.get(c, c) for c in found.columns], shown)
    _say(
        "People behind the rate: positives for TPR, negatives for FPR. Two groups' rates, normal approximation; see METHODS.md, 5."
    )


def _cell(value: object) -> str:
    """A number with three digits, a count without any, – for what is missing."""
    if not isinstance(value, float):
        return str(value)
    return "–" if value != value else f"{value:.0f}" if value > 1 else f"{value:.3f}"


@_command()
def dashboard(
    study: Annotated[str, Argument(metavar="STUDY", help="journal file, folder of tune, or storage URL")],
    host: Annotated[str, Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, Option(help="port to listen on; 0 takes a free one")] = 8080,
) -> None:
    """Show a study in optuna-dashboard, in the browser, until Ctrl-C."""
    from libmtl_fair.tune.artifacts import serve

    serve(study, host, port, lambda url: _say(f"dashboard: {url} (Ctrl-C ends it)"))


def main() -> None:
    """Run the command line; an interruption before a command has begun exits 75 too."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
